"""Expert matmuls whose cost follows the rows (DeepSeekMoE, V3 §2.1.2: dropless): the block form, and its peers.

`block`: rows are sorted by expert and each group starts at a multiple of `align` rows, so that a block of `align` rows belongs to
one expert; a loop over the blocks that hold rows reads that expert's weight in place: nothing is gathered, and the weight gradient
adds into one accumulator. `ragged` is `lax.ragged_dot`, the oracle: on CPU and GPU it does every expert's work.
Shapes: M rows, K inputs, N outputs, E experts, b rows a block.
"""
from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from model.dtypes import at_least_f32


def block_rows(n_rows: int, n_experts: int) -> int:
    """Rows a block, a power of two from 32 to 128: padding every expert adds an eighth at most where it has 256 rows; with fewer, less
    than 32 rows cost a turn of the loop as much (a prefill of 1,024 rows)."""
    target = max(n_rows // (8 * n_experts), 1)
    return max(32, min(128, 1 << (target.bit_length() - 1)))


def block(rows, w, group_sizes, align: int, *, transpose: bool = False):
    """rows [M, K], w [E, N, K], group_sizes i32 [E] -> [M, N]; rows past the last group give 0. transpose: w [E, K, N] instead."""
    if align > 1 and rows.shape[0] % align == 0:
        return _aligned(rows, w, group_sizes, align, transpose)
    n_rows = rows.shape[0]
    align = block_rows(n_rows, w.shape[0])
    position, source, padded_sizes = pad_groups(group_sizes, n_rows, align)
    return _take(_aligned(_take(rows, source), w, padded_sizes, align, transpose), position)


def _take(rows, index):
    """rows[index], zero where the index is past the end."""
    return jnp.where(index[:, None] < rows.shape[0], rows[jnp.minimum(index, rows.shape[0] - 1)], 0)


def _aligned(rows, w, group_sizes, align: int, transpose: bool):
    n_blocks = rows.shape[0] // align
    experts = _expert_of_block(group_sizes, n_blocks, align)
    contract = (((1,), (0 if transpose else 1,)), ((), ()))

    def one(i, out):
        weight = jax.lax.dynamic_index_in_dim(w, experts[i], keepdims=False)
        product = jax.lax.dot_general(jax.lax.dynamic_slice_in_dim(rows, i * align, align), weight, contract)
        return jax.lax.dynamic_update_slice_in_dim(out, product, i * align, axis=0)

    # only the blocks that hold rows: the buffer is as large as the worst routing needs
    start = jnp.zeros((rows.shape[0], w.shape[2 if transpose else 1]), rows.dtype) + 0 * rows[:1, :1]
    return jax.lax.fori_loop(0, jnp.sum(group_sizes) // align, one, start)


def pad_groups(group_sizes, n_rows: int, align: int):
    """Positions of sorted rows when each group is padded to a multiple of align.

    Returns position i32 [M] (row -> padded row; past the end for rows of no group), source i32 [P] (padded row -> row; M where
    padding) and padded group_sizes [E]; P = M rounded up to align + E * align.
    """
    n_padded = padded_rows(n_rows, group_sizes.shape[0], align)
    padded = (group_sizes + align - 1) // align * align
    ends = jnp.cumsum(group_sizes)
    index = jnp.arange(n_rows, dtype=jnp.int32)
    expert = jnp.searchsorted(ends, index, side="right", method="compare_all").astype(jnp.int32)
    shift = jnp.append((jnp.cumsum(padded) - padded) - (ends - group_sizes), n_padded).astype(jnp.int32)
    position = index + shift[expert]
    source = jnp.full(n_padded, n_rows, jnp.int32).at[position].set(index, mode="drop")
    return position, source, padded


def sort_into_groups(experts, n_experts: int, align: int):
    """Where each of N rows goes when rows are sorted by expert (equal ones in order) and each group padded to a multiple of align.

    experts i32 [N], n_experts for a row of no group -> position i32 [N] (P for a row of no group), source i32 [P] (N where padding),
    padded group sizes i32 [E]. A counting sort: rows compared within a block of 64 or more, blocks counted; a sort by comparing keys costs
    a GPU ten kernels.
    """
    n = experts.shape[0]
    width = min(max(64, 1 << (n // 1024).bit_length()), n)  # 1,024 blocks at most
    blocks = jnp.pad(experts, (0, -n % width), constant_values=n_experts).reshape(-1, width)
    index = jax.lax.broadcasted_iota(jnp.int32, blocks.shape, 1)
    same, earlier = blocks[:, :, None] == blocks[:, None, :], index[:, None, :] < index[:, :, None]
    rank = jnp.sum(same & earlier, axis=-1, dtype=jnp.int32)
    expert = jax.lax.broadcasted_iota(jnp.int32, (1, 1, n_experts), 2)
    counts = jnp.sum(blocks[..., None] == expert, axis=1, dtype=jnp.int32)
    through = jnp.cumsum(counts, axis=0)
    padded = (through[-1] + align - 1) // align * align
    n_padded = padded_rows(n, n_experts, align)
    start = (jnp.cumsum(padded) - padded)[None] + through - counts
    position = rank + jnp.take_along_axis(start, jnp.minimum(blocks, n_experts - 1), axis=1)
    position = jnp.where(blocks < n_experts, position, n_padded).reshape(-1)[:n]
    return position, jnp.full(n_padded, n, jnp.int32).at[position].set(jnp.arange(n, dtype=jnp.int32), mode="drop"), padded


def padded_rows(n_rows: int, n_experts: int, align: int) -> int:
    """Rows that always suffice for any split of n_rows over n_experts groups padded to align."""
    return (n_rows + align - 1) // align * align + n_experts * align


def _expert_of_block(group_sizes, n_blocks: int, align: int):
    """The expert of each block, and E for blocks past the last group."""
    starts = jnp.arange(n_blocks, dtype=jnp.int32) * align
    return jnp.searchsorted(jnp.cumsum(group_sizes), starts, side="right", method="compare_all").astype(jnp.int32)


def weight_gradient(rows, dy, group_sizes, align: int):
    """dy^T rows by expert: rows [M, K], dy [M, N] -> [E, N, K] in at least float32; rows of no group add nothing."""
    dtype = at_least_f32(rows.dtype)
    if align == 1 or rows.shape[0] % align:
        n_rows = rows.shape[0]
        align = block_rows(n_rows, group_sizes.shape[0])
        _, source, group_sizes = pad_groups(group_sizes, n_rows, align)
        rows, dy = _take(rows, source), _take(dy, source)
    n_blocks, n_experts = rows.shape[0] // align, group_sizes.shape[0]
    experts = _expert_of_block(group_sizes, n_blocks, align)

    def one(i, total):
        x, g = (jax.lax.dynamic_slice_in_dim(a, i * align, align) for a in (rows, dy))
        product = jax.lax.dot_general(g, x, (((0,), (0,)), ((), ())), preferred_element_type=dtype)
        return total.at[experts[i]].add(product)

    start = jnp.zeros((n_experts, dy.shape[1], rows.shape[1]), dtype) + 0 * dy[:1, :1, None].astype(dtype)
    return jax.lax.fori_loop(0, jnp.sum(group_sizes) // align, one, start)


def ragged(rows, w, group_sizes, align: int, *, transpose: bool = False):
    """lax.ragged_dot on rows [M, K], w [E, N, K] (transpose: [E, K, N]) -> [M, N]."""
    del align
    return jax.lax.ragged_dot(rows, w if transpose else w.swapaxes(1, 2), group_sizes)


class Grouped(NamedTuple):
    """The three products of an expert linear; weights [E, N, K]."""

    product: Callable
    input_gradient: Callable
    weight_gradient: Callable


KINDS = {
    "block": Grouped(block, functools.partial(block, transpose=True), weight_gradient),
    "ragged": Grouped(ragged, functools.partial(ragged, transpose=True), weight_gradient),
}
