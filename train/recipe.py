"""The job `r1`: a list of stages, each a job from a named checkpoint (R1 §2, fig. 2 of the recipe: base -> zero; cold start -> R1).

config.recipe.stages names subtrees config.NAME = dict(job, init_from, edits, ...). init_from is an earlier stage or a path; edits are
'path=value' on shared leaves for this stage alone. A stage leaves checkpoints/NAME (or traces/NAME.jsonl), lines with its name in
metrics.jsonl, an evaluation on held-out problems, and its budget; the report is rewritten after each. The same command goes on
inside the stage it was in: a stage is finished when its budget line stands.
"""
from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import json
import os
import pathlib
import shutil
import time
from typing import Any

import jax

from data import corpus
from data import tokenizer as tokenizers
from model import config as model_config
from model.errors import UserError, choice, leaf, named_input, require, sequence
from train import checkpoint, claims, evaluate_tasks, report, run_record
from train.ablate import apply_edits
from train.metrics import Logger, prepare_workdir, read_jsonl, table, write_atomically

JOBS = {"pretrain": "train.pretrain:pretrain", "gate": "train.gate:gate", "rl": "train.rl_loop:rl_job", "sft": "train.sft:sft",
        "rejection": "train.rejection:rejection"}
WITHOUT_WEIGHTS = ("rejection",)
ENOUGH_DISK = 200 << 20
TRACES_KEPT = 96  # of each stage's evaluation: the same problems for every stage, so that two can be laid side by side


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage: its own whole config, edits applied."""

    name: str
    job: str
    config: Any


def r1(config, workdir: str) -> None:
    """The job. Raises UserError before anything is run if a stage, edit or input is amiss."""
    began, path = time.monotonic(), pathlib.Path(workdir)
    stages = [stage_of(config, name, path) for name in names_of(config)]
    check(config, stages, path)
    limit = leaf(config, "stop_after_s", float, "config")
    prepare_workdir(workdir, config)
    preflight(config, stages, path)
    try:
        for stage in stages:
            if finished(path, stage):
                print(f"{stage.name}: finished before", flush=True)
                continue
            left = limit - (time.monotonic() - began) if limit else 0.0
            if (limit and left <= 0) or not run_stage(stage, path, max(left, 0.0)):
                print(f"recipe: stopped after {limit:.0f} s in {stage.name}; the same command goes on", flush=True)
                break
            report.write(path)
    finally:
        if (path / "metrics.jsonl").exists():
            conclude(path, names_of(config))
            print(f"report: {report.write(path)}", flush=True)


def names_of(config) -> tuple[str, ...]:
    """config.recipe.stages, checked. Raises UserError."""
    names = sequence(config.recipe, "stages", "recipe")
    require(len(names) > 0, "recipe.stages", names, "at least one stage")
    for i, name in enumerate(names):
        known = [k for k, v in config.items() if hasattr(v, "keys") and {"job", "init_from", "edits"} <= set(v.keys())]
        choice(name, known, "recipe.stages")
        require(name not in names[:i], "recipe.stages", name, "each stage once; another name needs a subtree of its own")
    return names


def stage_of(config, name: str, workdir: pathlib.Path) -> Stage:
    """The config that the stage's job sees. Raises UserError."""
    made = copy.deepcopy(config)
    sub = made[name]
    job = choice(sub.job, JOBS, f"{name}.job")
    with made.unlocked():
        made.job = job
    apply_edits(made, sequence(sub, "edits", name), f"{name}.edits")
    source = sub.init_from
    made.init_from.path = str(workdir / "checkpoints" / source) if source in config and source != name else source
    return Stage(name, job, made)


def check(config, stages: list[Stage], workdir: pathlib.Path) -> None:
    """Every stage has what it starts from, and a model that can be made. Raises UserError."""
    earlier: set[str] = set()
    for stage in stages:
        sub = stage.config[stage.name]
        source, traces = sub.init_from, sub.source.stage.name if stage.job == "sft" and sub.source.kind == "stage" else ""
        model_config.parse(stage.config.model)
        if source and source not in earlier and not (workdir / "checkpoints" / source).is_dir():
            with _naming(f"{stage.name}.init_from", source, sorted(earlier)):
                checkpoint.find(source)
        there = traces in earlier or (workdir / "traces" / f"{traces}.jsonl").is_file()
        require(not traces or there, f"{stage.name}.source.stage.name", traces, f"an earlier stage: {', '.join(sorted(earlier))}")
        earlier.add(stage.name)
    evaluate_tasks.parse(config.evaluation)


@contextlib.contextmanager
def _naming(name: str, found: str, earlier: list[str]):
    try:
        yield
    except UserError:
        raise UserError(f"{name}: found {found!r}, allowed: '', an earlier stage ({', '.join(earlier)}) or a checkpoint's path") from None


def preflight(config, stages: list[Stage], workdir: pathlib.Path) -> None:
    """Says what the run will need and has. Raises UserError where it cannot fit."""
    free = shutil.disk_usage(workdir).free
    require(free > ENOUGH_DISK, "workdir", f"{free >> 20} MB free", f"{ENOUGH_DISK >> 20} MB")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2 ** 30
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    device = jax.devices()[0]
    print(f"recipe: {len(stages)} stages ({', '.join(s.name for s in stages)})\n"
          f"workdir {workdir}, {free / 2 ** 30:.0f} GB free; {cores} cores, {memory:.0f} GB memory, {len(jax.devices())} {device.platform} "
          f"device(s); seed {config.seed}; expected: {config.recipe.expected}", flush=True)


def finished(workdir: pathlib.Path, stage: Stage) -> bool:
    """True when the stage's budget line and what it leaves behind are there."""
    left = workdir / "traces" / f"{stage.name}.jsonl" if stage.job in WITHOUT_WEIGHTS else workdir / "checkpoints" / stage.name / "final"
    return left.exists() and any(line.get("event") == "budget" and line.get("stage") == stage.name for line in _lines(workdir))


def run_stage(stage: Stage, workdir: pathlib.Path, stop_after_s: float) -> bool:
    """Runs or goes on with a stage, evaluates it, writes its budget; False if it was stopped on the way."""
    module, function = JOBS[stage.job].split(":")
    stage.config.stop_after_s = stop_after_s
    began, logger = time.monotonic(), Logger(workdir, stage.name)
    source = stage.config[stage.name].init_from
    print(f"\n== {stage.name} ({stage.job}{f' from {source}' if source else ''})", flush=True)
    with compile_seconds() as compiled:
        job = getattr(importlib.import_module(module), function)
        if job(stage.config, str(workdir), name=stage.name, stage=stage.name) is False:  # stopped on the way
            return False
        ran = time.monotonic() - began
        _drop(workdir, lambda line: line.get("stage") == stage.name and line.get("final"))
        run = run_record.read(workdir).of(stage.name)
        tokens = int(sum(line.get("tokens") or 0 for line in run.steps))
        if stage.job not in WITHOUT_WEIGHTS:
            evaluate_stage(stage, workdir, logger, tokens)
    run_s = time.monotonic() - began - sum(compiled)
    logger.event("budget", len(run.steps), compile_s=sum(compiled), run_s=run_s, evaluation_s=time.monotonic() - began - ran, tokens=tokens)
    return True


def evaluate_stage(stage: Stage, workdir: pathlib.Path, logger: Logger, tokens: int) -> None:
    """Judges what the stage left on held-out problems: an event `evaluation`, and traces."""
    config = stage.config
    with named_input("data", "tokenizer"):
        tasks, tokenizer = corpus.parse(config.data).tasks, tokenizers.parse(config.tokenizer)
    where = checkpoint.find(workdir / "checkpoints" / stage.name)
    cfg, params, bias = checkpoint.load_params(where)
    run, step = model_config.parse_run(config.run), int(where.name)
    model = evaluate_tasks.policy(params, bias, cfg, run)
    seen, traces = evaluate_tasks.full(model, tokenizer, tasks, evaluate_tasks.parse(config.evaluation), seed=config.seed, step=step)
    logger.event("evaluation", step, **seen, final=True, tokens=tokens, model="small" if "small" in stage.name else "main")
    for line in traces[:TRACES_KEPT]:
        logger.sample(step, **line, reward=float(line["right"]), final=True)
    print(f"{stage.name}: held-out pass@1 {span(seen, 'pass_at_1')}, length {seen['length']:.2f}, worked {seen['worked']:.2f}", flush=True)


def conclude(workdir: pathlib.Path, names: tuple[str, ...]) -> None:
    """The claims as events, and the closing tables on the console."""
    _drop(workdir, lambda line: line.get("event") == "claim")
    seen = {line["stage"]: line for line in _lines(workdir) if line.get("event") == "evaluation" and line.get("final")}
    budgets = {line["stage"]: line for line in _lines(workdir) if line.get("event") == "budget"}
    made = claims.judge(seen, "gate" if "gate" in seen else "base")
    for claim in made:
        Logger(workdir, claim["stage"]).event("claim", seen[claim["stage"]]["step"], **{k: v for k, v in claim.items() if k != "stage"})
    print("\n" + stage_table(names, seen, budgets))
    if made:
        rows = [(c["claim"], "held" if c["held"] else "NOT held", f"{c['value']:+.3f} [{c['low']:+.3f}, {c['high']:+.3f}]") for c in made]
        print("\n" + table("claims of the paper, on this seed", ("claim", "", "difference, 95 %"), rows), flush=True)


def stage_table(names: tuple[str, ...], seen: dict[str, dict], budgets: dict[str, dict]) -> str:
    """The closing table: one row a stage."""
    cons = next((k for e in seen.values() for k in e if k.startswith("cons_at_") and k.split("_")[-1].isdigit()), "cons_at_16")
    families = list(dict.fromkeys(f for e in seen.values() for f, v in e["by_family"].items() if v.get("transfer")))
    header = ("stage", "pass@1", cons.replace("cons_at_", "cons@"), "length", "format", "one language", "worked", "worked right",
              "direct right", *(f"{f} (transfer)" for f in families), "compile s", "run s")
    rows = []
    for name in names:
        e, b = seen.get(name, {}), budgets.get(name)
        cell = lambda key, of=e: of.get(key) if of.get(key) is not None else "-"  # noqa: E731
        extra = [f"{v['pass_at_1']:.2f}" if v else "-" for v in ((e.get("by_family") or {}).get(f) for f in families)]
        times = (f"{b['compile_s']:.0f}", f"{b['run_s']:.0f}") if b else ("-", "-")
        rows.append((name, span(e, "pass_at_1") if e else "-", *map(cell, (cons, "length", "format", "consistency", "worked",
                                                                          "worked_right", "direct_right")), *extra, *times))
    total = [sum(b[k] for b in budgets.values()) for k in ("compile_s", "run_s")]
    rows.append(("all", *["-"] * (len(header) - 3), *(f"{t:.0f}" for t in total)))
    levels = {f: v["chance"] for e in seen.values() for f, v in e["by_family"].items() if v.get("transfer")}
    note = "\nchance: " + ", ".join(f"{f} {v:.2f}" for f, v in levels.items()) if levels else ""
    return table("held-out problems after each stage, 95 % intervals", header, rows) + note


def span(values: dict, key: str) -> str:
    """'0.950 [0.927, 0.966]'."""
    return f"{values[key]:.3f} [{values[f'{key}_low']:.3f}, {values[f'{key}_high']:.3f}]"


@contextlib.contextmanager
def compile_seconds():
    """Yields a list to which XLA's lowering and compile times are added while inside (reading a cached program counts too)."""
    seconds: list[float] = []

    def listen(event: str, duration: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/") and "trace" not in event:
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seconds
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def _lines(workdir: pathlib.Path) -> list[dict[str, Any]]:
    path = workdir / "metrics.jsonl"
    return read_jsonl(path) if path.exists() else []


def _drop(workdir: pathlib.Path, unwanted) -> None:
    """Takes lines out of both jsonl files."""
    for name in ("metrics.jsonl", "samples.jsonl"):
        path = workdir / name
        if path.exists():
            lines = read_jsonl(path)
            kept = [line for line in lines if not unwanted(line)]
            if len(kept) < len(lines):
                write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
