"""The mesh and the one table from logical axes to mesh axes.

Every array of the model is described by logical axes; only this file knows the mesh. Axes are Auto: XLA places what we do not
constrain, `shard_map` is used only where bytes are placed by hand (expert_parallel.py, train/pipeline/execute.py).

| mesh axis | splits | V3's use (§3.1) |
|---|---|---|
| pipe | stages of layers | PP 16 |
| node, expert | the batch, and the experts | EP 64 over 8 nodes |
| fsdp | the batch, parameters and moments | ZeRO-1 DP |
| tensor | heads, ffn, vocab | none (V3 avoids TP) |
"""
from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from flax.core import meta
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from model.errors import UserError, leaf, require

MESH_AXES = ("pipe", "node", "expert", "fsdp", "tensor")
DATA_AXES = ("node", "expert", "fsdp")

RULES: dict[str, str | tuple[str, ...] | None] = {
    "layers": None,
    "batch": DATA_AXES,
    "seq": None,
    "cache": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "embed_in": None,
    "embed_activation": None,
    "heads": "tensor",
    "head": None,
    "q_lora": None,
    "kv_lora": None,
    "ffn": "tensor",
    "expert": ("node", "expert"),
    "expert_ffn": "tensor",
    "rows": DATA_AXES,
    "pair": None,
    "gate": None,
}


def make_mesh(config: Mapping, devices=None) -> Mesh:
    """The mesh of config.mesh = dict(pipe, node, expert, fsdp, tensor); one size may be -1: all devices that are left.

    Raises UserError naming the shapes that would fit.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {axis: leaf(config, axis, int, "mesh") for axis in MESH_AXES}
    free = [axis for axis, size in sizes.items() if size == -1]
    for axis, size in sizes.items():
        require(size >= 1 or size == -1, f"mesh.{axis}", size, "a positive integer, or -1 for the devices that are left")
    require(len(free) <= 1, "mesh", " ".join(free), "at most one axis of -1")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free:
        require(len(devices) % fixed == 0, "mesh", sizes, f"sizes whose product divides {len(devices)} devices")
        sizes[free[0]] = len(devices) // fixed
    elif fixed > len(devices) or len(devices) % fixed:
        raise UserError(f"mesh: found {sizes} = {fixed} devices, allowed: {_nearest(sizes, len(devices))}")
    shape = tuple(sizes[axis] for axis in MESH_AXES)
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape), devices=devices[:math.prod(shape)])


def _nearest(sizes: dict[str, int], n_devices: int) -> str:
    """The largest shapes below the one asked for that fit n_devices, changing one axis."""
    fits = []
    for axis, size in sizes.items():
        rest = math.prod(sizes.values()) // size
        best = max((k for k in range(1, size + 1) if rest * k <= n_devices and n_devices % (rest * k) == 0), default=None)
        if best and best != size:
            fits.append(f"{axis}={best}")
    return f"{n_devices} devices here: {' or '.join(fits)}" if fits else f"a product that divides {n_devices} devices"


def spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """The PartitionSpec of an array with these logical axes. Raises KeyError for an unknown axis, ValueError for a mesh axis twice."""
    parts = tuple(None if axis is None else RULES[axis] for axis in axes)
    used = [axis for part in parts if part for axis in ((part,) if isinstance(part, str) else part)]
    if len(used) != len(set(used)):
        raise ValueError(f"two logical axes of {axes} lie on one mesh axis: {parts}")
    return PartitionSpec(*parts)


def sharding(mesh: Mesh, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> NamedSharding:
    """The sharding of one array: as RULES say, replicated along a dimension that does not divide."""
    parts = []
    for size, part in zip(shape, spec(axes), strict=True):
        names = () if part is None else (part,) if isinstance(part, str) else part
        n = math.prod(mesh.shape[name] for name in names)
        parts.append(part if n > 1 and size % n == 0 else None)
    return NamedSharding(mesh, PartitionSpec(*parts))


def constrain(x, axes: tuple[str | None, ...]):
    """x with the layout of its logical axes, under the mesh of the context; x itself where there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or math.prod(mesh.shape.values()) == 1 or set(mesh.axis_names) != set(MESH_AXES):
        return x
    if mesh.manual_axes:
        return x  # inside shard_map the layout is ours
    return jax.lax.with_sharding_constraint(x, sharding(mesh, axes, x.shape).spec)


def by_rows(function, *arrays):
    """function(*arrays), whose arrays and results share their leading axis (rows, or sequences), run by each data shard on its own:
    XLA would gather the operands of a sort or a top-k over the whole mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    n = 1 if mesh.empty or mesh.manual_axes else math.prod(mesh.shape[axis] for axis in DATA_AXES)
    if n == 1 or arrays[0].shape[0] % n:
        return function(*arrays)
    return jax.shard_map(function, in_specs=PartitionSpec(DATA_AXES), out_specs=PartitionSpec(DATA_AXES))(*arrays)


def param(module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str, ...], init):
    """A parameter of a Linen module: stored float32, with its logical axes attached. The only caller of self.param."""
    if len(axes) != len(shape):
        raise ValueError(f"parameter {name}: shape {shape} with axes {axes}")
    spec(axes)
    return module.param(name, lambda key: Named(init(key, shape, jnp.float32), axes))


class Named(struct.PyTreeNode, meta.AxisMetadata):
    """An initial value and its logical axes. Linen's own box would constrain it with names of mesh axes; this one only remembers."""

    value: Any
    names: tuple[str, ...] = struct.field(pytree_node=False)

    def unbox(self):
        return self.value

    def replace_boxed(self, value):
        return self.replace(value=value)

    def add_axis(self, index, params):
        return self

    def remove_axis(self, index, params):
        return self


def normal(std: float):
    """V3 §4.2: every learnable matrix starts normal with std 0.006."""
    return nn.initializers.normal(std)
