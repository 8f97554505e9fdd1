"""Several runs on one page: what their configs differ in, how they ended, and their curves on one axis."""
from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from model.errors import require
from train import page, plots, run_record
from train.metrics import write_atomically
from train.plots import Curve
from train.run_record import Run

CURVES = {"main_loss": "Loss (next token)", "loss": "Loss", "mtp_loss": "MTP loss", "moe/max_violation": "Imbalance (MaxVio)",
          "reward/mean": "Reward", "completions/mean_length": "Length of answers", "lr": "Learning rate", "grad_norm": "Gradient norm",
          "tokens_per_s": "Tokens a second"}


def write(runs: Sequence[Run], workdir: pathlib.Path) -> pathlib.Path:
    """Writes workdir/compare.html and workdir/plots/compare_*.png; the first run is the one the others are compared with."""
    require(len(runs) >= 2, "report.runs", len(runs), "two runs or more, or none for the report of workdir")
    names = labels(runs)
    sections = [page.Section("Differences", differences(runs, names)), page.Section("How they ended", endings(runs, names)),
                page.Section("Curves", curves(runs, names, workdir))]
    target = workdir / "compare.html"
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, page.page(f"{len(runs)} runs compared", " · ".join(names), sections))
    return target


def labels(runs: Sequence[Run]) -> list[str]:
    """The shortest ends of their paths that tell them apart."""
    parts = [run.path.absolute().parts for run in runs]
    for n in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-n:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({i + 1})" for i, name in enumerate(names)]  # one run named twice


def different_leaves(configs: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Dotted path -> value in each config, for the deciding leaves that are not alike in all; missing where a run has no such leaf."""
    flat = [run_record.deciding_leaves(c) for c in configs]
    paths = list(dict.fromkeys(path for f in flat for path in f))
    rows = {path: [f.get(path, MISSING) for f in flat] for path in paths}
    return {path: row for path, row in rows.items() if any(v != row[0] for v in row)}


class Missing:
    """A leaf that a config does not have (it belongs to a kind that was not chosen)."""

    def __repr__(self) -> str:
        return "not read"


MISSING = Missing()


def differences(runs: Sequence[Run], names: Sequence[str]) -> str:
    """The leaves that differ, what is unlike the first run highlighted; commits beside them."""
    def cell(value, reference):
        shown = page.Html('<span class="none">not read</span>') if value is MISSING else page.code(json.dumps(value, ensure_ascii=False))
        return shown if value == reference else page.Html(f"<mark>{shown}</mark>")

    found = different_leaves([run.config for run in runs])
    rows = [(page.code(path), *(cell(v, row[0]) for v in row)) for path, row in found.items()]
    rows.append(("commit", *(page.code(run.commit[:10]) if run.commit else None for run in runs)))
    alike = len({path for run in runs for path in run_record.deciding_leaves(run.config)}) - len(found)
    return page.table(("setting", *names), rows, f"{len(found)} settings differ, {alike} are alike; marked: unlike the first run.")


def endings(runs: Sequence[Run], names: Sequence[str]) -> str:
    """The last numbers of each run, and the difference from the first."""
    rows: dict[str, list[float | None]] = {}
    for i, run in enumerate(runs):
        for label, value in last_numbers(run).items():
            rows.setdefault(label, [None] * len(runs))[i] = value
    body = []
    for label, values in rows.items():
        cells = [values[0]]
        for value in values[1:]:
            both = isinstance(value, float) and isinstance(values[0], float)
            cells.append(page.Html(f'{page.text(value)} <span class="none">({value - values[0]:+.3g})</span>') if both else value)
        body.append((label, *cells))
    return page.table(("", *names), body, "In brackets the difference from the first run. One run each: no interval, so no verdict.")


def last_numbers(run: Run) -> dict[str, float | None]:
    """Closing scores by domain, the end of the losses, the last evaluation of each stage, and what it took."""
    closing = run.last("closing") or run.last("eval") or {}
    numbers: dict[str, Any] = {f"bits per byte, {d}": v for d, v in (closing.get("bits_per_byte") or {}).items()}
    numbers |= {f"pass@1, {e['stage']}": e.get("pass_at_1") for e in run.named("evaluation") if e.get("stage")}
    for key, label in (("main_loss", "loss"), ("mtp_loss", "MTP loss"), ("moe/max_violation", "MaxVio")):
        numbers[f"{label}, mean of the last tenth"] = run.tail_mean(key)
    speed = run.series("tokens_per_s")[1]
    numbers |= {"steps": len(run.steps), "tokens": int(sum(line.get("tokens") or 0 for line in run.steps)),
                "seconds in steps": run.seconds(), "tokens/s, median": float(np.median(speed)) if len(speed) else None}
    return {k: v for k, v in numbers.items() if v is not None}


def curves(runs: Sequence[Run], names: Sequence[str], workdir: pathlib.Path) -> str:
    """Every curve that at least one run has, all runs on one axis."""
    shown = []
    for key, title in CURVES.items():
        found = [Curve(name, *run.series(key), smooth=True, colour=plots.COLOURS[i % len(plots.COLOURS)])
                 for i, (run, name) in enumerate(zip(runs, names, strict=True)) if run.series(key)[0].size]
        if found and not (key == "loss" and any(run.series("main_loss")[0].size for run in runs)):
            path = plots.curves(workdir / "plots" / f"compare_{key.replace('/', '_')}.png", title, found, log=key == "grad_norm")
            shown.append(page.picture(path))
    return page.grid(*shown)
