"""Pipeline schedules as data: which rank runs which operation after which (V3 §3.2.1, table 2).

A schedule is a list per rank; nothing in it is a time. `make` builds one of KINDS; the simulator, the checker, the slot
table and the pictures read these lists, and so will whatever executes them. A message is not written down: an operation
sends to the rank that holds the next stage (a backward: the one before), buffered, when it ends.

GPipe: Huang et al., arXiv:1811.06965, 2018. 1F1B and interleaved 1F1B: Narayanan et al., arXiv:2104.04473, 2021.
ZB1P is ZB-H1 of Qi et al., arXiv:2401.10241, 2023. DualPipe: see dualpipe.py.
"""
from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

from model.errors import UserError, choice, require
from train.pipeline import dualpipe as dual
from train.pipeline import simulate
from train.pipeline.op import PARTS, Entry, Op, Pair, Times

__all__ = ["KINDS", "Op", "Pair", "Schedule", "Times", "make"]

Node = tuple[str, int, int]  # (F, I or W, stage, sample): what exactly one operation of the whole schedule does


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The lists of all ranks, and which stages a rank holds."""

    kind: str
    n_microbatches: int
    stages: tuple[tuple[int, ...], ...]  # [rank][chunk]; a stage that stands twice is a copy whose gradients are summed
    directions: tuple[int, ...]  # [chunk]: 1 where its micro-batches enter at the last rank
    ops: list[list[Entry]]  # [rank][slot]
    max_activations: int | None = None  # bound on chunks of a rank between F and the input part of their backward

    @property
    def n_ranks(self) -> int:
        return len(self.stages)

    @functools.cached_property
    def n_stages(self) -> int:
        return 1 + max(max(chunks) for chunks in self.stages)

    @property
    def copies(self) -> float:
        """How often the parameters of a stage stand in the pipe."""
        return sum(map(len, self.stages)) / self.n_stages

    @functools.cached_property
    def per_direction(self) -> int:
        return self.n_microbatches // (1 + max(self.directions))

    @property
    def share(self) -> float:
        """Size of a chunk in units of 1/n_ranks of the model."""
        return self.n_ranks / self.n_stages

    def stage(self, rank: int, chunk: int) -> int:
        return self.stages[rank][chunk]

    def sample(self, op: Op) -> int:
        """The number of its micro-batch over both directions."""
        return op.direction * self.per_direction + op.microbatch

    @functools.cached_property
    def _homes(self) -> dict[tuple[int, int], int]:
        return {(s, d): r for r, chunks in enumerate(self.stages) for s, d in zip(chunks, self.directions, strict=True)}

    def home(self, stage: int, sample: int) -> int:
        """The rank at which a micro-batch passes a stage."""
        return self._homes[stage, sample // self.per_direction]

    def gives(self, rank: int, entry: Entry) -> list[Node]:
        return [(part, self.stages[rank][op.chunk], self.sample(op)) for op in entry.ops for part in PARTS[op.kind]]

    def needs(self, rank: int, entry: Entry) -> list[Node]:
        """What must be over before: F of the stage before; for I, F here and I of the next stage; for W, its I."""
        nodes = []
        for op in entry.ops:
            stage, sample = self.stages[rank][op.chunk], self.sample(op)
            if op.kind == "F":
                nodes += [("F", stage - 1, sample)] if stage else []
            elif op.kind == "W":
                nodes.append(("I", stage, sample))
            else:
                nodes.append(("F", stage, sample))
                nodes += [("I", stage + 1, sample)] if stage + 1 < self.n_stages else []
        return nodes

    def walk(self) -> Iterator[tuple[int, int, list[Node], list[Node]]]:
        """(rank, slot, needs, gives) in an order that keeps lists and dependencies; ends early if the rest waits for ever."""
        done, waiting, slots = set(), {}, [0] * self.n_ranks
        awake = list(reversed(range(self.n_ranks)))
        while awake:
            rank = awake.pop()
            for slot in range(slots[rank], len(self.ops[rank])):
                needs, gives = self.needs(rank, self.ops[rank][slot]), self.gives(rank, self.ops[rank][slot])
                missing = next((node for node in needs if node not in done), None)
                if missing is not None:
                    waiting.setdefault(missing, []).append(rank)
                    break
                yield rank, slot, needs, gives
                slots[rank] = slot + 1
                for node in gives:
                    done.add(node)
                    awake += waiting.pop(node, ())

    def in_flight(self, rank: int) -> list[int]:
        """By slot: the most chunks between F and the input part of their backward; of a pair, F counts first."""
        held, counts = 0, []
        for entry in self.ops[rank]:
            parts = [part for op in entry.ops for part in PARTS[op.kind]]
            counts.append(held + parts.count("F"))
            held += parts.count("F") - parts.count("I")
        return counts

    def weights_due(self, rank: int) -> list[int]:
        """By slot: the number of input parts whose weight part is still to come."""
        kinds = [[op.kind for op in entry.ops] for entry in self.ops[rank]]
        return list(itertools.accumulate(slot.count("Bi") - slot.count("W") for slot in kinds))

    def simulate(self, t_forward, t_backward_input, t_backward_weight, t_overlapped, t_comm=0.0) -> simulate.Timeline:
        return simulate.simulate(self, Times(t_forward, t_backward_input, t_backward_weight, t_overlapped, t_comm))


def make(kind: str, n_ranks: int, n_microbatches: int, n_chunks: int = 2) -> Schedule:
    """The schedule of a kind; n_chunks is read by interleaved only. Raises UserError where sizes do not fit."""
    build = KINDS[choice(kind, KINDS, "schedule.kind")].build
    for name, value in (("n_ranks", n_ranks), ("n_microbatches", n_microbatches), ("n_chunks", n_chunks)):
        require(type(value) is int and value >= 1, f"schedule.{name}", value, "an integer, at least 1")
    try:
        return build(n_ranks, n_microbatches, n_chunks)
    except UserError as error:
        raise UserError(f"schedule.{error} ({kind})") from None


def _one_way(kind: str, n: int, stages, orders: list[list[Entry]], max_activations: int) -> Schedule:
    return Schedule(kind, n, tuple(stages), (0,) * len(stages[0]), orders, max_activations)


def _one_forward_one_backward(forwards: list[Op], backwards: list[Op], ahead: int) -> list[Op]:
    """`ahead` forwards, then forward and backward in turn, then the backwards that are left."""
    turns = zip(forwards[ahead:], backwards, strict=False)
    return forwards[:ahead] + [op for turn in turns for op in turn] + backwards[len(forwards[ahead:]):]


def _ops(kind: str, n: int) -> list[Op]:
    return [Op(kind, 0, m) for m in range(n)]


def gpipe(n_ranks: int, n: int, n_chunks: int) -> Schedule:
    """All forwards, then all backwards, first come first served (the gradients sum in the order of 1f1b)."""
    orders = [_ops("F", n) + _ops("B", n) for _ in range(n_ranks)]
    return _one_way("gpipe", n, [(r,) for r in range(n_ranks)], orders, n)


def one_f_one_b(n_ranks: int, n: int, n_chunks: int) -> Schedule:
    """A rank starts as many forwards as there are stages from it to the end, then alternates."""
    orders = [_one_forward_one_backward(_ops("F", n), _ops("B", n), min(n_ranks - 1 - r, n)) for r in range(n_ranks)]
    return _one_way("1f1b", n, [(r,) for r in range(n_ranks)], orders, min(n_ranks, n))


def interleaved(n_ranks: int, n: int, n_chunks: int) -> Schedule:
    """1F1B over chunks: rank r holds stages r, r + PP, ...; PP micro-batches at a time go through the chunks."""
    require(n_ranks >= 2, "n_ranks", n_ranks, "at least 2")
    require(n_chunks >= 2, "n_chunks", n_chunks, "at least 2; with one chunk this is 1f1b")
    require(n % n_ranks == 0, "n_microbatches", n, f"a multiple of n_ranks = {n_ranks}")
    groups = [range(first, first + n_ranks) for first in range(0, n, n_ranks)]
    turns = [(chunk, m) for group in groups for chunk in range(n_chunks) for m in group]
    forwards = [Op("F", chunk, m) for chunk, m in turns]
    backwards = [Op("B", n_chunks - 1 - chunk, m) for chunk, m in turns]
    ahead = [min(2 * (n_ranks - 1 - r) + (n_chunks - 1) * n_ranks, len(turns)) for r in range(n_ranks)]
    stages = [tuple(range(r, n_ranks * n_chunks, n_ranks)) for r in range(n_ranks)]
    orders = [_one_forward_one_backward(forwards, backwards, a) for a in ahead]
    return _one_way("interleaved", n, stages, orders, min((n_chunks + 1) * n_ranks - 1, len(turns)))


def zb1p(n_ranks: int, n: int, n_chunks: int) -> Schedule:
    """1F1B with the backward split; rank r puts off r weight parts, which fill its wait at the end (ZB-H1)."""
    orders = []
    for rank, whole in enumerate(one_f_one_b(n_ranks, n, n_chunks).ops):
        order, started, finished = [], 0, 0
        for op in whole:
            if op.kind == "B" and started - finished > rank:  # before I: the F between has not had to wait for this W
                order.append(Op("W", 0, finished))
                finished += 1
            order.append(op if op.kind == "F" else op._replace(kind="Bi"))
            started += op.kind == "B"
        orders.append(order + [Op("W", 0, m) for m in range(finished, n)])
    return _one_way("zb1p", n, [(r,) for r in range(n_ranks)], orders, min(n_ranks, n))


def dualpipe(n_ranks: int, n: int, n_chunks: int) -> Schedule:
    """Half of the micro-batches from either end; chunk = direction."""
    require(n_ranks % 2 == 0, "n_ranks", n_ranks, "an even number")
    require(n % 2 == 0 and n >= 2 * n_ranks, "n_microbatches", n, f"an even number, at least 2 n_ranks = {2 * n_ranks}")
    stages = tuple((r, n_ranks - 1 - r) for r in range(n_ranks))
    down, up, half = (0, 0), (1, 1), n_ranks // 2
    orders = [dual.eight_steps(min(held), half, n // 2, (down, up) if r < half else (up, down))
              for r, held in enumerate(stages)]
    return Schedule("dualpipe", n, stages, (0, 1), orders, n_ranks + 1)


def dualpipev(n_ranks: int, n: int, n_chunks: int) -> Schedule:
    """Half of a DualPipe of 2 n_ranks: chunk 0 on the way down, chunk 1 on the way back, turning on the last rank."""
    require(n >= 2 * n_ranks, "n_microbatches", n, f"at least 2 n_ranks = {2 * n_ranks}")
    stages = [(r, 2 * n_ranks - 1 - r) for r in range(n_ranks)]
    orders = [dual.eight_steps(r, n_ranks, n, ((0, 0), (1, 0))) for r in range(n_ranks)]
    return _one_way("dualpipev", n, stages, orders, 2 * n_ranks + 1)


class Kind(NamedTuple):
    build: Callable[[int, int, int], Schedule]  # (n_ranks, n_microbatches, n_chunks)
    bubble: Callable[[int, int, Times], float]  # the published formula: (n_ranks, n_chunks, times)
    exact_if: str  # where it is the simulator's bubble, after "t_comm = 0"


def _one_way_bubble(p, v, t):
    return (p - 1) * (t.t_forward + t.t_backward)


def _dual_bubble(n_stages, t):
    return (n_stages / 2 - 1) * (t.t_overlapped + t.t_backward - 3 * t.t_backward_weight)


KINDS = {
    "gpipe": Kind(gpipe, _one_way_bubble, ""),
    "1f1b": Kind(one_f_one_b, _one_way_bubble, ""),
    "interleaved": Kind(interleaved, lambda p, v, t: _one_way_bubble(p, v, t) / v, ""),
    "zb1p": Kind(zb1p, lambda p, v, t: (p - 1) * (t.t_forward + t.t_backward - 2 * t.t_backward_weight),
                 ", W <= F, W <= I and n_microbatches >= PP"),
    "dualpipe": Kind(dualpipe, lambda p, v, t: _dual_bubble(p, t), ", F = I >= W and F&B <= F + B"),
    "dualpipev": Kind(dualpipev, lambda p, v, t: _dual_bubble(2 * p, t) / 2,  # 2 p stages, each half as long
                      ", F = I >= W and F&B = F + B"),
}
