"""Runs a schedule on a clock: when each operation starts, how long ranks idle, what they hold (V3 table 2).

A rank runs its list in order and starts an entry when all it needs is there. Messages leave when an entry ends, are
buffered, take t_comm and occupy nobody; a message to the rank itself takes nothing.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from model.errors import UserError
from train.pipeline.op import Entry, Times

if TYPE_CHECKING:
    from train.pipeline.schedule import Schedule


class Event(NamedTuple):
    rank: int
    op: Entry
    start: float
    end: float


class Timeline(NamedTuple):
    makespan: float
    bubble: float  # the largest idle time of a rank
    idle_per_rank: tuple[float, ...]  # makespan less the time it works
    peak_activations_per_rank: tuple[int, ...]  # chunks from F to the input part of their backward
    events: tuple[Event, ...]


def simulate(schedule: Schedule, times: Times) -> Timeline:
    """Times are of 1/n_ranks of the model, whatever its chunks. Raises UserError where ranks wait for ever."""
    over: dict = {}  # node -> (rank, end)
    free, busy, events = [0.0] * schedule.n_ranks, [0.0] * schedule.n_ranks, []
    for rank, slot, needs, gives in schedule.walk():
        entry, start = schedule.ops[rank][slot], free[rank]
        for node in needs:
            sender, end = over[node]
            start = max(start, end if sender == rank else end + times.t_comm)
        cost = times.of(entry) * schedule.share
        free[rank] = start + cost
        busy[rank] += cost
        for node in gives:
            over[node] = rank, free[rank]
        events.append(Event(rank, entry, start, free[rank]))
    if len(events) < sum(map(len, schedule.ops)):
        raise UserError(f"schedule {schedule.kind}: found ranks that wait for ever, allowed: what the checker passes")
    makespan = max(free)
    idle = tuple(makespan - b for b in busy)
    peaks = tuple(max(schedule.in_flight(rank), default=0) for rank in range(schedule.n_ranks))
    return Timeline(makespan, max(idle), idle, peaks, tuple(events))
