"""RMSNorm (V3 §2.1, Zhang & Sennrich 1910.07467), computed in at least float32; by our kernels on Hopper that of the residual stream,
and those of MLA's latents side by side in one array."""
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from model.dtypes import at_least_f32
from model.sharding import by_rows, constrain, param, row_shards
from pallas_kernels import latent_norm, norm

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
        return fused(streams, _varying(scale, x), eps)
    total = x if delta is None else constrain(x + delta, RESIDUAL)
    return total, rms_norm(total, scale, eps)


def _takes_kernel(streams, scale) -> bool:
    """Whether the kernel takes these arguments, and each data shard whole sequences of them."""
    x = streams[0]
    alike = all((y.shape, y.dtype) == (x.shape, x.dtype) for y in streams)
    return alike and x.shape[0] % row_shards() == 0 and norm.takes_kernel(jax.eval_shape(_flat, x), scale)


def _varying(scale, x):
    """scale, whose gradient inside somebody else's shard_map is the sum over the shards that x varies over."""
    axes = jax.typeof(x).manual_axis_type.varying - jax.typeof(scale).manual_axis_type.varying
    return jax.lax.pcast(scale, tuple(sorted(axes)), to="varying") if axes else scale


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


def split_rms_norm(y, scales, eps: float):
    """y [B, T, D1 + D2 + ... + R], scales [D1], [D2], ... -> rms_norm of the columns of each, and the columns left [B, T, R]."""
    if y.shape[0] % row_shards() == 0 and latent_norm.takes_kernel(jax.eval_shape(_flat, y), scales):
        return fused_split(y, tuple(_varying(scale, y) for scale in scales), eps)
    *latents, rest = jnp.split(y, _ends(scales), axis=-1)  # its gradient is one concatenation, that of slices a sum of padded arrays
    return *(rms_norm(x, scale, eps) for x, scale in zip(latents, scales, strict=True)), rest


def _ends(scales):
    return np.cumsum([len(scale) for scale in scales])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def fused_split(y, scales, eps):
    """`split_rms_norm` by the kernel, whose backward writes the gradient of y as one array."""
    def local(y, *scales):
        return tuple(out.reshape(*y.shape[:-1], -1) for out in latent_norm.latent_norm(_flat(y), scales, eps))

    return *by_rows(local, y, whole=scales), y[..., _ends(scales)[-1]:]


def _split_backward(eps, residuals, gradients):
    y, scales = residuals

    def local(y, *others):
        *gs, g_rest = map(_flat, others[:len(gradients)])
        d_y, d_scales = latent_norm.latent_norm_backward(_flat(y), others[len(gradients):], tuple(gs), g_rest, eps)
        return d_y.reshape(y.shape), tuple(d_scale[None] for d_scale in d_scales)

    d_y, d_scales = by_rows(local, y, *gradients, whole=scales)
    return d_y, tuple(jnp.sum(d, axis=0).astype(scale.dtype) for d, scale in zip(d_scales, scales, strict=True))  # over the shards


fused_split.defvjp(lambda y, scales, eps: (fused_split(y, scales, eps), (y, scales)), _split_backward)


def norm_param(module: nn.Module, name: str, width: int, axis: str = "embed"):
    """The scale of a norm, ones at the start."""
    return param(module, name, (width,), (axis,), nn.initializers.ones)
