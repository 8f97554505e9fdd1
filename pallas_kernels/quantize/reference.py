"""Tile quantisation in plain jnp: the specification and the CPU path (V3 §3.3.1-3.3.2, figure 7).

A tile is one scale: scale = amax / max(format), q = round(x / scale), x ~ q * scale. No history. `power_of_two` takes
the smallest power of two that is not less: moving such data between 1x128 and 128x1 tiles costs no second rounding of
the scale (V3 §3.3.3). The value formats are E4M3 (activations, weights and gradients alike) and E5M6 (the cached input
of the linear after attention), stored in float16, whose exponent it shares, with 4 of the 10 mantissa bits zero.
"""
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

TINY = float(jnp.finfo(jnp.float32).tiny)


class Format(NamedTuple):
    dtype: jnp.dtype
    largest: float
    bits: tuple[int, int]  # exponent, mantissa


FORMATS = {
    "e4m3": Format(jnp.float8_e4m3fn, 448.0, (4, 3)),
    "e5m6": Format(jnp.float16, 65024.0, (5, 6)),
}


def ceil_div(x: int, y: int) -> int:
    return -(-x // y)


def pad(x: jax.Array, *multiples: int) -> jax.Array:
    """Zeros up to the next multiple along each axis."""
    return jnp.pad(x, [(0, -n % m) for n, m in zip(x.shape, multiples, strict=True)])


def tile_scale(amax: jax.Array, format: str, power_of_two: bool) -> jax.Array:
    """Scale of tiles with largest magnitude `amax` (float32): bit for bit the same in jit, outside it and in a kernel.

    XLA turns a division by a constant into a product with its rounded inverse (off by one bit in half of all tiles),
    so the divisor is made to depend on the data. A zero tile gets the smallest normal number; NaN and infinity stay.
    """
    largest = FORMATS[format].largest
    if power_of_two:
        exponent = math.frexp(largest)[1] - 1
        mantissa = int((largest / 2.0**exponent - 1) * 2**23)
        bits = lax.bitcast_convert_type(amax, jnp.int32)
        bits = ((bits + (0x7FFFFF - mantissa)) & 0x7F800000) - (exponent << 23)
        scale = lax.bitcast_convert_type(jnp.maximum(bits, 1 << 23), jnp.float32)
        return jnp.where(jnp.isfinite(amax), scale, amax)
    return jnp.maximum(amax / jnp.where(jnp.isnan(amax), amax, largest), TINY)


def round_to(x: jax.Array, format: str) -> jax.Array:
    """Rounds float32 to the nearest value of the format, ties to even, too large ones to the largest; NaN stays.

    A cast to float8_e4m3fn makes NaN of what is past 464, hence the clip."""
    spec = FORMATS[format]
    x = jnp.clip(x, -spec.largest, spec.largest)
    if format != "e4m3":
        x = lax.reduce_precision(x, *spec.bits)
    return x.astype(spec.dtype)


def _tiles(x: jax.Array, tile: tuple[int, int]) -> jax.Array:
    """[..., M, K] -> [..., ceil(M/tm), tm, ceil(K/tk), tk], zeros in the last partial tiles."""
    *lead, rows, cols = x.shape
    row_tiles, col_tiles = ceil_div(rows, tile[0]), ceil_div(cols, tile[1])
    pad = [(0, 0)] * len(lead) + [(0, row_tiles * tile[0] - rows), (0, col_tiles * tile[1] - cols)]
    return jnp.pad(x, pad).reshape(*lead, row_tiles, tile[0], col_tiles, tile[1])


def spread(scale: jax.Array, tile: tuple[int, int], shape: tuple[int, int]) -> jax.Array:
    """[..., ceil(M/tm), ceil(K/tk)] -> [..., M, K]: each element's scale."""
    full = jnp.repeat(jnp.repeat(scale, tile[0], axis=-2), tile[1], axis=-1)
    return full[..., : shape[0], : shape[1]]


def quantize_tiles(x: jax.Array, tile: tuple[int, int], format: str, power_of_two: bool) -> tuple[jax.Array, jax.Array]:
    """[..., M, K] -> q [..., M, K], scale f32 [..., ceil(M/tm), ceil(K/tk)]."""
    tiles = _tiles(x.astype(jnp.float32), tile)
    amax = jnp.max(jnp.abs(tiles), axis=(-3, -1), keepdims=True)
    scale = tile_scale(amax, format, power_of_two)
    q = round_to(tiles * (1.0 / scale), format)
    *lead, row_tiles, tm, col_tiles, tk = q.shape
    q = q.reshape(*lead, row_tiles * tm, col_tiles * tk)[..., : x.shape[-2], : x.shape[-1]]
    return q, scale[..., 0, :, 0]


def dequantize_tiles(q: jax.Array, scale: jax.Array, tile: tuple[int, int], dtype: jnp.dtype) -> jax.Array:
    """q * scale by tile, rounded once to dtype."""
    return (q.astype(jnp.float32) * spread(scale, tile, q.shape[-2:])).astype(dtype)


def swiglu(gate_up: jax.Array) -> jax.Array:
    """silu(gate) * up in float32 (float64 stays); gate is the first half of the last axis, up the second."""
    gate, up = jnp.split(gate_up if gate_up.dtype == jnp.float64 else gate_up.astype(jnp.float32), 2, axis=-1)
    return gate * jax.nn.sigmoid(gate) * up


def swiglu_gradient(d_hidden: jax.Array, gate_up: jax.Array, weights: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
    """Gradients of weights[:, None] * silu(gate) * up, float32: of gate_up [..., M, 2F] and of weights [..., M] (None without)."""
    d, (gate, up) = d_hidden.astype(jnp.float32), jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
    s = jax.nn.sigmoid(gate)
    silu = gate * s
    x = jnp.concatenate([d * (up * (s + silu * (1 - s))), d * silu], axis=-1)
    return (x, None) if weights is None else (x * weights[..., None], jnp.sum(d * (silu * up), axis=-1))


def join_heads(parts: tuple[jax.Array, ...], widths: tuple[int, ...]) -> jax.Array:
    """The first widths[i] channels of each head of parts[i] [..., M, H, at least widths[i]] side by side: [..., M, H * sum(widths)]."""
    joined = jnp.concatenate([part[..., :width] for part, width in zip(parts, widths, strict=True)], axis=-1)
    return joined.reshape(*joined.shape[:-2], -1)


def rotate_back(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """x [..., M, H, C], neighbouring pairs of its last R channels rotated by cos, sin f32 [..., M, R/2] the other way, in float32: the
    gradient of a rotation. Rounded to x's dtype: [..., M, H * C]."""
    cut = x.shape[-1] - 2 * cos.shape[-1]
    pairs = x[..., cut:].astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    (even, odd), (cos, sin) = (pairs[..., 0], pairs[..., 1]), (cos[..., None, :], sin[..., None, :])
    back = jnp.stack([even * cos + odd * sin, odd * cos - even * sin], axis=-1).reshape(*x.shape[:-1], -1)
    back = lax.reduce_precision(back, jnp.finfo(x.dtype).nexp, jnp.finfo(x.dtype).nmant)  # XLA may drop a cast there and back
    return jnp.concatenate([x[..., :cut], back.astype(x.dtype)], axis=-1).reshape(*x.shape[:-2], -1)
