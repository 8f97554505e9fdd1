"""AdamW with bf16 moments over FP32 masters (V3 §3.3.2, §4.2), Muon beside it, rules by parameter path, and the EMA.

An update is p -= lr * multiplier(path) * (direction + decay(path) * p), after the gradient is clipped by its global norm. Rules are
(pattern, field, value) over paths such as 'moe/attention/q_up', the last match wins: field 'decay' (weight decay), 'lr' (a
multiplier) or 'freeze' (any number; the same as lr 0, and the gradient leaves the norm). By default matrices decay and norms do
not. `lr` and `clip` are traced scalars.
"""
from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from model.errors import choice, freeze, freeze_kind, leaf, pattern, require, sequence
from model.sharding import LAYOUTS, Layout

FIELDS = ("decay", "lr", "freeze")
DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32, "parameter": None}


@dataclasses.dataclass(frozen=True)
class AdamW:
    """moment_dtype: bfloat16 (V3), float32, or parameter (that of each leaf)."""

    b1: float
    b2: float
    eps: float
    moment_dtype: str

    def __post_init__(self):
        for name in ("b1", "b2"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "0 up to 1, 1 excluded")
        require(self.eps > 0, "eps", self.eps, "a positive number")
        choice(self.moment_dtype, DTYPES, "moment_dtype")

    def transformation(self) -> optax.GradientTransformation:
        return scale_by_adam(self)


@dataclasses.dataclass(frozen=True)
class Muon:
    """Orthogonalised momentum for matrices (Jordan 2024; Moonlight 2502.16982 scales it to Adam's rms), AdamW for the rest."""

    momentum: float
    rms: float
    adamw: AdamW

    def __post_init__(self):
        require(0 <= self.momentum < 1, "momentum", self.momentum, "0 up to 1, 1 excluded")
        require(self.rms > 0, "rms", self.rms, "a positive number")

    def transformation(self) -> optax.GradientTransformation:
        def label(path, leaf):
            return "matrix" if leaf.ndim >= 2 and path[0].key not in ("embedding", "head") and leaf.shape[-2] > 1 and \
                not path[-1].key.endswith("norm") else "rest"

        return optax.partition({"matrix": scale_by_muon(self), "rest": self.adamw.transformation()},
                               lambda params: jax.tree_util.tree_map_with_path(label, params))


class AdamState(NamedTuple):
    count: Any
    mu: Any
    nu: Any


def scale_by_adam(spec: AdamW) -> optax.GradientTransformation:
    """Adam's direction m̂ / (sqrt(v̂) + eps), moments kept in moment_dtype and updated in the dtype of the gradient."""
    def zeros(params):
        return jax.tree.map(lambda p: jnp.zeros(p.shape, DTYPES[spec.moment_dtype] or p.dtype), params)

    def init(params):
        return AdamState(jnp.zeros((), jnp.int32), zeros(params), zeros(params))

    def update(grads, state, params=None):
        count = state.count + 1
        mu = jax.tree.map(lambda g, m: spec.b1 * m.astype(g.dtype) + (1 - spec.b1) * g, grads, state.mu)
        nu = jax.tree.map(lambda g, v: spec.b2 * v.astype(g.dtype) + (1 - spec.b2) * g * g, grads, state.nu)

        def direction(m, v):
            n = count.astype(m.dtype)
            return m / (1 - spec.b1 ** n) / (jnp.sqrt(v / (1 - spec.b2 ** n)) + spec.eps)

        updates = jax.tree.map(direction, mu, nu)
        stored = [jax.tree.map(lambda x, old: x.astype(old.dtype), new, old) for new, old in ((mu, state.mu), (nu, state.nu))]
        return updates, AdamState(count, *stored)

    return optax.GradientTransformation(init, update)


def scale_by_muon(spec: Muon) -> optax.GradientTransformation:
    """Muon's direction for leaves [..., N, K], each matrix of a stack by itself: Nesterov momentum, orthogonalised, at Adam's rms."""
    def update(grads, momentum, params=None):
        momentum = jax.tree.map(lambda g, m: spec.momentum * m + g, grads, momentum)
        ahead = jax.tree.map(lambda g, m: spec.momentum * m + g, grads, momentum)
        return jax.tree.map(lambda u: spec.rms * max(u.shape[-2:]) ** 0.5 * orthogonalise(u), ahead), momentum

    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update)


def orthogonalise(x):
    """x [..., N, K] with its singular values brought near 1 (0.68 to 1.13) by five Newton-Schulz steps (Jordan 2024's quintic)."""
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


@dataclasses.dataclass(frozen=True)
class Ema:
    """Exponential moving average of the parameters, kept in host memory where the backend has it (V3 §3.2.3)."""

    decay: float

    def __post_init__(self):
        require(0 <= self.decay < 1, "decay", self.decay, "0 up to 1, 1 excluded")


class Optimizer(NamedTuple):
    """init(params) -> opt_state; update(grads, opt_state, params, lr, clip) -> (params, opt_state, grad_norm); ema or None; layout: how
    masters and moments are split over a mesh."""

    init: Callable
    update: Callable
    ema: Ema | None
    clip: float
    layout: Layout = LAYOUTS["fsdp"]


def parse(config: Mapping) -> Optimizer:
    """Freezes config.optimizer."""
    spec = freeze_kind(KINDS, config, "optimizer")
    rules = tuple(_rule(i, rule) for i, rule in enumerate(sequence(config, "rules", "optimizer")))
    decay, clip = leaf(config, "weight_decay", float, "optimizer"), leaf(config, "clip", float, "optimizer")
    require(decay >= 0, "optimizer.weight_decay", decay, "0 or more")
    require(clip > 0, "optimizer.clip", clip, "a positive number")
    layout = LAYOUTS[choice(config["sharding"]["kind"], LAYOUTS, "optimizer.sharding.kind")]
    return make(spec.transformation(), rules, decay, clip, freeze_kind(EMAS, config["ema"], "optimizer.ema"))._replace(layout=layout)


def make(transformation, rules, weight_decay: float, clip: float, ema: Ema | None) -> Optimizer:
    """The optimizer of a direction: clipping, decoupled decay and rules around it."""
    def coefficients(params):
        """(lr multiplier, decay) of each leaf, from its path."""
        def one(path, leaf):
            name = path_name(path)
            values = {"lr": 1.0, "decay": 0.0 if name.endswith("norm") else weight_decay}
            for expression, field, value in rules:
                if re.search(expression, name):
                    values.update({"lr": 0.0} if field == "freeze" else {field: value})
            return values["lr"], values["decay"]

        return jax.tree_util.tree_map_with_path(one, params)

    def init(params):
        unmatched = [p for p, _, _ in rules if not any(re.search(p, n) for n in path_names(params))]
        require(not unmatched, "optimizer.rules", ", ".join(unmatched), f"patterns that match a path, such as {path_names(params)[0]}")
        return transformation.init(params)

    def update(grads, opt_state, params, lr, clip):
        table = coefficients(params)
        grads = jax.tree.map(lambda g, c: jnp.zeros_like(g) if c[0] == 0 else g, grads, table)
        norm = optax.tree.norm(grads)
        scale = jnp.minimum(1.0, clip.astype(norm.dtype) / jnp.maximum(norm, 1e-12))
        grads = jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)
        updates, opt_state = transformation.update(grads, opt_state, params)

        def apply(p, u, coefficient):
            multiplier, decay = coefficient
            return p if multiplier == 0 else p - (lr * multiplier).astype(p.dtype) * (u.astype(p.dtype) + decay * p)

        params = jax.tree.map(apply, params, updates, table)
        return params, opt_state, norm

    return Optimizer(init, update, ema, clip)


def path_name(path) -> str:
    """'moe/attention/q_up' of a tree path of dict keys."""
    return "/".join(str(key.key) for key in path)


def path_names(params) -> list[str]:
    """The names of every leaf, in order."""
    return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]


def _rule(i: int, rule) -> tuple[str, str, float]:
    name = f"optimizer.rules[{i}]"
    require(isinstance(rule, (tuple, list)) and len(rule) == 3, name, rule, "(pattern, field, value)")
    expression, field, value = rule
    choice(field, FIELDS, f"{name} field")
    require(isinstance(value, (int, float)) and 0 <= value < math.inf, f"{name} value", value, "a number of 0 or more")
    return pattern(expression, name), field, float(value)


def _muon(config: Mapping, path: str) -> Muon:
    plain = {k: v for k, v in config.items() if k != "adamw"}
    return freeze(Muon, plain, path, adamw=freeze(AdamW, config["adamw"], f"{path}.adamw"))


KINDS = {"adamw": AdamW, "muon": _muon}
EMAS = {"none": lambda config, path: None, "host": Ema}
