"""The same product in plain Pallas: no inline Mosaic GPU code, so it also runs on a CPU in GPU interpret mode.

Two consumer warpgroups of 64 x 128, a producer, Pallas barriers, `plgpu.wgmma` into a fresh zeroed accumulator per K
block, promotion in jnp: the readable version, and the oracle of the fast kernel's pipeline. It reaches 0.8 of the fast
one's speed on an H100.
"""
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

BLOCK_K = 128
ROW, COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


def gemm(
    a: jax.Array, a_scale: jax.Array, b: jax.Array, b_scale: jax.Array, groups: jax.Array, *, n: int,
    out_dtype: jnp.dtype, row_scales: bool = False, stages: int = 4, sms: int = 132, interpret: bool = False,
) -> jax.Array:
    """a [M, K], a_scale [K/128, M]; b [G * n, K], b_scale [G * n/128, K/128] or (`row_scales`) [K/128, G * n];
    groups i32 [M/128]: the group of each 128 rows -> [M, n]. M, n, K multiples of 128."""
    M, K = a.shape
    k_blocks, m_tiles, n_tiles = K // BLOCK_K, M // 128, n // 128
    blocks = min(sms, m_tiles * n_tiles)

    def body(a_gmem, sa_gmem, b_gmem, sb_gmem, groups_gmem, d_gmem,
             a_smem, b_smem, sa_smem, sb_smem, d_smem, full, empty):
        wg, block = lax.axis_index("wg"), lax.axis_index("grid")
        mine = lax.div(m_tiles * n_tiles - block + blocks - 1, jnp.int32(blocks))

        def tile(i):
            t = block + i * blocks
            m = lax.rem(t, m_tiles)
            return m, lax.div(t, m_tiles), groups_gmem[m] * n_tiles

        def producer():
            plgpu.set_max_registers(40, action="decrease")

            def per_tile(i, step):
                m, col, first = tile(i)

                def per_block(k, step):
                    slot = lax.rem(step, stages)
                    pl.when(step >= stages)(lambda: plgpu.barrier_wait(empty.at[slot]))
                    cols, rows = pl.ds(k * BLOCK_K, BLOCK_K), pl.ds((first + col) * 128, 128)
                    plgpu.copy_gmem_to_smem(a_gmem.at[pl.ds(m * 128, 128), cols], a_smem.at[slot], full.at[slot])
                    plgpu.copy_gmem_to_smem(b_gmem.at[rows, cols], b_smem.at[slot], full.at[slot])
                    plgpu.copy_gmem_to_smem(sa_gmem.at[k, pl.ds(m * 128, 128)], sa_smem.at[slot], full.at[slot])
                    if row_scales:
                        plgpu.copy_gmem_to_smem(sb_gmem.at[k, rows], sb_smem.at[slot], full.at[slot])
                    return step + 1

                return lax.fori_loop(0, k_blocks, per_block, step)

            steps = lax.fori_loop(0, mine, per_tile, jnp.int32(0))

            def drain(step, _):  # leave no arrival unread
                plgpu.barrier_wait(empty.at[lax.rem(step, stages)])

            lax.fori_loop(jnp.maximum(steps - stages, 0), steps, drain, None)

        def consumer():
            plgpu.set_max_registers(232, action="increase")

            def per_tile(i, step):
                m, col, first = tile(i)

                def per_block(k, carry):
                    total, step = carry
                    slot = lax.rem(step, stages)
                    sb = None if row_scales else sb_gmem[first + col, k]
                    plgpu.barrier_wait(full.at[slot])
                    sa = plgpu.load(sa_smem.at[slot, pl.ds(wg * 64, 64)], layout=ROW)
                    if row_scales:
                        sb = plgpu.load(sb_smem.at[slot], layout=COLUMN)

                    def product(acc):
                        plgpu.wgmma(acc, a_smem.at[slot, pl.ds(wg * 64, 64)], b_smem.at[slot].transpose((1, 0)))
                        return acc[...]

                    part = pl.run_scoped(product, plgpu.ACC((64, 128), jnp.float32))
                    plgpu.barrier_arrive(empty.at[slot])
                    if row_scales:
                        part = part * lax.broadcast_in_dim(sb, (64, 128), (1,))
                    else:
                        sa = sa * sb
                    return total + part * lax.broadcast_in_dim(sa, (64, 128), (0,)), step + 1

                zero = plgpu.layout_cast(jnp.zeros((64, 128), jnp.float32), plgpu.Layout.WGMMA)
                total, step = lax.fori_loop(0, k_blocks, per_block, (zero, step))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                d_smem[wg] = total.astype(out_dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(d_smem.at[wg], d_gmem.at[pl.ds(m * 128 + wg * 64, 64), pl.ds(col * 128, 128)])
                return step

            lax.fori_loop(0, mine, per_tile, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

        lax.cond(wg < 2, consumer, producer)

    def tiled(columns):
        return plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(128)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((M, n), out_dtype),
        scratch_types=(
            plgpu.SMEM((stages, 128, BLOCK_K), jnp.float8_e4m3fn, transforms=tiled(128)),
            plgpu.SMEM((stages, 128, BLOCK_K), jnp.float8_e4m3fn, transforms=tiled(128)),
            plgpu.SMEM((stages, 128), jnp.float32),
            plgpu.SMEM((stages, 128), jnp.float32),
            plgpu.SMEM((2, 64, 128), out_dtype, transforms=tiled(128 // jnp.dtype(out_dtype).itemsize)),
            plgpu.Barrier(num_arrivals=4 if row_scales else 3, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        ),
        grid=(blocks,), grid_names=("grid",), num_threads=3, thread_name="wg",
        interpret=plgpu.InterpretGPUParams() if interpret else None,
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )(a, a_scale, b, b_scale, groups)
