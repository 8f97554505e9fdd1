"""Quantisation by tiles on Hopper, bound by memory: one read of the source, any of 1x128, 128x1 and 128x128 written.

512 threads own 128 x 128 elements: lane l of warp w holds 4 rows from 8 w + 4 (l / 16) and 8 columns from
8 (l mod 16) in registers. Maxima of magnitudes are taken as integers: the order is the same and NaN is the largest.
128x1 results are transposed through SMEM (units of 4 bytes, exclusive-or'd with the column group against bank
conflicts) and leave as [K, M]. A cached source comes to SMEM ahead of its use (`staged`). Everything is one
`plgpu.inline_mgpu` body: Pallas has no byte-wise transposition.
"""
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels import hopper
from pallas_kernels.quantize import staged, tuned, walk
from pallas_kernels.quantize.emit import QuantizeEmit
from pallas_kernels.quantize.reference import FORMATS, ceil_div
from pallas_kernels.quantize.sources import ROWS, Share, Source

REF = plgpu.RefType()
SCALAR = plgpu.Layout.WG_SPLAT(())


# plain: the source [batch, M, K]. swiglu: silu(gate) * up of [batch, M, 2 K]: gate, up. swiglu_gradient: [batch, M, K]: that by gate
# and up, of the gradient [batch, M, K / 2] of what the SwiGLU makes and gate and up [batch, M, K]. heads: [batch, M, K]: the first 128
# channels of each of K / 256 heads of one array, then of another, [batch, M, K / 256, channels]. rotated: [batch, M, K] in heads, the
# last channels of each turned back by cos and sin [batch, M, half as many].
FORMS = ("plain", "swiglu", "swiglu_gradient", "heads", "rotated")


@dataclasses.dataclass(frozen=True)
class Job:
    """What one launch does to [batch, M, K] (the output's sizes)."""

    batch: int
    M: int
    K: int
    source: str  # dtype of what is read
    form: str = "plain"  # what is quantised, of FORMS
    scaled: bool = False  # the source is in 1x128 tiles, its scale [batch, blocks, M] comes with it
    weighted: bool = False  # a factor a row [batch, M] comes last
    channels: tuple[int, ...] = ()  # of a head: in each of the arrays; rotated: all, those turned back
    rows: str | None = None  # format of the copy that keeps the layout
    columns: bool = False  # E4M3 copy as [K, M]
    block: bool = False  # one scale per 128 x 128 instead of 1 x 128 and 128 x 1
    power_of_two: bool = False

    @property
    def dots(self) -> bool:
        """Whether the gradient of the weights is written too."""
        return self.weighted and self.form == "swiglu_gradient"


def unfit(job: Job) -> str:
    """Why the kernel does not take this job ('' when it does)."""
    if job.K % 8 or job.form == "swiglu" and job.scaled and job.K % 128:
        return f"{job.K} columns: must be a multiple of {128 if job.K % 8 == 0 else 8}"
    if job.form == "swiglu_gradient" and (job.K % 256 or job.source != "bfloat16"):
        return f"{job.K // 2} columns of {job.source}: must be a multiple of 128, in bfloat16"
    if job.form in ("heads", "rotated") and (any(n % 8 for n in job.channels) or job.source != "bfloat16"):
        return f"heads of {job.channels} channels of {job.source}: must be multiples of 8, in bfloat16"
    if job.columns and job.M % 16:
        return f"{job.M} rows: must be a multiple of 16 for a transposed copy"
    if job.source not in ("bfloat16", "float16", "float32", "float8_e4m3fn"):
        return f"no kernel reads {job.source}"
    return ""


def _body(job: Job, tuning: tuned.Tuning, operands: int):
    """operands: how many the source has; results and scratch follow them."""
    k_tiles, m_tiles = ceil_div(job.K, 128), ceil_div(job.M, 128)

    def body(ctx, block, *refs):
        e = QuantizeEmit()
        gmem, refs = refs[:operands], list(refs[operands:])
        q_gmem = refs.pop(0) if job.rows else None
        rows_gmem = refs.pop(0) if job.rows and not job.block else None
        t_gmem = refs.pop(0) if job.columns else None
        columns_gmem = refs.pop(0) if job.columns and not job.block else None
        block_gmem = refs.pop(0) if job.block else None
        dots_gmem = refs.pop(0) if job.dots else None
        amax_smem, bytes_smem, *ring = refs
        of_parts = [llvm.ptrtoint(e.i32, utils.memref_ptr(r)) for r in (amax_smem, bytes_smem)]

        thread = utils.thread_idx()
        own_part, own_thread = e.div(thread, 512), e.rem(thread, 512)
        worker = e.add(e.mul(block.registers.item(), tuning.tiles), own_part)
        smem = [llvm.ptrtoint(e.i32, utils.memref_ptr(r)) for r in ring[:2]] if tuning.stages else None
        source = Source(e, job, gmem, smem, dots_gmem)

        def place(block):
            # the gate's and the up's tile of the same columns are neighbours
            return walk.place(e, block, m_tiles, k_tiles, tuning.walk, halves=2 if job.form == "swiglu_gradient" else 1)

        def share_of(block, exists, thread, stage):
            batch, tile_m, tile_k = place(block)
            lane, warp = e.rem(thread, 32), e.div(thread, 32)
            group, column = e.rem(lane, 16), e.mul(e.rem(lane, 16), 8)
            slot = e.add(e.mul(warp, 2), e.div(lane, 16))
            row0, col0 = e.add(e.mul(tile_m, 128), e.mul(slot, ROWS)), e.add(e.mul(tile_k, 128), column)
            in_columns = arith.andi(exists, e.less(col0, job.K))
            live = [arith.andi(e.less(e.add(row0, i), job.M), in_columns) for i in range(ROWS)]
            at_row = [e.add(e.mul(batch, job.M), row0, i) for i in range(ROWS)]
            return Share(exists, batch, tile_m, tile_k, thread, lane, group, slot, column, row0, col0, at_row, live, stage)

        def tile(block, exists, stage=None, refill=None):
            thread, part = (own_thread, own_part) if stage is None else (e.anew(own_thread), e.anew(own_part))
            amax_smem, bytes_smem = (e.add(at, e.mul(part, n)) for at, n in zip(of_parts, (512, 128 * 128), strict=True))
            alone = part if tuning.stages and tuning.tiles > 1 else None  # whose barriers are its own
            at = share_of(block, exists, thread, stage)

            def store_row(i, values):
                size = 1 if job.rows == "e4m3" else 2
                e.store(e.pointer(q_gmem, e.element(at.at_row[i], job.K, at.col0), size), e.pack(values, job.rows), at.live[i])

            def store_row_scale(row, scale, keep):
                line = e.element(e.add(e.mul(at.batch, k_tiles), at.tile_k), job.M, row)
                e.store(e.pointer(rows_gmem, line, 4), [e.bits(scale)], arith.andi(arith.andi(exists, keep), e.less(row, job.M)))

            if job.form == "swiglu" and not job.columns:  # row by row: no more than one is in float32
                for i, x in enumerate(source.rows(at)):
                    size = [arith.andi(e.bits(v), e.int(0x7FFFFFFF)) for v in x]
                    scale, inverse = e.scale(e.largest_across(e.largest(size), (8, 4, 2, 1)), job.rows, job.power_of_two)
                    store_row_scale(e.add(at.row0, i), scale, e.less(at.group, 1))
                    store_row(i, [arith.mulf(v, inverse) for v in x])
                return
            x = source.values(at)
            if job.form in ("swiglu_gradient", "rotated"):  # that took all registers there are
                at = share_of(e.anew(block), exists, e.anew(own_thread), stage)
                if job.dots:
                    source.store_dots(at, x.dots)

            first_half = e.less(at.lane, 16)
            if job.columns or job.block:  # maxima of columns (or of everything) meet in SMEM
                with utils.when(e.less(at.thread, 128)):
                    e.void("st.shared.b32 [$0], $1;", [e.add(amax_smem, e.mul(at.thread, 4)), e.int(0)], "r,r,~{memory}")
                e.barrier(alone)
                maxima = x.column_maxima()
                if job.block:
                    maxima = [e.largest_across(e.largest(maxima), (8, 4, 2, 1))]
                with utils.when(e.less(at.lane, 1) if job.block else first_half):
                    for j, m in enumerate(maxima):
                        slot = amax_smem if job.block else e.add(amax_smem, e.mul(at.column, 4), 4 * j)
                        e.void("red.shared.max.u32 [$0], $1;", [slot, m], "r,r,~{memory}")
                e.barrier(alone)
                if refill:
                    refill()
                mine = amax_smem if job.block else e.add(amax_smem, e.mul(e.rem(at.thread, 128), 4))
                amax = e.asm(e.i32, "ld.shared.b32 $0, [$1];", [mine], "=r,r,~{memory}")
                scale, inverse = e.scale(amax, "e4m3", job.power_of_two)
                if job.block:
                    line = e.element(e.add(e.mul(at.batch, m_tiles), at.tile_m), k_tiles, at.tile_k)
                    e.store(e.pointer(block_gmem, line, 4), [e.bits(scale)], arith.andi(exists, e.less(at.thread, 1)))
                    column_inverse = row_inverse = [inverse] * 8
                else:
                    if stage is not None:
                        at = dataclasses.replace(at, **dict(zip(("batch", "tile_m", "tile_k"), place(e.anew(block)), strict=True)))
                    col = e.add(e.mul(at.tile_k, 128), at.thread)
                    line = e.element(e.add(e.mul(at.batch, m_tiles), at.tile_m), job.K, col)
                    e.store(e.pointer(columns_gmem, line, 4), [e.bits(scale)],
                            arith.andi(e.less(at.thread, 128), arith.andi(exists, e.less(col, job.K))))
                    e.barrier(alone)  # all have read the maxima
                    e.void("st.shared.b32 [$0], $1;", [mine, e.bits(inverse)], "r,r,~{memory}")
                    e.barrier(alone)
                    column_inverse = [e.to_float(w) for j in (0, 4)
                                      for w in e.load_shared(e.add(amax_smem, e.mul(at.column, 4), 4 * j), 4)]

            if job.rows:
                if not job.block:
                    maxima = x.row_maxima()
                    own = e.of_row(maxima, at.group)  # each lane works out the scale of one row
                    scale, inverse = e.scale(own, job.rows, job.power_of_two)
                    store_row_scale(e.add(at.row0, at.group), scale, e.less(at.group, ROWS))
                    half = arith.andi(at.lane, e.int(16))
                    row_inverse = [e.to_float(e.shuffle(e.bits(inverse), e.add(half, i), "idx")) for i in range(ROWS)]
                for i in range(ROWS):
                    store_row(i, [arith.mulf(x.value(i, j), row_inverse[i]) for j in range(8)])

            if job.columns:
                swizzled = e.mul(arith.xori(at.slot, e.mul(at.group, 2)), 4)
                for j in range(8):
                    words = e.pack([arith.mulf(x.value(i, j), column_inverse[j]) for i in range(ROWS)], "e4m3")
                    word = e.add(bytes_smem, e.mul(at.column, 128), 128 * j, swizzled)
                    e.void("st.shared.b32 [$0], $1;", [word, *words], "r,r,~{memory}")
                e.barrier(alone)
                for i in range(4):
                    col = e.add(at.slot, 32 * i)
                    words = e.load_shared(e.add(bytes_smem, e.mul(col, 128), e.mul(arith.xori(at.group, e.div(col, 8)), 8)), 2)
                    out_col, out_row = e.add(e.mul(at.tile_k, 128), col), e.add(e.mul(at.tile_m, 128), at.column)
                    line = e.element(e.add(e.mul(at.batch, job.K), out_col), job.M, out_row)
                    e.store(e.pointer(t_gmem, line, 1), words,
                            arith.andi(arith.andi(exists, e.less(out_col, job.K)), e.less(out_row, job.M)))

        tiles = job.batch * m_tiles * k_tiles
        if not tuning.stages:
            tile(worker, e.less(worker, tiles))
            return

        yes = arith.constant(ir.IntegerType.get_signless(1), 1)
        staged.each_tile(
            ctx, e, gmem[:2], ring[:2], ring[2], stages=tuning.stages, parts=tuning.tiles, part=own_part, thread=own_thread,
            worker=worker, workers=grid(job, tuning) * tuning.tiles, tiles=tiles, origins=lambda block: source.origins(*place(block)),
            bytes_a_tile=source.pieces * (128 * 128 * source.itemsize + 512),
            work=lambda block, stage, refill: tile(block, yes, stage, refill))

    return body


def grid(job: Job, tuning: tuned.Tuning) -> int:
    tiles = job.batch * ceil_div(job.M, 128) * ceil_div(job.K, 128)
    return ceil_div(min(tiles, tuning.workers) if tuning.stages else tiles, tuning.tiles)


@functools.partial(jax.jit, static_argnums=(0, 1))  # traced and compiled once a shape, however often a model calls it
def quantize(job: Job, tuning: tuned.Tuning, *operands: jax.Array) -> list[jax.Array]:
    """x of the form (its scale [batch, K/128, M]) (weights f32 [batch, M]) -> in this order, those asked for: q [batch, M, K], its
    scale [batch, K/128, M]; transposed q [batch, K, M], its scale [batch, M/128, K]; block scale [batch, M/128, K/128]; of the
    weights' gradient the sums over 128 columns [batch, K/256, M].
    """
    B, M, K, k_tiles, m_tiles = job.batch, job.M, job.K, ceil_div(job.K, 128), ceil_div(job.M, 128)
    out = []
    if job.rows:
        out.append(jax.ShapeDtypeStruct((B, M, K), FORMATS[job.rows].dtype))
        out += [] if job.block else [jax.ShapeDtypeStruct((B, k_tiles, M), jnp.float32)]
    if job.columns:
        out.append(jax.ShapeDtypeStruct((B, K, M), jnp.float8_e4m3fn))
        out += [] if job.block else [jax.ShapeDtypeStruct((B, m_tiles, K), jnp.float32)]
    if job.block:
        out.append(jax.ShapeDtypeStruct((B, m_tiles, k_tiles), jnp.float32))
    if job.dots:
        out.append(jax.ShapeDtypeStruct((B, k_tiles // 2, M), jnp.float32))
    inner = _body(job, tuning, len(operands))

    def body(*refs):
        plgpu.inline_mgpu(arg_types=(SCALAR,) + (REF,) * len(refs))(inner)(lax.axis_index("grid"), *refs)

    tiles = tuning.tiles
    scratch = [plgpu.SMEM((128 * tiles,), jnp.int32), plgpu.SMEM((4096 * tiles if job.columns else 8,), jnp.int32)]
    if n := tiles * tuning.stages:
        pieces = n * (2 if job.form == "swiglu" else 1)
        scratch += [plgpu.SMEM((pieces, 128, 128), job.source), plgpu.SMEM((pieces, 128), jnp.float32), plgpu.SMEM((4 * n,), jnp.int32)]
    return list(hopper.launch(body, operands, tuple(out), tuple(scratch), name="quantize", cluster=1, warpgroups=4 * tiles,
                              grid=grid(job, tuning)))
