"""Products of ragged groups of rows in block-scaled FP8 (V3 §3.3): the experts' forward, dgrad and weight gradient.

| function | rows of group g | result |
|---|---|---|
| `grouped_matmul` | the next group_sizes[g] rows of a [M, K] | [M, N], rows past the sum zero |
| `masked_matmul` | the first counts[g] of a[g] [M, K] | [G, M, N], rows past the count zero |
| `weight_gradient` | the next group_sizes[g] rows of dy [M, N], x [M, K] | f32 [G, N, K] |

The dgrad is `grouped_matmul(dy, dy_scale, w.mT, w_scale.mT, group_sizes)`; w.mT is a copy unless it was kept (once a
step, outside the layer scan). Sizes live on the device (zeros allowed); the tile table is made there too.
`grouped_matmul` takes groups of any size and start. `weight_gradient` on Hopper wants every size to be a multiple of
128, so that no 128x1 scale tile crosses a group (dispatch pads with zero rows and counts them): others give NaN there.
Tolerance: as `fp8_matmul`. H100 80GB HBM3, 2026-11-24: 65-71 % of the FP8 peak at 4096 rows a group and more.
"""
import jax
import jax.numpy as jnp

from pallas_kernels.fp8_matmul.op import E4M3
from pallas_kernels.grouped_fp8_matmul import kernel, reference
from pallas_kernels.grouped_matmul.op import check_sizes
from pallas_kernels.quantize.reference import ceil_div
from pallas_kernels.target import choose


def _check(a, a_scale, b, b_scale, sizes, out_dtype):
    if b.ndim != 3 or a.shape[-1] != b.shape[-1] or 0 in a.shape + b.shape:
        raise ValueError(f"a {a.shape}, b {b.shape}: must end in one K >= 1, b [G, N, K]")
    if a.dtype != E4M3 or b.dtype != E4M3:
        raise ValueError(f"a is {a.dtype}, b is {b.dtype}: both must be float8_e4m3fn")
    (G, N, K) = b.shape
    want_a, want_b = (*a.shape[:-1], ceil_div(K, 128)), (G, ceil_div(N, 128), ceil_div(K, 128))
    if a_scale.shape != want_a or b_scale.shape != want_b or not a_scale.dtype == b_scale.dtype == jnp.float32:
        raise ValueError(f"a_scale {a_scale.dtype}{a_scale.shape}, b_scale {b_scale.dtype}{b_scale.shape}: "
                         f"must be float32 {want_a} and {want_b}")
    check_sizes(sizes, G)
    if out_dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"out_dtype={jnp.dtype(out_dtype)}: must be bfloat16 or float32")


def grouped_matmul(
    a: jax.Array, a_scale: jax.Array, b: jax.Array, b_scale: jax.Array, group_sizes: jax.Array,
    *, out_dtype: jnp.dtype = jnp.bfloat16, implementation: str = "auto",
) -> jax.Array:
    """a e4m3 [M, K], a_scale f32 [M, K/128]; b e4m3 [G, N, K], b_scale f32 [G, N/128, K/128] (ceil); group_sizes
    i32 [G] -> a b[g]^T [M, N] in out_dtype."""
    if a.ndim != 2:
        raise ValueError(f"a {a.shape}: must be [M, K]")
    _check(a, a_scale, b, b_scale, group_sizes, out_dtype)
    path = choose("grouped_fp8_matmul", implementation, interpretable="")
    if path != "reference":
        run = kernel.grouped if path == "kernel" else kernel.grouped_plain
        return run(a, a_scale, b, b_scale, group_sizes, out_dtype)
    return reference.grouped_matmul(a, a_scale, b, b_scale, group_sizes).astype(out_dtype)


def masked_matmul(
    a: jax.Array, a_scale: jax.Array, b: jax.Array, b_scale: jax.Array, counts: jax.Array,
    *, out_dtype: jnp.dtype = jnp.bfloat16, implementation: str = "auto",
) -> jax.Array:
    """a e4m3 [G, M, K], a_scale f32 [G, M, K/128]; b, b_scale as `grouped_matmul`; counts i32 [G] -> [G, M, N]."""
    if a.ndim != 3 or a.shape[0] != b.shape[0]:
        raise ValueError(f"a {a.shape}, b {b.shape}: must be [G, M, K] and [G, N, K]")
    _check(a, a_scale, b, b_scale, counts, out_dtype)
    if choose("grouped_fp8_matmul.masked", implementation) == "kernel":
        return kernel.masked(a, a_scale, b, b_scale, counts, out_dtype)
    return reference.masked_matmul(a, a_scale, b, b_scale, counts).astype(out_dtype)


def weight_gradient(
    dy: jax.Array, dy_scale: jax.Array, x: jax.Array, x_scale: jax.Array, group_sizes: jax.Array,
    *, accumulate: jax.Array | None = None, implementation: str = "auto",
) -> jax.Array:
    """dy e4m3 [M, N], dy_scale f32 [M/128, N]; x e4m3 [M, K], x_scale f32 [M/128, K] (ceil), both in 128x1 tiles;
    group_sizes i32 [G] -> dy^T x (+ accumulate f32 [G, N, K]) of each group, f32 [G, N, K]."""
    M, m_blocks = dy.shape[0], ceil_div(dy.shape[0], 128)
    if dy.ndim != 2 or x.ndim != 2 or x.shape[0] != M or 0 in dy.shape + x.shape or not dy.dtype == x.dtype == E4M3:
        raise ValueError(f"dy {dy.dtype}{dy.shape}, x {x.dtype}{x.shape}: must be e4m3 [M, N] and [M, K]")
    for name, q, scale in (("dy", dy, dy_scale), ("x", x, x_scale)):
        if scale.shape != (m_blocks, q.shape[1]) or scale.dtype != jnp.float32:
            raise ValueError(f"{name}_scale {scale.dtype}{scale.shape}: must be float32{(m_blocks, q.shape[1])}")
    check_sizes(group_sizes, group_sizes.shape[0])
    shape = (group_sizes.shape[0], dy.shape[1], x.shape[1])
    if accumulate is not None and (accumulate.shape != shape or accumulate.dtype != jnp.float32):
        raise ValueError(f"accumulate {accumulate.dtype}{accumulate.shape}: must be float32{shape}")
    if choose("grouped_fp8_matmul.weight_gradient", implementation) == "kernel":
        return kernel.weight_gradient(dy, dy_scale, x, x_scale, group_sizes, accumulate)
    out = reference.weight_gradient(dy, dy_scale, x, x_scale, group_sizes)
    return out if accumulate is None else out + accumulate
