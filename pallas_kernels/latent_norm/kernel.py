"""Norms of columns side by side on Hopper, bound by memory: both latents of a token, and the gradient of all its columns, in one launch.

As `norm/kernel.py`, with rows so short that each is a warp's own: a lane copies its pieces of 16 bytes of every cut of the next turns
to SMEM (cp.async) and reads nothing but these, and the sums over all cuts cross the warp together. Scales stay in registers, and
so do the sums of their gradient; at its end a block writes one line of these, for XLA to add. One `plgpu.inline_mgpu` body.
"""
import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith, math

from pallas_kernels import hopper
from pallas_kernels.emit import Emit

REF = plgpu.RefType()
SCALAR = plgpu.Layout.WG_SPLAT(())
MULTIPROCESSORS = 132
SEGMENT = 512  # bytes: 16 of each lane of a warp
SMEM = 216 * 1024
STAGES = 8  # turns in SMEM or on their way there, at most
COLUMNS = 64  # with a scale, of a lane, at most: backwards each has two registers
DTYPES = ("bfloat16", "float16", "float32")


class Cut(NamedTuple):
    """Columns of an array, in bytes: `size` from `start` of each row of `pitch`."""

    pitch: int
    start: int
    size: int

    @property
    def pieces(self) -> int:
        """Of 16 bytes, a lane."""
        return -(-self.size // SEGMENT)


@dataclasses.dataclass(frozen=True)
class Job:
    """What one launch does."""

    backward: bool
    M: int
    widths: tuple[int, ...]  # columns of each cut with a scale
    rest: int  # columns after them
    dtype: str
    eps: float

    @property
    def itemsize(self) -> int:
        return jnp.dtype(self.dtype).itemsize

    @property
    def width(self) -> int:
        """Columns of a piece."""
        return 16 // self.itemsize

    @property
    def joint(self) -> tuple[Cut, ...]:
        """The cuts in a row of y or of its gradient, the rest last."""
        sizes = [n * self.itemsize for n in (*self.widths, self.rest)]
        return tuple(Cut(sum(sizes), sum(sizes[:k]), size) for k, size in enumerate(sizes))

    @property
    def apart(self) -> tuple[Cut, ...]:
        """The same, each an array of its own."""
        return tuple(Cut(cut.size, 0, cut.size) for cut in self.joint)

    @property
    def copied(self) -> tuple[Cut, ...]:
        """What a turn reads of each row: the cuts of y with a scale, and their gradients and that of the rest."""
        return self.joint[:-1] + (self.apart if self.backward else ())

    @property
    def pieces(self) -> int:
        """Of a lane, a turn."""
        return sum(cut.pieces for cut in self.copied)

    @property
    def columns(self) -> int:
        """With a scale, of a lane."""
        return self.width * sum(cut.pieces for cut in self.joint[:-1])

    @property
    def warps(self) -> int:
        """Of a block: as many as registers and three turns in SMEM allow."""
        return next(n for n in (16, 8, 4) if n * self.columns <= 8 * COLUMNS and 3 * n * SEGMENT * self.pieces <= SMEM)

    @property
    def turn_bytes(self) -> int:
        return self.warps * SEGMENT * self.pieces

    @property
    def stages(self) -> int:
        return min(STAGES, SMEM // self.turn_bytes)

    @property
    def grid(self) -> int:
        return min(self.M, MULTIPROCESSORS)

    @property
    def turns(self) -> int:
        """Rows of a warp."""
        return -(-self.M // (self.grid * self.warps))


def unfit(job: Job, scales: set[str]) -> str:
    """Why the kernel does not take this job ('' when it does)."""
    if job.dtype not in DTYPES or scales != {"float32"}:
        return f"no kernel reads rows of {job.dtype} with scales of {' and '.join(sorted(scales))}"
    if not job.M or any(not cut.size or cut.size % 16 for cut in job.joint):
        return f"{job.M} rows cut into {[cut.size for cut in job.joint]} bytes: must be multiples of 16, and not nothing"
    if job.columns > COLUMNS or job.joint[-1].size > SEGMENT:
        return f"cuts of {job.widths} columns: must be at most {COLUMNS} a lane, the {job.rest} after them one piece a lane"
    return ""


class CutEmit(Emit):
    """A lane's share of the rows: piece i of a cut is the 16 bytes at i * SEGMENT + `byte`."""

    def __init__(self, job: Job, block, ring):
        super().__init__()
        self.job, self.block = job, block
        self.thread = utils.thread_idx()
        self.lane, self.warp = self.rem(self.thread, 32), self.div(self.thread, 32)
        self.ring, self.byte, self.threads = hopper._address(ring), self.mul(self.lane, 16), 32 * job.warps
        self.mine = self.add(self.ring, self.mul(self.thread, 16))

    def row(self, turn):
        """(row, whether there is one). Rows of one turn lie on all blocks: in the last one no multiprocessor has more than others."""
        row = self.add(self.mul(self.add(self.mul(turn, self.job.warps), self.warp), self.job.grid), self.block)
        return row, self.less(row, self.job.M)

    def inside(self, cut: Cut, i: int, live):
        """live, and piece i lies in the cut."""
        if (i + 1) * SEGMENT <= cut.size:
            return live
        return arith.andi(live, self.less(self.byte, cut.size - i * SEGMENT))

    def address(self, ref, cut: Cut, row):
        """Of the lane's first piece. Anew: LLVM would carry a pointer for every array around the loop."""
        return self.pointer(ref, self.element(self.anew(row), cut.pitch, self.add(self.byte, cut.start)), 1)

    def stage(self, turn):
        """Where the lane's pieces of a turn lie in SMEM, one every 16 bytes of all threads."""
        return self.add(self.mine, self.mul(self.rem(turn, self.job.stages), self.job.turn_bytes))

    def place(self, k: int, i: int) -> int:
        """Offset in a stage of piece i of the k-th cut copied."""
        return 16 * self.threads * (sum(cut.pieces for cut in self.job.copied[:k]) + i)

    def fill(self, refs, turn):
        """Starts the copies of a turn's rows: of zeros where there is no such row or column."""
        stage, (row, exists) = self.stage(turn), self.row(turn)
        for k, (ref, cut) in enumerate(zip(refs, self.job.copied, strict=True)):
            address = self.address(ref, cut, row)
            for i in range(cut.pieces):
                self.copy16((stage, self.place(k, i)), address, i * SEGMENT, self.inside(cut, i, exists))
        self.commit()

    def read(self, stage, k: int, i: int):
        """Piece i of the k-th cut copied, in float32."""
        return self.floats(self.shared16(stage, self.place(k, i)), self.job.dtype)

    def scale(self, ref, cut: Cut):
        """The lane's share of a scale, by piece; zeros past the last column."""
        def piece(i):
            live = self.less(self.byte, cut.size - i * SEGMENT)
            columns = (self.add(self.mul(self.lane, self.job.width), i * 32 * self.job.width + k) for k in range(0, self.job.width, 4))
            words = (self.load(self.pointer(ref, arith.extsi(self.i64, column), 4), 4, live) for column in columns)
            return [self.to_float(word) for four in words for word in four]

        return [piece(i) for i in range(cut.pieces)]

    def store16(self, address, cut: Cut, i: int, words, live):
        self.store(arith.addi(address, arith.constant(self.i64, i * SEGMENT)), words, self.inside(cut, i, live))

    def inverse_rms(self, squares, cut: Cut):
        mean = math.fma(squares, self.float(self.job.itemsize / cut.size), self.float(self.job.eps))
        return self.asm(self.f32, "rsqrt.approx.f32 $0, $1;", [mean], "=f,f", False)


def _forward_row(e: CutEmit, turn, scales, outputs, carry):
    job, stage, (row, exists) = e.job, e.stage(turn), e.row(turn)
    values = [[e.read(stage, k, i) for i in range(len(scale))] for k, scale in enumerate(scales)]
    squares = [functools.reduce(lambda sum, x: math.fma(x, x, sum), [x for piece in x for x in piece], e.float(0.0)) for x in values]
    for x, scale, total, cut, ref in zip(values, scales, e.across(squares, 32), job.apart, outputs, strict=False):  # but the rest
        r, to = e.inverse_rms(total, cut), e.address(ref, cut, row)
        for i, piece in enumerate(x):
            out = [arith.mulf(arith.mulf(v, r), s) for v, s in zip(piece, scale[i], strict=True)]
            e.store16(to, cut, i, e.words(out, job.dtype), exists)
    return carry


def _backward_row(e: CutEmit, turn, scales, outputs, d_scale):
    job, stage, (row, exists), zero = e.job, e.stage(turn), e.row(turn), e.float(0.0)
    n, d_y, sums, done = len(scales), outputs[0], [], []
    for k, scale in enumerate(scales):
        squares, dot = zero, zero
        for i, of in enumerate(scale):
            for s, x, g in zip(of, e.read(stage, k, i), e.read(stage, n + k, i), strict=True):
                squares, dot = math.fma(x, x, squares), math.fma(x, arith.mulf(g, s), dot)
        sums += [squares, dot]
    sums, before = e.across(sums, 32), iter(d_scale)
    for k, scale in enumerate(scales):
        cut = job.joint[k]
        r = arith.select(exists, e.inverse_rms(sums[2 * k], cut), zero)  # no row adds nothing, whatever eps
        mean, to = arith.mulf(arith.mulf(sums[2 * k + 1], r), e.float(-job.itemsize / cut.size)), e.address(d_y, cut, row)
        for i, of in enumerate(scale):
            out = []
            for s, x, g in zip(of, e.read(stage, k, i), e.read(stage, n + k, i), strict=True):
                normed = arith.mulf(x, r)
                done.append(math.fma(g, normed, next(before)))
                out.append(arith.mulf(math.fma(normed, mean, arith.mulf(g, s)), r))
            e.store16(to, cut, i, e.words(out, job.dtype), exists)
    e.store16(e.address(d_y, job.joint[n], row), job.joint[n], 0, e.shared16(stage, e.place(2 * n, 0)), exists)
    return done


def _walk(e: CutEmit, scales, operands, outputs):
    job, row_of = e.job, _backward_row if e.job.backward else _forward_row
    operands = operands[:1] * len(scales) + operands[1:]
    for turn in range(job.stages):
        e.fill(operands, e.int(turn))
    scales = [e.scale(ref, cut) for ref, cut in zip(scales, job.joint, strict=False)]

    @utils.fori(e.int(job.turns), [e.float(0.0)] * (job.columns if job.backward else 0))
    def walk(turn, carry):
        e.filled(job.stages - 1)
        carry = row_of(e, turn, scales, outputs, carry)
        e.fill(operands, e.add(turn, job.stages))
        return carry

    e.filled(0)
    if job.backward:
        _store_partials(e, walk.results, outputs[1])


def _store_partials(e: CutEmit, d_scale, partials):
    """Sums over the block's warps, where a lane's pieces were: a line of partials."""
    job, wider = e.job, e.job.width // 4
    for quad in range(job.columns // 4):
        four = d_scale[4 * quad:4 * quad + 4]
        e.void(f"st.shared.v4.f32 [$0 + {16 * e.threads * quad}], {{$1, $2, $3, $4}};", [e.mine, *four], "r,f,f,f,f,~{memory}")
    e.barrier()
    before = 0  # quads of a lane of earlier cuts
    for n, width in enumerate(job.widths):
        for first in range(0, width // 4, e.threads):
            quad = e.add(e.thread, first)  # of the cut's columns
            live = e.less(quad, width // 4)
            with utils.when(live):
                of_lane = e.add(e.mul(e.div(quad, 32 * wider), wider), e.rem(quad, wider), before)
                at = e.add(e.ring, e.mul(of_lane, 16 * e.threads), e.mul(e.rem(e.div(quad, wider), 32), 16))
                warps = ([e.to_float(w) for w in e.shared16(at, SEGMENT * warp)] for warp in range(job.warps))
                total = functools.reduce(lambda a, b: [arith.addf(x, y) for x, y in zip(a, b, strict=True)], warps)
                column = e.add(e.mul(quad, 4), sum(job.widths[:n]))
                e.store(e.pointer(partials, e.element(e.block, sum(job.widths), column), 4), [e.bits(v) for v in total], live)
        before += job.joint[n].pieces * wider


@functools.partial(jax.jit, static_argnums=0)  # traced and compiled once a shape, however often a model calls it
def run(job: Job, scales: tuple[jax.Array, ...], *operands: jax.Array):
    """Forward: scales, y -> normed of each. Backward: scales, y, a gradient of each and of the rest -> d_y, partial sums of the gradients
    of all scales, side by side, f32 [grid, D1 + D2 + ...]."""
    wide = sum(job.widths)
    if job.backward:
        shapes = ((job.M, wide + job.rest), job.dtype), ((job.grid, wide), "float32")
    else:
        shapes = tuple(((job.M, width), job.dtype) for width in job.widths)
    n, last = len(scales), len(scales) + len(operands)

    def inner(ctx, block, *refs):
        _walk(CutEmit(job, block.registers.item(), refs[-1]), refs[:n], refs[n:last], refs[last:-1])

    def body(*refs):
        plgpu.inline_mgpu(arg_types=(SCALAR,) + (REF,) * len(refs))(inner)(lax.axis_index("grid"), *refs)

    name = "latent_norm_backward" if job.backward else "latent_norm"
    scratch = (plgpu.SMEM((job.stages * job.turn_bytes // 4,), jnp.int32),)
    out = tuple(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape, dtype in shapes)
    return hopper.launch(body, (*scales, *operands), out, scratch, name=name, cluster=1, warpgroups=job.warps // 4, grid=job.grid)
