"""Block-scaled FP8 product in plain jnp: the specification, the CPU path, and an emulator of Hopper's accumulation.

D = sum over blocks k of 128 columns: a_scale[m, k] b_scale[n, k] (A_k B_k^T)[m, n] (V3 §3.3.2, figure 7b).
"""
import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.quantize.reference import ceil_div, dequantize_tiles

BLOCK_K = 128
WGMMA_K = 32  # products that one FP8 wgmma adds up at once
FRACTION = 13  # bits kept after the leading one of the largest summand


def b_tile(n_rows: int, b_scale: jax.Array) -> tuple[int, int]:
    """(1, 128) if b_scale has a row for every row of b, else (128, 128)."""
    return (1, BLOCK_K) if b_scale.shape[-2] == n_rows else (128, BLOCK_K)


def matmul(a: jax.Array, a_scale: jax.Array, b: jax.Array, b_scale: jax.Array) -> jax.Array:
    """The product of the dequantised operands in float32: [M, N]."""
    left = dequantize_tiles(a, a_scale, (1, BLOCK_K), jnp.float32)
    right = dequantize_tiles(b, b_scale, b_tile(b.shape[0], b_scale), jnp.float32)
    return lax.dot_general(left, right, (((1,), (1,)), ((), ())), precision="highest")


def _truncate(x: jax.Array, quantum: jax.Array) -> jax.Array:
    return jnp.trunc(x / quantum) * quantum


def _quantum(largest: jax.Array) -> jax.Array:
    """2^(exponent of the largest summand - 13)."""
    _, exponent = jnp.frexp(largest)
    return jnp.ldexp(jnp.ones_like(largest), jnp.maximum(exponent - 1 - FRACTION, -120))


def tensor_core_matmul(
    a: jax.Array, a_scale: jax.Array, b: jax.Array, b_scale: jax.Array, promotion: int
) -> jax.Array:
    """The same product with Hopper's accumulator, promoted to float32 every `promotion` columns: tiny sizes only.

    V3 §3.3.2 and DeepSeek's ISCA'25 paper (§3.1.1): the 32 products of one step and the running sum are aligned to the
    largest exponent among them, 13 bits below its leading one are kept, the rest is cut off. The scales of a promotion
    interval's first block hold for all of it, so beyond 128 they must not change along K.
    """
    (M, K), N = a.shape, b.shape[0]
    interval = min(promotion, ceil_div(K, BLOCK_K) * BLOCK_K)
    if interval % BLOCK_K:
        raise ValueError(f"promotion={promotion}: must be a multiple of {BLOCK_K}")
    steps, intervals = interval // WGMMA_K, ceil_div(K, interval)

    def cut(x):  # [rows, K] -> [intervals, steps, rows, 32]
        x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, intervals * interval - K)))
        return x.reshape(x.shape[0], intervals, steps, WGMMA_K).transpose(1, 2, 0, 3)

    def step(total, operands):
        a_step, b_step = operands
        products = a_step[:, None, :] * b_step[None, :, :]
        quantum = _quantum(jnp.maximum(jnp.max(jnp.abs(products), axis=-1), jnp.abs(total)))
        summed = jnp.sum(_truncate(products, quantum[..., None]), axis=-1) + _truncate(total, quantum)
        return _truncate(summed, _quantum(jnp.abs(summed))), None

    def one_interval(total, operands):
        a_steps, b_steps, sa, sb = operands
        part, _ = lax.scan(step, jnp.zeros((M, N), jnp.float32), (a_steps, b_steps))
        return total + part * (sa[:, None] * sb[None, :]), None

    blocks = interval // BLOCK_K
    sa = a_scale.T[::blocks]
    sb = jnp.repeat(b_scale, b_tile(N, b_scale)[0], axis=0)[:N].T[::blocks]
    total, _ = lax.scan(one_interval, jnp.zeros((M, N), jnp.float32), (cut(a), cut(b), sa, sb))
    return total
