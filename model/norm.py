"""RMSNorm (V3 §2.1, Zhang & Sennrich 1910.07467), computed in at least float32; that of the residual stream by our kernel on Hopper."""
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from model.dtypes import at_least_f32
from model.sharding import by_rows, constrain, param, row_shards
from pallas_kernels import norm

RESIDUAL = ("batch", "seq", "embed_activation")


def rms_norm(x, scale, eps: float):
    """x / sqrt(mean(x²) + eps) * scale over the last axis; x [..., D] any float dtype, scale [D]; result in x's dtype."""
    wide = x.astype(at_least_f32(x.dtype))
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    scale = scale.astype(normed.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
    return (normed * scale).astype(x.dtype)


def add_rms_norm(x, delta, scale, eps: float):
    """x and delta [B, T, D], scale [D] -> (x + delta, rms_norm(x + delta)); with delta None (x, rms_norm(x)).

    The sum is handed on, laid out as the residual stream, to be used from here: its gradient then meets that of the norm in one kernel.
    """
    streams = (x,) if delta is None else (x, delta)
    if _takes_kernel(streams, scale):
        axes = jax.typeof(x).manual_axis_type.varying - jax.typeof(scale).manual_axis_type.varying
        scale = jax.lax.pcast(scale, tuple(sorted(axes)), to="varying") if axes else scale  # whose gradient is the sum over shards
        return fused(streams, scale, eps)
    total = x if delta is None else constrain(x + delta, RESIDUAL)
    return total, rms_norm(total, scale, eps)


def _takes_kernel(streams, scale) -> bool:
    """Whether the kernel takes these arguments, and each data shard whole sequences of them."""
    x = streams[0]
    alike = all((y.shape, y.dtype) == (x.shape, x.dtype) for y in streams)
    return alike and x.shape[0] % row_shards() == 0 and norm.takes_kernel(jax.eval_shape(_flat, x), scale)


def _flat(x):
    return x.reshape(-1, x.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def fused(streams, scale, eps):
    """(total, normed) of the sum of one or two streams [B, T, D]."""
    def local(x, *rest):
        *delta, scale = rest
        return tuple(out.reshape(x.shape) for out in norm.rms_norm(_flat(x), scale, eps, *map(_flat, delta)))

    return by_rows(local, *streams, whole=(scale,))


def _forward(streams, scale, eps):
    total, normed = fused(streams, scale, eps)
    return (total, normed), (total, scale, (None,) * len(streams))


def _backward(eps, residuals, gradients):
    total, scale, streams = residuals

    def local(x, d_total, g, scale):
        dx, d_scale = norm.rms_norm_backward(_flat(x), scale, _flat(g), _flat(d_total), eps)
        return dx.reshape(x.shape), d_scale[None]

    dx, d_scale = by_rows(local, total, *gradients, whole=(scale,))
    return tuple(dx for _ in streams), jnp.sum(d_scale, axis=0).astype(scale.dtype)  # over the shards


fused.defvjp(_forward, _backward)


def norm_param(module: nn.Module, name: str, width: int, axis: str = "embed"):
    """The scale of a norm, ones at the start."""
    return param(module, name, (width,), (axis,), nn.initializers.ones)
