"""A schedule as a CSV file: a line per rank, first the stages it holds, then its operations in order.

    0,   F0, F1, B0,   , B1
    1,     , F0, B0, F1, B1

A cell is a kind (F, B, Bi, W) and a micro-batch; `.c` names a chunk other than 0, `<` direction 1, `&` joins an
overlapped pair: `F3 & B0.1<`. Of the stages `0 7<` the second is chunk 1 and its micro-batches enter at the last rank.
Micro-batches are numbered from 0 within a direction. Empty cells are for the eye; lines that begin with # are comments.
"""
from __future__ import annotations

import pathlib
import re

from model.errors import UserError
from train.pipeline.op import Entry, Op, Pair
from train.pipeline.schedule import Schedule

CELL = re.compile(r"(F|Bi|B|W)(\d+)(?:\.(\d+))?(<?)")
STAGE = re.compile(r"(\d+)(<?)")


def read(path: str, max_activations: int | None = None) -> Schedule:
    """The schedule of a file, unchecked but for its grammar and its placement of stages (else UserError)."""
    try:
        text = pathlib.Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"schedule.csv: found {path!r} ({error}), allowed: a text file") from None
    lines = [(number, [cell.strip() for cell in line.split(",")]) for number, line in enumerate(text.splitlines(), 1)
             if line.strip() and not line.startswith("#")]
    if not lines:
        raise UserError(f"{path}: found no rank, allowed: a line per rank, its stages first")
    held = [_stages(path, number, cells[0]) for number, cells in lines]
    directions = tuple(direction for _, direction in held[0])
    stages = tuple(tuple(stage for stage, _ in chunks) for chunks in held)
    if any(tuple(d for _, d in chunks) != directions for chunks in held):
        raise UserError(f"{path}: found ranks with unlike chunks, allowed: as many stages on each, the same with <")
    orders = [[_entry(path, number, cell) for cell in cells[1:] if cell] for number, cells in lines]
    ops = [op for order in orders for entry in order for op in entry.ops]
    n = 1 + max((op.microbatch for op in ops), default=0)
    schedule = Schedule(pathlib.Path(path).name, n * (1 + max(directions)), stages, directions, orders, max_activations)
    _placed(path, schedule)
    return schedule


def write(schedule: Schedule) -> str:
    """The text that `read` reads."""
    marks = ["<" * direction for direction in schedule.directions]
    heads = [" ".join(f"{stage}{mark}" for stage, mark in zip(held, marks, strict=True)) for held in schedule.stages]
    return "".join(", ".join([head, *map(str, order)]) + "\n" for head, order in zip(heads, schedule.ops, strict=True))


def _stages(path: str, number: int, cell: str) -> list[tuple[int, int]]:
    found = [STAGE.fullmatch(word) for word in cell.split()]
    if not found or not all(found):
        raise UserError(f"{path}, line {number}: found {cell!r}, allowed: first the stages of the rank: 0 or 0 7<")
    return [(int(match[1]), len(match[2])) for match in found]


def _entry(path: str, number: int, cell: str) -> Entry:
    found = [CELL.fullmatch(part.strip()) for part in cell.split("&")]
    if len(found) > 2 or not all(found):
        raise UserError(f"{path}, line {number}: found {cell!r}, allowed: F, B, Bi or W and a micro-batch, .chunk, <; "
                        "& joins a pair")
    ops = [Op(match[1], int(match[3] or 0), int(match[2]), len(match[4])) for match in found]
    return Pair(*ops) if len(ops) == 2 else ops[0]


def _placed(path: str, schedule: Schedule) -> None:
    """Every direction goes once through all stages, from a rank to itself or to its neighbour on the ring."""
    for direction in range(1 + max(schedule.directions)):
        held = {stage: rank for rank, chunks in enumerate(schedule.stages)
                for stage, d in zip(chunks, schedule.directions, strict=True) if d == direction}
        n_places = schedule.directions.count(direction) * schedule.n_ranks
        if sorted(held) != list(range(schedule.n_stages)) or n_places != schedule.n_stages:
            raise UserError(f"{path}: found stages {sorted(held)} on {n_places} chunks in direction {direction}, "
                            "allowed: 0, 1, 2, ..., each once")
        for stage in range(1, schedule.n_stages):
            if (held[stage] - held[stage - 1]) % schedule.n_ranks not in (0, 1, schedule.n_ranks - 1):
                raise UserError(f"{path}: found stage {stage - 1} on rank {held[stage - 1]} and stage {stage} on rank "
                                f"{held[stage]}, allowed: the same rank or neighbours")
