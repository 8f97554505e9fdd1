"""What a rank runs and what it costs: operations, overlapped pairs, times (V3 §3.2.1, figures 4 and 5).

A backward splits into an input part I (dx, which the stage before waits for) and a weight part W (dW, which nobody
waits for): the split of Qi et al., Zero Bubble Pipeline Parallelism, arXiv:2401.10241, 2023. B is I and W in one.
"""
from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

from model.errors import require

PARTS = {"F": "F", "B": "IW", "Bi": "I", "W": "W"}  # kind -> what it does, a letter each


class Op(NamedTuple):
    """One chunk of one rank working on one micro-batch; micro-batches are numbered within a direction."""

    kind: str  # a key of PARTS
    chunk: int
    microbatch: int
    direction: int = 0  # 0 enters the pipe at rank 0, 1 at the last rank

    @property
    def ops(self) -> tuple[Op, ...]:
        return (self,)

    def __str__(self) -> str:
        return f"{self.kind}{self.microbatch}{f'.{self.chunk}' if self.chunk else ''}{'<' * self.direction}"


class Pair(NamedTuple):
    """A forward and a backward of different micro-batches that run as one: each hides the other's communication."""

    forward: Op
    backward: Op

    @property
    def ops(self) -> tuple[Op, ...]:
        return (self.forward, self.backward)

    def __str__(self) -> str:
        return f"{self.forward}&{self.backward}"


Entry = Op | Pair  # an item of a rank's list


@dataclasses.dataclass(frozen=True)
class Times:
    """Times of 1/n_ranks of the model and of one message, in any unit; a chunk takes its share of them."""

    t_forward: float = 1.0
    t_backward_input: float = 1.0
    t_backward_weight: float = 1.0
    t_overlapped: float = 3.0  # F&B: a forward and a whole backward, overlapped
    t_comm: float = 0.0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            positive = value > 0 or (value == 0 and field.name in ("t_comm", "t_backward_weight"))
            require(positive and value < math.inf, field.name, value, "a time above 0 (t_comm, W: or 0)")

    @property
    def t_backward(self) -> float:
        return self.t_backward_input + self.t_backward_weight

    def of(self, entry: Entry) -> float:
        if isinstance(entry, Pair):
            return self.t_overlapped - (self.t_backward_weight if entry.backward.kind == "Bi" else 0.0)
        parts = {"F": self.t_forward, "I": self.t_backward_input, "W": self.t_backward_weight}
        return sum(parts[part] for part in PARTS[entry.kind])
