"""Rows between tokens and experts on Hopper, bound by memory: 16 bytes a lane, eight loads of a thread under way.

A warp takes a segment of a few rows: 512 bytes a load, so that it reads and writes whole lines and a dot product is a
shuffle away. It has the indices of all its rows in one load, a lane each. Blocks are many and short: 32 warps a
multiprocessor and more, at different places of index -> load -> store, hide the latency, and the tail is short.
The order of blocks and the width of a segment are `tuned.pick`'s. Everything is one `plgpu.inline_mgpu` body.
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
from pallas_kernels.rows import tuned
from pallas_kernels.rows.tuned import CHUNK, FLIGHT

REF = plgpu.RefType()
SCALAR = plgpu.Layout.WG_SPLAT(())
WARPS = 8  # of a block
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

    @property
    def row_bytes(self) -> int:
        return self.D * jnp.dtype(self.dtype).itemsize


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
    """Loads and stores of 16 bytes at a constant distance from an address, and a warp's share of the rows."""

    def __init__(self, job: Job, tuning: tuned.Tuning, block):
        super().__init__()
        self.job, self.tuning = job, tuning
        thread = utils.thread_idx()
        self.lane = self.rem(thread, 32)
        task = self.add(self.mul(block, WARPS), self.div(thread, 32))
        if job.op == "gather_sum":  # a row's segments side by side: nothing is read twice
            group, self.segment = self.div(task, segments(job, tuning)), self.rem(task, segments(job, tuning))
        else:
            self.segment, group = self.div(task, groups(job, tuning)), self.rem(task, groups(job, tuning))
        self.first = self.mul(group, tuning.rows)
        self.byte = self.add(self.mul(self.segment, tuning.chunks * CHUNK), self.mul(self.lane, 16))  # of the row

    def exists(self, row):
        """Whether there is such a row and (for a block past the last) segment."""
        return arith.andi(self.less(row, self.job.written), self.less(self.segment, segments(self.job, self.tuning)))

    def names_a_row(self, index):
        return arith.cmpi(arith.CmpIPredicate.ult, index, self.int(self.job.addressed))

    def within(self, chunk: int, live):
        """live, and the row is wide enough for this chunk of the lane."""
        if self.job.row_bytes % (self.tuning.chunks * CHUNK) == 0:
            return live
        return arith.andi(live, self.less(self.add(self.byte, chunk * CHUNK), self.job.row_bytes))

    def own(self, ref, element, live):
        """A 32-bit word of this lane."""
        return self.load(self.pointer(ref, element, 4), 1, live)[0]

    def of_lane(self, word, i: int):
        return self.shuffle(word, self.int(i), "idx")

    def address(self, ref, row):
        """Of this lane's first 16 bytes of a row."""
        return self.pointer(ref, self.element(row, self.job.row_bytes, self.byte), 1)

    def load16(self, address, chunk: int, live):
        """Four words, zeros unless `live`. With effects: all loads that stand together stay together."""
        out = self.asm(
            llvm.StructType.get_literal([self.i32] * 4),
            "{\n.reg .pred p;\nsetp.ne.b32 p, $5, 0;\nmov.b32 $0, 0;\nmov.b32 $1, 0;\nmov.b32 $2, 0;\nmov.b32 $3, 0;\n"
            f"@p ld.global.nc.L1::no_allocate.v4.b32 {{$0, $1, $2, $3}}, [$4+{chunk * CHUNK}];\n}}",
            [address, arith.extui(self.i32, live)], "=&r,=&r,=&r,=&r,l,r")
        return [llvm.extractvalue(self.i32, out, [i]) for i in range(4)]

    def store16(self, address, chunk: int, words, live):
        """Results are the first to leave L2: what the other blocks will read again stays."""
        self.void("{\n.reg .pred p;\nsetp.ne.b32 p, $1, 0;\n" f"@p st.global.cs.v4.b32 [$0+{chunk * CHUNK}], {{$2, $3, $4, $5}};\n}}",
                  [address, arith.extui(self.i32, live), *words], "l,r,r,r,r,r,~{memory}")

    def packed(self, values):
        """Four words of the job's dtype."""
        if self.job.dtype == "float32":
            return [self.bits(v) for v in values]
        half = "bf16x2" if self.job.dtype == "bfloat16" else "f16x2"
        return [self.asm(self.i32, f"cvt.rn.{half}.f32 $0, $2, $1;", [lo, hi], "=r,f,f", False)
                for lo, hi in zip(values[::2], values[1::2], strict=True)]

    def total_of_warp(self, x):
        for step in (16, 8, 4, 2, 1):
            x = arith.addf(x, self.to_float(self.shuffle(self.bits(x), self.int(step), "bfly")))
        return x


def segments(job: Job, tuning: tuned.Tuning) -> int:
    return -(-job.row_bytes // (tuning.chunks * CHUNK))


def groups(job: Job, tuning: tuned.Tuning) -> int:
    return -(-job.written // tuning.rows)


def _own_indices(e: RowEmit, index, *others):
    """For each row of the warp (row, exists, index, names one); others: its words of further arrays. One load of each array."""
    mine = e.add(e.first, e.lane)
    live = arith.andi(e.exists(mine), e.less(e.lane, e.tuning.rows))
    words = [e.own(ref, arith.extsi(e.i64, mine), live) for ref in (index, *others)]
    for i in range(e.tuning.rows):
        row = e.add(e.first, i)
        exists, (source, *rest) = e.exists(row), (e.of_lane(w, i) for w in words)
        yield row, exists, source, arith.andi(exists, e.names_a_row(source)), *rest


def _gather(e: RowEmit, x, source, out):
    chunks, rows = range(e.tuning.chunks), list(_own_indices(e, source))
    words = []
    for _, _, token, real in rows:
        address = e.address(x, token)
        words.append([e.load16(address, c, e.within(c, real)) for c in chunks])
    for (row, exists, _, _), row_words in zip(rows, words, strict=True):
        address = e.address(out, row)
        for c in chunks:
            e.store16(address, c, row_words[c], e.within(c, exists))


def _gather_sum(e: RowEmit, rows, position, *refs):
    *weights, out = refs
    choices, chunks = e.job.choices, range(e.tuning.chunks)
    exists = e.exists(e.first)
    live, element = arith.andi(exists, e.less(e.lane, choices)), e.element(e.first, choices, e.lane)
    own_row, own_weight = e.own(position, element, live), e.own(weights[0], element, live) if weights else None
    totals = [None for _ in chunks]
    for some in (range(k, min(k + FLIGHT, choices)) for k in range(0, choices, FLIGHT)):
        words = []
        for k in some:
            row = e.of_lane(own_row, k)
            address, real = e.address(rows, row), arith.andi(exists, e.names_a_row(row))
            words.append([e.load16(address, c, e.within(c, real)) for c in chunks])
        for k, row_words in zip(some, words, strict=True):
            weight = e.to_float(e.of_lane(own_weight, k)) if weights else None
            for c in chunks:
                values = e.floats(row_words[c], e.job.dtype)
                if totals[c] is None:
                    totals[c] = [arith.mulf(v, weight) if weights else v for v in values]
                else:
                    totals[c] = [math.fma(v, weight, t) if weights else arith.addf(t, v) for v, t in zip(values, totals[c], strict=True)]
    address = e.address(out, e.first)
    for c in chunks:
        e.store16(address, c, e.packed(totals[c]), e.within(c, exists))


def _weighted_backward(e: RowEmit, g, rows, source, weights, d_rows, dots):
    chunks, mine = range(e.tuning.chunks), list(_own_indices(e, source, weights))
    words = []
    for row, _, token, real, _ in mine:
        at_g, at_row = e.address(g, token), e.address(rows, row)
        words.append([[e.load16(at, c, e.within(c, real)) for at in (at_g, at_row)] for c in chunks])
    for (row, exists, _, real, weight), row_words in zip(mine, words, strict=True):
        address, dot = e.address(d_rows, row), e.float(0.0)
        weight = arith.select(real, e.to_float(weight), e.float(0.0))
        for c in chunks:
            of_g, of_row = (e.floats(w, e.job.dtype) for w in row_words[c])
            for a, b in zip(of_g, of_row, strict=True):
                dot = math.fma(a, b, dot)
            e.store16(address, c, e.packed([arith.mulf(v, weight) for v in of_g]), e.within(c, exists))
        line = e.pointer(dots, e.element(e.segment, e.job.written, row), 4)
        e.store(line, [e.bits(e.total_of_warp(dot))], arith.andi(exists, e.less(e.lane, 1)))


BODIES = {"gather": _gather, "gather_sum": _gather_sum, "weighted_backward": _weighted_backward}


@functools.partial(jax.jit, static_argnums=(0, 1))  # traced and compiled once a shape, however often a model calls it
def move(job: Job, tuning: tuned.Tuning, *operands: jax.Array):
    """gather: x, source -> rows. gather_sum: rows, position(, weights) -> x. weighted_backward: g, rows, source, weights ->
    (d_rows, dots f32 [segments, P], to be added)."""
    out = [jax.ShapeDtypeStruct((job.written, job.D), jnp.dtype(job.dtype))]
    if job.op == "weighted_backward":
        out.append(jax.ShapeDtypeStruct((segments(job, tuning), job.written), jnp.float32))

    def inner(ctx, block, *refs):
        BODIES[job.op](RowEmit(job, tuning, block.registers.item()), *refs)

    def body(*refs):
        plgpu.inline_mgpu(arg_types=(SCALAR,) + (REF,) * len(refs))(inner)(lax.axis_index("grid"), *refs)

    tasks = segments(job, tuning) * groups(job, tuning)
    return hopper.launch(body, operands, tuple(out), (), name=job.op, cluster=1, warpgroups=WARPS // 4, grid=-(-tasks // WARPS))
