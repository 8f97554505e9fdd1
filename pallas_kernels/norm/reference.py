"""RMSNorm of a residual stream in plain jnp: the specification, the CPU path and that of what the kernel does not take."""
import jax
import jax.numpy as jnp


def _wide(x: jax.Array) -> jax.Array:
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def _inverse_rms(wide: jax.Array, eps: float) -> jax.Array:
    return jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float, delta: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """x and delta [M, D], scale [D] -> (total, normed) [M, D] in the dtype of x."""
    total = x if delta is None else x + delta
    wide = _wide(total)
    return total, (wide * _inverse_rms(wide, eps) * scale.astype(wide.dtype)[None]).astype(x.dtype)


def rms_norm_backward(
    x: jax.Array, scale: jax.Array, g: jax.Array, d_total: jax.Array | None, eps: float
) -> tuple[jax.Array, jax.Array]:
    """x, g and d_total [M, D], scale [D] -> (dx [M, D] in the dtype of x, d_scale [D] in float32, in float64 for x in float64)."""
    wide, g = _wide(x), _wide(g)
    r = _inverse_rms(wide, eps)
    normed, scaled = wide * r, g * scale.astype(wide.dtype)[None]
    dx = r * (scaled - normed * jnp.mean(scaled * normed, axis=-1, keepdims=True))
    dx = dx if d_total is None else dx + _wide(d_total)
    return dx.astype(x.dtype), jnp.sum(g * normed, axis=0)
