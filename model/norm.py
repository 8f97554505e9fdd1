"""RMSNorm (V3 §2.1, Zhang & Sennrich 1910.07467), computed in at least float32."""
import flax.linen as nn
import jax
import jax.numpy as jnp

from model.dtypes import at_least_f32
from model.sharding import param


def rms_norm(x, scale, eps: float):
    """x / sqrt(mean(x²) + eps) * scale over the last axis; x [..., D] any float dtype, scale [D]; result in x's dtype."""
    wide = x.astype(at_least_f32(x.dtype))
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    scale = scale.astype(normed.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
    return (normed * scale).astype(x.dtype)


def norm_param(module: nn.Module, name: str, width: int, axis: str = "embed"):
    """The scale of a norm, ones at the start."""
    return param(module, name, (width,), (axis,), nn.initializers.ones)
