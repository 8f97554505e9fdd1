"""Job `schedule`: check a pipeline schedule, compare all kinds at its size, draw them (V3 table 2 and figure 5).

Writes schedule.md (the table), plots/schedule (what runs when), plots/bubble (its share against micro-batches) and
plots/winner (the shortest kind by ranks, micro-batches and communication), each plot as PNG and SVG.
"""
from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib

from model.errors import UserError, freeze, require
from train.metrics import prepare_workdir
from train.pipeline import compare, draw, grid
from train.pipeline.check import check
from train.pipeline.op import Times
from train.pipeline.schedule import make
from train.pipeline.simulate import simulate


@dataclasses.dataclass(frozen=True)
class Job:
    kind: str
    n_ranks: int
    n_microbatches: int
    n_chunks: int
    csv: str
    max_activations: int | None
    max_stash: int | None
    map_ranks: tuple[int, ...]  # the sizes of the second and the third picture
    map_per_rank: tuple[int, ...]  # micro-batches / ranks
    map_overlapped: tuple[float, ...]  # t_overlapped / (F + B)
    map_comm: tuple[float, ...]  # t_comm / F
    times: Times

    def __post_init__(self):
        for name in ("map_ranks", "map_per_rank"):
            sizes = getattr(self, name)
            require(sizes and all(type(n) is int and n >= 1 for n in sizes), name, sizes, "integers, at least 1")


def parse(config) -> Job:
    """config: the subtree `schedule`. The file `times` stands in for the leaves t_*."""
    path = config["times"]
    times = _read_times(path) if path else {key: config[key] for key in config if key.startswith("t_")}
    leaves = {key: config[key] for key in config if key != "times" and not key.startswith("t_")}
    return freeze(Job, leaves, "schedule", times=freeze(Times, times, path or "schedule"))


def _read_times(path: str) -> dict:
    allowed = "a JSON object with " + ", ".join(field.name for field in dataclasses.fields(Times))
    try:
        times = json.loads(pathlib.Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"schedule.times: found {path!r} ({error}), allowed: {allowed}") from None
    if not isinstance(times, dict):
        raise UserError(f"schedule.times: found {path!r} with {times!r}, allowed: {allowed}")
    return times


def schedule(config, workdir: str) -> None:
    job = parse(config.schedule)
    if job.csv:
        chosen = grid.read(job.csv, job.max_activations)
    else:
        chosen = make(job.kind, job.n_ranks, job.n_microbatches, job.n_chunks)
    report = check(chosen, job.times)
    if report.violations:
        print(*report.violations, sep="\n")
        raise UserError(f"schedule {chosen.kind}: {report.violations[0]}")
    text = (f"{chosen.kind} passes the checker: at most {report.peak_activations} chunks in flight and "
            f"{report.peak_weights} weight parts put off on a rank; on slots it receives into {report.receive_depth} buffers.\n\n"
            f"{compare.table(chosen, job.times, job.n_chunks, job.max_stash)}\n")
    print(text)
    folder = prepare_workdir(workdir, config)
    (folder / "schedule.md").write_text(text)
    plots = folder / "plots"
    draw.timeline(chosen, simulate(chosen, job.times), str(plots / "schedule"))
    curves = compare.shares(chosen.n_ranks, job.map_per_rank, job.n_chunks, job.times)
    draw.shares(curves, f"Bubble of {chosen.n_ranks} ranks", str(plots / "bubble"))
    t, cases = job.times, {}
    for overlap, comm in itertools.product(job.map_overlapped, job.map_comm):
        pair = overlap * (t.t_forward + t.t_backward)
        cases[overlap, comm] = dataclasses.replace(t, t_overlapped=pair, t_comm=comm * t.t_forward)
    panels = compare.winners(job.map_ranks, job.map_per_rank, job.n_chunks, cases)
    draw.winners(panels, "Bold: the shortest kind. Below: the shortest that keeps parameters once and at most PP + 1 activations, "
                 "and how much longer it takes", str(plots / "winner"))
