"""RMSNorm on Hopper, bound by memory: each byte read once and written once, about 100 KB a multiprocessor always on their way.

One block of 16 warps a multiprocessor walks the rows. A row is a team's: a warp's up to 2 KiB, above that 2, 4, 8 or 16 warps' whose
sums meet in shared memory. Lanes copy their own pieces of 16 bytes of the rows of the next turns to SMEM (cp.async), and read
nothing but these: no barrier stands between copy and use, and what a turn needs costs no registers before its use. The backward
adds the gradient of the scale for a lane's own columns in registers; at its end a block writes one line of partial sums, for XLA
to add. Everything is one `plgpu.inline_mgpu` body.
"""
import dataclasses
import functools

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
WARPS = 16  # of a block
THREADS = 32 * WARPS
PIECES = 4  # of 16 bytes, at most, that a lane has of each operand in a turn
COPIES = 6  # operands times turns that fit into SMEM, 32 KiB each
SEGMENT = 512  # bytes: 16 of each lane of a warp
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
        return self.D * jnp.dtype(self.dtype).itemsize

    @property
    def team(self) -> int:
        """Warps of a row, a power of two."""
        return 1 << (-(-self.row_bytes // (PIECES * SEGMENT)) - 1).bit_length()

    @property
    def pieces(self) -> int:
        """Of a row, a lane."""
        return -(-self.row_bytes // (self.team * SEGMENT))

    @property
    def columns(self) -> int:
        """Of a team's pieces: D or more."""
        return 32 * self.team * self.pieces * self.width

    @property
    def rows(self) -> int:
        """Of a team, a turn."""
        return PIECES // self.pieces

    @property
    def operands(self) -> int:
        """Of the size of x."""
        return 1 + self.backward + self.added

    @property
    def stages(self) -> int:
        """Turns whose rows are in SMEM or on their way there."""
        return COPIES // self.operands

    @property
    def steps(self) -> int:
        """Turns of all blocks together."""
        return -(-self.M // (WARPS // self.team * self.rows))

    @property
    def grid(self) -> int:
        return min(self.steps, MULTIPROCESSORS)


def unfit(job: Job, scale: str) -> str:
    """Why the kernel does not take this job ('' when it does)."""
    if job.dtype not in DTYPES or scale != "float32":
        return f"no kernel reads rows of {job.dtype} with a scale of {scale}"
    if not job.M or not job.D:
        return "nothing to do"
    if job.row_bytes % 16 or job.team > WARPS:
        return f"rows of {job.row_bytes} bytes: must be a multiple of 16 up to {WARPS * PIECES * SEGMENT}"
    return ""


class NormEmit(Emit):
    """A lane's share of the rows: piece i of a row is the 16 bytes at `byte` + i * `pitch`."""

    def __init__(self, job: Job, block, sums, ring, staged):
        super().__init__()
        self.job, self.block = job, block
        self.sums, self.ring, self.staged = map(hopper._address, (sums, ring, staged))
        self.thread = utils.thread_idx()
        self.lane, self.warp = self.rem(self.thread, 32), self.div(self.thread, 32)
        self.byte = self.mul(self.rem(self.thread, 32 * job.team), 16)
        self.pitch = SEGMENT * job.team

    def rows(self, turn):
        """[(row, whether there is one)] of this team."""
        step = self.add(self.mul(turn, self.job.grid), self.block)
        team = self.add(self.mul(step, WARPS // self.job.team), self.div(self.warp, self.job.team))
        rows = [self.add(self.mul(team, self.job.rows), n) for n in range(self.job.rows)]
        return [(row, self.less(row, self.job.M)) for row in rows]

    def inside(self, i: int, live):
        """live, and piece i of this lane lies in the row."""
        if (i + 1) * self.pitch <= self.job.row_bytes:
            return live
        return arith.andi(live, self.less(self.byte, self.job.row_bytes - i * self.pitch))

    def address(self, ref, row):
        """Of this lane's first piece. Anew: LLVM would carry a pointer for every operand around the loop."""
        return self.pointer(ref, self.element(self.anew(row), self.job.row_bytes, self.byte), 1)

    def place(self, turn, operand: int, n: int, i: int):
        """(address, offset) in SMEM of piece i of row n of a turn."""
        of_stage = 16 * THREADS * self.job.operands * self.job.rows * self.job.pieces
        address = self.add(self.ring, self.mul(self.thread, 16), self.mul(self.rem(turn, self.job.stages), of_stage))
        return address, 16 * THREADS * ((operand * self.job.rows + n) * self.job.pieces + i)

    def fill(self, refs, turn):
        """Starts the copies of a turn's rows."""
        for operand, ref in enumerate(refs):
            for n, (row, exists) in enumerate(self.rows(turn)):
                address = self.address(ref, row)
                for i in range(self.job.pieces):
                    self.copy16(self.place(turn, operand, n, i), address, i * self.pitch, self.inside(i, exists))
        self.commit()

    def fill_scale(self, ref):
        """As `scale` reads it. Zeros past the last column: what lanes outside the row have is zero too, and must stay so."""
        lanes, wider = 32 * self.job.team, self.job.width // 4
        for first in range(0, self.job.columns // 4, THREADS):
            four = self.add(self.thread, first)  # columns
            part = self.add(self.mul(self.div(four, lanes * wider), wider), self.rem(four, wider))
            place = self.add(self.mul(part, lanes), self.rem(self.div(four, wider), lanes))
            with utils.when(self.less(four, self.job.columns // 4)):
                at = self.pointer(ref, arith.extsi(self.i64, four), 16)
                self.copy16((self.add(self.staged, self.mul(place, 16)), 0), at, 0, self.less(four, self.job.D // 4))
        self.commit()

    def scale(self, i: int):
        """Of the columns of piece i: its first four of all lanes, then (rows of two bytes a column) its last four. No bank conflicts."""
        at, wider = self.add(self.staged, self.byte), self.job.width // 4
        return [self.to_float(w) for k in range(wider) for w in self.shared16(at, self.pitch * (i * wider + k))]

    def read(self, turn, n: int, i: int, operands: int):
        """Piece i of row n of the first operands, in float32."""
        return [self.floats(self.shared16(*self.place(turn, operand, n, i)), self.job.dtype) for operand in range(operands)]

    def store16(self, address, i: int, words, live):
        self.store(arith.addi(address, arith.constant(self.i64, i * self.pitch)), words, self.inside(i, live))

    def total(self, turn, *values):
        """One or two sums over the team."""
        values, team = self.across(values, 32), self.job.team
        if team > 1:
            first = self.add(self.sums, self.mul(self.rem(turn, 2), 8 * WARPS))  # those of the last turn may still be read
            mine = self.div(self.warp, team)
            self.void("{\n.reg .pred p;\nsetp.eq.b32 p, $1, 0;\n@p st.shared.v2.f32 [$0], {$2, $3};\n}",
                      [self.add(first, self.mul(self.warp, 8)), self.lane, values[0], values[-1]], "r,r,f,f,~{memory}")
            self.void(f"bar.sync $0, {32 * team};", [self.add(mine, 1)], "r,~{memory}")
            warp = self.add(self.mul(mine, team), self.rem(self.lane, team))
            words = self.load_shared(self.add(first, self.mul(warp, 8)), 2)
            values = self.across([self.to_float(w) for w in words[:len(values)]], team)
        return values

    def inverse_rms(self, squares):
        mean = math.fma(squares, self.float(1 / self.job.D), self.float(self.job.eps))
        return self.asm(self.f32, "rsqrt.approx.f32 $0, $1;", [mean], "=f,f", False)


def _forward_row(e: NormEmit, turn, n, row, exists, outputs, carry):
    *total, normed = outputs
    squares, values = e.float(0.0), []
    for i in range(e.job.pieces):
        x, *delta = e.read(turn, n, i, e.job.operands)
        if delta:
            words = e.words([arith.addf(a, b) for a, b in zip(x, delta[0], strict=True)], e.job.dtype)
            e.store16(e.address(total[0], row), i, words, exists)
            x = e.floats(words, e.job.dtype)
        for v in x:
            squares = math.fma(v, v, squares)
        values.append(x)
    r, to = e.inverse_rms(*e.total(turn, squares)), e.address(normed, row)
    for i, x in enumerate(values):
        out = [arith.mulf(arith.mulf(v, r), s) for v, s in zip(x, e.scale(i), strict=True)]
        e.store16(to, i, e.words(out, e.job.dtype), exists)
    return carry


def _backward_row(e: NormEmit, turn, n, row, exists, outputs, d_scale):
    job, zero = e.job, e.float(0.0)
    squares, dot, d_scale = zero, zero, list(d_scale)
    for i in range(job.pieces):
        for scale, x, g in zip(e.scale(i), *e.read(turn, n, i, 2), strict=True):
            squares, dot = math.fma(x, x, squares), math.fma(x, arith.mulf(g, scale), dot)
    squares, dot = e.total(turn, squares, dot)
    r = arith.select(exists, e.inverse_rms(squares), zero)  # no row adds nothing, whatever eps
    mean, to = arith.mulf(arith.mulf(dot, r), e.float(-1 / job.D)), e.address(outputs[0], row)
    for i in range(job.pieces):
        out = []
        columns = zip(e.scale(i), *e.read(turn, n, i, job.operands), strict=True)
        for k, (scale, x, g, *d_total) in enumerate(columns, i * job.width):
            normed = arith.mulf(x, r)
            d_scale[k] = math.fma(g, normed, d_scale[k])
            out.append(math.fma(math.fma(normed, mean, arith.mulf(g, scale)), r, d_total[0] if d_total else zero))
        e.store16(to, i, e.words(out, job.dtype), exists)
    return d_scale


def _walk(e: NormEmit, operands, scale, outputs):
    job, row_of = e.job, _backward_row if e.job.backward else _forward_row
    e.fill_scale(scale)
    for turn in range(job.stages):
        e.fill(operands, e.int(turn))
    e.filled(job.stages)
    e.barrier()

    @utils.fori(e.int(-(-job.steps // job.grid)), [e.float(0.0)] * (job.pieces * job.width if job.backward else 0))
    def walk(turn, carry):
        e.filled(job.stages - 1)
        for n, row in enumerate(e.rows(turn)):
            carry = row_of(e, turn, n, *row, outputs, carry)
        e.fill(operands, e.add(turn, job.stages))
        return carry

    e.filled(0)
    if job.backward:
        _store_partials(e, walk.results, outputs[1])


def _store_partials(e: NormEmit, d_scale, partials):
    """Sums over the block's teams, a piece after the other, where the rows were: a line of partials."""
    quads = 32 * e.job.team * e.job.width // 4  # groups of four columns in a piece of a team
    mine = e.add(e.ring, e.mul(e.thread, 4 * e.job.width))
    for i in range(e.job.pieces):
        e.barrier()
        for k in range(0, e.job.width, 4):
            four = d_scale[i * e.job.width + k:][:4]
            e.void("st.shared.v4.f32 [$0], {$1, $2, $3, $4};", [e.add(mine, 4 * k), *four], "r,f,f,f,f,~{memory}")
        e.barrier()
        for first in range(0, quads, THREADS):
            quad = e.add(e.thread, first)
            at, column = e.add(e.ring, e.mul(e.rem(quad, quads), 16)), e.add(e.mul(quad, 4), 4 * quads * i)
            teams = ([e.to_float(w) for w in e.shared16(at, 16 * quads * team)] for team in range(WARPS // e.job.team))
            total = functools.reduce(lambda a, b: [arith.addf(x, y) for x, y in zip(a, b, strict=True)], teams)
            live = arith.andi(e.less(quad, quads), e.less(column, e.job.D))
            e.store(e.pointer(partials, e.element(e.block, e.job.D, column), 4), [e.bits(v) for v in total], live)


@functools.partial(jax.jit, static_argnums=0)  # traced and compiled once a shape, however often a model calls it
def run(job: Job, scale: jax.Array, *operands: jax.Array):
    """Forward: scale, x(, delta) -> (total,) normed. Backward: scale, x, g(, d_total) -> dx, partial sums of d_scale f32 [grid, D]."""
    rows = jax.ShapeDtypeStruct((job.M, job.D), jnp.dtype(job.dtype))
    if job.backward:
        out = rows, jax.ShapeDtypeStruct((job.grid, job.D), jnp.float32)
    else:
        out = (rows,) * (1 + job.added)
    scratch = (plgpu.SMEM((2 * 2 * WARPS,), jnp.float32), plgpu.SMEM((COPIES * PIECES * THREADS * 4,), jnp.int32),
               plgpu.SMEM((job.columns,), jnp.float32))

    def inner(ctx, block, scale, *refs):
        rows, smem = refs[:-3], refs[-3:]
        _walk(NormEmit(job, block.registers.item(), *smem), rows[:job.operands], scale, rows[job.operands:])

    def body(*refs):
        plgpu.inline_mgpu(arg_types=(SCALAR,) + (REF,) * len(refs))(inner)(lax.axis_index("grid"), *refs)

    name = "rms_norm_backward" if job.backward else "rms_norm"
    return hopper.launch(body, (scale, *operands), out, scratch, name=name, cluster=1, warpgroups=WARPS // 4, grid=job.grid)
