"""Is a schedule right? For any lists, hand-written ones included.

Rules are tried in the order of RULES and the first that fails ends the check, as each presupposes those before it. That
every receive has exactly one send is `duplicate` and `missing`: a message is named by stage and micro-batch, its sender
is the one operation that makes it, its receiver the one that needs it. Sends are buffered and leave when an entry ends,
so a rank blocks on receives alone.
"""
from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from train.pipeline import slots
from train.pipeline.op import PARTS, Op, Pair, Times
from train.pipeline.schedule import Node, Schedule


class Violation(NamedTuple):
    rule: str  # a key of RULES
    rank: int
    slot: int  # index in the rank's list
    message: str

    def __str__(self) -> str:
        return f"rank {self.rank}, slot {self.slot}: {self.rule}: {self.message}"


class Report(NamedTuple):
    violations: tuple[Violation, ...]  # all of one rule; none: the schedule is right and the rest is known
    peak_activations: int | None = None  # the most chunks of a rank from F to I
    peak_weights: int | None = None  # the most weight parts put off by a rank
    receive_depth: int | None = None  # the most messages that wait at a rank, in the slot table


def check(schedule: Schedule, costs: Times | None = None) -> Report:
    """costs: those that the slot table of the receive depth is aligned with, default Times()."""
    for rule, broken in RULES.items():
        if violations := tuple(Violation(rule, *place) for place in broken(schedule)):
            return Report(violations)
    ranks = range(schedule.n_ranks)
    activations = max(max(schedule.in_flight(rank), default=0) for rank in ranks)
    weights = max(max(schedule.weights_due(rank), default=0) for rank in ranks)
    return Report((), activations, weights, slots.receive_depth(schedule, slots.align(schedule, costs or Times())))


Places = Iterator[tuple[int, int, str]]  # rank, slot, message


def _entries(schedule: Schedule) -> Iterator[tuple[int, int, Op | Pair]]:
    return ((rank, slot, entry) for rank, order in enumerate(schedule.ops) for slot, entry in enumerate(order))


def _slots_of(schedule: Schedule) -> dict[Node, list[int]]:
    """Where each part of each sample at each stage is done; the rank is its home."""
    found: dict[Node, list[int]] = {}
    for rank, slot, entry in _entries(schedule):
        for node in schedule.gives(rank, entry):
            found.setdefault(node, []).append(slot)
    return found


def _name(node: Node) -> str:
    part, stage, sample = node
    return f"{dict(F='forward', I='input part', W='weight part')[part]} of micro-batch {sample} at stage {stage}"


def _unknown(schedule: Schedule) -> Places:
    for rank, slot, entry in _entries(schedule):
        if isinstance(entry, Pair) and (entry.forward.kind != "F" or entry.backward.kind not in ("B", "Bi")):
            yield rank, slot, f"{entry} is not a forward and a backward"
        for op in entry.ops:
            if op.kind not in PARTS:
                yield rank, slot, f"kind {op.kind!r}, allowed: {', '.join(PARTS)}"
            elif op.chunk not in range(len(schedule.stages[rank])):
                yield rank, slot, f"{op} is of chunk {op.chunk}; the rank holds {len(schedule.stages[rank])}"
            elif op.microbatch not in range(schedule.per_direction):
                yield rank, slot, f"{op} is of micro-batch {op.microbatch}; a direction has {schedule.per_direction}"


def _wrong_direction(schedule: Schedule) -> Places:
    for rank, slot, entry in _entries(schedule):
        for op in entry.ops:
            allowed = schedule.directions[op.chunk]
            if op.direction != allowed:
                yield rank, slot, f"{op} goes in direction {op.direction}, its chunk {op.chunk} in {allowed}"


def _duplicate(schedule: Schedule) -> Places:
    again = {}
    for node, found in _slots_of(schedule).items():
        again |= {(schedule.home(*node[1:]), slot): f"{_name(node)} was at slot {found[0]}" for slot in found[1:]}
    return ((rank, slot, message) for (rank, slot), message in again.items())


def _missing(schedule: Schedule) -> Places:
    """Named at the slot of the first other part of the same micro-batch, at the end of the list if there is none."""
    found = _slots_of(schedule)
    for stage, sample in itertools.product(range(schedule.n_stages), range(schedule.n_microbatches)):
        rank = schedule.home(stage, sample)
        others = [found[part, stage, sample][0] for part in "FIW" if (part, stage, sample) in found]
        for part in "FI":
            if (part, stage, sample) not in found:
                yield rank, others[0] if others else len(schedule.ops[rank]), f"no {_name((part, stage, sample))}"


def _weight_lost(schedule: Schedule) -> Places:
    found = _slots_of(schedule)
    for part, stage, sample in found:
        weight = "W", stage, sample
        if part == "I" and weight not in found:
            yield schedule.home(stage, sample), found[part, stage, sample][0], f"no {_name(weight)} follows"


def _before_producer(schedule: Schedule) -> Places:
    found = _slots_of(schedule)
    for rank, slot, entry in _entries(schedule):
        for node in schedule.needs(rank, entry):
            if schedule.home(*node[1:]) == rank and found[node][0] >= slot:
                yield rank, slot, f"{entry} needs the {_name(node)}, at slot {found[node][0]}"
                break


def _cycle(schedule: Schedule) -> Places:
    """The ranks of one ring of waits, each at the entry that it cannot start."""
    heads = [0] * schedule.n_ranks
    for rank, slot, *_ in schedule.walk():
        heads[rank] = slot + 1
    found, waits = _slots_of(schedule), {}
    for rank, head in enumerate(heads):
        if head < len(schedule.ops[rank]):
            needs = [(schedule.home(*node[1:]), node) for node in schedule.needs(rank, schedule.ops[rank][head])]
            waits[rank] = next((other, node) for other, node in needs if found[node][0] >= heads[other])
    chain = list(waits)[:1]
    while waits and waits[chain[-1]][0] not in chain:
        chain.append(waits[chain[-1]][0])
    for rank in chain[chain.index(waits[chain[-1]][0]):] if waits else ():
        other, node = waits[rank]
        yield rank, heads[rank], f"{schedule.ops[rank][heads[rank]]} waits for ever for the {_name(node)}, rank {other}"


def _too_many_activations(schedule: Schedule) -> Places:
    """Named where a rank first exceeds the bound."""
    for rank in range(schedule.n_ranks):
        for slot, held in enumerate(schedule.in_flight(rank)):
            if schedule.max_activations is not None and held > schedule.max_activations:
                yield rank, slot, f"{held} chunks are between F and their backward; bound {schedule.max_activations}"
                break


RULES = {
    "op": _unknown,  # kind, chunk and micro-batch exist; a pair is a forward and a backward
    "direction": _wrong_direction,  # a chunk serves one direction
    "duplicate": _duplicate,  # each part of each micro-batch at each stage at most once
    "missing": _missing,  # forward and input part at least once
    "weight": _weight_lost,  # the weight queue is drained
    "order": _before_producer,  # on a rank: after what it needs
    "cycle": _cycle,  # between ranks: no ring of waits
    "activations": _too_many_activations,
}
