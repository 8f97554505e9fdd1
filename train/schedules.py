"""Schedules of a run as functions of progress, the share of its tokens that is done (V3 §4.2).

V3's learning rate: linear warm-up over 2,000 steps to 2.2e-4, constant to 10T of 14.8T tokens, cosine to 2.2e-5 over 4.3T, then
2.2e-5 for 333B and 7.3e-6 for 167B. Batch ramp 3,072 -> 15,360 sequences over the first 469B; MTP weight 0.3, from 10T on 0.1;
bias rate 1e-3, 0 in the last 500B. All are host numbers: a step takes them as traced scalars, so that no value recompiles it.
"""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from model.errors import freeze, freeze_kind, require


@dataclasses.dataclass(frozen=True)
class Constant:
    """Linear warm-up, then `peak`."""

    peak: float
    warmup_steps: int

    def __post_init__(self):
        _check(self)

    def __call__(self, step: int, progress: float) -> float:
        return self.peak * _warmup(step, self.warmup_steps)


@dataclasses.dataclass(frozen=True)
class Cosine:
    """Linear warm-up, then a half cosine from `peak` to `final` over the run."""

    peak: float
    final: float
    warmup_steps: int

    def __post_init__(self):
        _check(self)

    def __call__(self, step: int, progress: float) -> float:
        return _warmup(step, self.warmup_steps) * _half_cosine(self.peak, self.final, progress)


@dataclasses.dataclass(frozen=True)
class Linear:
    """Linear warm-up, `peak` until `constant_until`, then a line to `final` at the end (warm-up, stable, decay)."""

    peak: float
    final: float
    warmup_steps: int
    constant_until: float

    def __post_init__(self):
        _check(self, "constant_until")

    def __call__(self, step: int, progress: float) -> float:
        done = max(0.0, (progress - self.constant_until) / max(1 - self.constant_until, 1e-9))
        return _warmup(step, self.warmup_steps) * (self.peak + (self.final - self.peak) * min(done, 1.0))


@dataclasses.dataclass(frozen=True)
class V3:
    """V3 §4.2: warm-up, constant, cosine, and a tail of two steps; the three bounds are shares of the run's tokens."""

    peak: float
    final: float
    tail: float
    warmup_steps: int
    constant_until: float
    cosine_until: float
    final_until: float

    def __post_init__(self):
        _check(self, "constant_until", "cosine_until", "final_until")

    def __call__(self, step: int, progress: float) -> float:
        if progress >= self.final_until:
            return self.tail
        span = max(self.cosine_until - self.constant_until, 1e-12)
        done = min(max((progress - self.constant_until) / span, 0.0), 1.0)
        return _warmup(step, self.warmup_steps) * _half_cosine(self.peak, self.final, done)


@dataclasses.dataclass(frozen=True)
class MultiStep:
    """V2 §3.1.2: warm-up, then `peak` times `factor` at each of two shares of the tokens."""

    peak: float
    factor: float
    warmup_steps: int
    first: float
    second: float

    def __post_init__(self):
        _check(self, "first", "second")

    def __call__(self, step: int, progress: float) -> float:
        drops = (progress >= self.first) + (progress >= self.second)
        return self.peak * self.factor ** drops * _warmup(step, self.warmup_steps)


@dataclasses.dataclass(frozen=True)
class Switch:
    """`first` until the share `until` of the tokens, then `then` (MTP weight, bias rate)."""

    first: float
    then: float
    until: float

    def __post_init__(self):
        require(self.first >= 0 and self.then >= 0, "first, then", (self.first, self.then), "0 or more")
        require(0 <= self.until <= 1, "until", self.until, "a share from 0 to 1")

    def __call__(self, progress: float) -> float:
        return self.first if progress < self.until else self.then


@dataclasses.dataclass(frozen=True)
class Plan:
    """What each step of a run does: rows i64 [steps] (sequences), progress f64 [steps] (share of the rows done before it)."""

    rows: np.ndarray
    progress: np.ndarray

    @property
    def steps(self) -> int:
        return len(self.rows)


def plan(steps: int, batch_size: int, ramp: tuple[int, float] | None, multiple: int = 1) -> Plan:
    """The batch sizes of a run of `steps` steps: batch_size, or ramp = (start, until) growing from start with the rows done.

    d(rows)/d(step) = size(rows) gives the rows of the whole run, so that exactly `steps` steps spend them; sizes are rounded to
    `multiple` rows.
    """
    if ramp is None:
        rows = np.full(steps, batch_size, np.int64)
    else:
        start, until = ramp
        ratio = math.log(batch_size / start) / (batch_size - start) if batch_size != start else 1 / batch_size
        total = steps / (until * ratio + (1 - until) / batch_size)
        rows, done = np.full(steps, batch_size, np.int64), 0
        for i in range(steps):
            if done >= until * total:
                break
            size = start + (batch_size - start) * done / (until * total)
            rows[i] = max(multiple, round(size / multiple) * multiple)
            done += rows[i]
    return Plan(rows, (np.cumsum(rows) - rows) / max(rows.sum(), 1))


def parse_ramp(config: Mapping, path: str) -> tuple[int, float] | None:
    """config = dict(kind='none'|'linear', linear=dict(start, until))."""
    ramp = freeze_kind(RAMPS, config, path)
    return None if ramp is None else (ramp.start, ramp.until)


@dataclasses.dataclass(frozen=True)
class Ramp:
    """From `start` sequences a step to the batch size, over the share `until` of the tokens."""

    start: int
    until: float

    def __post_init__(self):
        require(self.start >= 1, "start", self.start, "a positive integer")
        require(0 < self.until <= 1, "until", self.until, "a share above 0, up to 1")


def parse_lr(config: Mapping, path: str):
    """The learning rate schedule of config = dict(kind=..., ...): a function (step, progress) -> float."""
    return freeze_kind(LEARNING_RATES, config, path)


def parse_switch(config: Mapping, path: str) -> Switch:
    """The two-valued schedule of config = dict(first, then, until)."""
    return freeze(Switch, config, path)


def _check(schedule, *bounds: str) -> None:
    """Rates and the warm-up are 0 or more, bounds shares of the run that do not fall."""
    for name in ("peak", "final", "tail", "factor", "warmup_steps"):
        value = getattr(schedule, name, 0)
        require(value >= 0, name, value, "0 or more")
    shares = [0.0, *(getattr(schedule, name) for name in bounds), 1.0]
    require(shares == sorted(shares), ", ".join(bounds), tuple(shares[1:-1]), "growing shares from 0 to 1")


def _warmup(step: int, warmup_steps: int) -> float:
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps > 0 else 1.0


def _half_cosine(high: float, low: float, share: float) -> float:
    return low + (high - low) * 0.5 * (1 + math.cos(math.pi * min(max(share, 0.0), 1.0)))


LEARNING_RATES = {"constant": Constant, "cosine": Cosine, "linear": Linear, "v3": V3, "multi_step": MultiStep}
RAMPS = {"none": lambda config, path: None, "linear": Ramp}
