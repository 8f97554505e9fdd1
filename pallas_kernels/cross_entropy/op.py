"""Cross entropy over a vocabulary: log Z of each row of logits, and the gradient of log p(target) = logit(target) - log Z.

| function | what | passes over the logits |
|---|---|---|
| `log_sum_exp` | log Z = log sum exp(logits) | one read |
| `log_probability_backward` | d_logits = g (onehot(target) - exp(logits - log Z)) | one read, one write |

No VJP: `train/cross_entropy.py` has it, and takes the target's logit by index.

The kernel takes logits of bfloat16, float16 or float32 whose rows are a multiple of 16 bytes; log Z and g are float32. Other dtypes and
widths, and no rows, take the reference. Both compute in float32 (the reference float64 for float64) and round once.
Tolerance: the order of additions and an exponential of 2 ulp; an exponential below the smallest normal number is 0. A row with NaN
gives NaN, else one with +inf gives inf, one of -inf alone -inf. A target out of range has no column. The same bits each time.
"""
import math

import jax
import jax.numpy as jnp

from pallas_kernels.cross_entropy import kernel, reference
from pallas_kernels.target import choose


def _job(backward: bool, logits: jax.Array) -> kernel.Job:
    """Raises ValueError on other than rows of floats."""
    if logits.ndim < 1 or not logits.shape[-1] or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(f"logits {logits.dtype}{logits.shape}: must be floats [..., V], V at least 1")
    return kernel.Job(backward, math.prod(logits.shape[:-1]), logits.shape[-1], logits.dtype.name)


def takes_kernel(logits: jax.Array, implementation: str = "auto") -> bool:
    """Whether these logits [..., V] go to the kernel, in both directions."""
    return choose("cross_entropy", implementation, kernel.unfit(_job(False, logits))) == "kernel"


def log_sum_exp(logits: jax.Array, *, implementation: str = "auto") -> jax.Array:
    """logits [..., V] of any float -> [...] float32 (float64 for float64). Raises ValueError on other shapes and dtypes."""
    job = _job(False, logits)
    if not takes_kernel(logits, implementation):
        return reference.log_sum_exp(logits)
    return kernel.run(job, logits.reshape(job.M, job.V)).reshape(logits.shape[:-1])


def log_probability_backward(
    logits: jax.Array, targets: jax.Array, log_z: jax.Array, g: jax.Array, *, implementation: str = "auto"
) -> jax.Array:
    """logits [..., V], targets of integers [...], log_z (of `log_sum_exp`) and g float32 [...], both float64 for float64 -> d_logits
    [..., V] in the dtype of the logits. Raises ValueError on other shapes and dtypes."""
    job, wide = _job(True, logits), jnp.float64 if logits.dtype == jnp.float64 else jnp.float32
    for name, x, dtype in (("targets", targets, jnp.integer), ("log_z", log_z, wide), ("g", g, wide)):
        if x.shape != logits.shape[:-1] or not jnp.issubdtype(x.dtype, dtype):
            raise ValueError(f"{name} {x.dtype}{x.shape}: must be {dtype.__name__}{logits.shape[:-1]}, one a row of logits")
    if not takes_kernel(logits, implementation):
        return reference.log_probability_backward(logits, targets, log_z, g)
    of_rows = (x.reshape(job.M) for x in (targets.astype(jnp.int32), log_z, g))
    return kernel.run(job, logits.reshape(job.M, job.V), *of_rows).reshape(logits.shape)
