"""The table of an ablation, rebuilt from its cells' metrics.jsonl alone: paired differences, intervals, exact tests, verdicts.

For each metric and edit: d_s = metric(edit, seed s) - metric(base, seed s), its mean with a Student-t 95 % interval, and the exact
two-sided sign-flip p. A verdict is about the sign that a paper predicts: as predicted or opposite only where the interval says so.
Writes ablation.json, ablation.md, report.html and plots/.
"""
from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from model import config as model_config
from model.errors import UserError
from train import metrics, page, plots, run_record, statistics
from train.run_record import Run

BASE, AA = "base", "A/A"
DIVERGED = "diverged.txt"
PREDICTED, OPPOSITE, UNDECIDED = "as predicted", "opposite", "undecided"


def _closing(run: Run, domain: str) -> float | None:
    scores = (run.last("closing") or {}).get("bits_per_byte") or {}
    return scores.get(domain) if domain else float(np.mean(list(scores.values()))) if scores else None


def _evaluation(run: Run, key: str) -> float | None:
    return (run.last("evaluation") or {}).get(key)


def _rise(run: Run, key: str) -> float | None:
    seen = [e[key] for e in run.named("evaluation") if e.get(key) is not None]
    return seen[-1] - seen[0] if len(seen) > 1 else None


def _log(value: float | None) -> float | None:
    return None if value is None else float(np.log(value))


# name -> (run, what stands behind '/' in the config) -> value; None where the run has none
METRICS: Mapping[str, Callable[[Run, str], float | None]] = {
    "bits_per_byte": _closing,  # mean of the domains, or one: bits_per_byte/code
    "main_loss": lambda run, _: run.tail_mean("main_loss"),
    "log_main_loss": lambda run, _: _log(run.tail_mean("main_loss")),  # a difference is the relative error of the smoothed loss
    "max_violation": lambda run, _: run.tail_mean("moe/max_violation"),
    "tokens_per_s": lambda run, _: float(np.median(run.series("tokens_per_s")[1])) if len(run.series("tokens_per_s")[0]) else None,
    "evaluation": _evaluation,  # evaluation/pass_at_1: a number of the run's last evaluation
    "rise": _rise,  # rise/worked: from its first evaluation to its last
}


def cell_path(workdir: pathlib.Path, arm: str, seed: int) -> pathlib.Path:
    """Where a cell's run lies; the A/A arm is the base at its own seeds."""
    return workdir / "cells" / (BASE if arm == AA else arm) / f"seed-{seed}"


def status(path: pathlib.Path) -> str:
    """none, half, done (its closing event stands, or every stage of a recipe has its budget) or diverged."""
    if (path / DIVERGED).exists():
        return "diverged"
    if not (path / "metrics.jsonl").exists() or not (path / "config.json").exists():
        return "none"
    run = run_record.read(path)
    stages = set(run.config["recipe"]["stages"]) if run.config.get("job") == "r1" else None
    ended = run.last("closing") if stages is None else stages <= {e.get("stage") for e in run.named("budget")}
    return "done" if ended else "half"


def collect(workdir: pathlib.Path) -> dict[str, Any]:
    """Every number of the table: dict(settings, tables={metric: rows}, costs, cells). Raises UserError outside an ablation's folder."""
    config = run_record.read(workdir).config
    if "ablate" not in config or not (workdir / "edits.json").exists():
        raise UserError(f"workdir: found no ablation in {str(workdir)!r}, allowed: the folder of a job 'ablate'")
    spec, notes = config["ablate"], json.loads((workdir / "edits.json").read_text())
    seeds = [config["seed"] + k for k in range(spec["seeds"])]
    arms = {BASE: seeds, AA: [s + len(seeds) for s in seeds]} | {name: seeds for name in spec["names"]}
    runs = {arm: [_finished(cell_path(workdir, arm, s)) for s in of] for arm, of in arms.items()}
    reasons = {arm: {str(s): _reason(cell_path(workdir, arm, s)) for s in of} for arm, of in arms.items()}
    note_of = {AA: dict(claim="The base again, on other seeds.", source="", published="", predicted={})} | notes
    tables = {}
    for metric in spec["metrics"]:
        values = {arm: [None if run is None else _value(run, metric) for run in found] for arm, found in runs.items()}
        tables[metric] = [_row(arm, arms[arm], values[BASE], values[arm], note_of[arm], metric, spec["margin"],
                               {s: r for s, r in reasons[arm].items() if r}) for arm in (AA, *spec["names"])]
    costs = [_cost(arm, [run for run in runs[arm] if run]) for arm in (BASE, *spec["names"])]
    return dict(base=spec["base"], edits=list(spec["edits"]), seeds=seeds, margin=spec["margin"], tables=tables,
                costs=[c for c in costs if c], done=sum(r is not None for found in runs.values() for r in found),
                cells=sum(map(len, runs.values())))


def _finished(path: pathlib.Path) -> Run | None:
    return run_record.read(path) if status(path) == "done" else None


def _reason(path: pathlib.Path) -> str:
    reasons = {"none": "not run yet", "half": "not finished", "done": ""}
    state = status(path)
    return reasons[state] if state in reasons else (path / DIVERGED).read_text().strip()


def _value(run: Run, metric: str) -> float | None:
    name, _, part = metric.partition("/")
    return METRICS[name](run, part)


def _row(arm, seeds, base, new, note, metric, margin, missing) -> dict[str, Any]:
    """One line of a table; pairs without both values are left out, and said."""
    pairs = [(s, b, v) for s, b, v in zip(seeds, base, new, strict=True) if b is not None and v is not None]
    row = dict(name=arm, claim=note["claim"], source=note["source"], published=note["published"], predicted=note["predicted"].get(metric),
               n=len(pairs), seeds=[p[0] for p in pairs], base=[p[1] for p in pairs], edit=[p[2] for p in pairs],
               differences=[p[2] - p[1] for p in pairs], mean=None, low=None, high=None, p=None, missing=missing)
    if pairs:
        found = statistics.paired_difference(row["edit"], row["base"])
        row |= dict(mean=found.mean, low=found.low, high=found.high, p=statistics.sign_flip_p(row["differences"]))
    return row | dict(verdict=verdict(row, margin))


def verdict(row: Mapping[str, Any], margin: float) -> str | None:
    """as predicted, opposite or undecided, by the interval alone; of the A/A row whether its interval holds 0."""
    low, high, sign = row["low"], row["high"], row["predicted"]
    if row["name"] == AA:
        return None if low is None else "holds 0" if low <= 0 <= high else "MISSES 0"
    if sign is None:
        return None
    if low is None:
        return UNDECIDED
    if sign == "same":
        return PREDICTED if -margin <= low and high <= margin else OPPOSITE if low > margin or high < -margin else UNDECIDED
    right, wrong = (low > 0, high < 0) if sign == "up" else (high < 0, low > 0)
    return PREDICTED if right else OPPOSITE if wrong else UNDECIDED


def _cost(arm: str, runs: list[Run]) -> dict[str, Any] | None:
    """Size and speed of an arm: whether a comparison is at equal parameters and FLOPs."""
    if not runs:
        return None
    speed = [_value(run, "tokens_per_s") for run in runs]
    cost = dict(name=arm, seconds=float(np.mean([run.seconds() for run in runs])), runs=len(runs),
                tokens_per_s=float(np.median([s for s in speed if s])) if any(speed) else None)
    cfg = model_config.parse(runs[0].config["model"])
    job = runs[0].config.get(runs[0].config["job"]) or {}  # a recipe has no length of its own
    flops, n = cfg.flops_per_token(job.get("seq_len", 1)), cfg.num_params()
    return cost | dict(total=n["total"], activated=n["activated"], mtp=n["mtp"], flops=flops["training"], mtp_flops=flops["mtp_training"])


COLUMNS = ("edit", "predicted", "verdict", "edit - base", "95 % interval", "p", "n", "base")


def cells_of(row: Mapping[str, Any]) -> tuple:
    """What a printed table shows of a row, in the order of COLUMNS."""
    signed = lambda v: "" if v is None else f"{v:+.4f}"  # noqa: E731
    base = float(np.mean(row["base"])) if row["base"] else ""
    interval = "" if row["low"] is None else f"[{signed(row['low'])}, {signed(row['high'])}]"
    p = "" if row["p"] is None else f"{row['p']:.3f}"
    return row["name"], row["predicted"] or "", row["verdict"] or "", signed(row["mean"]), interval, p, row["n"], base


def text(result: Mapping[str, Any]) -> str:
    """The tables for a console."""
    return "\n\n".join(metrics.table(f"{metric}: {result['base']}, {result['done']} of {result['cells']} cells done", COLUMNS,
                                     [cells_of(row) for row in rows]) for metric, rows in result["tables"].items())


def write(workdir: pathlib.Path) -> pathlib.Path:
    """Writes ablation.json, ablation.md, plots and report.html from the cells; returns the page's path."""
    result = collect(workdir)
    metrics.write_atomically(workdir / "ablation.json", json.dumps(result, indent=1) + "\n")
    metrics.write_atomically(workdir / "ablation.md", markdown(result))
    sections = [page.Section("How to read it", question(result)),
                *(page.Section(metric, section(result, metric, workdir)) for metric in result["tables"]),
                page.Section("Claims", claims(result)), page.Section("Curves", curves(workdir, result)),
                page.Section("Cost", cost_table(result))]
    target = workdir / "report.html"
    metrics.write_atomically(target, page.page(f"Ablations of {result['base']}", str(workdir), sections))
    return target


def markdown(result: Mapping[str, Any]) -> str:
    """The tables, every point of them, and the claims."""
    lines = [f"# Ablations of {result['base']}", "", f"Seeds {_span(result['seeds'])}; {result['done']} of {result['cells']} cells done"
             + (f"; all with {', '.join(f'`{e}`' for e in result['edits'])}." if result["edits"] else "."), ""]
    for metric, rows in result["tables"].items():
        lines += [f"## {metric}", "", f"| {' | '.join((*COLUMNS, 'differences by seed'))} |", "|---" * (len(COLUMNS) + 1) + "|"]
        for row in rows:
            points = " ".join(f"{d:+.4f}" for d in row["differences"])
            cells = [f"{c:.4f}" if isinstance(c, float) else str(c) for c in cells_of(row)]
            lines.append(f"| {' | '.join((*cells, points))} |")
        lines += ["", *(f"- {row['name']}, seed {s}: {reason}" for row in rows for s, reason in row["missing"].items()), ""]
    seen = {row["name"]: row for rows in result["tables"].values() for row in rows if row["name"] != AA}
    lines += ["## Claims", "", *(f"- **{n}**: {r['claim']} {r['source']}. Published: {r['published']}." for n, r in seen.items()), ""]
    return "\n".join(lines)


def _span(seeds: list[int]) -> str:
    return f"{seeds[0]}-{seeds[-1]}" if len(seeds) > 1 else str(seeds[0])


def question(result: Mapping[str, Any]) -> str:
    """What a difference, an interval and a verdict are."""
    n = len(result["seeds"])
    return page.paragraph(
        f"Each edit was trained beside the base ({result['base']}) on the same {n} seeds; {result['done']} of {result['cells']} runs are "
        f"done{', all with ' + ', '.join(result['edits']) if result['edits'] else ''}.",
        f"A difference is edit minus base at one seed; its interval is Student-t over the pairs; p is the exact sign-flip test, "
        f"never below {2 / 2 ** n:.4f} with {n} pairs.") + page.paragraph(
        f"A verdict compares the interval with the sign that the paper predicts; 'same' needs the whole interval within "
        f"±{result['margin']:g}. Undecided means that these seeds cannot tell. No correction for the number of rows: of twenty intervals "
        "one misses by chance.") + page.paragraph(
        "The A/A row is the base against itself on other seeds: its true difference is 0, so an interval that misses 0 is a false alarm, "
        "shown and not rerun. It lacks the pairing by seed, so it is rather wider than the other rows.")


def claims(result: Mapping[str, Any]) -> str:
    """What each edit stands for: the claim, its source and published number, and the sign predicted from them."""
    rows = [row for table in result["tables"].values() for row in table if row["name"] != AA]
    predicted: dict[str, list[str]] = {row["name"]: [] for row in rows}
    for metric, table in result["tables"].items():
        for row in table:
            if row["predicted"]:
                predicted[row["name"]].append(f"{metric} {row['predicted']}")
    return page.grid(*(
        f"<div><h3>{page.text(name)}</h3>" + page.paragraph(row["claim"]) + page.paragraph(page.Html('<span class="remark">' + page.text(
            f"{row['source']}. Published: {row['published']}. Predicted: {'; '.join(predicted[name]) or 'nothing here'}.") + "</span>"))
        + "</div>" for name, row in {row["name"]: row for row in rows}.items()))


def section(result: Mapping[str, Any], metric: str, workdir: pathlib.Path) -> str:
    """One metric: the table, the picture with all points, and what is missing."""
    rows = result["tables"][metric]
    good = {PREDICTED: True, "holds 0": True, OPPOSITE: False, "MISSES 0": False}
    body = [[page.badge(good.get(c), c) if c and name == "verdict" else c for name, c in zip(COLUMNS, cells_of(row), strict=True)]
            for row in rows]
    marked = [i for i, row in enumerate(rows) if row["verdict"] == "MISSES 0"]
    shown = [row for row in rows if row["mean"] is not None]
    parts = [page.table(COLUMNS, body, marked=marked)]
    if shown:
        path = workdir / "plots" / f"ablation_{metric.replace('/', '_')}.png"
        plots.intervals(path, f"{metric}: edit minus base", [(r["name"], r["mean"], r["low"], r["high"]) for r in shown],
                        points=[r["differences"] for r in shown], zero=True, marked=[AA] if marked else [])
        parts.append(page.picture(path, "Diamonds: mean difference with its 95 % interval; dots: every pair of seeds.", wide=True))
    missing = [f"{row['name']} seed {s}: {reason}" for row in rows for s, reason in row["missing"].items()]
    points = page.table(("edit", *(f"pair {i + 1}" for i in range(len(result["seeds"])))),
                        [(row["name"], *(f"{d:+.4f}" for d in row["differences"])) for row in shown])
    if missing:
        parts.append(page.paragraph(f"Missing: {'; '.join(missing)}."))
    return "".join([*parts, page.fold("Every difference", points)])


def curves(workdir: pathlib.Path, result: Mapping[str, Any]) -> str:
    """Loss over steps: the mean of each arm, and its difference from the base."""
    arms = (BASE, *(row["name"] for row in next(iter(result["tables"].values())) if row["name"] != AA))
    lines, apart, base = [], [], {}
    for i, arm in enumerate(arms):
        found = {s: run.series("main_loss") for s in result["seeds"] if (run := _finished(cell_path(workdir, arm, s)))}
        found = {s: (x, plots.running_mean(y)) for s, (x, y) in found.items() if len(x)}
        base = found if arm == BASE else base
        both = [s for s in found if s in base and len(found[s][0]) == len(base[s][0])]
        if not both:
            continue
        x, colour = found[both[0]][0], plots.COLOURS[i % len(plots.COLOURS)]
        lines.append(plots.Curve(arm, x, np.mean([found[s][1] for s in both], axis=0), colour=colour))
        if arm != BASE:
            apart.append(plots.Curve(arm, x, np.mean([found[s][1] - base[s][1] for s in both], axis=0), colour=colour))
    if not lines:
        return ""
    folder = workdir / "plots"
    return page.grid(
        page.picture(plots.curves(folder / "ablation_loss.png", "Training loss", lines), "Mean over seeds, running mean over steps."),
        page.picture(plots.curves(folder / "ablation_loss_difference.png", "Training loss, edit minus base", apart), "Below 0 the edit "
                     "is ahead at that step.") if apart else "")


def cost_table(result: Mapping[str, Any]) -> str:
    """Parameters, FLOPs and time of each arm."""
    return page.table(
        ("arm", "parameters", "activated", "MTP", "MFLOPs a token", "with MTP", "tokens/s, median", "seconds a run", "runs"),
        [(c["name"], c["total"], c["activated"], c["mtp"], c["flops"] / 1e6, (c["flops"] + c["mtp_flops"]) / 1e6, c["tokens_per_s"],
          c["seconds"], c["runs"]) for c in result["costs"]], "Runs meet at equal tokens. FLOPs are training FLOPs by formula.")
