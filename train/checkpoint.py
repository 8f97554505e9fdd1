"""Checkpoints: everything a run needs to go on, saved atomically; parameters out of any of them. The only user of orbax.

`checkpoints/STEP` holds params, router_bias, ema, opt_state, step as orbax items, and as metadata the model's config, the data
position and the job's own counters. `checkpoints/final` is a link to the last. A path given by a user may be a run, a stage
(`RUN/checkpoints/STAGE`) or a step.
"""
from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from orbax.checkpoint import v1 as ocp

from model import config as model_config
from model import precision
from model.config import ModelConfig
from model.errors import UserError
from train import cluster
from train.optimizer import path_name
from train.state import TrainState

_UNFINISHED = "orbax-checkpoint-tmp"  # in the name of what orbax has not finished, and of what is being removed


def save(directory: pathlib.Path, state: TrainState, model: dict[str, Any], extra: dict[str, Any], keep: int = 0) -> pathlib.Path:
    """Writes directory/STEP and points directory/final at it; keeps the `keep` newest steps (0: all). extra: JSON values.

    The step appears under its name only when it is whole.
    """
    step = int(state.step)
    path = directory.absolute() / str(step)  # orbax takes no other
    items = jax.tree.map(_of_all, {k: v for k, v in state._asdict().items() if v is not None})
    ocp.save_checkpointables(path, items, overwrite=True, custom_metadata=dict(model=jsonable(model), extra=extra, format=1))
    if jax.process_index() == 0:
        _link(directory / "final", str(step))
        for old in steps(directory)[:-keep] if keep else []:
            gone = directory / f"{old}.{_UNFINISHED}"  # a half-removed step must not look like a finished one
            os.replace(directory / str(old), gone)
            shutil.rmtree(gone, ignore_errors=True)
    cluster.barrier("saved")
    return path


def save_params(directory: pathlib.Path, step: int, model: dict[str, Any], params, router_bias) -> pathlib.Path:
    """Writes weights alone (an import, a stage's result) as directory/STEP."""
    return save(pathlib.Path(directory), TrainState(jnp.asarray(step, jnp.int32), params, router_bias, None, None), model, {})


def restore(path: pathlib.Path, like: TrainState, shardings: TrainState | None = None) -> tuple[TrainState, dict[str, Any]]:
    """(state, extra) of a step directory; `like` gives shapes and dtypes (a state or its eval_shape), shardings where leaves live."""
    def abstract(leaf, place=None):
        place = place or _whole()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    items = {}
    for name, tree in like._asdict().items():
        if tree is not None:
            places = [] if shardings is None else [getattr(shardings, name)]
            items[name] = jax.tree.map(abstract, tree, *places)
    with _readable(path, "workdir"):
        loaded = ocp.load_checkpointables(path.absolute(), items)
        return TrainState(**({k: None for k in TrainState._fields} | loaded)), metadata(path)["extra"]


def load_params(path: str | pathlib.Path, *, ema: bool = False, leaf: str = "init_from") -> tuple[ModelConfig, Any, Any]:
    """(ModelConfig, params, router_bias) of a run, stage or step; with ema the averaged parameters.

    Stored precision.Weight come back as such. Raises UserError, which names the config's subtree `leaf`.
    """
    step = find(path, leaf)
    with _readable(step, leaf):
        found = ocp.checkpointables_metadata(step)
        name = "ema" if ema else "params"
        if name not in found.metadata:
            raise UserError(f"{leaf}: {step} has no {name}, allowed: one of {', '.join(sorted(found.metadata))}")
        cfg = model_config.parse(ConfigDict(found.custom_metadata["model"]))
        wanted = {k: _as_abstract(found.metadata[k]) for k in (name, "router_bias") if k in found.metadata}
        loaded = ocp.load_checkpointables(step.absolute(), wanted)
        return cfg, loaded[name], loaded.get("router_bias")


def metadata(path: pathlib.Path) -> dict[str, Any]:
    """What was saved beside the arrays: model, extra."""
    return ocp.checkpointables_metadata(path).custom_metadata


def steps(directory: pathlib.Path) -> list[int]:
    """The finished steps under a checkpoint directory, in order."""
    directory = pathlib.Path(directory)
    if not directory.is_dir():
        return []
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit() and _is_step(p))


def _is_step(path: pathlib.Path) -> bool:
    return (path / "_CHECKPOINT_METADATA").is_file()


def find(path: str | pathlib.Path, leaf: str = "init_from") -> pathlib.Path:
    """The step directory a user means by a run, stage or step. Raises UserError, which names `leaf`.path."""
    path = pathlib.Path(path)
    for candidate in (path, path / "checkpoints"):
        if _is_step(candidate):
            return candidate.resolve()
        if (candidate / "final").exists():
            return find(candidate / "final", leaf)
        if steps(candidate):
            return (candidate / str(steps(candidate)[-1])).resolve()
    raise UserError(f"{leaf}.path: found {str(path)!r}, allowed: a run, a stage or a step with a finished checkpoint")


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
        shape = (table[other].low if precision.is_weight(table[other]) else table[other]).shape
        if shape != leaf.shape:
            raise UserError(f"init_from: {other} has shape {shape}, allowed: {leaf.shape} of {name}")
        taken += 1
        return jax.device_put(precision.raw(table[other], leaf.dtype), leaf.sharding)

    params = jax.tree_util.tree_map_with_path(one, params)
    if not taken:
        raise UserError(f"init_from.include: found {spec.include!r}, allowed: a pattern that matches a parameter's name")
    if router_bias is not None and source_bias is not None and source_bias.shape[1:] == router_bias.shape[1:]:
        source_bias = jax.device_get(source_bias)
        # a model without MTP takes the main layers' rows; rows that the source lacks stay 0
        n = min(len(source_bias), len(router_bias))
        router_bias = router_bias.at[:n].set(source_bias[:n])
    return params, router_bias


def clean(directory: pathlib.Path) -> None:
    """Removes what an interrupted save left behind."""
    if directory.is_dir():
        for path in directory.iterdir():
            if _UNFINISHED in path.name:
                shutil.rmtree(path, ignore_errors=True)
            elif path.name.startswith(".final."):
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def _readable(path: str | pathlib.Path, leaf: str):
    """Turns the many errors of a damaged checkpoint into one line."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, json.JSONDecodeError, jax.errors.JaxRuntimeError) as error:
        first = (str(error).strip().splitlines() or [""])[0][:200]
        raise UserError(f"{leaf}: cannot read the checkpoint {path} ({type(error).__name__}: {first}), allowed: a whole one") from error


def _as_abstract(tree):
    """What to load of orbax's description of a tree, where a NamedTuple is a dict of its fields."""
    if isinstance(tree, dict) and set(tree) == set(precision.Weight._fields):
        return precision.Weight(**{k: _as_abstract(v) for k, v in tree.items()})
    if isinstance(tree, dict):
        return {k: _as_abstract(v) for k, v in tree.items()}
    return None if tree is None else jax.ShapeDtypeStruct(tree.shape, tree.dtype, sharding=_whole())


def _whole() -> jax.sharding.Sharding:
    """Where an array without a layout goes: the first device, or a copy on every device of several processes."""
    if cluster.several():
        return jax.NamedSharding(jax.sharding.Mesh(jax.devices(), "all"), jax.P())
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def _of_all(x):
    """x as an array of every process, where it is one that each holds alike for itself."""
    if cluster.several() and getattr(x, "is_fully_addressable", True):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, _whole(), lambda index: x[index])
    return x


def _link(link: pathlib.Path, target: str) -> None:
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    temporary.symlink_to(target)
    os.replace(temporary, link)


def jsonable(value: Any) -> Any:
    """value with tuples as lists, as JSON gives it back."""
    if isinstance(value, dict):
        return {k: jsonable(v) for k, v in value.items()}
    return [jsonable(v) for v in value] if isinstance(value, (tuple, list)) else value

