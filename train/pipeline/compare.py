"""All kinds of schedule side by side: the table, bubble against micro-batches, the shortest by size and times."""
from __future__ import annotations

import itertools
from typing import NamedTuple

from model.errors import UserError
from train.pipeline import slots
from train.pipeline.op import Times
from train.pipeline.schedule import KINDS, Schedule, make
from train.pipeline.simulate import simulate

Sizes = tuple[int, ...]
Size = tuple[int, int]  # n_ranks, micro-batches / n_ranks
Case = tuple[float, float]  # t_overlapped / (F + B), t_comm / F


class Outcome(NamedTuple):
    makespan: float
    bubble: float
    activations: float  # the most a rank holds, in units of what 1/n_ranks of the model keeps for a micro-batch
    parameters: float  # how often they stand in the pipe

    @property
    def share(self) -> float:
        return self.bubble / self.makespan


def outcome(schedule: Schedule, times: Times) -> Outcome:
    line = simulate(schedule, times)
    return Outcome(line.makespan, line.bubble, max(line.peak_activations_per_rank) * schedule.share, schedule.copies)


def fitting(kind: str, n_ranks: int, n: int, n_chunks: int, more: int = 0) -> tuple[Schedule | None, str]:
    """The kind with n micro-batches, or at most so many more, or None; and why it does not run with n, or ''."""
    reason = ""
    for size in range(n, n + more + 1):
        try:
            return make(kind, n_ranks, size, n_chunks), reason
        except UserError as error:
            reason = reason or str(error)
    return None, reason


def messages(schedule: Schedule) -> float:
    """Activations and gradients sent from rank to rank, a micro-batch."""
    sent = sum(schedule.home(*node[1:]) != rank for rank, order in enumerate(schedule.ops) for entry in order
               for node in schedule.needs(rank, entry))
    return sent / schedule.n_microbatches


HEAD = ("", "micro-batches", "makespan", "bubble", "formula", "share", "activations", "parameters", "messages",
        "slots", "on slots", "rows: act", "grad", "stash")


def table(schedule: Schedule, times: Times, n_chunks: int, max_stash: int | None) -> str:
    """Markdown, a line per kind at the size of `schedule`, and itself."""
    n_ranks, n = schedule.n_ranks, schedule.n_microbatches
    kinds = {kind: fitting(kind, n_ranks, n, n_chunks, more=2 * n_ranks) for kind in KINDS} | {schedule.kind: (schedule, "")}
    lines, notes = [HEAD, ("---",) * len(HEAD)], []
    for kind, (one, reason) in kinds.items():
        if reason:
            notes.append(f"{reason}: {'left out' if one is None else f'shown with {one.n_microbatches}'}.")
        if one is None:
            continue
        result, formula = outcome(one, times), None
        if kind in KINDS:
            formula = KINDS[kind].bubble(n_ranks, n_chunks, times)
            if abs(formula - result.bubble) > 1e-9:
                notes.append(f"{kind}: the formula is exact if t_comm = 0{KINDS[kind].exact_if}.")
        aligned = slots.align(one, times, max_stash)
        lines.append((kind, one.n_microbatches, f"{result.makespan:g}", f"{result.bubble:g}",
                      "" if formula is None else f"{formula:g}", f"{result.share:.1%}", f"{result.activations:g}",
                      f"{result.parameters:g}", f"{messages(one):g}", len(aligned),
                      f"{slots.length(one, aligned, times):g}", *slots.tables(one, aligned)[1]))
    return "\n".join(["| " + " | ".join(map(str, line)) + " |" for line in lines] + [""] + notes)


def shares(n_ranks: int, per_rank: Sizes, n_chunks: int, times: Times) -> dict[str, list[tuple[int, float]]]:
    """kind -> (micro-batches, bubble share), where the kind runs."""
    curves = {kind: [(n, outcome(one, times).share) for n in (n_ranks * each for each in per_rank)
                     if (one := fitting(kind, n_ranks, n, n_chunks)[0])] for kind in KINDS}
    return {kind: points for kind, points in curves.items() if points}


class Winner(NamedTuple):
    """The shortest kind, and the shortest in 1F1B's memory: parameters once and at most PP + 1 activations."""

    kind: str
    frugal: str
    longer: float  # share by which the frugal one takes longer


def winners(n_ranks: Sizes, per_rank: Sizes, n_chunks: int, cases: dict[Case, Times]) -> dict[Case, dict[Size, Winner]]:
    """Per case: (n_ranks, micro-batches / n_ranks) -> the winner; of equally short kinds the one that holds less."""
    grids = {case: {} for case in cases}
    for p, each in itertools.product(n_ranks, per_rank):
        runs = {kind: one for kind in KINDS if (one := fitting(kind, p, p * each, n_chunks)[0])}
        for case, times in cases.items():
            all_of = {kind: outcome(one, times) for kind, one in runs.items()}
            order = sorted(all_of, key=lambda kind: (round(all_of[kind].makespan, 9), all_of[kind].activations))
            frugal = next(kind for kind in order if all_of[kind].parameters == 1 and all_of[kind].activations <= p + 1)
            longer = all_of[frugal].makespan / all_of[order[0]].makespan - 1
            grids[case][p, each] = Winner(order[0], frugal, longer)
    return grids
