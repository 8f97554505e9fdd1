"""Rows of a file into stacked, sharded arrays and back, a piece at a time.

An array [L, E, ..., N, K] is one buffer a device, made beforehand; each piece of a matrix goes to the devices whose window it meets and
is written in place (the buffer is donated). So memory is what the devices hold plus a piece, on one device or many: an update of the
whole sharded array would gather it. `lead` are the leading indices of a matrix [N, K] or vector [N] in the array.
"""
from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from model import safetensors_stream as stream
from model import sharding
from model.safetensors_stream import Tensor

Window = list[tuple[int, int]]  # first and last + 1 along each axis
Source = tuple[tuple[int, ...], Tensor]  # lead, and what lies there


def fill(sources: list[Source], scales: list[Tensor | None], shape: tuple[int, ...], dtype: np.dtype, mesh: Mesh | None,
         axes: tuple[str | None, ...] | None, on_tensor: Callable[[Tensor], None]) -> jax.Array:
    """An array of this shape and dtype made of its sources; FP8 ones with scales are dequantised. mesh None: the default device."""
    placed = None if mesh is None else sharding.sharding(mesh, axes, shape)
    indices = {None: ()} if placed is None else placed.addressable_devices_indices_map(shape)
    windows = {device: _window(index, shape) for device, index in indices.items()}
    buffers = {device: jnp.zeros([b - a for a, b in window], dtype, device=device) for device, window in windows.items()}
    for (lead, tensor), scale in zip(sources, scales, strict=True):
        scale = None if scale is None else stream.rows(scale, 0, scale.shape[0])
        for start, stop in stream.ranges(tensor.shape, tensor.dtype.itemsize):
            meets = {device: met for device, window in windows.items() if (met := _meet(window, lead, start, stop))}
            piece = stream.rows(tensor, start, stop) if meets else None
            for device, (index, offset) in meets.items():
                part = jax.device_put(np.ascontiguousarray(piece[index]), device)
                origin = np.asarray([start + index[0].start, *(columns.start for columns in index[1:])], np.int32)
                buffers[device] = _put(buffers[device], part, scale, offset, origin)
            jax.block_until_ready([buffers[device] for device in meets])  # else pieces pile up ahead of the device
        on_tensor(tensor)
    return buffers[None] if placed is None else jax.make_array_from_single_device_arrays(shape, placed, list(buffers.values()))


def pieces(array: Any, lead: tuple[int, ...], shape: tuple[int, ...], multiple: int = 1) -> Iterator[np.ndarray]:
    """The rows of array[lead], of this shape, in the ranges of safetensors_stream."""
    for start, stop in stream.ranges(shape, np.dtype(array.dtype).itemsize, multiple):
        yield take(array, lead, start, stop, shape)


def take(array: Any, lead: tuple[int, ...], start: int, stop: int, shape: tuple[int, ...]) -> np.ndarray:
    """Rows start..stop of array[lead], put together from the devices that hold them."""
    array = jnp.asarray(array)
    out = np.empty((stop - start, *shape[1:]), array.dtype)
    for shard in array.addressable_shards:
        met = _meet(_window(shard.index, array.shape), lead, start, stop)
        if met and not shard.replica_id:
            out[met[0]] = _cut(shard.data, met[1], out[met[0]].shape)
    return out


def _window(index: tuple[slice, ...], shape: tuple[int, ...]) -> Window:
    index = (*index, *[slice(None)] * (len(shape) - len(index)))
    return [part.indices(n)[:2] for part, n in zip(index, shape, strict=True)]


def _meet(window: Window, lead: tuple[int, ...], start: int, stop: int) -> tuple[tuple[slice, ...], np.ndarray] | None:
    """Where rows start..stop of the matrix at lead meet a device's window: (index into the rows, offset in its buffer), or None."""
    (first, last), columns = window[len(lead)], window[len(lead) + 1:]
    a, b = max(start, first), min(stop, last)
    if a >= b or not all(low <= i < high for i, (low, high) in zip(lead, window, strict=False)):
        return None
    offset = [*(i - low for i, (low, _) in zip(lead, window, strict=False)), a - first, *[0] * len(columns)]
    return (slice(a - start, b - start), *(slice(*c) for c in columns)), np.asarray(offset, np.int32)


@functools.partial(jax.jit, donate_argnums=0)
def _put(buffer, piece, scale, offset, origin):
    """buffer with piece at offset, in place; with scales [ceil(N/128), ceil(K/128)] piece is FP8, its first element at origin."""
    if scale is not None:
        n, k = (jnp.arange(size, dtype=jnp.int32) + at for size, at in zip(piece.shape, origin, strict=True))
        piece = piece.astype(jnp.float32) * scale[n // 128][:, k // 128]
    piece = piece.astype(buffer.dtype).reshape((1,) * (buffer.ndim - piece.ndim) + piece.shape)
    return _as(jax.lax.dynamic_update_slice(_bits(buffer), _bits(piece), list(offset)), buffer.dtype)


@functools.partial(jax.jit, static_argnums=2)
def _cut(array, offset, sizes):
    return _as(jax.lax.dynamic_slice(_bits(array), list(offset), (1,) * (array.ndim - len(sizes)) + sizes).reshape(sizes), array.dtype)


def _bits(x):
    """FP8 as bytes: XLA's CPU backend would convert a whole FP8 buffer to float16 and back at each update (6,000 times slower)."""
    return jax.lax.bitcast_convert_type(x, jnp.uint8) if x.dtype.itemsize == 1 else x


def _as(x, dtype):
    return jax.lax.bitcast_convert_type(x, dtype) if x.dtype == jnp.uint8 else x
