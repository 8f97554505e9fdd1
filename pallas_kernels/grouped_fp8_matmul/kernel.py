"""Grouped FP8 products: the frame of `fp8_matmul.kernel` walked by a tile table made on the device."""
import jax
import jax.numpy as jnp

from pallas_kernels import hopper
from pallas_kernels.fp8_matmul import plain
from pallas_kernels.fp8_matmul.kernel import gemm
from pallas_kernels.grouped_fp8_matmul import tuned
from pallas_kernels.grouped_matmul import table
from pallas_kernels.quantize.reference import ceil_div, pad


def _rows(a, a_scale, b, b_scale, tiles, out_dtype, tuning):
    """a [M, K] with the row tiles of a table -> [M, N]."""
    (G, N, _), M = b.shape, a.shape[0]
    columns = N + -N % (16 // jnp.dtype(out_dtype).itemsize)
    b = pad(b.reshape(G * N, -1), 1, 16)
    return gemm(pad(a, 1, 16), pad(a_scale.T, 1, 4), b, b_scale.reshape(-1, b_scale.shape[-1]), n=N, tuning=tuning,
                out_shape=jax.ShapeDtypeStruct((M, columns), out_dtype), tiles=tiles)[:, :N]


def grouped(a, a_scale, b, b_scale, group_sizes, out_dtype):
    (M, K), tuning = a.shape, tuned.pick(a.shape[0], b.shape[0])
    tiles = table.row_tiles(group_sizes, M, ceil_div(K, 128), tuning.tile_m, align=4)
    return _rows(a, a_scale, b, b_scale, tiles, out_dtype, tuning)


def masked(a, a_scale, b, b_scale, counts, out_dtype):
    (G, M, K), tuning = a.shape, tuned.pick(a.shape[0] * a.shape[1], a.shape[0])
    tiles = table.masked_tiles(counts, M, ceil_div(K, 128), tuning.tile_m, align=4)
    out = _rows(a.reshape(G * M, K), a_scale.reshape(G * M, -1), b, b_scale, tiles, out_dtype, tuning)
    return out.reshape(G, M, -1)


def weight_gradient(dy, dy_scale, x, x_scale, group_sizes, accumulate):
    G, N, K = group_sizes.shape[0], dy.shape[1], x.shape[1]
    tiles, poison = table.gradient_tiles(group_sizes, N, tuned.GRADIENT.tile_m, 128)
    dy_scale = pad(dy_scale, 1, 4) + poison[0]
    in_place = hopper.in_place(accumulate) and K % 4 == 0
    out = gemm(pad(dy.T, 1, 16), dy_scale, pad(x.T, 1, 16), pad(x_scale, 1, 4), n=K, tuning=tuned.GRADIENT,
               row_scales=True, tiles=tiles, out_shape=jax.ShapeDtypeStruct((G * N, K + -K % 4), jnp.float32),
               accumulate=accumulate.reshape(G * N, K) if in_place else None)
    out = out[:, :K].reshape(G, N, K)
    return out if in_place or accumulate is None else out + accumulate


def grouped_plain(a, a_scale, b, b_scale, group_sizes, out_dtype):
    """In GPU interpret mode: every group is moved to a multiple of 128 rows first."""
    (M, K), (G, N, _) = a.shape, b.shape
    padded = -(-group_sizes // 128) * 128
    room = ceil_div(M, 128) * 128 + G * 128
    starts, moved = (jnp.cumsum(s) - s for s in (group_sizes, padded))
    group = jnp.minimum(jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(M), side="right"), G - 1)
    live = jnp.arange(M) < jnp.sum(group_sizes)
    target = jnp.where(live, jnp.arange(M) - starts[group] + moved[group], room)
    rows = jnp.zeros((room, K), a.dtype).at[target].set(a, mode="drop")
    scales = jnp.zeros((room, a_scale.shape[1]), jnp.float32).at[target].set(a_scale, mode="drop")
    b = jnp.pad(b, ((0, 0), (0, -N % 128), (0, -K % 128)))
    groups = jnp.searchsorted(jnp.cumsum(padded), jnp.arange(0, room, 128), side="right")
    out = plain.gemm(pad(rows, 1, 128), scales.T, b.reshape(-1, b.shape[2]), b_scale.reshape(-1, b_scale.shape[2]),
                     jnp.minimum(groups, G - 1).astype(jnp.int32), n=b.shape[1], out_dtype=out_dtype, stages=2, sms=2,
                     interpret=True)[:, :N]
    return jnp.where(live[:, None], out.at[target].get(mode="fill", fill_value=0), jnp.zeros((), out_dtype))
