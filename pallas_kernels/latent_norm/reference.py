"""Norms of columns side by side in plain jnp: the specification, the CPU path and that of what the kernel does not take."""
import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.norm import reference as norm


def _cut(y: jax.Array, scales: tuple[jax.Array, ...]) -> list[jax.Array]:
    """The columns of each scale, and those left."""
    return jnp.split(y, np.cumsum([len(scale) for scale in scales]), axis=1)


def latent_norm(y: jax.Array, scales: tuple[jax.Array, ...], eps: float) -> tuple[jax.Array, ...]:
    """y [M, D1 + D2 + ... + R], scales [D1], [D2], ... -> normed [M, D1], [M, D2], ... in the dtype of y."""
    return tuple(norm.rms_norm(x, scale, eps, None)[1] for x, scale in zip(_cut(y, scales)[:-1], scales, strict=True))


def latent_norm_backward(
    y: jax.Array, scales: tuple[jax.Array, ...], gs: tuple[jax.Array, ...], g_rest: jax.Array, eps: float
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """As the forward, gs of its results, g_rest [M, R] -> (d_y in the dtype of y, the gradients of scales in float32 or float64)."""
    both = [norm.rms_norm_backward(x, scale, g, None, eps) for x, scale, g in zip(_cut(y, scales)[:-1], scales, gs, strict=True)]
    dxs, d_scales = zip(*both, strict=True)
    return jnp.concatenate([*dxs, g_rest], axis=1), d_scales
