"""RMSNorm of MLA's latents (V3 §2.1.1, eq. 1-11), which lie side by side in the rows of one down projection, and its gradient.

y = [c^Q | c^KV | k^R], or [c^KV | k^R]: each cut but the last, the rest, has a scale and is normed by itself.

| function | what | bytes |
|---|---|---|
| `latent_norm` | normed = x / sqrt(mean(x^2) + eps) * scale, of each cut x | 2 of the cuts |
| `latent_norm_backward` | dx = r (g' - n mean(g' n)), d_scale = sum of g n over the rows; g of the rest | 3 of the cuts, 2 of the rest |

with r = 1 / sqrt(mean(x^2) + eps), n = x r, g' = g scale. Cuts are read where they lie in y, and their gradients written where they
lie in d_y. No VJP: `model/norm.py` has it.

The kernel takes rows of bfloat16, float16 or float32 whose cuts are multiples of 16 bytes, those with a scale of up to 2,048 columns
together (each rounded up to 512 bytes), the rest up to 512 bytes, with float32 scales. Other dtypes and widths, and no rows, take the
reference. Both compute in float32 (the reference float64 for float64) and round once. Tolerance: the order of additions and the last
bit of a reciprocal root, then one rounding. The same bits each time.
"""
import itertools

import jax
import jax.numpy as jnp

from pallas_kernels.latent_norm import kernel, reference
from pallas_kernels.target import choose


def _job(backward: bool, y: jax.Array, scales: tuple[jax.Array, ...], eps: float) -> kernel.Job:
    """Raises ValueError on shapes and dtypes that do not belong together."""
    if y.ndim != 2 or not jnp.issubdtype(y.dtype, jnp.floating):
        raise ValueError(f"y {y.dtype}{y.shape}: must be floats [M, W]")
    for scale in scales:
        if scale.ndim != 1 or not jnp.issubdtype(scale.dtype, jnp.floating):
            raise ValueError(f"scale {scale.dtype}{scale.shape}: must be floats [D], one a column of its cut")
    widths = tuple(len(scale) for scale in scales)
    if not widths or sum(widths) > y.shape[1]:
        raise ValueError(f"cuts of {widths} columns: must be at least one, and together at most y's {y.shape[1]}")
    return kernel.Job(backward, y.shape[0], widths, y.shape[1] - sum(widths), y.dtype.name, float(eps))


def takes_kernel(y: jax.Array, scales: tuple[jax.Array, ...], implementation: str = "auto") -> bool:
    """Whether these rows y [M, W] and scales [D1], [D2], ... go to the kernel, in both directions."""
    unfit = kernel.unfit(_job(False, y, scales, 0.0), {scale.dtype.name for scale in scales})
    return choose("latent_norm", implementation, unfit) == "kernel"


def latent_norm(y: jax.Array, scales: tuple[jax.Array, ...], eps: float, *, implementation: str = "auto") -> tuple[jax.Array, ...]:
    """y [M, D1 + D2 + ... + R], scales [D1], [D2], ... -> normed [M, D1], [M, D2], ... in the dtype of y. Raises ValueError on other
    shapes and dtypes."""
    job = _job(False, y, scales, eps)
    return tuple(kernel.run(job, scales, y)) if takes_kernel(y, scales, implementation) else reference.latent_norm(y, scales, eps)


def latent_norm_backward(
    y: jax.Array, scales: tuple[jax.Array, ...], gs: tuple[jax.Array, ...], g_rest: jax.Array, eps: float, *, implementation: str = "auto"
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """y and scales as the forward had them, gs [M, D1], [M, D2], ... of its results and g_rest [M, R] in the dtype of y -> d_y [M, W] in
    that dtype, d_scales [D1], [D2], ... in float32 (float64 for rows of float64). Raises ValueError on other shapes and dtypes."""
    job = _job(True, y, scales, eps)
    for g, width in zip((*gs, g_rest), (*job.widths, job.rest), strict=True):
        if g.shape != (job.M, width) or g.dtype != y.dtype:
            raise ValueError(f"gradient {g.dtype}{g.shape}: must be {y.dtype}{(job.M, width)}, as the cut of y")
    if not takes_kernel(y, scales, implementation):
        return reference.latent_norm_backward(y, scales, gs, g_rest, eps)
    d_y, partials = kernel.run(job, scales, y, *gs, g_rest)
    d_scales = jnp.split(jnp.sum(partials, axis=0), list(itertools.accumulate(job.widths))[:-1])
    return d_y, tuple(d_scales)
