"""Rows between tokens and experts on Hopper, bound by memory: 16 bytes a lane, eight loads of a thread under way.

A warp takes a segment of 512 bytes of a few rows, one load each, so that it reads and writes whole lines and a dot product is
a shuffle away. It has the indices of all its rows in one load, a lane each. Blocks are many and short: 32 warps a
multiprocessor and more, at different places of index -> load -> store, hide the latency, and the tail is short. A token's row
is read once for each of its experts, far apart in time: all rows of a segment come before the next segment, so that those of
all tokens stay in L2. Wider segments were slower in a tuning script (docs/kernels.md). Everything is one `plgpu.inline_mgpu` body.
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
from pallas_kernels.emit import Emit

REF = plgpu.RefType()
SCALAR = plgpu.Layout.WG_SPLAT(())
WARPS = 8  # of a block
SEGMENT = 512  # bytes: 16 of each lane of a warp
FLIGHT = 8  # loads of 16 bytes a thread has under way: 32 registers of 64
FLOATS = ("bfloat16", "float16", "float32")
MOVED = (*FLOATS, "float8_e4m3fn", "float8_e5m2", "uint8", "int8", "uint16", "int16", "uint32", "int32")


@dataclasses.dataclass(frozen=True)
class Job:
    """What one launch does."""

    op: str  # gather, gather_sum, weighted_backward
    written: int  # rows
    addressed: int  # rows that an index may name
    D: int
    dtype: str
    choices: int = 1  # indices a row of gather_sum
    weights: str = ""  # their dtype, if any
    addends: int = 0  # of gather_sum

    @property
    def row_bytes(self) -> int:
        return self.D * jnp.dtype(self.dtype).itemsize

    @property
    def segments(self) -> int:
        return -(-self.row_bytes // SEGMENT)

    @property
    def rows(self) -> int:
        """Rows that a warp takes."""
        return dict(gather=FLIGHT, gather_sum=1, weighted_backward=FLIGHT // 2)[self.op]

    @property
    def tasks(self) -> int:
        """Warps."""
        return self.segments * -(-self.written // self.rows)


def unfit(job: Job) -> str:
    """Why the kernel does not take this job ('' when it does)."""
    if job.dtype not in (MOVED if job.op == "gather" else FLOATS):
        return f"no kernel reads {job.dtype}"
    if job.row_bytes % 16:
        return f"rows of {job.row_bytes} bytes: must be a multiple of 16"
    if job.weights not in ("", "float32"):
        return f"weights are {job.weights}: the kernel takes float32"
    if not 0 < job.choices <= 32:
        return f"{job.choices} rows to add: must be 1 to 32"
    return "" if job.written and job.addressed and job.D else "nothing to move"


class RowEmit(Emit):
    """A warp's share of the rows, and loads and stores of 16 bytes of it."""

    def __init__(self, job: Job, block):
        super().__init__()
        self.job = job
        thread = utils.thread_idx()
        self.lane = self.rem(thread, 32)
        task = self.add(self.mul(block, WARPS), self.div(thread, 32))
        if job.op == "gather_sum":  # a row's segments side by side: nothing is read twice
            group, self.segment = self.div(task, job.segments), self.rem(task, job.segments)
        else:
            self.segment, group = self.div(task, job.tasks // job.segments), self.rem(task, job.tasks // job.segments)
        self.first = self.mul(group, job.rows)
        self.byte = self.add(self.mul(self.segment, SEGMENT), self.mul(self.lane, 16))  # of the row

    def exists(self, row):
        """Whether there is such a row and (for a block past the last) segment."""
        return arith.andi(self.less(row, self.job.written), self.less(self.segment, self.job.segments))

    def mine(self, live):
        """live, and the row is wide enough for this lane."""
        return live if self.job.row_bytes % SEGMENT == 0 else arith.andi(live, self.less(self.byte, self.job.row_bytes))

    def names_a_row(self, index):
        return arith.cmpi(arith.CmpIPredicate.ult, index, self.int(self.job.addressed))

    def own(self, ref, element, live):
        """A 32-bit word of this lane."""
        return self.load(self.pointer(ref, element, 4), 1, live)[0]

    def of_lane(self, word, i: int):
        return self.shuffle(word, self.int(i), "idx")

    def address(self, ref, row):
        """Of this lane's first 16 bytes of a row."""
        return self.pointer(ref, self.element(row, self.job.row_bytes, self.byte), 1)

    def load16(self, ref, row, live):
        """This lane's four words of a row, zeros unless `live`. With effects: all loads that stand together stay together."""
        out = self.asm(
            llvm.StructType.get_literal([self.i32] * 4),
            "{\n.reg .pred p;\nsetp.ne.b32 p, $5, 0;\nmov.b32 $0, 0;\nmov.b32 $1, 0;\nmov.b32 $2, 0;\nmov.b32 $3, 0;\n"
            "@p ld.global.nc.L1::no_allocate.v4.b32 {$0, $1, $2, $3}, [$4];\n}",
            [self.address(ref, row), arith.extui(self.i32, self.mine(live))], "=&r,=&r,=&r,=&r,l,r")
        return [llvm.extractvalue(self.i32, out, [i]) for i in range(4)]

    def store16(self, ref, row, words, live, hint=""):
        self.store(self.address(ref, row), words, self.mine(live), hint)


def _own_indices(e: RowEmit, index, *others):
    """For each row of the warp (row, exists, index, names one); others: its words of further arrays. One load of each array."""
    mine = e.add(e.first, e.lane)
    live = arith.andi(e.exists(mine), e.less(e.lane, e.job.rows))
    words = [e.own(ref, arith.extsi(e.i64, mine), live) for ref in (index, *others)]
    for i in range(e.job.rows):
        row = e.add(e.first, i)
        exists, (source, *rest) = e.exists(row), (e.of_lane(w, i) for w in words)
        yield row, exists, source, arith.andi(exists, e.names_a_row(source)), *rest


def _gather(e: RowEmit, x, source, out):
    rows = list(_own_indices(e, source))
    words = [e.load16(x, token, real) for _, _, token, real in rows]
    for (row, exists, _, _), row_words in zip(rows, words, strict=True):
        e.store16(out, row, row_words, exists, ".cs")  # the source stays in L2, where it is read again


def _gather_sum(e: RowEmit, rows, position, *refs):
    *operands, out = refs
    weights, addends = (operands[:1], operands[1:]) if e.job.weights else ([], operands)
    choices, exists, totals = e.job.choices, e.exists(e.first), None
    live, element = arith.andi(exists, e.less(e.lane, choices)), e.element(e.first, choices, e.lane)
    own_row, own_weight = e.own(position, element, live), e.own(weights[0], element, live) if weights else None
    beside = [e.load16(addend, e.first, exists) for addend in addends]  # under way while the indices come
    for some in (range(k, min(k + FLIGHT, choices)) for k in range(0, choices, FLIGHT)):
        named = [e.of_lane(own_row, k) for k in some]
        words = [e.load16(rows, row, arith.andi(exists, e.names_a_row(row))) for row in named]
        for k, row_words in zip(some, words, strict=True):
            weight = e.to_float(e.of_lane(own_weight, k)) if weights else None
            values = e.floats(row_words, e.job.dtype)
            if totals is None:
                totals = [arith.mulf(v, weight) if weights else v for v in values]
            else:
                totals = [math.fma(v, weight, t) if weights else arith.addf(t, v) for v, t in zip(values, totals, strict=True)]
    for addend_words in beside:
        totals = [arith.addf(t, v) for t, v in zip(totals, e.floats(addend_words, e.job.dtype), strict=True)]
    e.store16(out, e.first, e.words(totals, e.job.dtype), exists)


def _weighted_backward(e: RowEmit, g, rows, source, weights, d_rows, dots):
    mine = list(_own_indices(e, source, weights))
    words = [(e.load16(g, token, real), e.load16(rows, row, real)) for row, _, token, real, _ in mine]
    for (row, exists, _, real, weight), both in zip(mine, words, strict=True):
        dot, (of_g, of_row) = e.float(0.0), (e.floats(w, e.job.dtype) for w in both)
        weight = arith.select(real, e.to_float(weight), e.float(0.0))
        for a, b in zip(of_g, of_row, strict=True):
            dot = math.fma(a, b, dot)
        e.store16(d_rows, row, e.words([arith.mulf(v, weight) for v in of_g], e.job.dtype), exists)
        line = e.pointer(dots, e.element(e.segment, e.job.written, row), 4)
        e.store(line, [e.bits(*e.across([dot], 32))], arith.andi(exists, e.less(e.lane, 1)))


BODIES = {"gather": _gather, "gather_sum": _gather_sum, "weighted_backward": _weighted_backward}


@functools.partial(jax.jit, static_argnums=0)  # traced and compiled once a shape, however often a model calls it
def move(job: Job, *operands: jax.Array):
    """gather: x, source -> rows. gather_sum: rows, position(, weights)(, addends) -> x. weighted_backward: g, rows, source, weights ->
    (d_rows, dots f32 [segments, P], to be added)."""
    out = [jax.ShapeDtypeStruct((job.written, job.D), jnp.dtype(job.dtype))]
    if job.op == "weighted_backward":
        out.append(jax.ShapeDtypeStruct((job.segments, job.written), jnp.float32))

    def inner(ctx, block, *refs):
        BODIES[job.op](RowEmit(job, block.registers.item()), *refs)

    def body(*refs):
        plgpu.inline_mgpu(arg_types=(SCALAR,) + (REF,) * len(refs))(inner)(lax.axis_index("grid"), *refs)

    return hopper.launch(body, operands, tuple(out), (), name=job.op, cluster=1, warpgroups=WARPS // 4, grid=-(-job.tasks // WARPS))
