"""The job `ablate`: a base and edits of it over paired seeds, in turn, each cell a run's folder of its own; then the table.

Cell (name, seed) is what `--config=FILE:NAME@BASE --config.seed=SEED` would run, in cells/NAME/seed-SEED. Edit and base meet at equal
seeds: equal initial weights where shapes allow, equal order of data. The A/A arm is the base again on a second, disjoint set of seeds;
it is part of every table. A finished cell is skipped, a half one resumes, a diverged one stays in the table with its reason (delete
its folder to run it again). Seeds are the outer loop: a run that was stopped leaves whole pairs.

Several processes may share a table: start the same command as often as there are cores to spare. Each takes the next cell that is not
done and that none holds (an advisory lock on its folder, gone with its process however that ends); the last to end writes the table.
"""
from __future__ import annotations

import ast
import contextlib
import dataclasses
import fcntl
import importlib.util
import json
import os
import pathlib
import shutil
import time
from collections.abc import Callable

from model import config as model_config
from model.errors import UserError, choice, freeze, leaf, require, user_input
from train import ablation_table, run_record
from train.metrics import prepare_workdir, write_atomically

JOBS = {"pretrain": "train.pretrain:pretrain", "r1": "train.recipe:r1", "rl": "train.rl_loop:rl_job"}  # what a cell may be
ROOT = pathlib.Path(__file__).parent.parent
REWRITE_S = 60  # seconds between two tables on the way
SIGNS = ("up", "down", "same")


@dataclasses.dataclass(frozen=True)
class Ablate:
    """config.ablate: names in `file`, on `base`, every cell changed by `edits` ('path=value', ..., {seed} in them replaced).

    metrics: of the table. margin: a 'same' is as predicted when its whole interval lies within +-margin. checkpoints: keep, or drop
    those of finished cells.
    """

    file: str
    base: str
    names: tuple
    seeds: int
    edits: tuple
    metrics: tuple
    margin: float
    checkpoints: str

    def __post_init__(self):
        require(len(self.names) > 0, "names", self.names, f"one or more of the names in {self.file}")
        require(len(set(self.names)) == len(self.names), "names", self.names, "each name once")
        require(not {ablation_table.BASE, ablation_table.AA} & set(self.names), "names", self.names, "edits: base and A/A always run")
        require(1 <= self.seeds <= 40, "seeds", self.seeds, "1 to 40 (with fewer than 2 there is no interval)")
        require(len(self.metrics) > 0, "metrics", self.metrics, f"one or more of {', '.join(ablation_table.METRICS)}")
        for metric in self.metrics:
            choice(metric.split("/")[0], ablation_table.METRICS, "metrics")
        require(self.margin > 0, "margin", self.margin, "above 0")
        choice(self.checkpoints, ("keep", "drop"), "checkpoints")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run: an arm of the table at one seed."""

    arm: str
    seed: int
    path: pathlib.Path
    config: object


def ablate(config, workdir: str) -> None:
    """The job: config.ablate, config.seed (the first seed), config.stop_after_s. The table is rewritten on the way."""
    spec, limit = freeze(Ablate, config.ablate, "ablate"), leaf(config, "stop_after_s", float, "config")
    module = load(spec.file)
    notes = {name: read_note(edit) for name, edit in module.ABLATIONS.items() if name in spec.names}
    todo = cells(spec, leaf(config, "seed", int, "config"), module.get_config, pathlib.Path(workdir))
    for cell in todo:
        check(cell)
    path = prepare_workdir(workdir, config)
    write_atomically(path / "edits.json", json.dumps(notes, indent=1) + "\n")
    with opened(path) as desk:
        fcntl.flock(desk, fcntl.LOCK_SH)  # every process at work has it; waits for a table that is being written
        try:
            work(todo, spec.checkpoints, limit, path, desk)
        finally:
            if hold(desk):
                print(f"{ablation_table.text(ablation_table.collect(path))}\nreport: {ablation_table.write(path)}")
            else:
                print("ablate: others are at work here, the last one writes the table", flush=True)


def work(todo: list[Cell], checkpoints: str, limit: float, path: pathlib.Path, desk: int) -> None:
    """Runs what is to be done of todo, in turn, for `limit` seconds (0: all); the table on the way is for whoever works alone."""
    began = shown = time.monotonic()
    first = None
    for i, cell in enumerate(todo):
        left, before = limit - (time.monotonic() - began) if limit else 0.0, time.monotonic()
        state = run_cell(cell, left, checkpoints) if left > 0 or not limit else "stopped"
        if state == "stopped":
            print(f"ablate: stopped after {limit:.0f} s in {cell.arm} seed {cell.seed}; the same command goes on", flush=True)
            return
        if state not in ("skipped", "held"):
            first, now = i if first is None else first, time.monotonic()
            left = (now - began) / (i - first + 1) * (len(todo) - i - 1)  # cells that others took in between count as done
            print(f"ablate {i + 1}/{len(todo)}  {cell.arm} seed {cell.seed}: {state} in {now - before:.0f} s, "
                  f"about {left / 60:.0f} min left", flush=True)
            if now - shown > REWRITE_S:
                if hold(desk):
                    ablation_table.write(path)
                fcntl.flock(desk, fcntl.LOCK_SH)
                shown = time.monotonic()


@contextlib.contextmanager
def opened(folder: pathlib.Path):
    """A handle that locks can be set on; closing it gives them up."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        yield handle
    finally:
        os.close(handle)


def hold(handle: int) -> bool:
    """Whether the handle's folder is ours alone from now on; what was held of it is given up first, so that of several processes which
    ask at their end one is not refused."""
    fcntl.flock(handle, fcntl.LOCK_UN)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def cells(spec: Ablate, first_seed: int, get_config: Callable, workdir: pathlib.Path) -> list[Cell]:
    """All cells in the order in which they run: for each seed base, A/A, edits. Raises UserError for a name, base or edit unknown."""
    made = []
    for k in range(spec.seeds):
        for arm in (ablation_table.BASE, ablation_table.AA, *spec.names):
            seed = first_seed + k + (spec.seeds if arm == ablation_table.AA else 0)
            with user_input("ablate.names"):
                config = get_config(f"{'base' if arm == ablation_table.AA else arm}@{spec.base}")
            apply_edits(config, tuple(e.replace("{seed}", str(seed)) for e in spec.edits), "ablate.edits")
            config.seed = seed
            made.append(Cell(arm, seed, ablation_table.cell_path(workdir, arm, seed), config))
    return made


def check(cell: Cell) -> None:
    """Refuses before the first run what the last one would stumble over. Raises UserError."""
    choice(cell.config.job, JOBS, f"ablate: the job of {cell.arm}")
    with user_input(f"ablate: {cell.arm}"):
        model_config.parse(cell.config.model)
    if (cell.path / "config.json").exists():
        now, before = (run_record.deciding_leaves(c) for c in (as_json(cell.config), run_record.read(cell.path).config))
        changed = sorted(k for k in now.keys() | before.keys() if now.get(k) != before.get(k))
        require(not changed, f"workdir: {cell.path} was run with other settings", ", ".join(changed[:4]), "the same, or another --workdir")


def run_cell(cell: Cell, stop_after_s: float, checkpoints: str) -> str:
    """Runs or goes on with a cell, its console in console.txt: 'skipped', 'held' (by another process), 'done', 'diverged' or 'stopped'."""
    cell.path.mkdir(parents=True, exist_ok=True)
    with opened(cell.path) as handle:
        if not hold(handle):
            return "held"
        if ablation_table.status(cell.path) in ("done", "diverged"):
            return "skipped"
        module, function = JOBS[cell.config.job].split(":")
        cell.config.stop_after_s = max(stop_after_s, 0.0)
        with open(cell.path / "console.txt", "a") as console, contextlib.redirect_stdout(console):
            try:
                getattr(importlib.import_module(module), function)(cell.config, str(cell.path))
            except FloatingPointError as error:
                write_atomically(cell.path / ablation_table.DIVERGED, f"{error}\n")
        state = ablation_table.status(cell.path)
        if state == "done" and checkpoints == "drop":
            shutil.rmtree(cell.path / "checkpoints", ignore_errors=True)
        return "stopped" if state == "half" else state


def read_note(edit: Callable) -> dict:
    """dict(claim, source, published, predicted={metric: sign}) of an edit's docstring. Raises UserError where one is missing."""
    text, fields = (edit.__doc__ or "").strip(), {}
    claim, *rest = text.splitlines() or [""]
    for line in rest:
        key, colon, value = line.strip().partition(": ")
        if colon and key in ("Source", "Published", "Predicted"):
            fields[key.lower()] = value
    require(bool(claim) and len(fields) == 3, f"ablation {edit.__name__}", text, "a claim, then lines Source:, Published:, Predicted:")
    predicted = {}
    for part in [] if fields["predicted"] == "none" else fields["predicted"].split(";"):
        metric, _, sign = part.strip().partition(" ")
        choice(metric.split("/")[0], ablation_table.METRICS, f"ablation {edit.__name__}: Predicted")
        predicted[metric] = choice(sign, SIGNS, f"ablation {edit.__name__}: Predicted {metric}")
    return dict(claim=claim, source=fields["source"], published=fields["published"], predicted=predicted)


def apply_edits(config, edits: tuple, path: str) -> None:
    """Sets leaves by 'a.b.c=value', the value a Python literal or a bare word. Raises UserError naming the edit."""
    for edit in edits:
        name, equals, word = edit.partition("=")
        try:
            value = ast.literal_eval(word)
        except (ValueError, SyntaxError):
            value = word
        node, *parts = config, *name.split(".")
        for part in parts[:-1]:
            node = node[part] if hasattr(node, "keys") and part in node else {}
        require(bool(equals) and parts[-1] in node and not hasattr(node[parts[-1]], "keys"), path, edit, "'path.to.leaf=value' of the base")
        try:
            node[parts[-1]] = value
        except TypeError as error:
            raise UserError(f"{path}: found {edit!r}, allowed: a value of the leaf's type ({error})") from None


def load(file: str):
    """The module of a config file with ABLATIONS and get_config, by path from the project's root. Raises UserError."""
    path = ROOT / file
    require(path.is_file(), "ablate.file", file, "a config file such as configs/ablations.py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    require(hasattr(module, "ABLATIONS") and hasattr(module, "get_config"), "ablate.file", file, "a file with ABLATIONS and get_config")
    return module


def as_json(config) -> dict:
    return json.loads(config.to_json_best_effort())
