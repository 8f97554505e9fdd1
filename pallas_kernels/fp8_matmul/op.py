"""D[M, N] = A[M, K] B[N, K]^T (+ C) in block-scaled FP8 (V3 §3.3): every dense product of an FP8 linear.

Scales: A has one a 1x128 tile; B one a 128x128 block (a weight), or one a 1x128 tile (both sides of a weight gradient,
where K runs along the tokens). The tensor cores sum 128 of K; that part is scaled and added in float32 registers.

| product of y = x w^T, w [N, K] | call |
|---|---|
| forward | `matmul(x, x_scale, w, w_scale)` |
| dgrad | `matmul(dy, dy_scale, w.T, w_scale.T)`: w.T is a copy unless kept (one a step, outside the scans) |
| weight gradient | `weight_gradient(dy, dy_scale, x, x_scale)`, both in 128x1 tiles |

Any M, N, K >= 1. Layouts on Hopper: see `pallas_kernels.quantize.op`.
Tolerance: relative norm error 2e-3 against float64 on the dequantised inputs with bf16 out (the rounding of bf16).
H100 80GB HBM3, 2026-11-24: 53-73 % of the FP8 peak at 4096 rows, weight gradients 41-50 % (docs/kernels.md).
"""
import functools

import jax
import jax.numpy as jnp

from pallas_kernels import hopper
from pallas_kernels.fp8_matmul import kernel, plain, reference, tuned
from pallas_kernels.quantize.reference import ceil_div, pad
from pallas_kernels.target import choose

E4M3 = jnp.float8_e4m3fn


def _check(a, a_scale, b, b_scale, out_dtype, accumulate, promotion):
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or 0 in a.shape + b.shape:
        raise ValueError(f"a {a.shape}, b {b.shape}: must be [M, K] and [N, K] with M, N, K >= 1")
    (M, K), N = a.shape, b.shape[0]
    if a.dtype != E4M3 or b.dtype != E4M3:
        raise ValueError(f"a is {a.dtype}, b is {b.dtype}: both must be float8_e4m3fn")
    k_blocks = ceil_div(K, 128)
    if a_scale.shape != (M, k_blocks) or a_scale.dtype != jnp.float32:
        raise ValueError(f"a_scale {a_scale.dtype}{a_scale.shape}: must be float32{(M, k_blocks)}")
    if b_scale.shape not in ((ceil_div(N, 128), k_blocks), (N, k_blocks)) or b_scale.dtype != jnp.float32:
        raise ValueError(
            f"b_scale {b_scale.dtype}{b_scale.shape}: must be float32{(ceil_div(N, 128), k_blocks)} or {(N, k_blocks)}")
    if out_dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"out_dtype={jnp.dtype(out_dtype)}: must be bfloat16 or float32")
    if accumulate is not None and (accumulate.shape != (M, N) or accumulate.dtype != jnp.float32):
        raise ValueError(f"accumulate {accumulate.dtype}{accumulate.shape}: must be float32{(M, N)}")
    if promotion < 128 or promotion % 128:
        raise ValueError(f"promotion={promotion}: must be a multiple of 128")


def matmul(
    a: jax.Array, a_scale: jax.Array, b: jax.Array, b_scale: jax.Array, *, out_dtype: jnp.dtype = jnp.bfloat16,
    accumulate: jax.Array | None = None, promotion: int = 128, implementation: str = "auto",
) -> jax.Array:
    """a b^T (+ accumulate): a e4m3 [M, K], a_scale f32 [M, K/128]; b e4m3 [N, K], b_scale f32 [N/128, K/128] or
    [N, K/128] (all ceil) -> out_dtype [M, N]; accumulate f32 [M, N] is added before the rounding.

    `promotion` > 128 is the ablation 'no promotion': partial sums stay in the tensor core's accumulator of about 14
    bits for so many columns (emulated where there is no Hopper card: tiny sizes only). The scales of an interval's
    first block then hold for all of it: they must not change along K. Raises ValueError on other shapes and dtypes.
    """
    _check(a, a_scale, b, b_scale, out_dtype, accumulate, promotion)
    row_scales = b_scale.shape[0] != ceil_div(b.shape[0], 128)
    ablation = "promotion > 128" if promotion > 128 else ""
    path = choose("fp8_matmul", implementation, ablation and row_scales and f"{ablation} with 1x128 scales of b",
                  interpretable=ablation)
    if path == "kernel":
        return _kernel(a, a_scale, b, b_scale, row_scales, out_dtype, accumulate, promotion)
    if path == "interpret":
        out = _interpret(a, a_scale, b, b_scale, row_scales)
    elif ablation:
        out = reference.tensor_core_matmul(a, a_scale, b, b_scale, promotion)
    else:
        out = reference.matmul(a, a_scale, b, b_scale)
    return (out if accumulate is None else out + accumulate).astype(out_dtype)


def _kernel(a, a_scale, b, b_scale, row_scales, out_dtype, accumulate, promotion):
    """TMA wants rows of 16 bytes: K is padded to 16, scales to 4, the columns of the result to 16 bytes."""
    (M, K), N = a.shape, b.shape[0]
    a, b = pad(a, 1, 16), pad(b, 1, 16)
    b_scale = pad(b_scale.T, 1, 4) if row_scales else b_scale
    tuning = tuned.WIDE if promotion > 128 else tuned.pick(M, N, K, row_scales)
    in_place = hopper.in_place(accumulate) and out_dtype == jnp.float32 and N % 4 == 0 and tuning.splits == 1
    dtype = out_dtype if accumulate is None and tuning.splits == 1 else jnp.float32
    columns = N + -N % (16 // jnp.dtype(dtype).itemsize)
    rows = M if tuning.splits == 1 else ceil_div(M, tuning.tile_m) * tuning.tile_m
    out = kernel.gemm(a, pad(a_scale.T, 1, 4), b, b_scale, n=N, tuning=tuning, row_scales=row_scales,
                      out_shape=jax.ShapeDtypeStruct((tuning.splits * rows, columns), dtype), promotion=promotion,
                      accumulate=accumulate if in_place else None)
    # in this order always: the same bits each time
    out = functools.reduce(jnp.add, (out[i * rows:i * rows + M, :N] for i in range(tuning.splits)))
    return (out if in_place or accumulate is None else out + accumulate).astype(out_dtype)


def _interpret(a, a_scale, b, b_scale, row_scales):
    (M, _), N = a.shape, b.shape[0]
    a, b = pad(a, 128, 128), pad(b, 128, 128)
    b_scale = pad(b_scale.T, 1, 128) if row_scales else b_scale
    groups = jnp.zeros(a.shape[0] // 128, jnp.int32)
    return plain.gemm(a, pad(a_scale.T, 1, 128), b, b_scale, groups, n=b.shape[0], out_dtype=jnp.float32,
                      row_scales=row_scales, stages=2, sms=2, interpret=True)[:M, :N]


def weight_gradient(
    dy: jax.Array, dy_scale: jax.Array, x: jax.Array, x_scale: jax.Array, *, accumulate: jax.Array | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """dy^T x (+ accumulate) in float32: dy e4m3 [M, N], dy_scale f32 [M/128, N]; x [M, K], x_scale [M/128, K] (ceil),
    both quantised in 128x1 tiles -> f32 [N, K]."""
    return matmul(dy.T, dy_scale.T, x.T, x_scale.T, out_dtype=jnp.float32, accumulate=accumulate,
                  implementation=implementation)
