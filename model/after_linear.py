"""What follows a linear at once and is differentiated with it: under V3's FP8 recipe (`precision.fuses`) the kernel that makes the
gradient of the linear's output writes it quantised, and never in bfloat16.

Each is a frozen dataclass: `apply(y, *operands) -> outputs` in plain jnp, differentiable, and `gradient(y, gradients, *operands) ->
(rows, columns, gradients of the operands)`, dy in 1x128 and in 128x1 tiles, each (q, scale); y is None unless `keeps`.
Shapes: M rows, F hidden width; B batch, T position (B T = M), H heads, N unrotated and R rotated channels of a head, P those of a value.
"""
from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from model.activation import swiglu
from model.rope import rotate_tail
from model.sharding import by_rows
from pallas_kernels import quantize


@dataclasses.dataclass(frozen=True)
class SwiGLU:
    """y [M, 2F] -> (y, hidden [M, F] = silu(gate) * up, times weights f32 [M] if given). No gradient of the first result is read here."""

    keeps = True

    def apply(self, y, weights=None):
        hidden = swiglu(y)
        return y, hidden if weights is None else (hidden.astype(weights.dtype) * weights[:, None]).astype(hidden.dtype)

    def gradient(self, y, gradients, weights=None):
        operands = (gradients[1], y) if weights is None else (gradients[1], y, weights)
        rows, columns, d_weights = by_rows(quantize.swiglu_gradient, *operands, tile=128)
        return rows, columns, () if weights is None else (d_weights,)


@dataclasses.dataclass(frozen=True)
class Rotated:
    """Queries: y [M, H (N + R)] -> [B, T, H, N + R], the last R channels of every head rotated by cos, sin [B or 1, T, R/2]."""

    n_heads: int
    keeps = False

    def apply(self, y, cos, sin):
        return rotate_tail(y.reshape(-1, cos.shape[1], self.n_heads, y.shape[-1] // self.n_heads), (cos, sin))

    def gradient(self, y, gradient, cos, sin):
        angles = (jnp.broadcast_to(a, (*gradient.shape[:2], a.shape[-1])) for a in (cos, sin))
        operands = (a.reshape(-1, *a.shape[2:]) for a in (gradient, *angles))
        return *by_rows(quantize.quantize_rotated_back, *operands, tile=128), (None, None)


@dataclasses.dataclass(frozen=True)
class KeysValues:
    """Keys and values: y [M, H (N + P)], and one rotated key k_rope [B, T, R] for all heads -> k [B, T, H, N + R], v [B, T, H, P]."""

    n_heads: int
    nope: int  # N
    keeps = False

    def apply(self, y, k_rope):
        k_nope, v = jnp.split(y.reshape(*k_rope.shape[:2], self.n_heads, -1), [self.nope], axis=-1)
        shared = jnp.broadcast_to(k_rope[:, :, None], (*k_nope.shape[:3], k_rope.shape[-1]))
        return jnp.concatenate([k_nope, shared], axis=-1), v

    def gradient(self, y, gradients, k_rope):
        dk, dv = gradients
        flat = [d.reshape(-1, *d.shape[2:]) for d in gradients]
        rows, columns = by_rows(lambda dk, dv: quantize.quantize_heads((dk, dv), (self.nope, dv.shape[-1])), *flat, tile=128)
        return rows, columns, (jnp.sum(dk[..., self.nope:], axis=2, dtype=jnp.float32).astype(k_rope.dtype),)
