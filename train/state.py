"""TrainState: everything a step changes; made, described and placed on a mesh here."""
from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from model import sharding, transformer
from model.config import ModelConfig
from train.optimizer import Optimizer


class TrainState(NamedTuple):
    """step i32 []; params f32; router_bias f32 [n_moe + J, E] or None; opt_state; ema (as params) or None."""

    step: Any
    params: Any
    router_bias: Any
    opt_state: Any
    ema: Any


def create(rng, cfg: ModelConfig, optimizer: Optimizer) -> TrainState:
    """A fresh state. Call it under jit."""
    return from_params(transformer.init(rng, cfg), init_router_bias(cfg), optimizer)


def from_params(params, router_bias, optimizer: Optimizer) -> TrainState:
    """A state at step 0 that starts from these weights."""
    ema = None if optimizer.ema is None else jax.tree.map(jnp.copy, params)
    return TrainState(jnp.zeros((), jnp.int32), params, router_bias, optimizer.init(params), ema)


def init_router_bias(cfg: ModelConfig):
    """Zeros f32 [n_moe + J, E], or None for a kind without a bias."""
    return jnp.zeros((cfg.n_moe_layers + cfg.mtp_depth, cfg.moe.n_routed_experts), jnp.float32) if cfg.has_bias else None


def shardings(mesh, cfg: ModelConfig, state: TrainState) -> TrainState:
    """The NamedSharding of each leaf: parameters by their logical axes, moments and EMA as their parameter, the rest replicated."""
    axes = transformer.axes(cfg)
    by_shape: dict[tuple[str, ...], Any] = {}
    for path, names in jax.tree_util.tree_leaves_with_path(axes, is_leaf=lambda x: isinstance(x, tuple)):
        by_shape[tuple(key.key for key in path)] = names

    def one(path, leaf):
        # a moment's path ends with its parameter's path
        keys = tuple(key.key for key in path if hasattr(key, "key"))
        for start in range(len(keys)):
            names = by_shape.get(keys[start:])
            if names is not None and len(names) == len(leaf.shape):
                return sharding.sharding(mesh, names, leaf.shape)
        return jax.NamedSharding(mesh, jax.P())

    return jax.tree_util.tree_map_with_path(one, state)


def create_sharded(mesh, rng, cfg: ModelConfig, optimizer: Optimizer) -> TrainState:
    """A fresh state, each leaf made where it lives."""
    make = lambda key: create(key, cfg, optimizer)  # noqa: E731
    return jax.jit(make, out_shardings=shardings(mesh, cfg, jax.eval_shape(make, rng)))(rng)
