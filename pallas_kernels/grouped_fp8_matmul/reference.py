"""Grouped block-scaled FP8 products in plain jnp: dequantise, then the block form of `grouped_matmul.reference`."""
import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.grouped_matmul import reference as grouped
from pallas_kernels.quantize.reference import dequantize_tiles


def grouped_matmul(
    a: jax.Array, a_scale: jax.Array, b: jax.Array, b_scale: jax.Array, group_sizes: jax.Array
) -> jax.Array:
    """f32 [M, N]; rows of no group are zero."""
    rows = dequantize_tiles(a, a_scale, (1, 128), jnp.float32)
    return grouped.matmul(rows, dequantize_tiles(b, b_scale, (128, 128), jnp.float32), group_sizes)


def masked_matmul(a: jax.Array, a_scale: jax.Array, b: jax.Array, b_scale: jax.Array, counts: jax.Array) -> jax.Array:
    """f32 [G, M, N]; rows at and past counts[g] are zero."""
    rows = dequantize_tiles(a, a_scale, (1, 128), jnp.float32)
    w = dequantize_tiles(b, b_scale, (128, 128), jnp.float32)
    live = jnp.arange(a.shape[1], dtype=jnp.int32)[None, :, None] < counts[:, None, None]
    out = lax.dot_general(rows, w, (((2,), (2,)), ((0,), (0,))), precision="highest")
    return jnp.where(live, out, 0.0)


def weight_gradient(
    dy: jax.Array, dy_scale: jax.Array, x: jax.Array, x_scale: jax.Array, group_sizes: jax.Array
) -> jax.Array:
    """f32 [G, N, K]."""
    dy, x = (dequantize_tiles(q, s, (128, 1), jnp.float32) for q, s in ((dy, dy_scale), (x, x_scale)))
    return grouped.weight_gradient(dy, x, group_sizes)
