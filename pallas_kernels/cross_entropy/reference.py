"""Sum and gradient of a log softmax in plain jnp: the specification, the CPU path and that of what the kernel does not take."""
import jax
import jax.numpy as jnp


def _wide(x: jax.Array) -> jax.Array:
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def log_sum_exp(logits: jax.Array) -> jax.Array:
    """logits [..., V] -> [...], in float32 (float64 for float64)."""
    return jax.nn.logsumexp(_wide(logits), axis=-1)


def log_probability_backward(logits: jax.Array, targets: jax.Array, log_z: jax.Array, g: jax.Array) -> jax.Array:
    """logits [..., V], targets, log_z and g [...] -> the gradient of logits, in their dtype."""
    p = jnp.exp(_wide(logits) - log_z[..., None])
    is_target = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1) == targets[..., None]
    return (g[..., None] * (is_target.astype(p.dtype) - p)).astype(logits.dtype)
