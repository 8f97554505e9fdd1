"""The checker's score: schedules broken on purpose, and re-orderings that are legal.

    python -m train.pipeline.mutate [how many of each, default 1000]

Each mutation breaks one rule of the checker at a place that is known beforehand; it counts as found if the checker
names exactly that rule, rank and slot (`deadlock`: if they are in the ring of waits that it names). Random moves are
sorted by `replay`, which runs the lists with mailboxes and shares nothing with the checker: the legal ones must be
accepted, all others refused.
"""
from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable

import numpy as np

from train.pipeline.check import check
from train.pipeline.op import Entry, Op, Pair
from train.pipeline.schedule import KINDS, Schedule, make

Place = tuple[str, int, int]  # rule, rank, slot


def replay(schedule: Schedule) -> bool:
    """Runs the lists rank by rank: True if every micro-batch went through, nothing is left over and the bound held."""
    ranks, last = range(schedule.n_ranks), schedule.n_stages - 1
    mail, held, due = ([set() for _ in ranks] for _ in range(3))
    lists = [list(order) for order in schedule.ops]
    n_forward = 0

    def deliver(what, stage, op):
        for rank in ranks:
            for chunk, here in enumerate(schedule.stages[rank]):
                if here == stage and schedule.directions[chunk] == op.direction:
                    mail[rank].add((what, stage, op.direction, op.microbatch))

    def runs(rank, op, pretend):
        """Whether the op can run; unless it is to pretend, runs it."""
        stage, name = schedule.stages[rank][op.chunk], (op.direction, op.microbatch)
        key = stage, *name
        if op.kind == "W":
            takes, puts = [(due[rank], key)], []
        elif op.kind == "F":
            takes, puts = [(mail[rank], ("act", *key))] if stage else [], [(held[rank], key)]
        else:
            takes = [(held[rank], key)] + ([(mail[rank], ("grad", *key))] if stage < last else [])
            puts = [(due[rank], key)] if op.kind == "Bi" else []
        if any(thing not in box for box, thing in takes) or any(thing in box for box, thing in puts):
            return False
        if not pretend:
            for box, thing in takes:
                box.remove(thing)
            for box, thing in puts:
                box.add(thing)
            if op.kind == "F" and stage < last:
                deliver("act", stage + 1, op)
            if op.kind in ("B", "Bi") and stage:
                deliver("grad", stage - 1, op)
        return True

    moved = True
    while moved:
        moved = False
        for rank in ranks:
            while lists[rank] and all(runs(rank, op, pretend=True) for op in lists[rank][0].ops):
                for op in lists[rank].pop(0).ops:
                    runs(rank, op, pretend=False)
                    n_forward += op.kind == "F"
                    if len(held[rank]) > schedule.max_activations:
                        return False
                moved = True
    return n_forward == schedule.n_microbatches * schedule.n_stages and not any(map(any, (lists, mail, held, due)))


def _with(schedule: Schedule, rank: int, order: list[Entry]) -> Schedule:
    return dataclasses.replace(schedule, ops=[order if r == rank else old for r, old in enumerate(schedule.ops)])


def _moved(schedule: Schedule, rank: int, source: int, target: int) -> Schedule:
    order = list(schedule.ops[rank])
    order.insert(target, order.pop(source))
    return _with(schedule, rank, order)


def _changed(schedule: Schedule, rank: int, slot: int, old: Op, new: Op | None) -> Schedule:
    """With one op, alone or of a pair, in the place of another or (None) away."""
    entry, order = schedule.ops[rank][slot], list(schedule.ops[rank])
    kept = [new if op is old else op for op in entry.ops if op is not old or new]
    order[slot:slot + 1] = [Pair(*kept)] if len(kept) == 2 else kept
    return _with(schedule, rank, order)


def _pick(schedule: Schedule, rng: np.random.Generator, kinds: tuple[str, ...]) -> tuple[int, int, Op] | None:
    """A random operation of one of the kinds: rank, slot, op."""
    found = [(rank, slot, op) for rank, order in enumerate(schedule.ops) for slot, entry in enumerate(order)
             for op in entry.ops if op.kind in kinds]
    return found[rng.integers(len(found))] if found else None


def _slot_of(order: list[Entry], kinds: tuple[str, ...], like: Op) -> int:
    return next(slot for slot, entry in enumerate(order) for op in entry.ops if op.kind in kinds and op[1:] == like[1:])


def drop(schedule, rng):
    rank, slot, op = _pick(schedule, rng, ("F", "B", "Bi"))
    broken = _changed(schedule, rank, slot, op, None)
    return broken, ("missing", rank, _slot_of(broken.ops[rank], ("B", "Bi") if op.kind == "F" else ("F",), op))


def duplicate(schedule, rng):
    rank, slot, op = _pick(schedule, rng, ("F", "B", "Bi", "W"))
    order = list(schedule.ops[rank])
    copy = int(rng.integers(slot + 1, len(order) + 1))
    order.insert(copy, op)
    return _with(schedule, rank, order), ("duplicate", rank, copy)


def before_producer(schedule, rng):
    rank, slot, op = _pick(schedule, rng, ("B", "Bi", "W"))
    producer = _slot_of(schedule.ops[rank], ("Bi",) if op.kind == "W" else ("F",), op)
    target = int(rng.integers(producer + 1))
    return _moved(schedule, rank, slot, target), ("order", rank, target)


def swap_direction(schedule, rng):
    rank, slot, op = _pick(schedule, rng, ("F", "B", "Bi", "W"))
    return _changed(schedule, rank, slot, op, op._replace(direction=1 - op.direction)), ("direction", rank, slot)


def lose_weight(schedule, rng):
    """Drops a W, or makes a whole backward an input part."""
    rank, slot, op = _pick(schedule, rng, ("B", "W"))
    if op.kind == "B":
        return _changed(schedule, rank, slot, op, op._replace(kind="Bi")), ("weight", rank, slot)
    return _changed(schedule, rank, slot, op, None), ("weight", rank, _slot_of(schedule.ops[rank], ("Bi",), op))


def one_too_many(schedule, rng):
    """Starts a forward early enough to exceed the bound by one, where nothing else is wrong with that."""
    rank, slot, op = _pick(schedule, rng, ("F",))
    target = int(rng.integers(max(slot - 4, 0), slot + 1))
    broken = _moved(schedule, rank, slot, target)
    held, peak, where = 0, 0, None
    for s, entry in enumerate(broken.ops[rank]):
        held += sum(o.kind == "F" for o in entry.ops)
        peak = max(peak, held)
        where = s if where is None and held > schedule.max_activations else where
        held -= sum(o.kind in ("B", "Bi") for o in entry.ops)
    looser = dataclasses.replace(broken, max_activations=schedule.max_activations + 1)
    fits = peak == schedule.max_activations + 1 and replay(looser)
    return (broken, ("activations", rank, where)) if fits else None


def deadlock(schedule, rng):
    """Moves an entry so far ahead that other ranks wait for this one and it for them, not before its own producer."""
    rank, slot, op = _pick(schedule, rng, ("F", "B", "Bi"))
    own = [_slot_of(schedule.ops[rank], ("F",), o) for o in schedule.ops[rank][slot].ops if o.kind != "F"]
    target = int(rng.integers(max(own, default=-1) + 1, slot + 1))
    broken = _moved(schedule, rank, slot, target)
    stage = schedule.stage(rank, op.chunk)
    turns_here = stage + 1 in schedule.stages[rank] or stage - 1 in schedule.stages[rank]
    unbounded = dataclasses.replace(broken, max_activations=schedule.n_microbatches * schedule.n_stages)
    return None if turns_here or replay(unbounded) else (broken, ("cycle", rank, target))


MUTATIONS: dict[str, Callable[[Schedule, np.random.Generator], tuple[Schedule, Place] | None]] = {
    "drop": drop, "duplicate": duplicate, "before_producer": before_producer, "swap_direction": swap_direction,
    "lose_weight": lose_weight, "one_too_many": one_too_many, "deadlock": deadlock,
}
POOL = tuple(make(kind, p, n) for kind in KINDS for p, n in ((2, 4), (4, 8), (4, 12), (6, 12)))


def _draw(make_one, n: int, rng: np.random.Generator):
    """n results of make_one on random schedules of the pool, those that are None left out."""
    while n:
        if (one := make_one(POOL[rng.integers(len(POOL))], rng)) is not None:
            yield one
            n -= 1


def found(name: str, n: int, seed: int) -> int:
    """How many of n mutations the checker names rightly."""
    hits = 0
    for broken, place in _draw(MUTATIONS[name], n, np.random.default_rng(seed)):
        named = {violation[:3] for violation in check(broken).violations}
        hits += place in named if name == "deadlock" else named == {place}
    return hits


def agreement(n: int, seed: int) -> tuple[int, int, int]:
    """Of n legal re-orderings, accepted; of the illegal ones met on the way, refused; and how many these were."""
    accepted = refused = illegal = 0

    def reordered(schedule, rng):
        nonlocal refused, illegal
        other = schedule
        for _ in range(rng.integers(1, 4)):
            rank = int(rng.integers(schedule.n_ranks))
            source = int(rng.integers(len(schedule.ops[rank])))
            target = int(np.clip(source + rng.integers(-3, 4), 0, len(schedule.ops[rank]) - 1))
            other = _moved(other, rank, source, target)
        if other.ops == schedule.ops:
            return None
        if replay(other):
            return other
        illegal += 1
        refused += bool(check(other).violations)
        return None

    for other in _draw(reordered, n, np.random.default_rng(seed)):
        accepted += not check(other).violations
    return accepted, refused, illegal


if __name__ == "__main__":
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    for name in MUTATIONS:
        print(f"{name:16} {found(name, n, seed=0)} of {n} named by rule, rank and slot")
    accepted, refused, illegal = agreement(n, seed=0)
    print(f"{'re-ordered':16} {accepted} of {n} legal accepted, {refused} of {illegal} illegal refused")
