"""Grouped products in bf16 for Hopper, in Pallas Mosaic GPU: rows w^T, rows w, dy^T x, one frame.

A block has two consumer warpgroups of 128 x 128 and a producer; a stage is 64 of the reduction (128 bytes). The consumers share a
tile of 256 rows, or have tiles of 128 in turn: the ring of stages is one all the same, and each knows where the other's tile ends.
An operand lies 'k' (its rows hold the reduction) or 'mn' (its columns do); wgmma in bf16 reads either, so dgrad and weight
gradient need no transposed copies. The persistent grid walks the row tiles of a table made on the device
(`grouped_matmul.table`). With `interpret` Pallas barriers and copies stand in for those of `pallas_kernels.hopper`.

SwiGLU in the epilogue: a tile's 128 columns are then 64 of gate and the same 64 of up, so a thread holds both of a pair.
"""
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.grouped_matmul import epilogue, table, tiles, tuned
from pallas_kernels.grouped_matmul.tuned import INTERPRET, Tuning
from pallas_kernels.quantize.reference import ceil_div, pad

STEP = 64  # of the reduction a stage
K_BLOCKS = tiles.FIELDS.index("k_blocks")
SCALAR = plgpu.Layout.WG_SPLAT(())
REF = plgpu.RefType()


def tiled(columns: int) -> tuple:
    return plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(128)


# one compile a shape
@functools.partial(jax.jit, static_argnames=("major", "n", "b_stride", "out_shape", "tuning", "swiglu", "interpret"))
def gemm(
    a: jax.Array, b: jax.Array, row_tiles: tuple[jax.Array, jax.Array], *, major: tuple[str, str], n: int,
    b_stride: int, out_shape: jax.ShapeDtypeStruct, tuning: Tuning, accumulate: jax.Array | None = None,
    offset: jax.Array | None = None, swiglu: bool = False, interpret: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """a [rows, K] or ('mn') [K, rows]; b [groups * b_stride, K] or [groups * b_stride, n] -> out_shape [rows, n].

    Group g of B starts at row g * b_stride; `accumulate` float32 is added in place, `offset` f32 [1] to every element. With
    `swiglu` the n rows of a group of B are gate and up, n / 2 each (a multiple of 64), and silu(gate) * up [rows, n / 2] comes too.
    """
    c, (n_rows, columns), itemsize = tuning, out_shape.shape, out_shape.dtype.itemsize
    S, cluster, chunk, add = c.stages, c.cluster, 128 // out_shape.dtype.itemsize, accumulate is not None
    n_groups = ceil_div(ceil_div(n, c.tile_n), cluster)
    grid = c.sms // cluster
    a_block = (c.parts, 128, STEP) if major[0] == "k" else (c.parts, STEP, 128)
    b_block = (c.tile_n, STEP) if major[1] == "k" else (STEP, c.tile_n)
    half_n, width = n // 2, c.tile_n // 2 if swiglu else c.tile_n  # width: columns of D from a tile to the next

    def body(a_gmem, b_gmem, count_gmem, tiles_gmem, *refs):
        offset_gmem, *refs = refs if offset is not None else (None, *refs)
        d_gmem, *hidden_gmem, a_smem, b_smem, d_smem, full, empty = refs
        wg, block = lax.axis_index("wg"), lax.axis_index("grid")
        rank = lax.axis_index("cluster") if cluster > 1 else 0

        def inline(f, arguments, out=None):
            return plgpu.inline_mgpu(arg_types=arguments, return_type=out)(f)

        if interpret:
            def wait_full(slot, parity):
                plgpu.barrier_wait(full.at[slot])

            def release(slot):
                plgpu.barrier_arrive(empty.at[slot])

            def uniform(x):
                return x

            def silu_times(gate, up):
                gate, up = gate.astype(jnp.float32), up.astype(jnp.float32)
                return (jax.nn.silu(gate) * up).astype(out_shape.dtype)

            def store_tile(d_gmem, wg, buffer, at, col, valid):  # any number of rows, by powers of two
                done = jnp.int32(0)
                for rows in (64, 32, 16, 8, 4, 2, 1):
                    now = jnp.minimum(valid, 64) & rows

                    @pl.when(now != 0)
                    def _(done=done, rows=rows):
                        plgpu.copy_smem_to_gmem(d_smem.at[wg, buffer, pl.ds(done, rows)],
                                                d_gmem.at[pl.ds(at + done, rows), pl.ds(col, chunk)])

                    done = done + now
        else:
            inline(hopper.init_barriers(S, c.parts, cluster), (REF,))(full)
            staged = plgpu.RefType(tiled(STEP))
            raw_load = inline(hopper.produce_bf16(S, c.parts, c.tile_n, cluster, major, half_n if swiglu else None),
                              (REF, REF, staged, staged, REF) + (SCALAR,) * 6)
            raw_wait = inline(hopper.wait_full, (REF, SCALAR, SCALAR))
            raw_release = inline(hopper.release(S, cluster), (REF, SCALAR))
            uniform = inline(hopper.uniform, (SCALAR,), plgpu.ShapeDtypeStruct((), jnp.int32, layout=SCALAR))
            raw_store = [inline(hopper.store_tile(chunk, itemsize, buffer, add),
                                (plgpu.RefType(tiled(chunk)), REF) + (SCALAR,) * 3) for buffer in range(c.buffers)]
            raw_rows = {n_cols: inline(hopper.store_rows(n_cols, itemsize, add), (plgpu.Layout.WGMMA, REF) + (SCALAR,) * 4)
                        for n_cols in (columns, half_n)}

            silu_times = inline(epilogue.swiglu, (plgpu.Layout.WGMMA,) * 2,
                                plgpu.ShapeDtypeStruct((64, chunk), out_shape.dtype, layout=plgpu.Layout.WGMMA))
            take_turn, give_turn = (inline(f, (SCALAR,)) for f in (hopper.take_turn, hopper.give_turn))

            def wait_full(slot, parity):
                raw_wait(full, slot, parity)

            def release(slot):
                raw_release(full, slot)

            def store_tile(d_gmem, wg, buffer, at, col, valid):
                raw_store[buffer](d_smem, d_gmem, wg, at, col)

        m_tiles = uniform(count_gmem[0])
        total = m_tiles * n_groups
        mine = lax.div(total - block + (grid - 1), jnp.int32(grid))

        def tile(i):
            """Column of this block's i-th tile, and its FIELDS under way from memory."""
            col, m = hopper.walk(block + i * grid, n_groups, m_tiles, c.group)
            m = jnp.clip(m, 0, tiles_gmem.shape[1] - 1)  # of tiles past the last, too, where the walk may lead anywhere
            col = (col * cluster + rank) * width
            if swiglu and half_n % (width * cluster):  # the second block of the last cluster does the last columns once more
                col = jnp.minimum(col, half_n - width)
            return col, tuple(tiles_gmem[j, m] for j in range(len(tiles.FIELDS)))

        def each_tile(work, first, step, carry):
            """carry = work(i, carry, column, *FIELDS) for tiles first, first + step, ... of this block; the next FIELDS come meanwhile."""
            def turn(j, state):
                carry, (col, fields) = state
                i = first + j * step
                ahead = tile(i + step)
                return work(i, carry, col, *map(uniform, fields)), ahead

            return lax.fori_loop(0, lax.div(mine - first + (step - 1), step), turn, (carry, tile(first)))[0]

        def advance(slot, parity):
            wrap = slot == S - 1
            return jnp.where(wrap, 0, slot + 1), jnp.where(wrap, parity ^ 1, parity)

        def producer():
            plgpu.set_max_registers(24, action="decrease")

            def per_tile(_i, carry, col, row, _d_row, _rows, _skip, group, first_k, k_blocks):
                def per_block(k, carry):
                    slot, parity, step = carry
                    k = (first_k + k) * STEP
                    if not interpret:
                        raw_load(a_gmem, b_gmem, a_smem, b_smem, full, slot, parity, row, col, group * b_stride, k)
                        return *advance(slot, parity), step + 1
                    pl.when(step >= S)(lambda: plgpu.barrier_wait(empty.at[slot]))
                    for part in range(c.parts):
                        rows, ks = pl.ds(row + part * 128, 128), pl.ds(k, STEP)
                        plgpu.copy_gmem_to_smem(a_gmem.at[(rows, ks) if major[0] == "k" else (ks, rows)],
                                                a_smem.at[slot, part], full.at[slot])
                    first = group * b_stride
                    for i in range(c.tile_n // width):  # gate and up lie apart
                        where = ((pl.ds(first + col + i * half_n, width), pl.ds(k, STEP)) if major[1] == "k" else
                                 (pl.ds(first + k, STEP), pl.ds(col, c.tile_n)))
                        to = b_smem.at[slot, pl.ds(i * width, width)] if swiglu else b_smem.at[slot]
                        plgpu.copy_gmem_to_smem(b_gmem.at[where], to, full.at[slot])
                    return *advance(slot, parity), step + 1

                return lax.fori_loop(0, k_blocks, per_block, carry)

            _, _, steps = each_tile(per_tile, 0, 1, (jnp.int32(0), jnp.int32(0), jnp.int32(0)))
            if interpret:  # leave no arrival unread
                lax.fori_loop(jnp.maximum(steps - S, 0), steps,
                              lambda step, _: plgpu.barrier_wait(empty.at[lax.rem(step, S)]), None)

        def consumer():
            plgpu.set_max_registers(240, action="increase")
            part = wg if c.parts == 2 else 0

            def per_tile(i, carry, col, _a_row, row, rows, _skip, _group, _first_k, k_blocks):
                def compute():
                    def reduction(acc):
                        if c.parts == 1:  # not before the other saw the last fill of each stage: a wait tells only even fills from odd
                            take_turn(wg)

                        def per_block(k, carry):
                            slot, parity, held = carry
                            wait_full(slot, parity)
                            left, right = a_smem.at[slot, part], b_smem.at[slot]
                            plgpu.wgmma(acc, left if major[0] == "k" else left.transpose((1, 0)),
                                        right.transpose((1, 0)) if major[1] == "k" else right)
                            plgpu.wgmma_wait(1)  # the product before this one is done
                            pl.when(k > 0)(lambda: release(held))
                            return *advance(slot, parity), slot

                        slot, parity, held = lax.fori_loop(0, k_blocks, per_block, (*carry, jnp.int32(0)))
                        if c.parts == 1:
                            pl.when(i + 1 < mine)(lambda: give_turn(1 - wg))
                        plgpu.wgmma_wait(0)
                        pl.when(k_blocks > 0)(lambda: release(held))
                        return acc[...], slot, parity

                    total, slot, parity = pl.run_scoped(reduction, plgpu.ACC((128, c.tile_n), jnp.float32))
                    out = (total if offset is None else total + offset_gmem[0]).astype(out_shape.dtype)
                    for half in range(2):
                        below = part * 128 + half * 64
                        store(out[half * 64:(half + 1) * 64], half, row + below, rows - below)
                    return slot, parity

                def store(out, half, at, valid):
                    pieces = [(out[:, e:e + chunk], d_gmem, col + e) for e in range(0, c.tile_n, chunk)]
                    if swiglu:
                        (gate, _, _), (up, _, _) = pieces
                        pieces = [(gate, d_gmem, col), (up, d_gmem, half_n + col), (silu_times(gate, up), *hidden_gmem, col)]

                    def whole():
                        for i, (piece, to, column) in enumerate(pieces, half * len(pieces)):
                            buffer = i % c.buffers  # round the buffers: only the oldest store must have left its own
                            plgpu.wait_smem_to_gmem(c.buffers - 1, wait_read_only=True)
                            d_smem[wg, buffer] = piece
                            plgpu.commit_smem()
                            store_tile(to, wg, buffer, at, column, valid)

                    def some():
                        if len(pieces) % c.buffers:  # the round stops here: the next tile begins with the first buffer
                            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        for piece, to, column in pieces if swiglu else [(out, d_gmem, col)]:
                            raw_rows[to.shape[1]](piece, to, at, column, 0, valid)

                    if interpret:
                        pl.when(valid > 0)(whole)
                    else:
                        lax.cond(valid >= 64, whole, some)

                def idle():
                    def per_block(k, carry):
                        wait_full(*carry)
                        release(carry[0])
                        return advance(*carry)
                    return lax.fori_loop(0, k_blocks, per_block, carry)

                return lax.cond(part * 128 < rows, compute, idle) if c.parts == 2 else compute()

            def past(i, carry):
                """Past the stages of the other consumer's tile i."""
                end = carry[0] + uniform(tile(i)[1][K_BLOCKS])
                return lax.rem(end, S), (carry[1] + lax.div(end, S)) & 1

            def in_turn(i, carry, *fields):
                return past(i + 1, per_tile(i, carry, *fields))

            start = (jnp.int32(0), jnp.int32(0))
            if c.parts == 2:
                each_tile(per_tile, 0, 1, start)
            else:
                pl.when((wg == 1) & (mine > 0))(lambda: give_turn(0))
                each_tile(in_turn, wg, 2, lax.cond(wg == 0, lambda: start, lambda: past(0, start)))
            plgpu.wait_smem_to_gmem(0)

        lax.cond(wg < 2, consumer, producer)
        if cluster > 1:
            inline(lambda ctx: hopper.cluster_sync(cluster), ())()

    copies = c.parts + c.tile_n // width
    barriers = ((plgpu.Barrier(num_arrivals=copies, num_barriers=S), plgpu.Barrier(num_arrivals=c.parts, num_barriers=S)) if interpret else
                (plgpu.SMEM((4 * S,), jnp.int32), plgpu.SMEM((8,), jnp.int32)))
    scratch = (
        plgpu.SMEM((S, *a_block), jnp.bfloat16, transforms=tiled(STEP)),
        plgpu.SMEM((S, *b_block), jnp.bfloat16, transforms=tiled(STEP)),
        plgpu.SMEM((2, c.buffers, 64, chunk), out_shape.dtype, transforms=tiled(chunk)),
        *barriers,
    )
    operands = (a, b, *row_tiles, *(() if offset is None else (offset,)))
    out_shapes = (out_shape, jax.ShapeDtypeStruct((n_rows, half_n), out_shape.dtype)) if swiglu else out_shape
    return hopper.launch(body, operands, out_shapes, scratch, name="grouped_matmul", grid=grid, cluster=cluster,
                         warpgroups=3, accumulate=accumulate, interpret=interpret)


def by_rows(
    rows: jax.Array, w: jax.Array, group_sizes: jax.Array, contract: int, interpret: bool, swiglu: bool = False
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """rows [M, K] with w [G, N, K]: contract 2 gives rows w^T [M, N], contract 1 rows [M, N] w -> [M, K].

    With `swiglu` (contract 2, N / 2 a multiple of 64) rows w^T is gate and up, and silu(gate) * up [M, N / 2] comes too.
    TMA wants rows of 16 bytes and, of an 'mn' operand, tiles of 8 x 64; interpret mode no reads out of bounds."""
    M, reduced, n = rows.shape[0], w.shape[contract], w.shape[3 - contract]
    multiple = 128 if interpret else 64
    w = jnp.pad(w, ((0, 0), (0, -w.shape[1] % multiple), (0, -w.shape[2] % multiple)))
    rows = jnp.pad(rows, ((0, 256), (0, -reduced % STEP))) if interpret else pad(rows, 1, 8)
    shape = INTERPRET if interpret else tuned.rows(reduced)
    row_tiles = (tiles if interpret else table).row_tiles(group_sizes, M, ceil_div(reduced, STEP), 128 * shape.parts)
    columns = n + -n % (128 if interpret else 8)
    out = gemm(rows, w.reshape(-1, w.shape[2]), row_tiles, major=("k", "k" if contract == 2 else "mn"), n=n,
               b_stride=w.shape[1], out_shape=jax.ShapeDtypeStruct((rows.shape[0], columns), rows.dtype),
               tuning=shape, swiglu=swiglu, interpret=interpret)
    return tuple(x[:M] for x in out) if swiglu else out[:M, :n]


def weight_gradient(
    dy: jax.Array, x: jax.Array, group_sizes: jax.Array, accumulate: jax.Array | None, interpret: bool
) -> jax.Array:
    """dy [M, N], x [M, K] -> f32 [G, N, K]; group sizes multiples of 64, else NaN."""
    G, N, K = group_sizes.shape[0], dy.shape[1], x.shape[1]
    if interpret:
        dy, x = (jnp.pad(v, [(0, 256 + -n % 128) for n in v.shape]) for v in (dy, x))
    else:
        dy, x = pad(dy, 8, 64), pad(x, 8, 64)
    columns = K + -K % (128 if interpret else 4)
    in_place = hopper.in_place(accumulate) and columns == K and not interpret
    shape = INTERPRET if interpret else tuned.gradient(dy.shape[0] // G)
    gradient_tiles, poison = (tiles if interpret else table).gradient_tiles(group_sizes, N, 128 * shape.parts, STEP)
    out = gemm(dy, x, gradient_tiles, major=("mn", "mn"), n=K, b_stride=0,
               out_shape=jax.ShapeDtypeStruct((G * N, columns), jnp.float32),
               tuning=shape, interpret=interpret,
               accumulate=accumulate.reshape(G * N, K) if in_place else None,
               offset=poison)
    out = out[:, :K].reshape(G, N, K)
    return out if in_place or accumulate is None else out + accumulate
