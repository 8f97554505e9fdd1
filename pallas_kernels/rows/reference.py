"""Rows between tokens and experts in plain jnp: the specification, the CPU path and that of dtypes wider than float32."""
import jax
import jax.numpy as jnp


def _inside(index: jax.Array, n: int) -> jax.Array:
    return (index >= 0) & (index < n)


def gather(x: jax.Array, source: jax.Array) -> jax.Array:
    """x [M, D], source i32 [P] -> [P, D]; zeros where the source is out of range."""
    inside = _inside(source, x.shape[0])
    return jnp.where(inside[:, None], x[jnp.where(inside, source, 0)], jnp.zeros((), x.dtype))


def at(rows: jax.Array, position: jax.Array) -> jax.Array:
    """rows [P, ...] at position i32 [M, K] -> [M, K, ...]; zeros where the position is out of range."""
    outside = rows.shape[0]  # a negative index would count from the end
    return jnp.take(rows, jnp.where(position < 0, outside, position), axis=0, mode="fill", fill_value=0)


def gather_sum(rows: jax.Array, position: jax.Array, weights: jax.Array | None, addends: tuple[jax.Array, ...]) -> jax.Array:
    """rows [P, D], position i32 [M, K], weights [M, K] or None, addends [M, D] -> [M, D] in the dtype of rows, added in that of the
    weights, without them in at least float32."""
    picked = at(rows, position)
    if weights is not None:
        # a sum, not an einsum: XLA fuses it with the gather instead of calling a batched matmul of 1 x K products
        picked = picked.astype(weights.dtype) * weights[..., None]
    wide = picked.dtype if picked.dtype.itemsize >= 4 else jnp.float32
    total = jnp.sum(picked, axis=1, dtype=wide)
    return sum((addend.astype(wide) for addend in addends), total).astype(rows.dtype)


def weighted_backward(
    g: jax.Array, rows: jax.Array, source: jax.Array, weights: jax.Array, position: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """g [M, D], rows [P, D], source i32 [P], weights [P] -> d_rows [P, D] in the dtype of rows, dots in that of the weights: [P],
    or [M, K] with a position."""
    inside, wide = _inside(source, g.shape[0]), weights.dtype
    picked = g[jnp.where(inside, source, 0)].astype(wide)
    d_rows = jnp.where(inside[:, None], picked * weights[:, None], 0).astype(rows.dtype)
    if position is not None:
        return d_rows, jnp.sum(g.astype(wide)[:, None] * at(rows, position).astype(wide), axis=-1)
    return d_rows, jnp.where(inside, jnp.sum(picked * rows.astype(wide), axis=-1), 0)
