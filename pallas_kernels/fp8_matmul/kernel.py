"""D[M, N] = A[M, K] B[N, K]^T in block-scaled FP8 (E4M3) for Hopper, in Pallas Mosaic GPU: dense and grouped.

A has one float32 scale per 1 x 128 tile, given as a_scale[K/128, M], so that one stage's scales are one contiguous TMA
copy; B has one per 128 x 128 block, b_scale[N/128, K/128], or one per 1 x 128 tile, b_scale[K/128, N]. The tensor
cores sum 128 of K; that partial product is then scaled and added in float32 registers (promotion).

One block has `wgs` consumer warpgroups and a producer. A consumer owns `tile_m / wgs` rows of the tile as waves of 64.
The grid is persistent. Letters: S stages, m/n/k tile indices. Building blocks in `pallas_kernels.hopper`.
"""
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.fp8_matmul.tuned import Tuning
from pallas_kernels.grouped_matmul.tiles import FIELDS
from pallas_kernels.quantize.reference import ceil_div

BLOCK_K = hopper.BLOCK_K
SCALAR = plgpu.Layout.WG_SPLAT(())
ACC = plgpu.Layout._WGMMA_ACC_32BIT
ROW, COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
REF = plgpu.RefType()
TILED = plgpu.RefType((plgpu.TilingTransform((8, BLOCK_K)), plgpu.SwizzleTransform(128)))


@functools.partial(jax.jit, static_argnames=("n", "tuning", "out_shape", "row_scales", "promotion"))  # one compile a shape
def gemm(
    a: jax.Array, a_scale: jax.Array, b: jax.Array, b_scale: jax.Array, *, n: int, tuning: Tuning,
    out_shape: jax.ShapeDtypeStruct, row_scales: bool = False, tiles: tuple[jax.Array, jax.Array] | None = None,
    accumulate: jax.Array | None = None, promotion: int = BLOCK_K,
) -> jax.Array:
    """a [M, K], b [groups * n, K] -> out_shape [rows, n], bfloat16 or float32; `accumulate` float32 is added in place.

    `row_scales`: b_scale is [K/128, groups * n]. `tiles`: a table of `grouped_matmul.tiles`. With `tuning.splits` the
    rows of out_shape are, for each part of K, those of whole tiles: parts of the sum, to be added up.
    """
    (M, K), c, (_, N) = a.shape, tuning, out_shape.shape
    waves, cluster, S = c.tile_m // (64 * c.wgs), c.cluster, c.stages
    all_k, n_blocks = ceil_div(K, BLOCK_K), ceil_div(n, BLOCK_K)
    n_groups = ceil_div(ceil_div(n, c.tile_n), cluster)
    dense, add = tiles is None, accumulate is not None
    itemsize = out_shape.dtype.itemsize
    chunk = min(c.tile_n, 128 // itemsize)  # columns of a TMA store
    buffers = min(c.buffers, c.tile_n // chunk)
    out_tile = (plgpu.TilingTransform((8, chunk)), plgpu.SwizzleTransform(chunk * itemsize))
    two_scales = BLOCK_K % c.tile_n != 0
    kept = promotion // BLOCK_K  # K blocks that stay in the tensor core's accumulator
    tile_k = all_k // c.splits  # K blocks of a tile of a dense product
    constant_slots = c.unroll == S and tile_k % S == 0 and (dense or not row_scales)  # every tile starts at stage 0
    idle_tiles = not dense and not row_scales  # tiles of no product are the producer's: it has time, and no other's zeros wait for them
    grid = c.sms // cluster
    if dense:
        total = ceil_div(M, c.tile_m) * c.splits * n_groups
        grid = ceil_div(total, ceil_div(total, grid)) if c.fewest_sms else min(grid, total)

    def body(a_gmem, sa_gmem, b_gmem, sb_gmem, *refs):
        (count_gmem, tiles_gmem), refs = ((None, None), refs) if dense else (refs[:2], refs[2:])
        d_gmem, a_smem, b_smem, sa_smem, sb_smem, d_smem, bars = refs
        wg, block = lax.axis_index("wg"), lax.axis_index("grid")
        rank = lax.axis_index("cluster") if cluster > 1 else 0

        def inline(f, arguments, out=None):
            return plgpu.inline_mgpu(arg_types=arguments, return_type=out)(f)

        inline(hopper.init_barriers(S, c.wgs, cluster), (REF,))(bars)
        load = inline(hopper.produce(S, c.tile_m, c.tile_n, cluster, row_scales),
                      (REF,) * 4 + (TILED, TILED, REF, REF, REF) + (SCALAR,) * 5)
        wait_full = inline(hopper.wait_full, (REF, SCALAR, SCALAR))
        release_slot = inline(hopper.release(S, cluster), (REF, SCALAR))
        release_if = inline(hopper.release(S, cluster), (REF, SCALAR, SCALAR))
        acc_type = plgpu.ShapeDtypeStruct((64, c.tile_n), jnp.float32, layout=ACC)
        row_type = plgpu.ShapeDtypeStruct((64,), jnp.float32, layout=ROW)
        reuse = () if c.overlap else (ACC,) if kept == 1 else (ACC, SCALAR)
        issue = [inline(hopper.issue(c.tile_m, c.tile_n, waves, w), (TILED, TILED, REF, SCALAR, SCALAR, *reuse),
                        (acc_type, row_type)) for w in range(waves)]
        if row_scales:
            add_part = inline(hopper.promote_rows(c.tile_n), (ACC, ACC, ROW, COLUMN), acc_type)
            column_scales = inline(hopper.column_scales(c.tile_n), (REF, SCALAR), plgpu.ShapeDtypeStruct(
                (c.tile_n,), jnp.float32, layout=COLUMN))
        else:
            add_part = inline(hopper.promote(c.tile_n, two_scales), (ACC, ACC, ROW) + (SCALAR,) * 3, acc_type)
        uniform = inline(hopper.uniform, (SCALAR,), plgpu.ShapeDtypeStruct((), jnp.int32, layout=SCALAR))
        zeros = inline(hopper.zeros(c.tile_n), (), acc_type)
        to_output = inline(hopper.to_output(out_shape.dtype.name), (ACC,), plgpu.ShapeDtypeStruct(
            (64, c.tile_n), out_shape.dtype, layout=plgpu.Layout.WGMMA))
        store_tile = [inline(hopper.store_tile(chunk, itemsize, buffer, add),
                             (plgpu.RefType(out_tile), REF) + (SCALAR,) * 3) for buffer in range(buffers)]
        store_rows = inline(hopper.store_rows(N, itemsize, add),
                            (plgpu.Layout.WGMMA, REF) + (SCALAR,) * 4)
        zero_rows = inline(hopper.zero_rows(c.tile_n, N, itemsize), (REF,) + (SCALAR,) * 3)

        m_tiles = ceil_div(M, c.tile_m) * c.splits if dense else uniform(count_gmem[0])
        total = m_tiles * n_groups
        rounds = lax.div(total + (grid - 1), jnp.int32(grid))
        # The last round is dealt backwards: with tiles of uneven height, blocks that got a tall one late get no more.
        last = rounds - 1
        mine = rounds - (grid - 1 - block >= total - last * grid).astype(jnp.int32)

        def tile(i):
            """Column tile and FIELDS of this block's i-th tile."""
            t = i * grid + jnp.where(i == last, grid - 1 - block, block)
            col, m = hopper.walk(t, n_groups, m_tiles, c.group)
            col = col * cluster + rank
            if dense and c.splits > 1:
                row_tiles = m_tiles // c.splits
                return col, lax.rem(m, row_tiles) * c.tile_m, m * c.tile_m, c.tile_m, 0, 0, lax.div(m, row_tiles) * tile_k, tile_k
            if dense:
                return col, m * c.tile_m, m * c.tile_m, c.tile_m, 0, 0, 0, all_k
            return col, *(uniform(tiles_gmem[j, m]) for j in range(len(FIELDS)))

        def advance(slot, parity):
            wrap = slot == S - 1
            return jnp.where(wrap, 0, slot + 1), jnp.where(wrap, parity ^ 1, parity)

        def next_slot(u, slot, parity):
            """`advance` inside an unrolled trip."""
            if not constant_slots:
                return advance(slot, parity)
            return jnp.int32((u + 1) % S), (parity ^ 1 if u == S - 1 else parity)

        def before(slot):
            return jnp.where(slot == 0, S - 1, slot - 1)

        start = (jnp.int32(0), jnp.int32(0))

        def producer():
            if c.registers:
                plgpu.set_max_registers(c.producer_registers, action="decrease")

            def per_tile(i, carry):
                col, row, d_row, rows, skip, group, first_k, k_blocks = tile(i)
                if idle_tiles:
                    pl.when(k_blocks == 0)(lambda: zero_rows(d_gmem, d_row + skip, d_row + rows, col * c.tile_n))

                def per_block(k, carry):
                    load(a_gmem, b_gmem, sa_gmem, sb_gmem, a_smem, b_smem, sa_smem, sb_smem, bars, *carry,
                         row, col * c.tile_n + group * n, first_k + k)
                    return advance(*carry)

                return lax.fori_loop(0, k_blocks, per_block, carry)

            lax.fori_loop(0, mine, per_tile, start)

        def consumer():
            if c.registers:
                plgpu.set_max_registers(c.registers, action="increase")

            def per_tile(i, carry):
                col, _, row, rows, skip, group, first_k, k_blocks = tile(i)
                first = lax.div(col * c.tile_n, BLOCK_K)
                sb_row, sb_next = (jnp.minimum(first + j, n_blocks - 1) + group * n_blocks for j in (0, 1))
                cut = lax.div((first + 1) * BLOCK_K - col * c.tile_n, 8)

                def b_scales(k):  # read one block ahead of its use
                    if row_scales:
                        return ()
                    k = jnp.minimum(k + first_k if c.splits > 1 else k, all_k - 1)
                    return (sb_gmem[sb_row, k], sb_gmem[sb_next, k]) if two_scales else (sb_gmem[sb_row, k],) * 2

                def promote(total, acc, sa, sb, k):
                    if row_scales:
                        return add_part(total, acc, sa, sb)
                    if kept > 1:
                        done = (lax.rem(k, kept) == kept - 1) | (k == k_blocks - 1)
                        sb = tuple(jnp.where(done, s, 0.0) for s in sb)
                    return add_part(total, acc, sa, *sb, cut)

                def in_turn(first_k, unroll, state):
                    totals, acc, ahead, slot, parity = state
                    slot = jnp.int32(0) if constant_slots else slot
                    for u in range(unroll):
                        k = first_k + u
                        sb, ahead = ahead, b_scales(k + 1)
                        wait_full(bars, slot, parity)
                        new = []
                        for w in range(waves):
                            keep = () if kept == 1 else ((lax.rem(k, kept) != 0).astype(jnp.int32),)
                            acc, sa = issue[w](a_smem, b_smem, sa_smem, slot, wg, acc, *keep)
                            if row_scales and w == 0:  # the stage before: its scales were used, or `acc` would still be needed
                                release_if(bars, (u - 1) % S if constant_slots else before(slot), (k > 0).astype(jnp.int32))
                            plgpu.wgmma_wait(0)
                            if row_scales:
                                sb = column_scales(sb_smem, slot)
                            elif w == waves - 1:
                                release_slot(bars, slot)
                            new.append(promote(totals[w], acc, sa, sb, k))
                        totals = tuple(new)
                        slot, parity = next_slot(u, slot, parity)
                    return totals, acc, ahead, slot, parity

                # Within a trip block k is promoted while the wgmma of block k + 1 runs. Each trip ends with nothing in
                # flight: ptxas serialises every wgmma when a running accumulator crosses a loop edge.
                def overlapped(first_k, unroll, state):
                    (total,), acc, sb, slot, parity = state
                    running = held = None
                    slot = jnp.int32(0) if constant_slots else slot
                    for u in range(unroll):
                        ahead, sb = sb, b_scales(first_k + u + 1)
                        wait_full(bars, slot, parity)
                        fresh = (*issue[0](a_smem, b_smem, sa_smem, slot, wg), ahead, first_k + u)
                        if running is not None:
                            plgpu.wgmma_wait(1)
                            release_slot(bars, held)
                            total = promote(total, *running)
                        running, held = fresh, slot
                        slot, parity = next_slot(u, slot, parity)
                    plgpu.wgmma_wait(0)
                    release_slot(bars, held)
                    return (promote(total, *running),), acc, sb, slot, parity

                def compute():
                    step = overlapped if c.overlap else in_turn
                    acc = jnp.int32(0) if c.overlap else zeros()
                    state = (tuple(zeros() for _ in range(waves)), acc, b_scales(0), *carry)
                    trips = k_blocks // c.unroll if dense else lax.div(k_blocks, c.unroll)
                    state = lax.fori_loop(0, trips, lambda t, s: step(t * c.unroll, c.unroll, s), state)
                    if not constant_slots and (not dense or k_blocks % c.unroll):
                        state = lax.fori_loop(trips * c.unroll, k_blocks, lambda k, s: step(k, 1, s), state)
                    totals, _, _, slot, parity = state
                    for w in range(waves):
                        below = (wg * waves + w) * 64
                        store(to_output(totals[w]), row + below, skip - below, rows - below)
                    if row_scales:
                        release_if(bars, before(slot), (jnp.int32(k_blocks) > 0).astype(jnp.int32))
                    return slot, parity

                def store(out, at, skip, valid):
                    def whole():
                        for first in range(0, c.tile_n, buffers * chunk):
                            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                            for e in range(buffers):
                                at_col = first + e * chunk
                                d_smem[wg, e] = out[:, at_col:at_col + chunk] if chunk < c.tile_n else out
                            plgpu.commit_smem()
                            for e in range(buffers):
                                store_tile[e](d_smem, d_gmem, wg, at, col * c.tile_n + first + e * chunk)

                    if dense:
                        whole()
                    else:
                        lax.cond((valid >= 64) & (skip <= 0), whole,
                                 lambda: store_rows(out, d_gmem, at, col * c.tile_n, skip, valid))

                def idle():
                    def per_block(k, carry):
                        wait_full(bars, *carry)
                        release_slot(bars, carry[0])
                        return advance(*carry)
                    return lax.fori_loop(0, k_blocks, per_block, carry)

                rows = jnp.where(k_blocks > 0, rows, 0) if idle_tiles else rows
                return compute() if dense else lax.cond(wg * waves * 64 < rows, compute, idle)

            lax.fori_loop(0, mine, per_tile, start)
            plgpu.wait_smem_to_gmem(0)

        lax.cond(wg < c.wgs, consumer, producer)
        if cluster > 1:
            inline(lambda ctx: hopper.cluster_sync(cluster), ())()

    scratch = (
        plgpu.SMEM((S, c.tile_m, BLOCK_K), jnp.float8_e4m3fn, transforms=TILED.transforms),
        plgpu.SMEM((S, c.tile_n, BLOCK_K), jnp.float8_e4m3fn, transforms=TILED.transforms),
        plgpu.SMEM((S, c.tile_m), jnp.float32),
        plgpu.SMEM((S, c.tile_n if row_scales else 8), jnp.float32),
        plgpu.SMEM((c.wgs, buffers, 64, chunk), out_shape.dtype, transforms=out_tile),
        plgpu.SMEM((4 * S,), jnp.int32),
    )
    return hopper.launch(body, (a, a_scale, b, b_scale, *(tiles or ())), out_shape, scratch, name="fp8_matmul", grid=grid,
                         cluster=cluster, warpgroups=c.wgs + 1, accumulate=accumulate)
