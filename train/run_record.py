"""A run as its folder tells it: config.json, metrics.jsonl, samples.jsonl, git_commit.txt. Whatever is missing reads as empty."""
from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from model.errors import UserError, user_input
from train.metrics import NOT_THE_RUN, read_jsonl

TAIL = 0.1  # share of the steps whose mean stands for the end of a curve


@dataclasses.dataclass(frozen=True)
class Run:
    """lines: of metrics.jsonl, in order; samples: of samples.jsonl."""

    path: pathlib.Path
    config: dict[str, Any]
    lines: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    commit: str

    @property
    def stages(self) -> list[str | None]:
        """The stages in the order in which they began; [None] for a job run alone."""
        return list(dict.fromkeys(line.get("stage") for line in self.lines))

    def of(self, stage: str | None) -> Run:
        """The lines of one stage alone."""
        pick = lambda lines: [line for line in lines if line.get("stage") == stage]  # noqa: E731
        return dataclasses.replace(self, lines=pick(self.lines), samples=pick(self.samples))

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The lines of training steps."""
        return [line for line in self.lines if "event" not in line]

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """(step i64 [n], value f64 [n, ...]) of the training steps that logged a number under key."""
        found = [(line["step"], line[key]) for line in self.steps if line.get(key) is not None]
        shapes = {np.shape(v) for _, v in found}
        if not found or len(shapes) > 1:
            return np.zeros(0, np.int64), np.zeros(0)
        return np.array([s for s, _ in found], np.int64), np.array([v for _, v in found], np.float64)

    def named(self, event: str) -> list[dict[str, Any]]:
        """All events of a name."""
        return [line for line in self.lines if line.get("event") == event]

    def last(self, event: str) -> dict[str, Any] | None:
        return (self.named(event) or [None])[-1]

    def tail_mean(self, key: str) -> float | None:
        """The mean over the last tenth of the steps."""
        _, y = self.series(key)
        return float(y[-max(1, round(TAIL * len(y))):].mean()) if len(y) else None

    def seconds(self) -> float:
        """Time spent in training steps, the first one's compile included."""
        return float(sum(line.get("step_time") or 0.0 for line in self.steps))


def read(path: str | pathlib.Path) -> Run:
    """Reads a run's folder. Raises UserError if there is none, or no config.json in it."""
    path = pathlib.Path(path)
    if not (path / "config.json").is_file():
        raise UserError(f"workdir: found no config.json in {str(path)!r}, allowed: the folder of a run")
    with user_input(str(path / "config.json")):
        config = json.loads((path / "config.json").read_text())
    lines, samples = ([line for line in read_jsonl(path / name) if isinstance(line, dict)] if (path / name).exists() else []
                      for name in ("metrics.jsonl", "samples.jsonl"))
    commit = path / "git_commit.txt"
    return Run(path, config, lines, samples, commit.read_text().strip() if commit.exists() else "")


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves of nested dicts by dotted path; an empty dict is a leaf."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def leaves_read(config: dict[str, Any]) -> dict[str, Any]:
    """The flat config without the leaves of kinds that were not chosen: what a run could read."""
    def prune(tree):
        unread = {k for k, v in tree.items() if "kind" in tree and isinstance(v, dict) and k != tree["kind"] and "kind" not in v}
        return {k: prune(v) if isinstance(v, dict) else v for k, v in tree.items() if k not in unread}

    return {k: v for k, v in flatten(prune(config)).items() if v != {}}


def deciding_leaves(config: dict[str, Any]) -> dict[str, Any]:
    """The leaves read that decide a run's numbers: not how long it may take, nor what only times it or looks at it."""
    return {path: value for path, value in leaves_read(config).items() if path.split(".")[0] not in NOT_THE_RUN}
