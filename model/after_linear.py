"""What follows a linear at once and is differentiated with it: under V3's FP8 recipe (`precision.fuses`) the kernel that makes the
gradient of the linear's output writes it quantised, and never in bfloat16.

Each is a frozen dataclass: `apply(y, *operands) -> outputs` in plain jnp, differentiable, and `gradient(y, gradients, *operands) ->
(rows, columns, gradients of the operands)`, dy in 1x128 and in 128x1 tiles, each (q, scale); y is None unless `keeps`.
Shapes: M rows, F hidden width.
"""
from __future__ import annotations

import dataclasses

from model.activation import swiglu
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
