"""Checkpoints: everything a run needs to go on, saved atomically; parameters out of any of them. The only user of orbax.

`checkpoints/STEP` holds params, router_bias, ema, opt_state, step as orbax items, and as metadata the model's config, the data
position and the job's own counters. `checkpoints/final` is a link to the last. A path given by a user may be a run, a stage
(`RUN/checkpoints/STAGE`) or a step.
"""
from __future__ import annotations

import os
import pathlib
import re
import shutil
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
from orbax.checkpoint import v1 as ocp

from model import config as model_config
from model import precision
from model.config import ModelConfig
from model.errors import UserError
from train.optimizer import path_name
from train.state import TrainState


def save(directory: pathlib.Path, state: TrainState, model: dict[str, Any], extra: dict[str, Any], keep: int = 0) -> pathlib.Path:
    """Writes directory/STEP and points directory/final at it; keeps the `keep` newest steps (0: all). extra: JSON values."""
    step = int(state.step)
    path = directory / str(step)
    items = {k: v for k, v in state._asdict().items() if v is not None}
    ocp.save_checkpointables(path, items, overwrite=True, custom_metadata=dict(model=jsonable(model), extra=extra, format=1))
    if jax.process_index() == 0:
        _link(directory / "final", str(step))
        for old in steps(directory)[:-keep] if keep else []:
            shutil.rmtree(directory / str(old), ignore_errors=True)
    return path


def save_params(directory: pathlib.Path, step: int, model: dict[str, Any], params, router_bias) -> pathlib.Path:
    """Writes weights alone (an import, a stage's result) as directory/STEP."""
    return save(pathlib.Path(directory), TrainState(jnp.asarray(step, jnp.int32), params, router_bias, None, None), model, {})


def restore(path: pathlib.Path, like: TrainState, shardings: TrainState | None = None) -> tuple[TrainState, dict[str, Any]]:
    """(state, extra) of a step directory; `like` gives shapes and dtypes (a state or its eval_shape), shardings where leaves live."""
    def abstract(leaf, place=None):
        place = place or jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    items = {}
    for name, tree in like._asdict().items():
        if tree is not None:
            places = [] if shardings is None else [getattr(shardings, name)]
            items[name] = jax.tree.map(abstract, tree, *places)
    loaded = ocp.load_checkpointables(path, items)
    return TrainState(**({k: None for k in TrainState._fields} | loaded)), metadata(path)["extra"]


def load_params(path: str | pathlib.Path, *, ema: bool = False) -> tuple[ModelConfig, Any, Any]:
    """(ModelConfig, params, router_bias) of a run, stage or step; with ema the averaged parameters. Raises UserError."""
    step = find(path)
    found = ocp.checkpointables_metadata(step).metadata
    name = "ema" if ema else "params"
    if name not in found:
        raise UserError(f"init_from: {step} has no {name}, allowed: one of {', '.join(sorted(found))}")
    cfg = model_config.parse(ConfigDict(metadata(step)["model"]))
    wanted = {k: _as_abstract(found[k]) for k in (name, "router_bias") if k in found}
    loaded = ocp.load_checkpointables(step, wanted)
    return cfg, loaded[name], loaded.get("router_bias")


def metadata(path: pathlib.Path) -> dict[str, Any]:
    """What was saved beside the arrays: model, extra."""
    return ocp.checkpointables_metadata(path).custom_metadata


def steps(directory: pathlib.Path) -> list[int]:
    """The finished steps under a checkpoint directory, in order."""
    if not directory.is_dir():
        return []
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit() and ocp.is_orbax_checkpoint(p))


def find(path: str | pathlib.Path) -> pathlib.Path:
    """The step directory a user means by a run, stage or step. Raises UserError."""
    path = pathlib.Path(path)
    for candidate in (path, path / "checkpoints"):
        if candidate.is_dir() and ocp.is_orbax_checkpoint(candidate):
            return candidate.resolve()
        if (candidate / "final").exists():
            return find(candidate / "final")
        if steps(candidate):
            return (candidate / str(steps(candidate)[-1])).resolve()
    raise UserError(f"init_from.path: found {str(path)!r}, allowed: a run, a stage or a step with a finished checkpoint")


def warm_start(spec, params, router_bias, cfg: ModelConfig):
    """Parameters taken from another run by `config.init_from` = dict(path, include, exclude, rename, ema) into params of cfg.

    A leaf of `params` is replaced if its name matches include and not exclude; rename = ((pattern, replacement), ...) maps names of
    this model to names of the source. Shapes must agree. Raises UserError naming the leaf.
    """
    _, source, source_bias = load_params(spec.path, ema=spec.ema)
    table = {path_name(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(source, is_leaf=precision.is_weight)}
    taken = 0

    def one(path, leaf):
        nonlocal taken
        name = path_name(path)
        if not re.search(spec.include, name) or (spec.exclude and re.search(spec.exclude, name)):
            return leaf
        other = name
        for pattern, replacement in spec.rename:
            other = re.sub(pattern, replacement, other)
        if other not in table:
            raise UserError(f"init_from: {spec.path} has no {other}, allowed: {', '.join(sorted(table)[:5])}, ...")
        if table[other].shape != leaf.shape:
            raise UserError(f"init_from: {other} has shape {table[other].shape}, allowed: {leaf.shape} of {name}")
        taken += 1
        return jax.device_put(table[other].astype(leaf.dtype), leaf.sharding)

    params = jax.tree_util.tree_map_with_path(one, params)
    if not taken:
        raise UserError(f"init_from.include: found {spec.include!r}, allowed: a pattern that matches a parameter's name")
    if router_bias is not None and source_bias is not None and source_bias.shape == router_bias.shape:
        router_bias = source_bias
    return params, router_bias


def clean(directory: pathlib.Path) -> None:
    """Removes what an interrupted save left behind."""
    if directory.is_dir():
        for path in directory.iterdir():
            if "orbax-checkpoint-tmp" in path.name:
                shutil.rmtree(path, ignore_errors=True)


def _as_abstract(tree):
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=place), tree)


def _link(link: pathlib.Path, target: str) -> None:
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    temporary.symlink_to(target)
    os.replace(temporary, link)


def jsonable(value: Any) -> Any:
    """value with tuples as lists, as JSON gives it back."""
    if isinstance(value, dict):
        return {k: jsonable(v) for k, v in value.items()}
    return [jsonable(v) for v in value] if isinstance(value, (tuple, list)) else value

