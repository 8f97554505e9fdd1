"""Rotary positions for the decoupled part of MLA (V3 §2.1.1) and YaRN's extension of them (V3 §4.3, Peng et al. 2309.00071).

The rotation acts on neighbouring pairs (x[2j], x[2j+1]) at frequency theta^(-2j/R), in float32 at least. YaRN stretches the slow
frequencies by `factor` with a ramp between beta_fast and beta_slow rotations, and multiplies the softmax scale by mscale².
Shapes: B batch, T position, R rotated width.
"""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from model.dtypes import at_least_f32
from model.errors import freeze_kind, leaf, require


@dataclasses.dataclass(frozen=True)
class NoScaling:
    """Plain RoPE."""

    softmax_factor = 1.0
    rotation_factor = 1.0

    def frequencies(self, theta: float, width: int) -> np.ndarray:
        return theta ** (-np.arange(0, width, 2) / width)


@dataclasses.dataclass(frozen=True)
class Yarn:
    """YaRN as the published models use it: V3 s=40, alpha=1, beta=32 on an original window of 4096."""

    factor: float
    original_max_position: int
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float

    def __post_init__(self):
        require(self.factor >= 1, "factor", self.factor, "at least 1")
        require(self.original_max_position >= 1, "original_max_position", self.original_max_position, "a positive integer")

    @property
    def softmax_factor(self) -> float:
        """What multiplies the softmax scale: mscale² (0.1 mscale_all_dim ln s + 1, squared); 1 without mscale_all_dim."""
        return self._mscale(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

    @property
    def rotation_factor(self) -> float:
        """What multiplies cos and sin: 1 for the published models, whose two mscales are equal."""
        if self.mscale and self.mscale_all_dim:
            return self._mscale(self.mscale) / self._mscale(self.mscale_all_dim)
        return self._mscale(1.0)

    def _mscale(self, value: float) -> float:
        return 0.1 * value * math.log(self.factor) + 1 if self.factor > 1 else 1.0

    def frequencies(self, theta: float, width: int) -> np.ndarray:
        def correction(rotations: float) -> float:
            return width * math.log(self.original_max_position / (rotations * 2 * math.pi)) / (2 * math.log(theta))

        low = max(math.floor(correction(self.beta_fast)), 0)
        high = min(math.ceil(correction(self.beta_slow)), width - 1)
        if low == high:
            high += 0.001  # the published code's guard against dividing by zero
        ramp = np.clip((np.arange(width // 2) - low) / (high - low), 0, 1)
        plain = NoScaling().frequencies(theta, width)
        return plain * (1 - ramp) + plain / self.factor * ramp


@dataclasses.dataclass(frozen=True)
class Rope:
    """theta and how long contexts are reached."""

    theta: float
    scaling: NoScaling | Yarn

    def rotation(self, positions_BT, width: int, dtype=jnp.float32):
        """cos, sin [B, T, R/2] in at least float32 for positions [B, T] (any integer dtype)."""
        dtype = at_least_f32(dtype)
        frequencies = jnp.asarray(self.scaling.frequencies(self.theta, width), dtype)
        angles = positions_BT.astype(dtype)[..., None] * frequencies[None, None]
        factor = self.scaling.rotation_factor
        return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(x_BTHR, rotation):
    """Rotates neighbouring pairs of the last axis; x [B, T, H, R] any float dtype, result in the same dtype and pair order."""
    dtype = at_least_f32(x_BTHR.dtype)
    cos, sin = (part.astype(dtype)[:, :, None, :] for part in rotation)
    pairs = x_BTHR.astype(dtype).reshape(*x_BTHR.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return rotated.reshape(x_BTHR.shape).astype(x_BTHR.dtype)


@jax.custom_vjp
def rotate_tail(x_BTHK, rotation):
    """x with the last R of its K channels rotated. The gradient is rotated back in one pass, where that of a cut and a join is two
    padded arrays and their sum."""
    cut = x_BTHK.shape[-1] - 2 * rotation[0].shape[-1]
    return jnp.concatenate([x_BTHK[..., :cut], rotate(x_BTHK[..., cut:], rotation)], axis=-1)


def _rotate_back(rotation, g_BTHK):
    cos, sin = rotation
    return rotate_tail(g_BTHK, (cos, -sin)), None


rotate_tail.defvjp(lambda x, rotation: (rotate_tail(x, rotation), rotation), _rotate_back)


SCALINGS = {"none": NoScaling, "yarn": Yarn}


def parse(config: Mapping) -> Rope:
    """Freezes config.model.rope."""
    theta = leaf(config, "theta", float, "model.rope")
    require(theta > 1, "model.rope.theta", theta, "a number above 1")
    return Rope(theta, freeze_kind(SCALINGS, config["scaling"], "model.rope.scaling"))

