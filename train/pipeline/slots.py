"""From lists to the table an executor scans: slots, buffer rows, int32 columns.

One exchange stands between two slots: what slot s sends is usable from s + 1. A slot lasts as long as its busiest rank,
so lists run slower on slots than on clocks, unless the aligner helps. It tries every backward whole or split (dx then
leaves a slot early) with ready operations fused into a slot or not, and keeps the shortest.

Inside a slot the order is: read rows; forward and input part; tail (the last stage's losses and dy); weight part;
write what arrived. So a forward feeds an input part from the next slot on, an input part its weight part at once; an
act or grad row is free for what arrives in the slot that reads it last, a stash row from the next slot on.
"""
from __future__ import annotations

import heapq
import math
from collections import deque
from typing import NamedTuple

import numpy as np

from model.errors import UserError, require
from train.pipeline.op import PARTS, Entry, Op, Pair, Times
from train.pipeline.schedule import Node, Schedule


class Slot(NamedTuple):
    """What a rank does in a slot. A whole backward fills input and weight, a pair all three."""

    forward: Op | None = None
    input: Op | None = None
    weight: Op | None = None


Table = list[list[Slot]]  # [slot][rank]


def align(schedule: Schedule, costs: Times, max_stash: int | None = None) -> Table:
    """The shortest of the four tables of a schedule that the checker accepts.

    max_stash bounds what a rank keeps from I to W (inputs and output gradients): W runs earlier rather than exceed it.
    """
    require(max_stash is None or max_stash >= 1, "schedule.max_stash", max_stash, "at least 1, or None: no bound")
    bound = math.inf if max_stash is None else max_stash
    tables = [_fill(schedule, costs, bound, split, fuse) for fuse in (False, True) for split in (False, True)]
    return min(tables, key=lambda table: (round(length(schedule, table, costs), 9), len(table)))


def length(schedule: Schedule, table: Table, costs: Times) -> float:
    """The time of a table: the sum over slots of the busiest rank. Only pairs marked in the lists cost t_overlapped."""
    pairs = [{entry for entry in order if isinstance(entry, Pair)} for order in schedule.ops]

    def cost(rank: int, slot: Slot) -> float:
        pair = Pair(slot.forward, slot.input)
        entries = {pair, slot.weight} - {slot.input} if pair in pairs[rank] else set(slot)
        return sum(costs.of(entry) for entry in entries if entry)

    return schedule.share * sum(max(cost(rank, slot) for rank, slot in enumerate(row)) for row in table)


def _parts(entries: list[Entry]) -> str:
    return "".join(PARTS[op.kind] for entry in entries for op in entry.ops)


def _halves(entry: Entry) -> list[Entry]:
    return [entry._replace(kind="Bi"), entry._replace(kind="W")] if entry.ops[0].kind == "B" else [entry]


class _Rank:
    """What one rank still has to do, what it takes into the slot being filled, and the weight parts it has put off."""

    def __init__(self, schedule: Schedule, rank: int, costs: Times, max_stash: float, split: bool):
        self.schedule, self.rank, self.costs, self.max_stash = schedule, rank, costs, max_stash
        self.queue = deque(part for entry in schedule.ops[rank] for part in (_halves(entry) if split else [entry]))
        self.taken: list[Entry] = []
        self.due: list[Op] = []  # oldest first; of earlier slots only

    def cost(self) -> float:
        return sum(map(self.costs.of, self.taken))

    def gives(self) -> list[Node]:
        return [node for entry in self.taken for node in self.schedule.gives(self.rank, entry)]

    def take(self, done: set[Node], limit: float = math.inf) -> bool:
        """Takes the next entry, if it is ready, its lanes are free and the slot stays within the limit of time."""
        if not self.queue:
            return False
        if "I" in _parts([self.queue[0]]) and len(self.due) >= self.max_stash:  # no stash row is free: W first
            if self.due[0] in self.taken:
                return False
            self.queue.remove(self.due[0])
            self.queue.appendleft(self.due[0])
        entry = self.queue[0]
        here = self.gives() if _parts([entry]) == "W" else ()
        fits = not set(_parts([entry])) & set(_parts(self.taken)) and self.cost() + self.costs.of(entry) <= limit
        if not fits or any(node not in done and node not in here for node in self.schedule.needs(self.rank, entry)):
            return False
        self.taken.append(self.queue.popleft())
        return True

    def close(self) -> Slot:
        """Ends the slot and says what was in it."""
        ops = [op for entry in self.taken for op in entry.ops]
        self.due += [op._replace(kind="W") for op in ops if op.kind == "Bi"]
        self.due = [op for op in self.due if op not in ops]
        self.taken = []
        lanes = {part: op for op in ops for part in PARTS[op.kind]}
        return Slot(*(lanes.get(part) for part in "FIW"))


def _fill(schedule: Schedule, costs: Times, max_stash: float, split: bool, fuse: bool) -> Table:
    """Slot by slot each rank takes its next entry if ready; fused, also those after it that fit into the slot."""
    ranks = [_Rank(schedule, rank, costs, max_stash, split) for rank in range(schedule.n_ranks)]
    done: set[Node] = set()
    table = []
    while any(rank.queue for rank in ranks):
        if not any([rank.take(done) for rank in ranks]):
            raise UserError(f"schedule {schedule.kind}: found ranks that wait for ever, allowed: what check passes")
        if fuse:
            longest = max(rank.cost() for rank in ranks)
            for rank in ranks:
                while rank.taken and rank.take(done, longest + 1e-9):
                    pass
        done.update(node for rank in ranks for node in rank.gives())
        table.append([rank.close() for rank in ranks])
    return table


def colour(intervals: list[tuple[int, int]]) -> list[int]:
    """A row for each half-open interval, no two of a row overlapping; as few rows as ever overlap at once."""
    rows, free, busy = [0] * len(intervals), [], []
    for i in sorted(range(len(intervals)), key=intervals.__getitem__):
        start, end = intervals[i]
        while busy and busy[0][0] <= start:
            heapq.heappush(free, heapq.heappop(busy)[1])
        rows[i] = heapq.heappop(free) if free else len(busy)
        heapq.heappush(busy, (end, rows[i]))
    return rows


class Tables(NamedTuple):
    """What the executor reads: int32 [slots, ranks] each, sharded by column over `pipe`. It never asks for the kind.

    A row that is not used is the trash row, one past the buffer's last. An act row belongs to a sample from the arrival
    of its stage input (first stage: from its forward) to its input part: what else F keeps for I may use the same row
    number. from_left and from_right are ring shifts by one rank, own is the rank itself.
    """

    branch: np.ndarray  # 0 idle, 1 F, 2 I, 3 F and I
    forward_chunk: np.ndarray
    forward_sample: np.ndarray
    forward_act: np.ndarray
    forward_first: np.ndarray  # 1: the input is the embedding of the sample's tokens
    forward_last: np.ndarray  # 1: the tail runs and writes dy to tail_grad
    input_chunk: np.ndarray
    input_sample: np.ndarray
    input_act: np.ndarray
    input_grad: np.ndarray
    input_first: np.ndarray  # 1: dx goes to the embedding
    weight_on: np.ndarray
    weight_chunk: np.ndarray
    weight_stash: np.ndarray
    write_stash: np.ndarray
    tail_grad: np.ndarray
    act_from_left: np.ndarray
    act_from_right: np.ndarray
    act_own: np.ndarray
    grad_from_left: np.ndarray
    grad_from_right: np.ndarray
    grad_own: np.ndarray


class Rows(NamedTuple):
    """Rows of the three buffers, the trash row not counted: the largest of any rank, as one program serves all."""

    act: int
    grad: int
    stash: int


def _when(schedule: Schedule, table: Table) -> dict[Node, int]:
    """The slot of each part of each sample at each stage."""
    return {(part, schedule.stage(rank, op.chunk), schedule.sample(op)): s for s, row in enumerate(table)
            for rank, slot in enumerate(row) for part, op in zip("FIW", slot, strict=True) if op}


def lifetimes(schedule: Schedule, table: Table) -> dict[str, list[dict[tuple[int, int], tuple[int, int]]]]:
    """Per buffer and rank: (stage, sample) -> half-open interval in which the row is taken."""
    when, last = _when(schedule, table), schedule.n_stages - 1
    lives = {buffer: [{} for _ in range(schedule.n_ranks)] for buffer in Rows._fields}
    for part, stage, sample in when:
        if part == "F":
            rank, read = schedule.home(stage, sample), when["I", stage, sample]
            dy = ("F", stage, sample) if stage == last else ("I", stage + 1, sample)
            lives["act"][rank][stage, sample] = when["F", max(stage - 1, 0), sample], read
            lives["grad"][rank][stage, sample] = when[dy], read
            lives["stash"][rank][stage, sample] = read, when["W", stage, sample] + 1
    return lives


def receive_depth(schedule: Schedule, table: Table) -> int:
    """The most messages that wait at a rank for their first reader at the end of a slot."""
    when, waiting = _when(schedule, table), [[] for _ in range(schedule.n_ranks)]
    for (part, stage, sample), read in when.items():
        before = {"F": ("F", stage - 1, sample), "I": ("I", stage + 1, sample)}.get(part)
        if before in when:
            waiting[schedule.home(stage, sample)].append((when[before], read))
    return max((1 + max(colour(spans), default=-1) for spans in waiting), default=0)


def tables(schedule: Schedule, table: Table) -> tuple[Tables, Rows]:
    """The columns of a table and the rows its buffers need; rows by interval colouring."""
    number = {buffer: [dict(zip(spans, colour(list(spans.values())), strict=True)) for spans in ranks]
              for buffer, ranks in lifetimes(schedule, table).items()}
    rows = Rows(*(1 + max(max(of_rank.values(), default=-1) for of_rank in number[buffer]) for buffer in Rows._fields))
    trash = {name: getattr(rows, buffer) for name in Tables._fields for buffer in Rows._fields if buffer in name}
    t = Tables(*(np.full((len(table), schedule.n_ranks), trash.get(name, 0), np.int32) for name in Tables._fields))

    def send(buffer: str, s: int, sender: int, stage: int, sample: int):
        receiver = schedule.home(stage, sample)
        side = {0: "own", 1: "from_left"}.get((receiver - sender) % schedule.n_ranks, "from_right")
        getattr(t, f"{buffer}_{side}")[s, receiver] = number[buffer][receiver][stage, sample]

    for s, row in enumerate(table):
        for rank, slot in enumerate(row):
            here = s, rank
            act, grad, stash = (number[buffer][rank] for buffer in Rows._fields)
            t.branch[here] = (slot.forward is not None) + 2 * (slot.input is not None)
            if op := slot.forward:
                stage, sample = key = schedule.stage(rank, op.chunk), schedule.sample(op)
                t.forward_chunk[here], t.forward_sample[here], t.forward_act[here] = op.chunk, sample, act[key]
                t.forward_first[here], t.forward_last[here] = stage == 0, stage == schedule.n_stages - 1
                if stage == schedule.n_stages - 1:
                    t.tail_grad[here] = grad[key]
                else:
                    send("act", s, rank, stage + 1, sample)
            if op := slot.input:
                stage, sample = key = schedule.stage(rank, op.chunk), schedule.sample(op)
                t.input_chunk[here], t.input_sample[here] = op.chunk, sample
                t.input_act[here], t.input_grad[here], t.write_stash[here] = act[key], grad[key], stash[key]
                t.input_first[here] = stage == 0
                if stage:
                    send("grad", s, rank, stage - 1, sample)
            if op := slot.weight:
                key = schedule.stage(rank, op.chunk), schedule.sample(op)
                t.weight_on[here], t.weight_chunk[here], t.weight_stash[here] = 1, op.chunk, stash[key]
    return t, rows
