"""Tile tables of grouped products, made in jnp inside jit: group sizes are known only on the device. On Hopper `table` makes them.

A table is (number of row tiles i32 [1], i32 [7, most tiles]), one column a row tile, its rows being FIELDS: the first
row in A and in D, the end of the rows that count and how many before them do not, the group, the first block of K and
the number of K blocks (0: the rows are zero).
"""
import jax
import jax.numpy as jnp

from pallas_kernels.quantize.reference import ceil_div

FIELDS = ("a_row", "d_row", "rows", "skip", "group", "first_k", "k_blocks")


def _sums(x: jax.Array) -> jax.Array:
    """Inclusive prefix sums as one masked sum: for so few numbers one small kernel, where a scan is several."""
    index = jnp.arange(x.shape[0], dtype=jnp.int32)
    return jnp.sum(jnp.where(index[:, None] >= index[None, :], x[None, :], 0), axis=1, dtype=jnp.int32)


def most(n_segments: int, n_rows: int, tile_m: int, align: int) -> int:
    """Row tiles at most: columns of a table of `segment_tiles`."""
    return ceil_div(n_rows + n_segments * (align - 1), tile_m) + n_segments


def segment_tiles(
    starts: jax.Array, ends: jax.Array, groups: jax.Array, live: jax.Array, n_rows: int, k_blocks: int, tile_m: int,
    align: int,
) -> tuple[jax.Array, jax.Array]:
    """Row tiles of segments of rows, each of one group, dead ones (`live` false) to be filled with zeros.

    Tiles start at multiples of `align` and skip the rows before their segment (TMA reads the scales, along rows, from
    multiples of 16 bytes only). Those of 192 rows end in tiles of 128 where that leaves no 64 rows idle (three
    consumers of 64 rows each)."""
    n_segments = starts.shape[0]
    skips = jnp.where(ends > starts, starts % align, 0)
    units = -(-(ends - starts + skips) // 64)
    counts = -(-units // (tile_m // 64))
    tall = counts
    if tile_m == 192:
        tall = units // 3 - ((units % 3 == 1) & (units >= 4)).astype(jnp.int32)
    last = _sums(counts)
    index = jnp.arange(most(n_segments, n_rows, tile_m, align), dtype=jnp.int32)
    segment = jnp.sum(last[None, :] <= index[:, None], axis=1, dtype=jnp.int32)
    segment = jnp.minimum(segment, n_segments - 1)
    within = index - (last - counts)[segment]
    n_tall = jnp.minimum(within, tall[segment])
    row = (starts - skips)[segment] + n_tall * tile_m + (within - n_tall) * 128
    height = jnp.where(within < tall[segment], tile_m, 128)
    rows = jnp.clip(ends[segment] - row, 0, height)
    skip = jnp.where(within == 0, skips[segment], 0)
    blocks = jnp.where(live[segment], jnp.int32(k_blocks), 0)
    table = jnp.stack([row, row, rows, skip, groups[segment], jnp.zeros_like(row), blocks])
    return last[-1:], table.astype(jnp.int32)


def row_tiles(
    group_sizes: jax.Array, n_rows: int, k_blocks: int, tile_m: int, align: int = 1
) -> tuple[jax.Array, jax.Array]:
    """Consecutive groups, then the rows of no group."""
    n_groups = group_sizes.shape[0]
    index = jnp.arange(n_groups + 1, dtype=jnp.int32)
    sizes = jnp.pad(group_sizes, (0, 1))
    ends = jnp.minimum(_sums(sizes), n_rows)
    starts = jnp.minimum(ends, _sums(sizes) - sizes)
    ends = jnp.where(index < n_groups, ends, n_rows)
    return segment_tiles(starts, ends, index % n_groups, index < n_groups, n_rows, k_blocks, tile_m, align)


def masked_tiles(counts: jax.Array, n_rows: int, k_blocks: int, tile_m: int, align: int) -> tuple[jax.Array, jax.Array]:
    """`n_rows` rows a group, of which the first counts[g] are live; dead rows last, so that blocks share the work."""
    n_groups = counts.shape[0]
    index = jnp.arange(2 * n_groups, dtype=jnp.int32)
    live, group = index < n_groups, index % n_groups
    cut = group * n_rows + jnp.clip(counts[group], 0, n_rows)
    starts, ends = jnp.where(live, group * n_rows, cut), jnp.where(live, cut, (group + 1) * n_rows)
    return segment_tiles(starts, ends, group, live, n_groups * n_rows, k_blocks, tile_m, align)


def gradient_tiles(
    group_sizes: jax.Array, n_out: int, tile_m: int, block: int
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """Tiles of a weight gradient [G * n_out, K]: K of the product runs along each group's rows, in whole blocks.

    Also f32 [1], 0 or NaN if a group is no whole number of blocks: a weight gradient must not be wrong in silence."""
    n_groups, per_group = group_sizes.shape[0], ceil_div(n_out, tile_m)
    index = jnp.arange(n_groups * per_group, dtype=jnp.int32)
    group, row = index // per_group, index % per_group * tile_m
    first = (_sums(group_sizes) - group_sizes)[group] // block
    rows, zero = jnp.minimum(n_out - row, tile_m), jnp.zeros_like(row)
    table = jnp.stack([row, group * n_out + row, rows, zero, zero, first, group_sizes[group] // block])
    poison = jnp.where(jnp.all(group_sizes % block == 0), 0.0, jnp.nan).astype(jnp.float32)
    return (jnp.full(1, n_groups * per_group, jnp.int32), table.astype(jnp.int32)), poison[None]
