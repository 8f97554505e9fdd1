"""One rule of dtypes: what must be exact is computed in at least float32, and float64 stays float64."""
import jax.numpy as jnp


def at_least_f32(dtype):
    """float64 for float64, else float32. (jnp.promote_types refuses mixed floats under strict promotion.)"""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32
