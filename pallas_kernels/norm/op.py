"""RMSNorm of a residual stream (V3 §2.1, Zhang & Sennrich 1910.07467) with the addition before it, and its gradient.

| function | what | bytes, in rows of x |
|---|---|---|
| `rms_norm` | total = x + delta; normed = total / sqrt(mean(total^2) + eps) * scale | 4 (2 without delta) |
| `rms_norm_backward` | dx = r (g' - n mean(g' n)) + d_total, d_scale = sum of g n over the rows | 4 (3 without d_total) |

with r = 1 / sqrt(mean(total^2) + eps), n = total r, g' = g scale. No VJP: `model/norm.py` has it, of total and scale alone.

The kernel takes rows of bfloat16, float16 or float32, of a multiple of 16 bytes up to 32 KiB, with a float32 scale. Other dtypes
and widths, and no rows, take the reference. Both compute in float32 (the reference float64 for float64) and round once, the total
first: normed is that of the rounded total. Tolerance: the order of additions and the last bit of a reciprocal root, then one rounding.
The same bits each time.
"""
import jax
import jax.numpy as jnp

from pallas_kernels.norm import kernel, reference
from pallas_kernels.target import choose


def _job(backward: bool, x: jax.Array, scale: jax.Array, eps: float, **others: jax.Array | None) -> kernel.Job:
    """Raises ValueError on shapes and dtypes that do not belong together."""
    if x.ndim != 2 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x {x.dtype}{x.shape}: must be floats [M, D]")
    if scale.shape != x.shape[1:] or not jnp.issubdtype(scale.dtype, jnp.floating):
        raise ValueError(f"scale {scale.dtype}{scale.shape}: must be floats {x.shape[1:]}, one a column of x")
    for name, other in others.items():
        if other is not None and (other.shape != x.shape or other.dtype != x.dtype):
            raise ValueError(f"{name} {other.dtype}{other.shape}: must be as x, {x.dtype}{x.shape}")
    added = others["d_total" if backward else "delta"] is not None
    return kernel.Job(backward, *x.shape, x.dtype.name, float(eps), added)


def takes_kernel(x: jax.Array, scale: jax.Array, implementation: str = "auto") -> bool:
    """Whether these rows x [M, D] and scale [D] go to the kernel, in both directions."""
    job = _job(False, x, scale, 0.0, delta=None)
    return choose("rms_norm", implementation, kernel.unfit(job, scale.dtype.name)) == "kernel"


def rms_norm(
    x: jax.Array, scale: jax.Array, eps: float, delta: jax.Array | None = None, *, implementation: str = "auto"
) -> tuple[jax.Array, jax.Array]:
    """x [M, D] and delta [M, D] or None, of one dtype, scale [D] -> (total, normed) [M, D] in that dtype. Without a delta the total
    is x itself. Raises ValueError on other shapes and dtypes."""
    job = _job(False, x, scale, eps, delta=delta)
    if not takes_kernel(x, scale, implementation):
        return reference.rms_norm(x, scale, eps, delta)
    out = kernel.run(job, scale, x, *(() if delta is None else (delta,)))
    return (x, *out) if delta is None else tuple(out)


def rms_norm_backward(
    x: jax.Array, scale: jax.Array, g: jax.Array, d_total: jax.Array | None, eps: float, *, implementation: str = "auto"
) -> tuple[jax.Array, jax.Array]:
    """x (the total), g (of normed) and d_total or None [M, D] of one dtype, scale [D] -> dx [M, D] in that dtype, d_scale [D] in float32
    (float64 for rows of float64). Raises ValueError on other shapes and dtypes."""
    job = _job(True, x, scale, eps, g=g, d_total=d_total)
    if not takes_kernel(x, scale, implementation):
        return reference.rms_norm_backward(x, scale, g, d_total, eps)
    dx, partials = kernel.run(job, scale, x, g, *(() if d_total is None else (d_total,)))
    return dx, jnp.sum(partials, axis=0)
