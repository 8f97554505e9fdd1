"""Cross entropy on Hopper, bound by memory: logits read once, up to 192 KB a multiprocessor always on their way.

One block of 16 warps a multiprocessor. A row is a warp's, which walks it in turns of up to 2 KiB and has its next turns, of this row and
the following, copied to SMEM (cp.async). Each lane reads only what it copied itself: no barrier anywhere, and no warp waits for another.
Forward: a lane keeps the highest logit so far, m, and the sum of exp(logit - m); at the row's end the lanes' pairs meet by shuffles.
Backward: all elements as those of no target; the lane that has the target's writes it again. Everything is one `plgpu.inline_mgpu` body.
"""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, math

from pallas_kernels import hopper
from pallas_kernels.emit import Emit

REF = plgpu.RefType()
SCALAR = plgpu.Layout.WG_SPLAT(())
MULTIPROCESSORS = 132
WARPS = 16  # of a block
THREADS = 32 * WARPS
PIECES = 4  # of 16 bytes, at most, that a lane has in a turn
STAGES = 6  # turns in SMEM or on their way there, 32 KiB each
SEGMENT = 512  # bytes: 16 of each lane of a warp
LARGEST = float(np.finfo(np.float32).max)
LOG2_E = 1.4426950408889634
DTYPES = {"bfloat16": 0xFF80FF80, "float16": 0xFC00FC00, "float32": 0xFF800000}  # and a word of -inf


@dataclasses.dataclass(frozen=True)
class Job:
    """What one launch does."""

    backward: bool
    M: int
    V: int
    dtype: str

    @property
    def itemsize(self) -> int:
        return jnp.dtype(self.dtype).itemsize

    @property
    def width(self) -> int:
        """Columns of a piece."""
        return 16 // self.itemsize

    @property
    def row_bytes(self) -> int:
        return self.V * self.itemsize

    @property
    def pieces(self) -> int:
        """Of a lane, a turn."""
        return min(PIECES, -(-self.row_bytes // SEGMENT))

    @property
    def turns(self) -> int:
        """Of a row."""
        return -(-self.row_bytes // (self.pieces * SEGMENT))

    @property
    def grid(self) -> int:
        return min(self.M, MULTIPROCESSORS)

    @property
    def rounds(self) -> int:
        """Rows of a warp."""
        return -(-self.M // (self.grid * WARPS))


def unfit(job: Job) -> str:
    """Why the kernel does not take this job ('' when it does)."""
    if job.dtype not in DTYPES:
        return f"no kernel reads logits of {job.dtype}"
    if job.row_bytes % 16:
        return f"rows of {job.row_bytes} bytes: must be a multiple of 16"
    return "" if job.M else "nothing to do"


class LogitEmit(Emit):
    """A warp's rows: piece i of a turn is the lane's 16 bytes at turn * `span` + i * SEGMENT + `byte` of the row."""

    def __init__(self, job: Job, block, ring):
        super().__init__()
        self.job, self.block = job, block
        thread = utils.thread_idx()
        self.lane, self.warp = self.rem(thread, 32), self.div(thread, 32)
        self.byte, self.span = self.mul(self.lane, 16), job.pieces * SEGMENT
        self.mine = self.add(hopper._address(ring), self.mul(thread, 16))

    def row(self, round):
        """(row, whether there is one). Rows of one round lie on all blocks: in the last one no multiprocessor has more than others."""
        row = self.add(self.mul(self.add(self.mul(round, WARPS), self.warp), self.job.grid), self.block)
        return row, self.less(row, self.job.M)

    def offset(self, turn):
        """Of the lane's first piece, in the row."""
        return self.add(self.mul(turn, self.span), self.byte)

    def inside(self, turn, i: int):
        """Whether piece i lies in the row."""
        return self.less(self.offset(turn), self.job.row_bytes - i * SEGMENT)

    def address(self, ref, row, turn):
        """Of the lane's first piece. Anew: LLVM would carry a pointer for every array around the loop."""
        return self.pointer(ref, self.element(self.anew(row), self.job.row_bytes, self.offset(turn)), 1)

    def stage(self, step):
        """Where the pieces of the warp's step-th turn, over all its rows, lie in SMEM: THREADS * 16 bytes apart."""
        return self.add(self.mine, self.mul(self.rem(step, STAGES), self.job.pieces * THREADS * 16))

    def fill(self, logits, step):
        """Starts the copies of a turn: of zeros where there is no such row or column."""
        turn, (row, exists) = self.rem(step, self.job.turns), self.row(self.div(step, self.job.turns))
        stage, address = self.stage(step), self.address(logits, row, turn)
        for i in range(self.job.pieces):
            self.copy16((stage, 16 * THREADS * i), address, SEGMENT * i, arith.andi(exists, self.inside(turn, i)))
        self.commit()

    def below(self, a, n: int):
        """0 <= a < n."""
        return arith.cmpi(arith.CmpIPredicate.ult, a, self.int(n))

    def read(self, stage, i: int):
        """The four words of a piece."""
        return self.shared16(stage, 16 * THREADS * i)

    def exponential(self, x):
        return self.asm(self.f32, "ex2.approx.ftz.f32 $0, $1;", [arith.mulf(x, self.float(LOG2_E))], "=f,f", False)

    def highest(self, words):
        """The highest value of words, NaN aside; of 16 bits in pairs first."""
        if self.job.dtype == "float32":
            return _tree(arith.maxnumf, self.floats(words, "float32"))
        pair = "max.bf16x2" if self.job.dtype == "bfloat16" else "max.f16x2"
        both = _tree(lambda a, b: self.asm(self.i32, f"{pair} $0, $1, $2;", [a, b], "=r,r,r", False), words)
        return arith.maxnumf(*self.floats([both], self.job.dtype))


def _tree(join, values):
    """All joined, neighbours first."""
    while len(values) > 1:
        values = [join(*values[k:k + 2]) if k + 1 < len(values) else values[k] for k in range(0, len(values), 2)]
    return values[0]


def _turns(e: LogitEmit, logits, round, carry, work):
    """work(turn, stage, carry) -> carry over the turns of a row, refilling behind."""
    @utils.fori(e.int(e.job.turns), carry)
    def walk(turn, carry):
        step = e.add(e.mul(round, e.job.turns), turn)
        e.filled(STAGES - 1)
        carry = work(turn, e.stage(step), carry)
        e.fill(logits, e.add(step, STAGES))
        return carry

    return walk.results


def _forward_row(e: LogitEmit, round, logits, log_z):
    """The reference point m of the sum is always finite, so that nothing but NaN and infinite logits make NaN and infinity."""
    def work(turn, stage, carry):
        highest, total = carry
        words = [e.read(stage, i) for i in range(e.job.pieces)]
        for i in range(e.job.pieces):
            if e.job.row_bytes % e.span:
                nothing = e.int(DTYPES[e.job.dtype])
                words[i] = [arith.select(e.inside(turn, i), word, nothing) for word in words[i]]
        most = arith.minnumf(arith.maxnumf(highest, e.highest(sum(words, []))), e.float(LARGEST))
        terms = [[e.exponential(arith.subf(x, most)) for x in e.floats(piece, e.job.dtype)] for piece in words]
        before = arith.mulf(total, e.exponential(arith.subf(highest, most)))
        return [most, arith.addf(before, _tree(arith.addf, [_tree(arith.addf, piece) for piece in terms]))]

    (row, exists), (highest, total) = e.row(round), _turns(e, logits, round, [e.float(-LARGEST), e.float(0.0)], work)
    most = highest
    for step in (16, 8, 4, 2, 1):
        most = arith.maxnumf(most, e.to_float(e.shuffle(e.bits(most), e.int(step), "bfly")))
    (total,) = e.across([arith.mulf(total, e.exponential(arith.subf(highest, most)))], 32)
    to, first = e.pointer(log_z, arith.extsi(e.i64, row), 4), arith.andi(exists, e.less(e.lane, 1))
    e.store(to, [e.bits(arith.addf(most, math.log(total)))], first)


def _backward_row(e: LogitEmit, round, logits, targets, log_z, g, d_logits):
    job, (row, exists) = e.job, e.row(round)
    target, z, g = (e.load(e.pointer(ref, arith.extsi(e.i64, row), 4), 1, exists)[0] for ref in (targets, log_z, g))
    z, g = e.to_float(z), e.to_float(g)
    of_others, pitch = arith.negf(g), SEGMENT // job.itemsize
    named = arith.andi(exists, e.below(target, job.V))

    def work(turn, stage, carry):
        to = e.address(d_logits, row, turn)
        for i in range(job.pieces):
            p = [e.exponential(arith.subf(x, z)) for x in e.floats(e.read(stage, i), job.dtype)]
            at, live = arith.addi(to, arith.constant(e.i64, SEGMENT * i)), arith.andi(exists, e.inside(turn, i))
            e.store(at, e.words([arith.mulf(v, of_others) for v in p], job.dtype), live)
        column = arith.subi(target, e.div(e.offset(turn), job.itemsize))  # of the target, from the lane's first
        byte = e.mul(e.rem(column, pitch), job.itemsize)  # in its piece, if that is the lane's
        with utils.when(arith.andi(named, arith.andi(e.below(column, job.pieces * pitch), e.below(byte, 16)))):
            (x, *_) = e.floats([_load_one(e, e.add(stage, e.mul(e.div(column, pitch), 16 * THREADS), byte))], job.dtype)
            value = arith.mulf(g, arith.subf(e.float(1.0), e.exponential(arith.subf(x, z))))
            at = arith.addi(to, arith.extsi(e.i64, e.mul(column, job.itemsize)))
            _store_one(e, at, e.words([value, e.float(0.0)], job.dtype)[0])
        return carry

    _turns(e, logits, round, [], work)


def _load_one(e: LogitEmit, address):
    """An element of SMEM, in the low bits of a word."""
    return e.asm(e.i32, f"ld.volatile.shared.{'b32' if e.job.itemsize == 4 else 'u16'} $0, [$1];", [address], "=r,r,~{memory}")


def _store_one(e: LogitEmit, address, word):
    """The low bits of a word."""
    if e.job.itemsize == 2:
        word = arith.trunci(ir.IntegerType.get_signless(16), word)
    bits = 8 * e.job.itemsize
    e.void(f"st.global.b{bits} [$0], $1;", [address, word], f"l,{'h' if bits == 16 else 'r'},~{{memory}}")


def _walk(e: LogitEmit, logits, *others):
    for step in range(STAGES):
        e.fill(logits, e.int(step))

    @utils.fori(e.int(e.job.rounds), [])
    def _(round, carry):
        (_backward_row if e.job.backward else _forward_row)(e, round, logits, *others)
        return carry

    e.filled(0)


@functools.partial(jax.jit, static_argnums=0)  # traced and compiled once a shape, however often a model calls it
def run(job: Job, logits: jax.Array, *of_rows: jax.Array):
    """Forward: logits [M, V] -> log Z f32 [M]. Backward: logits, targets i32 [M], log Z f32 [M], g f32 [M] -> d_logits [M, V], where the
    logits were unless they are still needed: a lane reads its bytes before it writes them."""
    in_place = job.backward and hopper.in_place(logits)
    out = jax.ShapeDtypeStruct((job.M, job.V), jnp.dtype(job.dtype)) if job.backward else jax.ShapeDtypeStruct((job.M,), jnp.float32)

    def inner(ctx, block, *refs):
        *rows, ring = refs
        logits = rows.pop() if in_place else rows.pop(0)
        _walk(LogitEmit(job, block.registers.item(), ring), logits, *rows, *((logits,) if in_place else ()))

    def body(*refs):
        plgpu.inline_mgpu(arg_types=(SCALAR,) + (REF,) * len(refs))(inner)(lax.axis_index("grid"), *refs)

    how = dict(name="log_probability_backward" if job.backward else "log_sum_exp", cluster=1, warpgroups=WARPS // 4, grid=job.grid)
    scratch = (plgpu.SMEM((STAGES * job.pieces * THREADS * 4,), jnp.int32),)
    if in_place:
        return hopper.launch(body, of_rows, None, scratch, accumulate=logits, **how)
    return hopper.launch(body, (logits, *of_rows), (out,), scratch, **how)[0]
