"""Rows between tokens and experts: what stands before, after and behind the experts' matmuls (V3 §2.1.2).

| function | what | for |
|---|---|---|
| `gather` | row i is x[source[i]] | dispatch, of values or of FP8 bytes |
| `gather_sum` | token m is the (weighted) sum of rows[position[m, k]] over k, and of up to 2 addends | combine; the gradient of dispatch |
| `weighted_backward` | g[source] * weights and <g[source], rows> in one read | the gradient of combine |

An index out of range names a row of zeros: rows of padding, choices whose expert is elsewhere. What no index names is
not looked at, NaN or not. No VJPs: `model/expert_parallel.py` has them, as each of these is another's gradient.

The kernel takes rows of a multiple of 16 bytes: integers and floats of 1, 2 or 4 bytes in `gather`, bfloat16, float16 and
float32 with float32 weights in the others, which add in float32 and round once. Other dtypes and widths take the reference.
Tolerance: none in `gather`; the order of float32 additions, then one rounding, in the others. The same bits each time.
Figures: docs/kernels.md.
"""
import jax
import jax.numpy as jnp

from pallas_kernels.rows import kernel, reference
from pallas_kernels.target import choose


def _check(x: jax.Array, index: jax.Array, n_axes: int, name: str) -> None:
    if x.ndim != 2:
        raise ValueError(f"rows {x.shape}: must be [rows, D]")
    if index.ndim != n_axes or index.dtype != jnp.int32:
        raise ValueError(f"{name} {index.dtype}{index.shape}: must be int32 of {n_axes} axes")


def _check_weights(weights: jax.Array, index: jax.Array) -> None:
    if weights.shape != index.shape or not jnp.issubdtype(weights.dtype, jnp.floating):
        raise ValueError(f"weights {weights.dtype}{weights.shape}: must be floats {index.shape}, one an index")


def _takes_kernel(job: kernel.Job, implementation: str) -> bool:
    return choose(job.op, implementation, kernel.unfit(job)) == "kernel"


def gather(x: jax.Array, source: jax.Array, *, implementation: str = "auto") -> jax.Array:
    """x [M, D] of any dtype, source i32 [P] -> [P, D]: row source[i] of x, zeros where it is not in 0..M-1.

    Raises ValueError on other shapes and index dtypes.
    """
    _check(x, source, 1, "source")
    job = kernel.Job("gather", source.shape[0], *x.shape, x.dtype.name)
    if not _takes_kernel(job, implementation):
        return reference.gather(x, source)
    return kernel.move(job, x, source)[0]


def gather_sum(
    rows: jax.Array, position: jax.Array, weights: jax.Array | None = None, addends: tuple[jax.Array, ...] = (),
    *, implementation: str = "auto",
) -> jax.Array:
    """rows [P, D] of floats, position i32 [M, K], weights [M, K] or None, addends [M, D] in the dtype of rows, two at most -> [M, D]:
    sum over k of weights * rows[position], and the addends.

    A position not in 0..P-1 is a row of zeros. Added in float32 (in the weights' dtype if that is another), returned in the
    dtype of rows. Raises ValueError on other shapes and dtypes.
    """
    _check(rows, position, 2, "position")
    if weights is not None:
        _check_weights(weights, position)
    (M, K), D = position.shape, rows.shape[1]
    if len(addends) > 2 or any((addend.shape, addend.dtype) != ((M, D), rows.dtype) for addend in addends):
        raise ValueError(f"addends {[f'{a.dtype}{a.shape}' for a in addends]}: must be at most two of {rows.dtype}{(M, D)}")
    job = kernel.Job("gather_sum", M, *rows.shape, rows.dtype.name, K, "" if weights is None else weights.dtype.name, len(addends))
    if not _takes_kernel(job, implementation):
        return reference.gather_sum(rows, position, weights, addends)
    return kernel.move(job, rows, position, *(() if weights is None else (weights,)), *addends)[0]


def weighted_backward(
    g: jax.Array, rows: jax.Array, source: jax.Array, weights: jax.Array, position: jax.Array | None = None,
    *, implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """g [M, D], rows [P, D], source i32 [P], weights [P] -> d_rows [P, D] = g[source] * weights in the dtype of rows,
    dots [P] = <g[source], rows> in the dtype of the weights (float32 in the kernel). Both zero where the source is not in 0..M-1.

    With position i32 [M, K], where source[position[m, k]] = m, the dots come as [M, K]: those of the rows at position, zero where
    it is not in 0..P-1. Raises ValueError on other shapes and dtypes.
    """
    _check(rows, source, 1, "source")
    _check_weights(weights, source)
    if g.shape[1:] != rows.shape[1:] or g.dtype != rows.dtype or rows.shape[:1] != source.shape:
        raise ValueError(f"g {g.dtype}{g.shape}, rows {rows.dtype}{rows.shape}, source {source.shape}: must be [M, D], [P, D], [P]")
    if position is not None:
        _check(g, position, 2, "position")
    job = kernel.Job("weighted_backward", source.shape[0], *g.shape, g.dtype.name, weights=weights.dtype.name)
    if not _takes_kernel(job, implementation):
        return reference.weighted_backward(g, rows, source, weights, position)
    d_rows, dots = kernel.move(job, g, rows, source, weights)
    dots = jnp.sum(dots, axis=0)
    return d_rows, dots if position is None else reference.at(dots, position)
