"""The gate of a MoE layer on Hopper, bound by instructions: all of a token in the registers of a few lanes.

A token is that of a team of 1 to 32 lanes of a warp, each with the consecutive experts `width`, 8 where that divides; what a team must
agree on is a shuffle away. Choice: scores become integers of the same order (NaN: 0, chosen by nobody), and K times the highest is found,
then the lowest index that has it. A group is one or several lanes of a team; every lane ranks its own. Counts are integer additions in
SMEM, shares float sums in a fixed order; a block leaves its sums to XLA as one row of partials. Everything is one `plgpu.inline_mgpu` body.
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
from pallas_kernels.gate.reference import TINY, Rule

REF = plgpu.RefType()
SCALAR = plgpu.Layout.WG_SPLAT(())
WARPS = 4  # of a block
TOKENS = 32  # of a block, at least: partial sums are few, and four blocks a multiprocessor have 16,384
MOST_CHOSEN = 16
TOP = 0x80000000
MINUS_INFINITY = 0x007FFFFF  # its key


@dataclasses.dataclass(frozen=True)
class Job:
    """What one launch does."""

    backward: bool
    B: int
    T: int
    E: int
    rule: Rule

    @property
    def groups(self) -> int:
        return self.rule.n_groups if self.rule.limited else 1

    @property
    def lanes(self) -> int:
        """Of a token: the fewest that have whole experts, 8 at most (of a whole warp 16), and each no two groups; 0 if there are none."""
        fits = (n for n in (1, 2, 4, 8, 16, 32) if self.E % n == 0 and self.E // n <= (16 if n == 32 else 8) and n % self.groups == 0)
        return next(fits, 0)

    @property
    def width(self) -> int:
        """Experts of a lane."""
        return self.E // self.lanes

    @property
    def teams(self) -> int:
        """Of a block: tokens at a time."""
        return 32 * WARPS // self.lanes

    @property
    def turns(self) -> int:
        return min(max(1, TOKENS // self.teams), -(-self.T // self.teams))

    @property
    def blocks(self) -> int:
        """Of a sequence."""
        return -(-self.T // (self.teams * self.turns))


def unfit(job: Job, dtype: str) -> str:
    """Why the kernel does not take this job ('' when it does)."""
    if dtype != "float32":
        return f"logits are {dtype}: the kernel takes float32"
    if not job.lanes:
        return f"{job.E} experts in {job.groups} groups do not divide over the lanes of a warp"
    if job.rule.n_chosen > MOST_CHOSEN:
        return f"{job.rule.n_chosen} chosen: must be {MOST_CHOSEN} at most"
    return "" if job.B and job.T else "nothing to do"


class GateEmit(Emit):
    """A lane's share of its team's token: experts `first` to `first` + width."""

    def __init__(self, job: Job, block):
        super().__init__()
        self.job, self.block, self.thread = job, block, utils.thread_idx()
        self.of_warp, self.warp = self.rem(self.thread, 32), self.div(self.thread, 32)
        self.lane = self.rem(self.thread, job.lanes)
        self.first = self.mul(self.lane, job.width)
        self.leader = arith.subi(self.of_warp, self.lane)  # the team's first lane
        self.sequence, self.start = self.div(block, job.blocks), self.mul(self.rem(block, job.blocks), job.teams * job.turns)

    def equal(self, a, b):
        return arith.cmpi(arith.CmpIPredicate.eq, a, self.int(b) if isinstance(b, int) else b)

    def above(self, a, b):
        """Unsigned a > b."""
        return arith.cmpi(arith.CmpIPredicate.ugt, a, b)

    def token(self, turn):
        """(row of the token in all sequences, whether there is one)."""
        at = self.add(self.start, self.mul(turn, self.job.teams), self.div(self.thread, self.job.lanes))
        return self.add(self.mul(self.sequence, self.job.T), at), self.less(at, self.job.T)

    def row(self, ref, row, live):
        """The lane's words of a row of E."""
        width = self.job.width
        wide = 4 if width % 4 == 0 else 2 if width % 2 == 0 else 1
        address = self.pointer(ref, self.element(row, self.job.E, self.first), 4)
        pieces = (self.load(arith.addi(address, arith.constant(self.i64, 4 * n)), wide, live) for n in range(0, width, wide))
        return [word for piece in pieces for word in piece]

    def word(self, ref, element, live):
        return self.load(self.pointer(ref, element, 4), 1, live)[0]

    def of_team(self, join, x):
        """A word joined over the team's lanes: 'max' or 'min', unsigned."""
        if self.job.lanes == 32:
            return self.asm(self.i32, f"redux.sync.{join}.u32 $0, $1, 0xffffffff;", [x], "=r,r")
        return self.butterfly(dict(max=arith.maxui, min=arith.minui)[join], x, self.job.lanes)

    def butterfly(self, join, x, lanes: int):
        while lanes := lanes // 2:
            x = join(x, self.shuffle(x, self.int(lanes), "bfly"))
        return x

    def from_lane(self, x, lane):
        """Another lane's of the team."""
        return x if self.job.lanes == 1 else self.shuffle(x, self.add(self.leader, lane), "idx")

    def is_nan(self, x):
        return arith.cmpf(arith.CmpFPredicate.UNO, x, x)

    def key(self, x):
        """An unsigned integer of the same order as x (that is never -0), 0 for NaN."""
        bits = self.bits(x)
        key = arith.xori(bits, arith.ori(arith.shrsi(bits, self.int(31)), self.int(TOP)))
        return arith.select(self.is_nan(x), self.int(0), key)

    def value(self, key):
        """Of a key: NaN of 0."""
        sign = arith.shrsi(arith.xori(key, self.int(0xFFFFFFFF)), self.int(31))
        return self.to_float(arith.xori(key, arith.ori(sign, self.int(TOP))))

    def scores(self, logits):
        if self.job.rule.score == "sigmoid":
            return [arith.divf(self.float(1.0), arith.addf(self.float(1.0), math.exp(arith.negf(x)))) for x in logits]
        largest = functools.reduce(arith.maximumf, logits)
        larger = lambda a, b: self.bits(arith.maximumf(self.to_float(a), self.to_float(b)))  # noqa: E731
        largest = self.to_float(self.butterfly(larger, self.bits(largest), self.job.lanes))
        powers = [math.exp(arith.subf(x, largest)) for x in logits]
        total = self.sum(powers)  # a division: a product might be fused with the bias's addition, and the sum not be that of these scores
        return [arith.divf(p, total) for p in powers]

    def sum(self, values):
        """Over the token's experts."""
        return self.across([functools.reduce(arith.addf, values)], self.job.lanes)[0]

    def inverse(self, x, of: float = 1.0):
        return arith.divf(self.float(of), arith.addf(x, self.float(TINY)))

    def best(self, keys):
        """(the lowest index of the highest key, E - 1 if no key is left; the keys without it)."""
        experts = [self.add(self.first, n) for n in range(self.job.width)]
        most = self.of_team("max", functools.reduce(arith.maxui, keys))
        none = index = self.int(self.job.E - 1)
        for key, expert in reversed(list(zip(keys, experts, strict=True))):
            index = arith.select(self.equal(key, most), expert, index)
        index = arith.select(self.equal(most, 0), none, self.of_team("min", index))
        return index, [arith.select(self.equal(index, expert), self.int(0), key) for key, expert in zip(keys, experts, strict=True)]

    def count(self, counters, kind: int, expert, live):
        """One more in SMEM."""
        address = self.add(counters, self.mul(expert, 4), 4 * kind * self.job.E)
        self.void("{\n.reg .pred p;\nsetp.ne.b32 p, $1, 0;\n@p red.shared.add.u32 [$0], 1;\n}", [address, arith.extui(self.i32, live)],
                  "r,r,~{memory}")


def _limited(e: GateEmit, keys):
    """The keys with those of groups that are not kept at that of -inf. A group with NaN is kept, beside n_kept others."""
    rule, lanes = e.job.rule, e.job.lanes // e.job.groups
    if rule.group_score == "max":
        score = e.butterfly(arith.maxui, functools.reduce(arith.maxui, keys), lanes)
    else:
        high, low = keys[0], e.int(0)
        for key in keys[1:]:
            high, low = arith.maxui(high, key), arith.maxui(low, arith.minui(high, key))
        step = lanes
        while step := step // 2:
            other, second = (e.shuffle(x, e.int(step), "bfly") for x in (high, low))
            high, low = arith.maxui(high, other), arith.maxui(arith.maxui(low, second), arith.minui(high, other))
        score = e.key(arith.addf(e.value(high), e.value(low)))
    some = e.butterfly(arith.minui, functools.reduce(arith.minui, keys), lanes)
    score = arith.select(e.equal(some, 0), e.int(0), score)
    group, place = e.div(e.lane, lanes), e.int(0)
    for i in range(e.job.groups):
        other = e.from_lane(score, e.int(i * lanes))
        earlier = arith.extui(e.i32, e.less(e.int(i), group))
        place = e.add(place, arith.extui(e.i32, e.above(e.add(other, earlier), score)))
    keep = arith.ori(e.less(place, rule.n_kept), e.equal(score, 0))
    return [arith.select(keep, key, e.int(MINUS_INFINITY)) for key in keys]


def _choose(e: GateEmit, s, bias):
    """The token's K experts."""
    biased = [arith.addf(x, b) for x, b in zip(s, bias, strict=True)] if bias else s
    keys = [e.key(x) for x in biased]
    nan = e.int(e.job.E - 1)  # the first
    for n, key in reversed(list(enumerate(keys))):
        nan = arith.select(e.equal(key, 0), e.add(e.first, n), nan)
    if e.job.groups > 1:
        keys = _limited(e, keys)
    experts = []
    for _ in range(e.job.rule.n_chosen):
        expert, keys = e.best(keys)
        experts.append(expert)
    experts[0] = arith.minui(experts[0], e.of_team("min", nan))
    return experts


def _forward(e: GateEmit, refs, scratch):
    logits, valid, *bias, experts_out, weights_out, partials = refs
    job, rule, (counters, shares_smem) = e.job, e.job.rule, (hopper._address(ref) for ref in scratch)
    for at in range(0, 2 * job.E, 32 * WARPS):
        counter = e.add(e.thread, at)
        _store_shared(e, e.add(counters, e.mul(counter, 4)), e.int(0), e.less(counter, 2 * job.E))
    always = e.less(e.int(0), 1)
    bias = [e.to_float(w) for ref in bias for w in e.row(ref, e.int(0), always)]
    e.barrier()

    @utils.fori(e.int(job.turns), [e.float(0.0)] * job.width)
    def walk(turn, shares):
        row, exists = e.token(turn)
        words, is_valid = e.row(logits, row, exists), e.word(valid, arith.extsi(e.i64, row), exists)
        s = e.scores([e.to_float(w) for w in words])
        counted = arith.cmpi(arith.CmpIPredicate.ne, is_valid, e.int(0))
        experts, hits = _choose(e, s, bias), [e.key(x) for x in s]
        chosen = []
        for expert in experts:
            mine, at = e.float(0.0), arith.subi(expert, e.first)
            for n, x in enumerate(s):
                mine = arith.select(e.equal(at, n), x, mine)
            chosen.append(e.to_float(e.from_lane(e.bits(mine), e.div(expert, job.width))))
        factor = e.inverse(functools.reduce(arith.addf, chosen), rule.scale) if rule.weights == "normalised" else e.float(rule.scale)
        for k, (expert, x) in enumerate(zip(experts, chosen, strict=True)):
            mine = e.equal(e.lane, k % job.lanes)
            element, live = e.element(row, rule.n_chosen, e.int(k)), arith.andi(exists, mine)
            e.store(e.pointer(experts_out, element, 4), [expert], live)
            e.store(e.pointer(weights_out, element, 4), [e.bits(arith.mulf(x, factor))], live)
            hit, hits = e.best(hits)
            for kind, which in enumerate((expert, hit)):
                e.count(counters, kind, which, arith.andi(counted, mine))
        weight = arith.mulf(arith.sitofp(e.f32, is_valid), e.inverse(e.sum(s)))
        return [math.fma(x, weight, share) for x, share in zip(s, shares, strict=True)]

    shares, lanes = walk.results, 32
    while (lanes := lanes // 2) >= job.lanes:  # over the teams of the warp
        shares = [arith.addf(x, e.to_float(e.shuffle(e.bits(x), e.int(lanes), "bfly"))) for x in shares]
    for n, x in enumerate(shares):
        at = e.add(shares_smem, e.mul(e.add(e.mul(e.warp, job.E), e.first, n), 4))
        _store_shared(e, at, e.bits(x), e.less(e.of_warp, job.lanes))
    e.barrier()
    for at in range(0, job.E, 32 * WARPS):
        expert = e.add(e.thread, at)
        live = e.less(expert, job.E)
        with utils.when(live):
            counts = [arith.uitofp(e.f32, _load_shared(e, e.add(counters, e.mul(expert, 4), 4 * kind * job.E))) for kind in range(2)]
            of_warps = [e.to_float(_load_shared(e, e.add(shares_smem, e.mul(expert, 4), 4 * warp * job.E))) for warp in range(WARPS)]
            for kind, x in enumerate((*counts, functools.reduce(arith.addf, of_warps))):
                line = e.add(e.mul(e.block, 3), kind)
                e.store(e.pointer(partials, e.element(line, job.E, expert), 4), [e.bits(x)], live)


def _backward(e: GateEmit, refs, scratch):
    logits, valid, experts, d_weights, d_shares, d_logits = refs
    job, rule, one = e.job, e.job.rule, e.float(1.0)
    always = e.less(e.int(0), 1)
    d_share = [e.to_float(w) for w in e.row(d_shares, e.sequence, always)]

    @utils.fori(e.int(job.turns), [])
    def _(turn, carry):
        row, exists = e.token(turn)
        words, is_valid = e.row(logits, row, exists), e.word(valid, arith.extsi(e.i64, row), exists)
        elements = [e.element(row, rule.n_chosen, e.int(k)) for k in range(rule.n_chosen)]
        chosen = [(e.word(experts, at, exists), e.to_float(e.word(d_weights, at, exists))) for at in elements]
        s = e.scores([e.to_float(w) for w in words])
        d_s, times = ([e.float(0.0)] * job.width for _ in range(2))
        for expert, d_weight in chosen:
            at = arith.subi(expert, e.first)
            for n in range(job.width):
                mine = e.equal(at, n)
                d_s[n] = arith.select(mine, arith.addf(d_s[n], d_weight), d_s[n])
                times[n] = arith.select(mine, arith.addf(times[n], one), times[n])
        d_s = [arith.mulf(d, e.float(rule.scale)) for d in d_s]
        if rule.weights == "normalised":
            d_s = _through_division(e, s, d_s, times)
        mask = arith.sitofp(e.f32, is_valid)
        of_shares = _through_division(e, s, [arith.mulf(d, mask) for d in d_share], [one] * job.width)
        d_s = [arith.addf(a, b) for a, b in zip(d_s, of_shares, strict=True)]
        if rule.score == "softmax":
            dot = e.sum([arith.mulf(d, x) for d, x in zip(d_s, s, strict=True)])
            out = [arith.mulf(x, arith.subf(d, dot)) for d, x in zip(d_s, s, strict=True)]
        else:
            out = [arith.mulf(arith.mulf(d, x), arith.subf(one, x)) for d, x in zip(d_s, s, strict=True)]
        wide = 4 if job.width % 4 == 0 else 2 if job.width % 2 == 0 else 1
        address = e.pointer(d_logits, e.element(row, job.E, e.first), 4)
        for n in range(0, job.width, wide):
            e.store(arith.addi(address, arith.constant(e.i64, 4 * n)), [e.bits(x) for x in out[n:n + wide]], exists)
        return carry


def _through_division(e: GateEmit, s, d, times):
    """Gradient of s where d is that of s over the sum of `times` s."""
    total, dot = (functools.reduce(arith.addf, [arith.mulf(a, x) for a, x in zip(other, s, strict=True)]) for other in (times, d))
    total, dot = e.across([total, dot], e.job.lanes)
    inverse = e.inverse(total)
    dot = arith.mulf(dot, inverse)
    return [arith.mulf(arith.subf(a, arith.mulf(n, dot)), inverse) for a, n in zip(d, times, strict=True)]


def _store_shared(e: GateEmit, address, word, live):
    e.void("{\n.reg .pred p;\nsetp.ne.b32 p, $2, 0;\n@p st.shared.b32 [$0], $1;\n}", [address, word, arith.extui(e.i32, live)],
           "r,r,r,~{memory}")


def _load_shared(e: GateEmit, address):
    return e.asm(e.i32, "ld.shared.b32 $0, [$1];", [address], "=r,r,~{memory}")


@functools.partial(jax.jit, static_argnums=0)  # traced and compiled once a shape, however often a model calls it
def run(job: Job, logits: jax.Array, valid: jax.Array, *others: jax.Array):
    """Forward: logits f32 [B, T, E], valid i32 [B, T](, bias f32 [E]) -> experts i32 and weights f32 [B, T, K], partial sums f32
    [B, blocks, 3, E]. Backward: logits, valid, experts, d_weights, d_shares [B, E] -> (d_logits,)."""
    (B, T, E), f32 = logits.shape, jnp.float32
    if job.backward:
        out, scratch = (jax.ShapeDtypeStruct((B, T, E), f32),), ()
    else:
        tokens = (B, T, job.rule.n_chosen)
        out = tuple(jax.ShapeDtypeStruct(*what) for what in ((tokens, jnp.int32), (tokens, f32), ((B, job.blocks, 3, E), f32)))
        scratch = (plgpu.SMEM((2 * E,), jnp.int32), plgpu.SMEM((WARPS * E,), f32))

    def inner(ctx, block, *refs):
        n = len(refs) - len(scratch)
        (_backward if job.backward else _forward)(GateEmit(job, block.registers.item()), refs[:n], refs[n:])

    def body(*refs):
        plgpu.inline_mgpu(arg_types=(SCALAR,) + (REF,) * len(refs))(inner)(lax.axis_index("grid"), *refs)

    name = "gate_backward" if job.backward else "gate"
    operands = (logits, valid, *others)
    return hopper.launch(body, operands, out, scratch, name=name, cluster=1, warpgroups=WARPS // 4, grid=job.B * job.blocks)
