"""Causal attention for a CPU (V3 §2.1.1, eq. 10), where each pass over the scores costs as much as a product: `attend`.

A block of queries at a time reads the keys up to its end and no further. The softmax's sum divides the product with v instead of the
weights, and the gradient keeps exp(scores - max), so that few passes over the scores remain.
Shapes: B batch, T query, S key, H heads, K width of q and k, P width of v.
"""
from __future__ import annotations

import functools

import jax
import jax.numpy as jnp


def n_blocks(n: int) -> int:
    """Blocks of queries, at most 4, of 64 tokens at least."""
    return next(blocks for blocks in (4, 2, 1) if blocks == 1 or n % blocks == 0 and n // blocks >= 64)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend(q_BTHK, k_BTHK, v_BTHP, mask_BTT, scale: float):
    """softmax(q k^T scale) v where mask bool [B, T, T] lets no token look ahead -> [B, T, H, P]; q, k, v [B, T, H, ..] of one dtype."""
    return _forward(q_BTHK, k_BTHK, v_BTHP, mask_BTT, scale)[0]


def _forward(q_BTHK, k_BTHK, v_BTHP, mask_BTT, scale: float):
    k, v, blocks = jnp.swapaxes(k_BTHK, 1, 2), jnp.swapaxes(v_BTHP, 1, 2), []
    n = n_blocks(k.shape[2])
    for i, (q, mask) in enumerate(zip(*(jnp.split(x, n, axis=1) for x in (q_BTHK, mask_BTT)), strict=True)):
        q, end = jnp.swapaxes(q, 1, 2) * scale, (i + 1) * q.shape[1]
        scores = jnp.einsum("BHTK,BHSK->BHTS", q, k[:, :, :end])
        scores = jnp.where(mask[:, None, :, :end], scores, jnp.finfo(scores.dtype).min)
        e = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
        total = jnp.sum(e, axis=-1, keepdims=True)
        blocks.append((q, e, total, jnp.einsum("BHTS,BHSP->BHTP", e, v[:, :, :end]) / total))
    return jnp.concatenate([jnp.swapaxes(block[-1], 1, 2) for block in blocks], axis=1), (k, v, blocks)


def _backward(scale: float, residuals, g_BTHP):
    k, v, blocks = residuals
    dq, dk, dv = [], 0, 0
    for (q, e, total, out), g in zip(blocks, jnp.split(g_BTHP, len(blocks), axis=1), strict=True):
        end, g = e.shape[-1], jnp.swapaxes(g, 1, 2) / total
        d_scores = e * (jnp.einsum("BHTP,BHSP->BHTS", g, v[:, :, :end]) - jnp.sum(g * out, axis=-1, keepdims=True))
        dq.append(jnp.swapaxes(jnp.einsum("BHTS,BHSK->BHTK", d_scores, k[:, :, :end]), 1, 2) * scale)
        # K and P before S: XLA's matmul library takes the transposed small operand, not transposed scores
        later = [(0, 0)] * 3 + [(0, k.shape[2] - end)]
        dk += jnp.pad(jnp.einsum("BHTK,BHTS->BHKS", q, d_scores), later)
        dv += jnp.pad(jnp.einsum("BHTP,BHTS->BHPS", g, e), later)
    return jnp.concatenate(dq, axis=1), dk.transpose(0, 3, 1, 2), dv.transpose(0, 3, 1, 2), None


attend.defvjp(_forward, _backward)
