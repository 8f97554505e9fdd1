"""Delayed scaling, the ablation `fp8_delayed`: one scale a tensor, from the largest values of past optimizer steps.

V3 §3.3.2 scales every tile by its own largest value, online; frameworks before it (Transformer Engine's recipe of this name) keep a
history of largest values and scale a whole tensor by the largest of it, times 2^margin, so that a value can be quantised before the
whole tensor was seen. What grows past the history saturates. Here inputs of matmuls and gradients of their outputs are scaled so;
weights are in hand when they are quantised, once a step, and take their own largest value. As elsewhere here everything is E4M3. A
history of zeros (the first step) leaves a tensor's own largest value.

The history is one array f32 [S, 2, H] beside the router bias: S matmul weights of all layers in tree order, (input, gradient of the
output), H steps, newest first. It needs no path of its own: `expected` gives f32 [S, 2], `precision.with_masters` deals it to the
weights, and the cotangent that a linear returns for its pair is what it saw, so that `jax.grad` with respect to it gives the
observations [S, 2]. Those of micro-batches are joined by their maximum, and `update` pushes them.
"""
from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from model.errors import require


@dataclasses.dataclass(frozen=True)
class Delayed:
    """config.run.precision.fp8_delayed: history is the number of past steps, margin the powers of two kept free above them."""

    history: int
    margin: int

    def __post_init__(self):
        require(self.history >= 1, "history", self.history, "a positive integer")
        require(0 <= self.margin <= 16, "margin", self.margin, "0 to 16")


def init(n: int, spec: Delayed):
    """A history f32 [n, 2, H] of nothing."""
    return jnp.zeros((n, 2, spec.history), jnp.float32)


def expected(history, spec: Delayed):
    """The largest value to scale by, f32 [S, 2]; 0 where nothing was seen."""
    return jnp.max(history, axis=-1) * 2.0 ** spec.margin


def update(history, seen):
    """The history with seen f32 [S, 2] as its newest step; what is not finite counts as not seen."""
    seen = jnp.where(jnp.isfinite(seen), seen, 0)
    return jnp.concatenate([seen[..., None], history[..., :-1]], axis=-1)


def largest(own, past):
    """The value a tensor is scaled by: that of its past (None: no history is kept), or its own where there is none."""
    return own if past is None else jnp.where(past > 0, past, own)
