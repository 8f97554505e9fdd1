"""Products of ragged groups of rows in bf16: the experts' matmuls (V3 §2.1.2), forward, dgrad, weight gradient.

Rows are sorted by group, `group_sizes` (i32 [G], on the device, zeros allowed) says how many each has; rows past their
sum give zeros. `lax.ragged_dot` on the GPU does every group's work for every row (16-49 TF/s where a dense product
reaches 791), so without these kernels the bf16 path would be no baseline.

Groups of any size and start in `matmul` and `dgrad` (one that ends inside a tile of 64 rows costs a slower store).
`weight_gradient` on Hopper wants every group size to be a multiple of 64 (dispatch pads with zero rows and counts
them): other sizes give NaN there, never a wrong number. The kernel is for bf16; float32 and float64 take the reference.
`matmul_swiglu` is `matmul` by gate and up whose kernel writes the SwiGLU too, from the rounded values it stores: what a
kernel after it would have to read again.
Tolerance: relative norm error 2e-3 against float64 (the rounding of bf16).
H100 80GB HBM3, 2026-11-24: 74-79 % of the bf16 peak at 4096 rows a group and more, 0.93-0.98 of XLA's dense product.
"""
import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul import kernel, reference
from pallas_kernels.quantize.reference import swiglu
from pallas_kernels.target import choose


def check_sizes(group_sizes: jax.Array, n_groups: int) -> None:
    if group_sizes.shape != (n_groups,) or group_sizes.dtype != jnp.int32:
        raise ValueError(f"group_sizes {group_sizes.dtype}{group_sizes.shape}: must be int32{(n_groups,)}")


def _not_bf16(x: jax.Array) -> str:
    return "" if x.dtype == jnp.bfloat16 else f"the kernel is for bfloat16, not {x.dtype}"


def _check_rows(rows: jax.Array, w: jax.Array, group_sizes: jax.Array, contract: int) -> None:
    if rows.ndim != 2 or w.ndim != 3 or rows.shape[1] != w.shape[contract] or 0 in rows.shape + w.shape:
        raise ValueError(f"rows {rows.shape}, w {w.shape}: axis 1 of rows must meet axis {contract} of w [G, N, K]")
    if rows.dtype != w.dtype or not jnp.issubdtype(rows.dtype, jnp.floating):
        raise ValueError(f"rows are {rows.dtype}, w is {w.dtype}: must be one float dtype")
    check_sizes(group_sizes, w.shape[0])


def _by_rows(op: str, rows: jax.Array, w: jax.Array, sizes: jax.Array, contract: int, implementation: str) -> jax.Array:
    _check_rows(rows, w, sizes, contract)
    path = choose(op, implementation, _not_bf16(rows), interpretable=_not_bf16(rows))
    if path == "reference":
        return reference.matmul(rows, w, sizes, contract)
    return kernel.by_rows(rows, w, sizes, contract, interpret=path == "interpret")


def matmul(rows: jax.Array, w: jax.Array, group_sizes: jax.Array, *, implementation: str = "auto") -> jax.Array:
    """rows [M, K], w [G, N, K], group_sizes i32 [G] -> rows w[g]^T [M, N] in the dtype of rows."""
    return _by_rows("grouped_matmul", rows, w, group_sizes, 2, implementation)


def matmul_swiglu(
    rows: jax.Array, w_pair: jax.Array, group_sizes: jax.Array, *, implementation: str = "auto"
) -> tuple[jax.Array, jax.Array]:
    """rows [M, K], w_pair [G, 2, F, K], group_sizes i32 [G] -> (gate_up [M, 2F] = rows w_pair[g]^T, silu(gate) * up [M, F]).

    Both in the dtype of rows; the second is worked out in float32 from the rounded first. One kernel where F is a multiple of 64;
    'auto' does others by `matmul` and jnp, a path by name refuses them. Raises ValueError on shapes or dtypes that do not meet.
    """
    if w_pair.ndim != 4 or w_pair.shape[1] != 2:
        raise ValueError(f"w_pair {w_pair.shape}: must be [G, 2, F, K]")
    w, F = w_pair.reshape(w_pair.shape[0], -1, w_pair.shape[3]), w_pair.shape[2]
    _check_rows(rows, w, group_sizes, 2)
    unfit = _not_bf16(rows) or ("" if F % 64 == 0 else f"F={F}: must be a multiple of 64")
    path = choose("grouped_matmul.matmul_swiglu", implementation, unfit, interpretable=unfit)
    if path != "reference":
        return kernel.by_rows(rows, w, group_sizes, 2, interpret=path == "interpret", swiglu=True)
    gate_up = matmul(rows, w, group_sizes, implementation=implementation)
    return gate_up, swiglu(gate_up).astype(gate_up.dtype)


def dgrad(dy: jax.Array, w: jax.Array, group_sizes: jax.Array, *, implementation: str = "auto") -> jax.Array:
    """dy [M, N], w [G, N, K], group_sizes i32 [G] -> dy w[g] [M, K] in the dtype of dy; w is read as it lies."""
    return _by_rows("grouped_matmul.dgrad", dy, w, group_sizes, 1, implementation)


def weight_gradient(
    dy: jax.Array, x: jax.Array, group_sizes: jax.Array, *, accumulate: jax.Array | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """dy [M, N], x [M, K], group_sizes i32 [G] -> dy^T x (+ accumulate f32 [G, N, K]) of each group, f32 [G, N, K]."""
    if dy.ndim != 2 or x.ndim != 2 or dy.shape[0] != x.shape[0] or 0 in dy.shape + x.shape or dy.dtype != x.dtype:
        raise ValueError(f"dy {dy.dtype}{dy.shape}, x {x.dtype}{x.shape}: must be [M, N] and [M, K] of one dtype")
    check_sizes(group_sizes, group_sizes.shape[0])
    path = choose("grouped_matmul.weight_gradient", implementation, _not_bf16(dy), interpretable=_not_bf16(dy))
    if path != "reference":
        return kernel.weight_gradient(dy, x, group_sizes, accumulate, interpret=path == "interpret")
    out = reference.weight_gradient(dy, x, group_sizes)
    return out if accumulate is None else out + accumulate
