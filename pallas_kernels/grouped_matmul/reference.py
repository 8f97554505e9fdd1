"""Grouped products in plain jnp, in block form: the specification and the CPU path.

Rows are sorted by group; row m belongs to group g when starts[g] <= m < starts[g] + group_sizes[g]. Every group is cut
into blocks of a few rows, each block gathers its group's weight, and one batched matmul does them all: the cost follows
the rows, where `lax.ragged_dot` off the TPU does every group's work for every row.
"""
import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.quantize.reference import ceil_div


def block_rows(n_rows: int, n_groups: int) -> int:
    """Rows of a block: the power of two nearest above half the mean group, within [8, 128]."""
    mean = ceil_div(n_rows, 2 * n_groups)
    return min(128, max(8, 1 << (mean - 1).bit_length()))


def blocks(group_sizes: jax.Array, n_rows: int, block: int) -> tuple[jax.Array, jax.Array]:
    """(group i32[B], row i32[B, block]) of B = n_rows/block + G blocks; a row equal to n_rows is padding."""
    group_sizes = group_sizes.astype(jnp.int32)
    n_groups = group_sizes.shape[0]
    starts, counts = jnp.cumsum(group_sizes) - group_sizes, -(-group_sizes // block)
    ends = jnp.cumsum(counts)
    index = jnp.arange(ceil_div(n_rows, block) + n_groups, dtype=jnp.int32)
    group = jnp.minimum(jnp.searchsorted(ends, index, side="right").astype(jnp.int32), n_groups - 1)
    within = (index - (ends - counts)[group]) * block
    row = within[:, None] + jnp.arange(block, dtype=jnp.int32)[None, :]
    inside = (row < group_sizes[group][:, None]) & (index < ends[-1])[:, None]
    row = row + starts[group][:, None]
    return group, jnp.where(inside & (row < n_rows), row, n_rows)


def _gather(x: jax.Array, row: jax.Array) -> jax.Array:
    return jnp.take(x, row, axis=0, mode="fill", fill_value=0)


def _sum_dtype(x: jax.Array) -> jnp.dtype:
    return jnp.float64 if x.dtype == jnp.float64 else jnp.float32


def matmul(rows: jax.Array, w: jax.Array, group_sizes: jax.Array, contract: int = 2) -> jax.Array:
    """rows [M, K] with w [G, N, K] over its axis `contract` (2: forward, rows w^T; 1: dgrad, rows w).

    Rows of no group are zero. Products are summed in float32 (float64 stays); the result has the dtype of rows.
    """
    M, G = rows.shape[0], w.shape[0]
    group, row = blocks(group_sizes, M, block_rows(M, G))
    out = lax.dot_general(_gather(rows, row), w[group], (((2,), (contract,)), ((0,), (0,))), precision="highest",
                          preferred_element_type=_sum_dtype(rows))
    zeros = jnp.zeros((M, out.shape[-1]), rows.dtype)
    return zeros.at[row].set(out.astype(rows.dtype), mode="drop")


def weight_gradient(dy: jax.Array, x: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """dy [M, N], x [M, K] -> [G, N, K]: dy^T x of each group's rows, in at least float32."""
    M, G = dy.shape[0], group_sizes.shape[0]
    group, row = blocks(group_sizes, M, block_rows(M, G))
    parts = lax.dot_general(_gather(dy, row), _gather(x, row), (((1,), (1,)), ((0,), (0,))), precision="highest",
                            preferred_element_type=_sum_dtype(dy))
    return jax.ops.segment_sum(parts, group, num_segments=G, indices_are_sorted=True)
