"""TrainState: everything a step changes; made, described and placed on a mesh here (EMA in host memory: V3 §3.2.3)."""
from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from model import precision, sharding, transformer
from model.config import Execution, ModelConfig
from model.transformer import AS_STORED
from train.optimizer import Optimizer


class TrainState(NamedTuple):
    """step i32 []; params f32; router_bias f32 [n_moe + J, E] or None; opt_state; ema (as params) or None; amax f32 [S, 2, H], the history
    of a precision with delayed scales, or None."""

    step: Any
    params: Any
    router_bias: Any
    opt_state: Any
    ema: Any
    amax: Any = None


def create(rng, cfg: ModelConfig, optimizer: Optimizer, run: Execution = AS_STORED) -> TrainState:
    """A fresh state. Call it under jit."""
    return from_params(transformer.init(rng, cfg), init_router_bias(cfg), optimizer, run)


def from_params(params, router_bias, optimizer: Optimizer, run: Execution = AS_STORED) -> TrainState:
    """A state at step 0 that starts from these weights."""
    ema = None if optimizer.ema is None else jax.tree.map(jnp.copy, params)
    return TrainState(jnp.zeros((), jnp.int32), params, router_bias, optimizer.init(params), ema, precision.init_history(params, run))


def init_router_bias(cfg: ModelConfig):
    """Zeros f32 [n_moe + J, E], or None for a kind without a bias and for a model without a MoE layer."""
    n_layers = cfg.n_moe_layers + cfg.mtp_depth
    return jnp.zeros((n_layers, cfg.moe.n_routed_experts), jnp.float32) if cfg.has_bias and n_layers else None


def shardings(mesh, cfg: ModelConfig, state: TrainState, layout: sharding.Layout = sharding.LAYOUTS["fsdp"]) -> TrainState:
    """The NamedSharding of each leaf: parameters by their logical axes as the optimizer's `layout` says, moments and EMA as their
    parameter (the EMA in host memory, V3 §3.2.3), the rest replicated."""
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
                return layout.at_rest(mesh, names, leaf.shape)
        return jax.NamedSharding(mesh, jax.P())

    places = jax.tree_util.tree_map_with_path(one, state)
    return places._replace(ema=jax.tree.map(in_host_memory, places.ema))


def in_host_memory(place: jax.NamedSharding) -> jax.NamedSharding:
    """The same layout in pinned host memory, where the devices have memory of their own (a CPU's is the host's already)."""
    return place if place.mesh.devices.flat[0].platform == "cpu" else place.with_memory_kind("pinned_host")


def create_sharded(mesh, rng, cfg: ModelConfig, optimizer: Optimizer) -> TrainState:
    """A fresh state, each leaf made where it lives."""
    make = lambda key: create(key, cfg, optimizer)  # noqa: E731
    return jax.jit(make, out_shardings=shardings(mesh, cfg, jax.eval_shape(make, rng), optimizer.layout))(rng)
