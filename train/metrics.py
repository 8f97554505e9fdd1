"""What a run tells: a live line on the console, metrics.jsonl (one object a training step), events, and the run's own record.

Only training steps carry both `step` and `loss`; every other line carries `event`. On resume both jsonl files are cut back to the
restored step. A step's device values are fetched once, when it is logged.
"""
from __future__ import annotations

import json
import math
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from model.errors import UserError, choice
from train import cluster

# subtrees that may change between the parts of a run: how long it lasts, what looks at it afterwards, and jobs that time or count
NOT_THE_RUN = ("resume", "stop_after_s", "checkpoint", "report", "eval", "sample", "speed", "scaling", "plan", "probe", "export_hf")


class Logger:
    """Writes metrics.jsonl and samples.jsonl of a run; `stage` is added to every line of a recipe."""

    def __init__(self, workdir: str | pathlib.Path, stage: str | None = None):
        self.workdir, self.stage = pathlib.Path(workdir), stage
        self.main = jax.process_index() == 0

    def step(self, step: int, metrics: dict[str, Any]) -> dict[str, Any]:
        """One training step; returns what was written, as Python numbers."""
        line = {"step": step} | {k: plain(v) for k, v in metrics.items()}
        self._write("metrics.jsonl", line)
        return line

    def event(self, event: str, step: int, **values: Any) -> None:
        """Anything else: an evaluation, a gate, a claim."""
        self._write("metrics.jsonl", {"event": event, "step": step} | {k: plain(v) for k, v in values.items()})

    def sample(self, step: int, **values: Any) -> None:
        """A generated text."""
        self._write("samples.jsonl", {"step": step} | values)

    def cut_back(self, step: int) -> None:
        """Drops what this stage logged after its checkpoint at `step` (-1: all of it), the closing event, and a half-written line."""
        for name in ("metrics.jsonl", "samples.jsonl") if self.main else ():
            path = self.workdir / name
            if path.exists():
                kept = [line for line in read_jsonl(path)
                        if line.get("stage") != self.stage or (line.get("step", 0) <= step and line.get("event") != "closing")]
                write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))

    def _write(self, name: str, line: dict[str, Any]) -> None:
        if self.main:
            if self.stage is not None:
                line = {"stage": self.stage} | line
            with open(self.workdir / name, "a") as file:
                file.write(json.dumps(line) + "\n")


def plain(value: Any) -> Any:
    """JSON for a scalar or array; not-a-number and infinities become null. A float32 is written with the digits that tell it from its
    neighbours, 0.001, not those of the float64 it would be, 0.0010000000474974513: half the bytes of a log."""
    if isinstance(value, (jax.Array, np.ndarray, np.generic)):
        value = np.asarray(value)
        short = jnp.issubdtype(value.dtype, jnp.floating) and value.dtype.itemsize <= 4
        value = (value.astype(np.float32).astype(str) if short else value).astype(np.float64).tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return {k: plain(v) for k, v in value.items()} if isinstance(value, dict) else value


def read_jsonl(path: pathlib.Path) -> list[dict[str, Any]]:
    """The complete lines of a file; a last line that was cut off is left out."""
    lines = []
    for raw in path.read_text().splitlines():
        try:
            lines.append(json.loads(raw))
        except json.JSONDecodeError:
            break
    return lines


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Replaces path in one rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)


def prepare_workdir(workdir: str, config) -> pathlib.Path:
    """Makes the run's folder and writes config.json, with the git commit and diff beside it.

    A folder with checkpoints is gone on from: if its config.json differs, the difference is printed, and refused unless
    config.resume='allow_diff'. Raises UserError, also if the folder cannot be written.
    """
    path = pathlib.Path(workdir)
    new = json.loads(config.to_json_best_effort())
    allowed = choice(new.get("resume", "same"), ("same", "allow_diff"), "resume") == "allow_diff"
    try:
        path.mkdir(parents=True, exist_ok=True)
        changed = changed_leaves(path, new)
        if changed and jax.process_index() == 0:
            print("\n".join([f"{path / 'config.json'}: the config has changed", *(f"  {k}: {a!r} -> {b!r}" for k, a, b in changed)]))
        if changed and not allowed:
            raise UserError(f"resume: {workdir} holds a run of another config ({', '.join(k for k, _, _ in changed[:5])}), allowed: "
                            "the same config, another --workdir, or --config.resume=allow_diff")
        cluster.barrier("config")  # everyone has read the old one
        if jax.process_index():
            return path
        write_atomically(path / "config.json", json.dumps(new, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"workdir: found {workdir!r} ({error.strerror}), allowed: a folder that can be written") from None
    root = pathlib.Path(__file__).parent.parent
    for name, command in (("git_commit.txt", ["git", "rev-parse", "HEAD"]), ("git_diff.patch", ["git", "diff", "HEAD"])):
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            write_atomically(path / name, done.stdout)
    return path


def changed_leaves(workdir: pathlib.Path, new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(leaf, old value, new value) where config.json of a run with checkpoints differs; leaves that change no number are passed over."""
    from train.run_record import leaves_read

    saved = [p for pattern in ("*", "*/*") for p in (workdir / "checkpoints").glob(pattern) if p.name.isdigit()]
    if not saved or not (workdir / "config.json").exists():
        return []
    try:
        before = leaves_read(json.loads((workdir / "config.json").read_text()))
    except ValueError as error:
        raise UserError(f"workdir: {workdir / 'config.json'} is not JSON ({error}), allowed: the file that the run wrote") from None
    after, none = leaves_read(new), "(none)"
    return [(k, before.get(k, none), after.get(k, none)) for k in sorted(before.keys() | after.keys())
            if before.get(k, none) != after.get(k, none) and k.split(".")[0] not in NOT_THE_RUN]


class Progress:
    """One live line for a loop of `total` steps: bar, values, tokens/s, time left; a plain line now and then without a terminal."""

    def __init__(self, title: str, total: int, start: int = 0, every_s: float = 10.0):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self.title, self.total, self.every_s, self.last = title, total, every_s, time.monotonic()
        self.live = sys.stdout.isatty() and jax.process_index() == 0
        self.bar = Progress(TextColumn("[bold]{task.description}"), BarColumn(24), MofNCompleteColumn(), TextColumn("{task.fields[text]}"),
                            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), disable=not self.live)
        self.task = self.bar.add_task(title, total=total, completed=start, text="compiling")

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.stop()

    def update(self, step: int, values: dict[str, Any]) -> None:
        """Shows these values at this step."""
        text = "  ".join(f"{k} {_short(v)}" for k, v in values.items())
        self.bar.update(self.task, completed=step, text=text)
        if not self.live and jax.process_index() == 0 and (time.monotonic() - self.last > self.every_s or step >= self.total):
            self.last = time.monotonic()
            print(f"{self.title} {step}/{self.total}  {text}", flush=True)

    def note(self, text: str) -> None:
        """A line above the bar."""
        if jax.process_index() == 0:
            self.bar.console.print(text, highlight=False) if self.live else print(text, flush=True)


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A text table, as printed at the end of a job."""
    header, body = [str(c) for c in columns], [[_short(v) for v in row] for row in rows]
    widths = [max(len(line[i]) for line in [header, *body]) for i in range(len(header))]

    def draw(line):
        return "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width)
                         for i, (cell, width) in enumerate(zip(line, widths, strict=True)))

    return "\n".join([title, draw(header), "-" * len(draw(header)), *map(draw, body)])


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 1e-2 and value else f"{value:.3f}"
    return str(value)
