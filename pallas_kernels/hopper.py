"""Mosaic GPU building blocks of the block-scaled FP8 products on Hopper (sm_90a).

Each function returns (or is) the body of one `plgpu.inline_mgpu` call. They exist because Pallas has no way to
  * start a wgmma from zero (`plgpu.wgmma` always accumulates, so it needs zeroed registers and a fence),
  * keep LLVM and ptxas from running two accumulators at once (they spill), or to ask that they do,
  * arrive on an mbarrier with one lane a warp, or fill a stage from one thread with one expect-tx: Pallas barriers and
    copies take all 128 lanes of the warpgroup, for each copy.
Letters: S stages; slot, parity: the stage in turn and the phase of its barriers.
"""
import contextlib

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import launch_context as lc
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, math, memref, nvvm, scf, vector

BLOCK_K = 128  # columns of A and B per scale, and bytes per row of a stage
TURN = 8  # named barriers of turns; the first ones are Mosaic's, one a warpgroup
ACC_LAYOUT = fa.WGMMA_LAYOUT_ACC_32BIT
ROW_LAYOUT = fa.WGMMA_ROW_LAYOUT
COLUMN_LAYOUT = fa.WGMMA_COL_LAYOUT
# Shared-memory matrix descriptor of K-major rows of 128 bytes with the 128-byte swizzle: swizzle mode 1 (bits 62-63),
# 1024 bytes between groups of 8 rows (bits 32-45), bits 16-29 unused.
DESCRIPTOR = (1 << 62) | ((1024 >> 4) << 32) | (1 << 16)


def walk(t, first, second, group):
    """Walks `group` tiles of the first dimension, then a step of the second, so that a wave of blocks reuses L2."""
    group = min(group, first)
    g, r = lax.div(t, group * second), lax.rem(t, group * second)
    width = jnp.minimum(group, first - g * group)
    return g * group + lax.rem(r, width), lax.div(r, width)


def in_place(accumulate) -> bool:
    """Whether `launch` can add to this array in place: not under a shard_map that checks varying axes."""
    return accumulate is not None and not jax.typeof(accumulate).manual_axis_type.varying


def launch(body, operands, out_shape, scratch, *, name, grid, cluster, warpgroups, accumulate=None, interpret=False):
    """Runs body(*operands, *outputs, *scratch) on `grid` clusters; the result is added to `accumulate` in place if given,
    or put there: the body has it after the operands, for reading and writing.
    """
    mesh = dict(grid=(grid,), grid_names=("grid",), num_threads=warpgroups, thread_name="wg", kernel_name=name,
                **(dict(cluster=(cluster,), cluster_names=("cluster",)) if cluster > 1 else {}))
    parameters = plgpu.CompilerParams(unsafe_no_auto_barriers=True)
    if accumulate is None:
        out = plgpu.kernel(body, out_type=out_shape, scratch_types=scratch, compiler_params=parameters,
                           interpret=plgpu.InterpretGPUParams() if interpret else None, **mesh)(*operands)
        # Pallas forgets along which axes of a shard_map its operands vary: a custom VJP around it compares them
        axes = {axis for x in operands for axis in jax.typeof(x).manual_axis_type.varying}
        return jax.tree.map(lambda x: jax.lax.pcast(x, tuple(sorted(axes - jax.typeof(x).manual_axis_type.varying)), to="varying"), out)

    def scoped(*refs):
        pl.run_scoped(lambda *scratch: body(*refs, *scratch), *scratch, collective_axes="wg")

    total = jax.new_ref(accumulate)  # `plgpu.kernel` takes no mutable operand; an aliased one saves a pass over C
    pl.kernel(scoped, out_type=(), mesh=plgpu.Mesh(**mesh), compiler_params=parameters)(*operands, total)
    return jax.freeze(total)


def _i32(x):
    t = ir.IntegerType.get_signless(32)
    return arith.constant(t, ir.IntegerAttr.get(t, x))


def _i64(x):
    t = ir.IntegerType.get_signless(64)
    return arith.constant(t, ir.IntegerAttr.get(t, x))


def _scalar(x):
    return x.registers.item() if isinstance(x, fa.FragmentedArray) else x


def _void(ptx, args, constraints):
    llvm.inline_asm(ir.Type.parse("!llvm.void"), args, ptx, constraints, has_side_effects=True)


def _address(ref):
    """32-bit shared-memory address of an SMEM memref."""
    return llvm.ptrtoint(ir.IntegerType.get_signless(32), utils.memref_ptr(ref))


def _index(x):
    return arith.index_cast(ir.IndexType.get(), x)


def _wait(address, parity):
    _void("{\n.reg .pred p;\nWAIT_${:uid}:\nmbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1;\n"
          "@!p bra.uni WAIT_${:uid};\n}", [address, parity], "r,r,~{memory}")


def init_barriers(stages, wgs, cluster):
    """full[s]: one arrival (the producer) plus the bytes; empty[s]: one arrival a consumer warp of the cluster."""

    def body(ctx, bars_ref):
        base = _address(bars_ref)
        with utils.when(utils.single_thread_predicate(utils.ThreadSubset.BLOCK)):
            for s in range(stages):
                for offset, count in ((s, 1), (stages + s, 4 * wgs * cluster)):
                    _void("mbarrier.init.shared::cta.b64 [$0], $1;",
                          [arith.addi(base, _i32(8 * offset)), _i32(count)], "r,r,~{memory}")
            _void("fence.mbarrier_init.release.cluster;", [], "~{memory}")
        cluster_sync(cluster)

    return body


def cluster_sync(cluster):
    if cluster > 1:
        _void("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;", [], "~{memory}")
    else:
        _void("bar.sync 0;", [], "~{memory}")


@contextlib.contextmanager
def filling(bars_ref, stages, slot, parity, size):
    """What one thread does once stage `slot` is free (it is, if `parity` is None): it tells the stage's barrier how many
    bytes come, and yields it for their copies."""
    base = _address(bars_ref)
    offset = arith.muli(slot, _i32(8))
    warp = arith.remui(utils.warp_idx(sync=True), _i32(4))
    with utils.when(arith.cmpi(arith.CmpIPredicate.eq, warp, _i32(0))):
        if parity is not None:
            _wait(arith.addi(base, arith.addi(offset, _i32(8 * stages))), arith.xori(parity, _i32(1)))
        with utils.when(nvvm.elect_sync()):
            full = arith.addi(base, offset)
            _void("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [$0], $1;", [full, _i32(size)], "r,r,~{memory}")
            yield utils.BarrierRef(llvm.inttoptr(ir.Type.parse("!llvm.ptr<3>"), full), _i32(0), None, 1)


def produce(stages, tile_m, tile_n, cluster, row_scales):
    """Waits until stage `slot` is free, then has one thread start the TMA copies that fill it.

    A and its scales go to all blocks of the cluster; with `row_scales` the rows of B have scales of their own."""

    def body(ctx, a_gmem, b_gmem, sa_gmem, sb_gmem, a_smem, b_smem, sa_smem, sb_smem, bars_ref,
             slot, parity, row, col, k):
        slot, parity, row, col, k = map(_scalar, (slot, parity, row, col, k))
        size = (tile_m + tile_n) * BLOCK_K + tile_m * 4 + (tile_n * 4 if row_scales else 0)
        with filling(bars_ref, stages, slot, parity, size) as barrier:
            k_col = arith.muli(k, _i32(BLOCK_K))

            # Without a transform TMA clips at any edge and starts at any row; 8-row tiles of 128 columns are one
            # contiguous piece of SMEM.
            def copy(src, dst, at, shape, swizzle, shared):
                dst = utils.memref_reshape(utils.memref_slice(dst, _index(slot)), tuple(n for n in shape if n))
                ctx.async_copy(
                    src_ref=src, dst_ref=dst, barrier=barrier, arrive=False, swizzle=swizzle, predicate=None,
                    gmem_slice=tuple(utils.DynamicSlice(_index(i), n) if n else _index(i)
                                     for i, n in zip(at, shape, strict=True)),
                    collective=gpu.Dimension.x if shared and cluster > 1 else None)

            copy(a_gmem, a_smem, (row, k_col), (tile_m, BLOCK_K), 128, True)
            copy(b_gmem, b_smem, (col, k_col), (tile_n, BLOCK_K), 128, False)
            copy(sa_gmem, sa_smem, (k, row), (None, tile_m), None, True)
            if row_scales:
                copy(sb_gmem, sb_smem, (k, col), (None, tile_n), None, False)

    return body


def produce_bf16(stages, parts, tile_n, cluster, major, apart=None):
    """As `produce`, for `parts` times 128 rows of A and a tile of B in bf16, 64 of the reduction a stage.

    A 'k' operand is read like FP8; of an 'mn' one (reduction along its rows) TMA writes 8 x 64 tiles. With `apart` the tile of a
    'k' operand B is two halves, of which the second starts so many rows below the first."""

    def body(ctx, a_gmem, b_gmem, a_smem, b_smem, bars_ref, slot, parity, row, col, first, k):
        slot, parity, row, col, first, k = map(_scalar, (slot, parity, row, col, first, k))
        with filling(bars_ref, stages, slot, parity, (128 * parts + tile_n) * 128) as barrier:

            def copy(src, dst, kind, at, rows, shared):
                shape = (rows, 64) if kind == "k" else (64, rows)
                if kind == "k":
                    dst = utils.memref_reshape(dst, shape)
                ctx.async_copy(
                    src_ref=src, dst_ref=dst, barrier=barrier, arrive=False, swizzle=128, predicate=None,
                    gmem_slice=tuple(utils.DynamicSlice(_index(i), n) for i, n in zip(at, shape, strict=True)),
                    gmem_transform=() if kind == "k" else (lc.TileTransform((8, 64)),),
                    collective=gpu.Dimension.x if shared and cluster > 1 else None)

            for part in range(parts):
                at = arith.addi(row, _i32(128 * part))
                copy(a_gmem, utils.memref_slice(a_smem, (_index(slot), part)), major[0],
                     (at, k) if major[0] == "k" else (k, at), 128, True)
            b_tile = utils.memref_slice(b_smem, _index(slot))
            if apart is None:
                at = (arith.addi(first, col), k) if major[1] == "k" else (arith.addi(first, k), col)
                copy(b_gmem, b_tile, major[1], at, tile_n, False)
            else:
                at, half = arith.addi(first, col), tile_n // 2
                for i in range(2):  # SMEM holds tiles of 8 rows
                    copy(b_gmem, utils.memref_slice(b_tile, slice(i * half // 8, (i + 1) * half // 8)), "k",
                         (arith.addi(at, _i32(i * apart)), k), half, False)

    return body


def wait_full(ctx, bars_ref, slot, parity):
    _wait(arith.addi(_address(bars_ref), arith.muli(_scalar(slot), _i32(8))), _scalar(parity))


def issue(tile_m, tile_n, waves, wave):
    """Starts the four wgmmas of one 64 x N x 128 product; also reads the scales of A that it will need.

    Returns the (still running) accumulator and, per thread, a_scale of its two rows. `old`, if given, is an accumulator
    whose registers are overwritten: its value is ignored, but ptxas then cannot start this wgmma before the last use of
    `old`, nor keep both alive. With `keep` (i1) the product is added to `old` instead: no promotion in between."""

    def body(ctx, a_smem, b_smem, sa_smem, slot, wg, old=None, keep=None):
        slot, wg = _scalar(slot), _scalar(wg)
        i64, f32 = ir.IntegerType.get_signless(64), ir.F32Type.get()
        row = arith.addi(arith.muli(wg, _i32(64 * waves)), _i32(64 * wave))  # of the stage's A tile

        def descriptor(ref, rows, first):
            address = arith.addi(_address(ref), arith.muli(slot, _i32(rows * BLOCK_K)))
            if first is not None:
                address = arith.addi(address, arith.muli(first, _i32(BLOCK_K)))
            return arith.addi(arith.extui(i64, arith.shrui(address, _i32(4))), _i64(DESCRIPTOR))

        count = tile_n // 2
        regs = "{" + ", ".join(f"${i}" for i in range(count)) + "}"
        first = f"setp.ne.b32 z, ${count + 2}, 0;" if keep is not None else "setp.ne.b32 z, 0, 0;"
        lines = ["{", ".reg .pred z, u;", ".reg .b64 a, b;", first, "setp.eq.b32 u, 0, 0;",
                 "wgmma.fence.sync.aligned;"]
        for k in range(BLOCK_K // 32):
            lines += [f"add.s64 a, ${count}, {2 * k};", f"add.s64 b, ${count + 1}, {2 * k};",
                      f"wgmma.mma_async.sync.aligned.m64n{tile_n}k32.f32.e4m3.e4m3 {regs}, a, b, "
                      f"{'u' if k else 'z'}, 1, 1;"]
        lines += ["wgmma.commit_group.sync.aligned;", "}"]
        field = ir.VectorType.get((1,), f32)
        tied = [str(i) for i in range(count)] if old is not None else []
        scalars = [] if keep is None else [_scalar(keep)]
        out = llvm.inline_asm(
            llvm.StructType.get_literal([field] * count),
            [descriptor(a_smem, tile_m, row), descriptor(b_smem, tile_n, None), *scalars,
             *(old.registers.flat if tied else ())],
            "\n".join(lines),
            ",".join(["=f" if tied else "=&f"] * count + ["l", "l"] + ["r"] * len(scalars) + [*tied, "~{memory}"]),
            has_side_effects=True)
        acc = [llvm.extractvalue(field, out, [i]) for i in range(count)]

        # Lane l of warp w holds rows 16 w + l / 4 and 8 below it.
        lane = arith.remui(utils.thread_idx(), _i32(128))
        mine = arith.addi(arith.muli(arith.divui(lane, _i32(32)), _i32(16)),
                          arith.divui(arith.remui(lane, _i32(32)), _i32(4)))
        mine = arith.addi(mine, row)
        rows = [vector.broadcast(field, memref.load(sa_smem, [_index(slot), _index(arith.addi(mine, _i32(below)))]))
                for below in (0, 8)]
        return _fragments(acc, (64, tile_n), ACC_LAYOUT), _fragments(rows, (64,), ROW_LAYOUT)

    return body


def _fragments(registers, shape, layout):
    registers = np.array(registers, dtype=object).reshape(layout.registers_shape(shape))
    return fa.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def release(stages, cluster):
    """One lane of each warp says to every block of the cluster that this warp no longer needs stage `slot`; not if `live` is 0.

    What was loaded from the stage must have been used before: ptxas lets an arrival overtake a load in flight."""

    def body(ctx, bars_ref, slot, live=None):
        i32 = ir.IntegerType.get_signless(32)
        address = arith.addi(_address(bars_ref), arith.addi(arith.muli(_scalar(slot), _i32(8)), _i32(8 * stages)))
        live = _i32(1) if live is None else _scalar(live)
        if cluster == 1:
            lane, chosen = arith.extui(i32, nvvm.elect_sync()), "setp.ne.and.b32 p, $1, 0, q;"
            arrive = "@p mbarrier.arrive.release.cta.shared::cta.b64 _, [$0];"
        else:
            lane, chosen = arith.remui(utils.thread_idx(), _i32(32)), f"setp.lt.and.u32 p, $1, {cluster}, q;"
            # No `.release.cluster`: that puts a GPU-wide MEMBAR in front of every arrival (halved the speed).
            arrive = "@p mapa.shared::cluster.u32 r, $0, $1;\n@p mbarrier.arrive.shared::cluster.b64 _, [r];"
        _void(f"{{\n.reg .pred p, q;\n.reg .b32 r;\nsetp.ne.b32 q, $2, 0;\n{chosen}\n{arrive}\n}}", [address, lane, live],
              "r,r,r,~{memory}")

    return body


def _tie(registers):
    """An empty asm through which the registers pass: LLVM moves nothing that made them past the next wgmma, which
    would keep both accumulators alive and spill."""
    t, n = registers[0].type, len(registers)
    tied = llvm.inline_asm(llvm.StructType.get_literal([t] * n), registers, "",
                           ",".join(["=f"] * n + [str(i) for i in range(n)]), has_side_effects=True)
    return [llvm.extractvalue(t, tied, [i]) for i in range(n)]


def promote(tile_n, two_scales):
    """total + acc * (a_scale * b_scale), one FMA an element.

    With `two_scales` the first `cut` groups of 8 columns take b_scale sb0, the others sb1."""

    def body(ctx, total, acc, sa, sb0, sb1, cut):
        t = ir.VectorType.get((1,), ir.F32Type.get())
        scales = [[arith.mulf(r, vector.broadcast(t, _scalar(sb))) for r in sa.registers.flat]
                  for sb in ((sb0, sb1) if two_scales else (sb0,))]
        out = []
        step = np.gcd(tile_n, 128) // 8  # a tile can cross into the next block of B only at these groups
        scale = scales[0]
        for group in range(tile_n // 8):
            if two_scales and group and group % step == 0:
                first = arith.cmpi(arith.CmpIPredicate.sgt, _scalar(cut), _i32(group))
                scale = [arith.select(first, x, y) for x, y in zip(*scales, strict=True)]
            for i in range(4 * group, 4 * group + 4):
                out.append(math.fma(acc.registers.flat[i], scale[(i // 2) % 2], total.registers.flat[i]))
        return _fragments(_tie(out), (64, tile_n), ACC_LAYOUT)

    return body


def column_scales(tile_n):
    """The scales of B's rows, two columns a register pair: read while the tensor cores work on the same stage."""

    def body(ctx, sb_smem, slot):
        pair = ir.VectorType.get((2,), ir.F32Type.get())
        column = arith.muli(arith.remui(utils.thread_idx(), _i32(4)), _i32(2))  # lane l: columns 2 (l mod 4) and next
        slot = _index(_scalar(slot))
        pairs = [vector.load(pair, sb_smem, [slot, _index(arith.addi(column, _i32(8 * g)))]) for g in range(tile_n // 8)]
        return _fragments(pairs, (tile_n,), COLUMN_LAYOUT)

    return body


def promote_rows(tile_n):
    """total + acc * a_scale * b_scale with a scale a row of B."""

    def body(ctx, total, acc, sa, sb):
        t = ir.VectorType.get((1,), ir.F32Type.get())
        sa0, sa1 = sa.registers.flat
        out = []
        for group, pair in enumerate(sb.registers.flat):
            columns = [vector.extract_strided_slice(t, pair, [i], [1], [1]) for i in range(2)]
            for i in range(4):
                register = 4 * group + i
                scaled = arith.mulf(acc.registers.flat[register], columns[i % 2])
                out.append(math.fma(scaled, (sa0, sa1)[i // 2], total.registers.flat[register]))
        return _fragments(_tie(out), (64, tile_n), ACC_LAYOUT)

    return body


def zeros(tile_n):
    def body(ctx):
        f32 = ir.F32Type.get()
        return fa.FragmentedArray.splat(arith.constant(f32, ir.FloatAttr.get(f32, 0.0)), (64, tile_n), ACC_LAYOUT)
    return body


def take_turn(ctx, wg):
    """Waits until the other consumer warpgroup of two gave the turn to `wg`, by `give_turn(wg)`."""
    _void("bar.sync $0, 256;", [arith.addi(_scalar(wg), _i32(TURN))], "r,~{memory}")


def give_turn(ctx, wg):
    _void("bar.arrive $0, 256;", [arith.addi(_scalar(wg), _i32(TURN))], "r,~{memory}")


def uniform(ctx, x):
    """Broadcasts lane 0's copy of a loaded scalar: only then does the compiler treat a branch on it as uniform."""
    i32 = ir.IntegerType.get_signless(32)
    out = llvm.inline_asm(i32, [_scalar(x)], "shfl.sync.idx.b32 $0, $1, 0, 0x1f, 0xffffffff;", "=r,r",
                          has_side_effects=True)
    return fa.FragmentedArray.splat(out, (), is_signed=True)


def store_tile(columns, itemsize, buffer, add):
    """TMA store of the 64 rows x `columns` that warpgroup `wg` staged in its SMEM buffer; clipped at the edges of D.
    With `add` they are added to what is there."""

    def body(ctx, d_smem, d_gmem, wg, row, col):
        at = _index(_scalar(wg))
        staged = utils.memref_slice(d_smem, at if buffer is None else (at, buffer))
        ctx.async_copy(src_ref=utils.memref_reshape(staged, (64, columns)), dst_ref=d_gmem,
                       gmem_slice=(utils.DynamicSlice(_index(_scalar(row)), 64),
                                   utils.DynamicSlice(_index(_scalar(col)), columns)),
                       swizzle=columns * itemsize, reduction_op="add" if add else None)

    return body


def store_rows(n_cols, itemsize, add):
    """Ordinary stores (or additions) of rows `skip` to `valid` of a finished 64 x N tile: where a group begins or ends
    inside it, a TMA store would overwrite its neighbour's rows."""

    def body(ctx, out, d_gmem, row, col, skip, valid):
        i32, i64 = (ir.IntegerType.get_signless(n) for n in (32, 64))
        row, col, skip, valid = map(_scalar, (row, col, skip, valid))
        lane = arith.remui(utils.thread_idx(), _i32(128))
        mine = arith.addi(arith.muli(arith.divui(lane, _i32(32)), _i32(16)),
                          arith.divui(arith.remui(lane, _i32(32)), _i32(4)))
        base = llvm.ptrtoint(i64, utils.memref_ptr(d_gmem))
        register = i32 if itemsize == 2 else i64
        at = arith.addi(col, arith.muli(arith.remui(lane, _i32(4)), _i32(2)))
        for half in range(2):  # one address a row, the columns as constant offsets: an address a column spills
            below = arith.addi(mine, _i32(8 * half))
            live = arith.andi(arith.cmpi(arith.CmpIPredicate.slt, below, valid), arith.cmpi(arith.CmpIPredicate.sge, below, skip))
            columns = arith.select(live, arith.subi(_i32(n_cols), at), _i32(0))  # that there still are
            element = arith.addi(arith.muli(arith.extsi(i64, arith.addi(row, below)), _i64(n_cols)), arith.extsi(i64, at))
            address = arith.addi(base, arith.muli(element, _i64(itemsize)))
            for group, pair in enumerate(out.registers.flat[half::2]):  # of 8 columns, this thread has two
                to = 8 * group * itemsize
                write = f"@p st.global.b{16 * itemsize} [$0+{to}], $1;"
                if add:
                    write = f"mov.b64 {{x, y}}, $1;\n@p red.global.add.f32 [$0+{to}], x;\n@p red.global.add.f32 [$0+{to + 4}], y;"
                _void(f"{{\n.reg .pred p;\n.reg .f32 x, y;\nsetp.gt.s32 p, $2, {8 * group};\n{write}\n}}",
                      [address, llvm.bitcast(register, pair), columns], f"l,{'r' if itemsize == 2 else 'l'},r,~{{memory}}")

    return body


def zero_rows(tile_n, n_cols, itemsize):
    """Zeros in rows `first` to `stop` of D's columns from col on, of a tile that nothing is computed for; by a whole warpgroup."""
    pieces = tile_n * itemsize // 16  # of a row

    def body(ctx, d_gmem, first, stop, col):
        i32, i64 = (ir.IntegerType.get_signless(n) for n in (32, 64))
        first, stop, col = map(_scalar, (first, stop, col))
        thread = arith.remui(utils.thread_idx(), _i32(128))
        at = arith.addi(col, arith.muli(arith.remui(thread, _i32(pieces)), _i32(16 // itemsize)))
        with utils.when(arith.cmpi(arith.CmpIPredicate.slt, at, _i32(n_cols))):
            rows = scf.ForOp(arith.addi(first, arith.divui(thread, _i32(pieces))), stop, _i32(128 // pieces))
            with ir.InsertionPoint(rows.body):
                element = arith.addi(arith.muli(arith.extsi(i64, rows.induction_variable), _i64(n_cols)), arith.extsi(i64, at))
                address = arith.addi(llvm.ptrtoint(i64, utils.memref_ptr(d_gmem)), arith.muli(element, _i64(itemsize)))
                _void("st.global.v4.b32 [$0], {$1, $1, $1, $1};", [address, _i32(0)], "l,r,~{memory}")
                scf.yield_([])

    return body


def to_output(dtype):
    """The finished tile in the layout of a store."""

    def body(ctx, total):
        total = total.to_layout(fa.WGMMA_LAYOUT)
        return total.astype(ir.BF16Type.get()) if dtype == "bfloat16" else total

    return body
