"""The mesh and the one table from logical axes to mesh axes.

Every array of the model is described by logical axes; only this file knows the mesh. Axes are Auto: XLA places what we do not
constrain, `shard_map` is used only where bytes are placed by hand (expert_parallel.py, train/pipeline/execute.py).

| mesh axis | splits | V3's use (§3.1) |
|---|---|---|
| pipe | stages of layers | PP 16 |
| node, expert | the batch, and the experts | EP 64 over 8 nodes |
| fsdp | the batch, parameters and moments | ZeRO-1 DP |
| tensor | heads, ffn, vocab | none (V3 avoids TP) |

How parameters lie between steps (their gradients and moments with them) and within one is a kind of LAYOUTS: `fsdp` splits both by
the table and gathers a layer's weights where they are used; `zero1` (V3's DP) splits them at rest over every data axis and gathers
the copies that compute once a step.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
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
    require(jax.process_count() == 1 or math.prod(shape) == len(devices), "mesh", sizes, f"all {len(devices)} devices of the processes")
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


def sharding(mesh: Mesh, axes: tuple[str | None, ...], shape: tuple[int, ...], whole: tuple[str, ...] = ()) -> NamedSharding:
    """The sharding of one array: as RULES say, replicated along a dimension that does not divide and along the logical axes `whole`."""
    parts = []
    for size, part in zip(shape, spec(tuple(None if axis in whole else axis for axis in axes)), strict=True):
        names = () if part is None else (part,) if isinstance(part, str) else part
        n = math.prod(mesh.shape[name] for name in names)
        parts.append(part if n > 1 and size % n == 0 else None)
    return NamedSharding(mesh, PartitionSpec(*parts))


def gathered(mesh: Mesh, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> NamedSharding:
    """The sharding of weights in use under ZeRO-1: experts and tensor parts stay apart, nothing else is split."""
    return sharding(mesh, axes, shape, whole=("embed",))


def over_data(mesh: Mesh, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> NamedSharding:
    """The sharding of masters and moments under ZeRO-1: `gathered`, and the largest dimension that divides split over the data axes
    that split none yet; over fewer of them where none divides."""
    parts = list(gathered(mesh, axes, shape).spec)
    used = {name for part in parts if part for name in ((part,) if isinstance(part, str) else part)}
    free = tuple(axis for axis in DATA_AXES if axis not in used and mesh.shape[axis] > 1)
    for names in (free[i:] for i in range(len(free))):
        n = math.prod(mesh.shape[name] for name in names)
        fits = [i for i, size in enumerate(shape) if parts[i] is None and size % n == 0]
        if fits:
            parts[max(fits, key=lambda i: shape[i])] = names
            break
    return NamedSharding(mesh, PartitionSpec(*parts))


class Layout(NamedTuple):
    """at_rest and in_use: (mesh, logical axes, shape) -> sharding of a parameter; in_use None: as XLA makes of it."""

    at_rest: Callable
    in_use: Callable | None


LAYOUTS = {"fsdp": Layout(sharding, None), "zero1": Layout(over_data, gathered)}


def rows_here(mesh: Mesh, n: int) -> np.ndarray:
    """Which rows of a batch of n lie on this process's devices, in order: all of them where there is one process."""
    shards = math.prod(mesh.shape[axis] for axis in DATA_AXES)
    require(n % shards == 0, "mesh", f"{shards} data shards (node x expert x fsdp)", f"a divisor of the {n} rows of a micro-batch")
    places = NamedSharding(mesh, spec(("batch",))).addressable_devices_indices_map((n,)).values()
    return np.unique(np.concatenate([np.arange(n)[index] for index in places]))


def constrain(x, axes: tuple[str | None, ...], place: Callable = sharding):
    """x with the layout of its logical axes, under the mesh of the context; x itself where there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or math.prod(mesh.shape.values()) == 1 or set(mesh.axis_names) != set(MESH_AXES):
        return x
    if mesh.manual_axes:
        return x  # inside shard_map the layout is ours
    return jax.lax.with_sharding_constraint(x, place(mesh, axes, x.shape).spec)


def row_shards() -> int:
    """Over how many data shards `by_rows` splits."""
    return shards("rows")


def shards(axis: str) -> int:
    """Over how many shards a logical axis is split: 1 without a mesh, and inside a shard_map, where all is one shard's own already."""
    mesh, parts = jax.sharding.get_abstract_mesh(), RULES[axis]
    names = () if parts is None else (parts,) if isinstance(parts, str) else parts
    return 1 if mesh.empty or mesh.manual_axes else math.prod(mesh.shape[name] for name in names)


def by_rows(function, *arrays, whole=(), tile: int = 1, summed: bool = False):
    """function(*arrays, *whole), whose arrays and results share their leading axis (rows, or sequences), run by each data shard on its own:
    XLA would gather the operands of a custom kernel over the whole mesh.

    whole: arrays that every shard sees whole. tile: rows that belong together. summed: results are sums over rows, then over shards.
    """
    n = row_shards()
    if n == 1 or arrays[0].shape[0] % (n * tile):
        return function(*arrays, *whole)

    def local(*operands):
        out = function(*operands)
        return jax.lax.psum(out, DATA_AXES) if summed else out

    rows, copied = PartitionSpec(DATA_AXES), PartitionSpec()
    return jax.shard_map(local, in_specs=(rows,) * len(arrays) + (copied,) * len(whole), out_specs=copied if summed else rows)(
        *arrays, *whole)


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
