"""RMSNorm on Hopper, bound by memory: 16 bytes a lane, all loads of a row under way, each byte read once and written once.

A row lies in the registers of a warp, or of 2, 4, 8 or 16 (a team) above 2 KiB, whose sums meet in shared memory: at most four
pieces of 16 bytes a lane of each operand, packed as they came and unpacked where they are used. The forward has a row (several
narrow ones) a team and many short blocks. The backward has one block of 16 warps a multiprocessor that walks the rows: each lane
adds the gradient of the scale for its own columns in registers, and a block writes one line of partial sums at its end, for XLA
to add. The scale is read anew for each row, from L1. Everything is one `plgpu.inline_mgpu` body.
"""
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith, llvm, math

from pallas_kernels import hopper
from pallas_kernels.quantize.emit import Emit

REF = plgpu.RefType()
SCALAR = plgpu.Layout.WG_SPLAT(())
PIECES = 4  # of 16 bytes that a lane has of each operand: 16 registers
SEGMENT = 512  # bytes: 16 of each lane of a warp
MULTIPROCESSORS = 132
DTYPES = ("bfloat16", "float16", "float32")


@dataclasses.dataclass(frozen=True)
class Job:
    """What one launch does."""

    backward: bool
    M: int
    D: int
    dtype: str
    eps: float
    added: bool  # delta is added to x (backward: d_total to the gradient)

    @property
    def width(self) -> int:
        """Columns of a piece."""
        return 16 // jnp.dtype(self.dtype).itemsize

    @property
    def row_bytes(self) -> int:
        return 16 * self.D // self.width

    @property
    def segments(self) -> int:
        return -(-self.row_bytes // SEGMENT)

    @property
    def team(self) -> int:
        """Warps of a row, a power of two."""
        return 1 << (-(-self.segments // PIECES) - 1).bit_length()

    @property
    def pieces(self) -> int:
        """Of a lane of a team."""
        return -(-self.segments // self.team)

    @property
    def rows(self) -> int:
        """Of a team at once."""
        return PIECES // self.pieces

    @property
    def warps(self) -> int:
        """Of a block."""
        return 16 if self.backward else max(8, self.team)

    @property
    def steps(self) -> int:
        """Times that a block's worth of rows is taken, by all blocks together."""
        return -(-self.M // (self.warps // self.team * self.rows))

    @property
    def grid(self) -> int:
        return min(self.steps, MULTIPROCESSORS) if self.backward else self.steps


def unfit(job: Job, scale: str) -> str:
    """Why the kernel does not take this job ('' when it does)."""
    if job.dtype not in DTYPES or scale != "float32":
        return f"no kernel reads rows of {job.dtype} with a scale of {scale}"
    if job.D * jnp.dtype(job.dtype).itemsize % 16:
        return f"rows of {job.D} {job.dtype}: must be a multiple of 16 bytes"
    if job.team > 16:
        return f"rows of {job.row_bytes} bytes: must be {16 * PIECES * SEGMENT} at most"
    return "" if job.M and job.D else "nothing to do"


class NormEmit(Emit):
    """A lane's share of a row: piece i is the 16 bytes at `byte` + i * `pitch`."""

    def __init__(self, job: Job, block, sums):
        super().__init__()
        self.job, self.block, self.sums = job, block, hopper._address(sums)
        self.thread = utils.thread_idx()
        self.lane, self.warp = self.rem(self.thread, 32), self.div(self.thread, 32)
        self.byte = self.mul(self.rem(self.thread, 32 * job.team), 16)
        self.pitch = SEGMENT * job.team

    def rows(self, step):
        """[(row, whether there is one)] of this team."""
        team = self.add(self.mul(step, self.job.warps // self.job.team), self.div(self.warp, self.job.team))
        rows = [self.add(self.mul(team, self.job.rows), i) for i in range(self.job.rows)]
        return [(row, self.less(row, self.job.M)) for row in rows]

    def inside(self, i: int, live=None):
        """live, and piece i of this lane lies in the row."""
        if (i + 1) * self.pitch > self.job.row_bytes:
            inside = self.less(self.byte, self.job.row_bytes - i * self.pitch)
            return inside if live is None else arith.andi(live, inside)
        return self.less(self.int(0), 1) if live is None else live

    def address(self, ref, row, i: int):
        return self.pointer(ref, self.element(row, self.job.row_bytes, self.add(self.byte, i * self.pitch)), 1)

    def load16(self, address, live, how=".L1::no_allocate"):
        """Four words, zeros unless `live`. With effects: all loads that stand together stay together."""
        out = self.asm(
            llvm.StructType.get_literal([self.i32] * 4),
            "{\n.reg .pred p;\nsetp.ne.b32 p, $5, 0;\nmov.b32 $0, 0;\nmov.b32 $1, 0;\nmov.b32 $2, 0;\nmov.b32 $3, 0;\n"
            f"@p ld.global.nc{how}.v4.b32 {{$0, $1, $2, $3}}, [$4];\n}}", [address, arith.extui(self.i32, live)], "=&r,=&r,=&r,=&r,l,r")
        return [llvm.extractvalue(self.i32, out, [i]) for i in range(4)]

    def load_row(self, ref, row, live):
        return [self.load16(self.address(ref, row, i), self.inside(i, live)) for i in range(self.job.pieces)]

    def store_piece(self, ref, row, i: int, words, live):
        self.store(self.address(ref, row, i), words, self.inside(i, live))

    def scale(self, ref, i: int):
        """The scale of this lane's columns of piece i."""
        at = self.pointer(ref, arith.extsi(self.i64, self.div(self.add(self.byte, i * self.pitch), 16)), 4 * self.job.width)
        parts = [arith.addi(at, arith.constant(self.i64, 16 * k)) for k in range(self.job.width // 4)]
        return [self.to_float(w) for part in parts for w in self.load16(part, self.inside(i), "")]

    def unpack(self, words):
        """Anew: unpacked once for all uses they would stay so, in twice the registers."""
        return self.floats([self.anew(w) for w in words], self.job.dtype)

    def pack(self, values):
        if self.job.dtype == "float32":
            return [self.bits(v) for v in values]
        half = "bf16x2" if self.job.dtype == "bfloat16" else "f16x2"
        return [self.asm(self.i32, f"cvt.rn.{half}.f32 $0, $2, $1;", [lo, hi], "=r,f,f", False)
                for lo, hi in zip(values[::2], values[1::2], strict=True)]

    def inverse_rms(self, squares):
        mean = math.fma(squares, self.float(1 / self.job.D), self.float(self.job.eps))
        return self.asm(self.f32, "rsqrt.approx.f32 $0, $1;", [mean], "=f,f", False)

    def across(self, values, lanes: int):
        """Each summed over groups of so many lanes, which all get the same bits."""
        while lanes := lanes // 2:
            others = [self.to_float(self.shuffle(self.bits(v), self.int(lanes), "bfly")) for v in values]
            values = [arith.addf(v, other) for v, other in zip(values, others, strict=True)]
        return values

    def total(self, values, turn):
        """Each (two at most, for a team of several warps) summed over the team."""
        values = self.across(values, 32)
        if self.job.team == 1:
            return values
        first = self.add(self.sums, self.mul(self.rem(turn, 2), 8 * self.job.warps))  # the turn before is still being read
        self.void("{\n.reg .pred p;\nsetp.eq.b32 p, $1, 0;\n@p st.shared.v2.f32 [$0], {$2, $3};\n}",
                  [self.add(first, self.mul(self.warp, 8)), self.lane, values[0], values[-1]], "r,r,f,f,~{memory}")
        team = self.div(self.warp, self.job.team)
        self.void(f"bar.sync $0, {32 * self.job.team};", [self.add(team, 1)], "r,~{memory}")
        warp = self.add(self.mul(team, self.job.team), self.rem(self.lane, self.job.team))
        words = self.load_shared(self.add(first, self.mul(warp, 8)), 2)
        return self.across([self.to_float(w) for w in words[:len(values)]], self.job.team)


def _squares(e: NormEmit, row):
    """This lane's sum of squares of a row in pieces."""
    total = e.float(0.0)
    for words in row:
        for x in e.unpack(words):
            total = math.fma(x, x, total)
    return total


def _forward(e: NormEmit, x, *refs):
    delta, scale, total, normed = refs if e.job.added else (None, refs[0], None, refs[1])
    rows = e.rows(e.block)
    words = [e.load_row(x, *row) for row in rows]
    if e.job.added:
        others = [e.load_row(delta, *row) for row in rows]
        for n, (row, exists) in enumerate(rows):
            for i, other in enumerate(others[n]):
                both = zip(e.unpack(words[n][i]), e.unpack(other), strict=True)
                words[n][i] = e.pack([arith.addf(a, b) for a, b in both])
                e.store_piece(total, row, i, words[n][i], exists)
    squares = e.total([_squares(e, row_words) for row_words in words], e.int(0))
    for (row, exists), row_words, sum_ in zip(rows, words, squares, strict=True):
        r = e.inverse_rms(sum_)
        for i, piece in enumerate(row_words):
            values = zip(e.unpack(piece), e.scale(scale, i), strict=True)
            e.store_piece(normed, row, i, e.pack([arith.mulf(arith.mulf(v, r), s) for v, s in values]), exists)


def _backward(e: NormEmit, x, scale, g, *refs):
    *d_total, dx, partials, columns = refs
    job, zero = e.job, e.float(0.0)

    def one_row(row, exists, x_row, g_row, more, d_scale, turn):
        squares, dot = _squares(e, x_row), zero
        for i, pieces in enumerate(zip(x_row, g_row, strict=True)):
            for a, b, s in zip(*map(e.unpack, pieces), e.scale(scale, i), strict=True):
                dot = math.fma(a, arith.mulf(b, s), dot)
        squares, dot = e.total([squares, dot], turn)
        r = arith.select(exists, e.inverse_rms(squares), zero)  # no row adds nothing, whatever eps
        mean = arith.mulf(arith.mulf(dot, r), e.float(-1 / job.D))
        for i, pieces in enumerate(zip(x_row, g_row, strict=True)):
            out, rest = [], e.unpack(more[i]) if more else [zero] * job.width
            for k, (a, b, s, c) in enumerate(zip(*map(e.unpack, pieces), e.scale(scale, i), rest, strict=True)):
                normed = arith.mulf(a, r)
                d_scale[i * job.width + k] = math.fma(b, normed, d_scale[i * job.width + k])
                out.append(math.fma(math.fma(normed, mean, arith.mulf(b, s)), r, c))
            e.store_piece(dx, row, i, e.pack(out), exists)

    @utils.fori(e.int(-(-job.steps // job.grid)), [zero] * (job.pieces * job.width))
    def walk(turn, d_scale):
        rows, d_scale = e.rows(e.add(e.mul(turn, job.grid), e.block)), list(d_scale)
        x_rows, g_rows, *more = ([e.load_row(ref, *row) for row in rows] for ref in (x, g, *d_total))
        for n, row in enumerate(rows):
            one_row(*row, x_rows[n], g_rows[n], more[0][n] if more else None, d_scale, turn)
        return d_scale

    _store_partials(e, walk.results, partials, hopper._address(columns))


def _store_partials(e: NormEmit, d_scale, partials, columns):
    """Sums over the block's teams, one piece after the other: a row of partials."""
    job, threads = e.job, 32 * e.job.warps
    quads = 32 * job.team * job.width // 4  # groups of four columns in a piece of the team
    for i in range(job.pieces):
        for k in range(0, job.width, 4):
            e.void("st.shared.v4.f32 [$0], {$1, $2, $3, $4};",
                   [e.add(columns, e.mul(e.thread, 4 * job.width), 4 * k), *d_scale[i * job.width + k:][:4]], "r,f,f,f,f,~{memory}")
        e.barrier()
        for first in range(0, quads, threads):
            quad, total = e.add(e.thread, first), None
            for team in range(job.warps // job.team):
                inside = e.add(e.mul(e.rem(quad, quads), 16), 16 * quads * team)
                words = [e.to_float(w) for w in e.load_shared(e.add(columns, inside), 4)]
                total = words if total is None else [arith.addf(a, b) for a, b in zip(total, words, strict=True)]
            column = e.add(e.mul(quad, 4), 4 * quads * i)
            live = arith.andi(e.less(quad, quads), e.less(column, job.D))
            e.store(e.pointer(partials, e.element(e.block, job.D, column), 4), [e.bits(v) for v in total], live)
        e.barrier()


@functools.partial(jax.jit, static_argnums=0)  # traced and compiled once a shape, however often a model calls it
def run(job: Job, *operands: jax.Array):
    """Forward: x(, delta), scale -> (total,) normed. Backward: x, scale, g(, d_total) -> dx, partial sums of d_scale f32 [grid, D]."""
    rows = jax.ShapeDtypeStruct((job.M, job.D), jnp.dtype(job.dtype))
    scratch = [plgpu.SMEM((4 * job.warps,), jnp.float32)]
    if job.backward:
        out = rows, jax.ShapeDtypeStruct((job.grid, job.D), jnp.float32)
        scratch.append(plgpu.SMEM((32 * job.warps * job.width,), jnp.float32))
    else:
        out = (rows,) * (2 if job.added else 1)

    def inner(ctx, block, sums, *refs):
        (_backward if job.backward else _forward)(NormEmit(job, block.registers.item(), sums), *refs)

    def body(*refs):
        sums = len(operands) + len(out)
        refs = (refs[sums], *refs[:sums], *refs[sums + 1:])
        plgpu.inline_mgpu(arg_types=(SCALAR,) + (REF,) * len(refs))(inner)(lax.axis_index("grid"), *refs)

    name = "rms_norm_backward" if job.backward else "rms_norm"
    return hopper.launch(body, operands, out, tuple(scratch), name=name, cluster=1, warpgroups=job.warps // 4, grid=job.grid)
