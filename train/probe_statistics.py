"""What a tensor would lose by each way of scaling it: signal-to-noise, underflow, saturation; and how far its outliers stand out.

For x [..., M, K] of n real values (rows of padding are zero and count for nothing): amax = max |x|, rms = sqrt(sum x^2 / n), kurtosis =
n sum x^4 / (sum x^2)^2 about zero, as formats are symmetric (3 for a normal distribution), and for each scheme with Q its rounding:
signal-to-noise 10 log10(sum x^2 / sum (x - Q x)^2) dB, underflow = the share of values other than 0 that become 0, saturation = the
share beyond the largest representable value. Sums are of x / amax, so that gradients of 1e-9 do not vanish in float32.
"""
from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.quantize import reference


class Scheme(NamedTuple):
    """A format and what shares a scale: tiles of M x K, or the whole matrix (None), by its own amax or by that of past batches."""

    tile: tuple[int, int] | None
    format: str = "e4m3"
    power_of_two: bool = False
    past: bool = False


SCHEMES = {
    "tensor": Scheme(None),
    "delayed": Scheme(None, past=True),
    "1x128": Scheme((1, 128)),
    "128x1": Scheme((128, 1)),
    "128x128": Scheme((128, 128)),
    "e5m6": Scheme((1, 128), "e5m6", True),  # the input of the linear after attention (V3 §3.3.3)
}


def through(x, scheme: Scheme, past=None):
    """x f32 [..., M, K] as the scheme represents it, float32; past: the amax of its history (a scalar), read if the scheme says so."""
    if scheme.tile:
        q, scale = reference.quantize_tiles(x, scheme.tile, scheme.format, scheme.power_of_two)
        return reference.dequantize_tiles(q, scale, scheme.tile, jnp.float32)
    scale = _scale(x, scheme, past)
    return reference.round_to(x * (1.0 / scale), scheme.format).astype(jnp.float32) * scale


def statistics(x, n, past):
    """dict(amax, rms, kurtosis, snr, underflow, saturation), the last three dicts by scheme, of x [..., M, K] with n real values and
    the amax `past` of its history; float32 scalars. A tensor of zeros has rms 0 and everything else 0 or infinite, never NaN."""
    x = x.astype(jnp.float32)
    amax = jnp.max(jnp.abs(x))
    unit = 1 / jnp.where(amax > 0, amax, 1)
    power, fourth = jnp.sum((x * unit) ** 2), jnp.sum((x * unit) ** 4)
    filled = jnp.maximum(jnp.sum(x != 0, dtype=jnp.float32), 1)
    snr, underflow, saturation = {}, {}, {}
    for name, scheme in SCHEMES.items():
        rounded = through(x, scheme, past)
        noise = jnp.sum(((x - rounded) * unit) ** 2)
        snr[name] = jnp.where(noise > 0, 10 * jnp.log10(power / jnp.where(noise > 0, noise, 1)), jnp.inf)
        underflow[name] = jnp.sum((rounded == 0) & (x != 0), dtype=jnp.float32) / filled
        beyond = jnp.zeros((), jnp.float32) if scheme.tile else jnp.sum(
            jnp.abs(x) > 1.0001 * reference.FORMATS[scheme.format].largest * _scale(x, scheme, past), dtype=jnp.float32)
        saturation[name] = beyond / filled
    return dict(amax=amax, rms=jnp.sqrt(power / n) * amax, kurtosis=n * fourth / jnp.where(power > 0, power, 1) ** 2, snr=snr,
                underflow=underflow, saturation=saturation)


def by_layer(x, n, past):
    """statistics of each x[i] [..., M, K], a layer at a time: x [L, ..., M, K], past f32 [L]; float32 [L]."""
    return jax.lax.map(lambda item: statistics(item[0], n, item[1]), (x, past))


def relative(a, b):
    """|a - b| / |b| over all but the first axis: a, b [L, ...] -> f32 [L]; 0 where both are zero, infinite where only b is."""
    axes = tuple(range(1, a.ndim))
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    unit = jnp.max(jnp.abs(b), axis=axes, keepdims=True)
    unit = 1 / jnp.where(unit > 0, unit, 1)
    apart, size = (jnp.sqrt(jnp.sum((v * unit) ** 2, axis=axes)) for v in (a - b, b))
    return jnp.where(apart == 0, 0, apart / size)


def _scale(x, scheme: Scheme, past):
    """One scale a matrix. A history of nothing but zeros (or none) leaves the matrix's own amax."""
    own = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)
    return reference.tile_scale(jnp.where(past > 0, past, own) if scheme.past else own, scheme.format, scheme.power_of_two)
