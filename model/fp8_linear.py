"""The FP8 linear (V3 §3.3): forward, input gradient and weight gradient on E4M3 operands with fine-grained scales.

| product | left | right |
|---|---|---|
| y = x W^T | x in 1x128 tiles | W in 128x128 blocks |
| dx = dy W | dy in 1x128 tiles | the transposed copy of W, its scales transposed |
| dW = dy^T x | dy in 128x1 tiles | the cached x, re-quantised 128x1 |

`followed` is a linear with what comes after it (after_linear.py), whose gradient is the operands of dy themselves; `carried` takes its
gradient as the bytes that dispatch moved to the experts (V3 §3.3.3).

Under a mesh every data shard quantises and multiplies its own rows (XLA would give each device all of them: it cannot split a kernel);
the columns of a dense weight are not split over `tensor`.

The residual is the quantised input, named '<site>/input' so that remat can keep it. The input of the linear after attention is
cached E5M6-valued with power-of-two scales and converted to E4M3 for each product. Recipes beside `fp8_block` are ablations:
per-tensor scales (current, or delayed: delayed_scaling.py), 128x128 blocks for gradients (App. B.2: diverged at 16B), no promotion
(per-tensor scales, which alone allow it).
"""
from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from model import delayed_scaling
from model.sharding import by_rows
from pallas_kernels import fp8_matmul, grouped_fp8_matmul, quantize

CACHED_WIDE = frozenset({"mla/out", "gqa/out"})
DISPATCHED = frozenset({"moe/gate_up", "moe/shared_gate_up"})  # what travels has power-of-two scales (V3 §3.3.3); one copy serves both


@dataclasses.dataclass(frozen=True)
class Recipe:
    """tensor: one scale a tensor instead of tiles; gradient_blocks: dy in 128x128 blocks; promote: partial sums to FP32 every 128 of K."""

    tensor: bool = False
    gradient_blocks: bool = False
    promote: bool = True

    @property
    def tiles(self) -> bool:
        """Activations and gradients are in V3's tiles."""
        return not self.tensor and not self.gradient_blocks


class Carried(NamedTuple):
    """A product y bf16 [M, N] whose gradient is that of (q E4M3 [M, N], scale f32 [M, N/128]), zeros that nothing reads: in 1x128 tiles.
    No gradient of y itself is read."""

    y: Any
    q: Any
    scale: Any


RECIPES = {
    "fp8_block": Recipe(),
    "fp8_tensor": Recipe(tensor=True),
    "fp8_delayed": Recipe(tensor=True),  # by the history that the weight brings
    "fp8_block_grad": Recipe(gradient_blocks=True),
    "fp8_no_promotion": Recipe(tensor=True, promote=False),
}


def quantize_weight(w, recipe: Recipe):
    """w [..., N, K] -> (q [..., N, K], transposed copy [..., K, N], scale [..., N/128, K/128])."""
    if not recipe.tensor:
        return quantize.quantize_weight(w)
    n, k = w.shape[-2:]
    scale = jnp.max(jnp.abs(w), axis=(-2, -1), keepdims=True) / 448 + 1e-30
    q = _to_e4m3(w / scale)
    return q, q.mT, jnp.broadcast_to(scale, (*w.shape[:-2], -(-n // 128), -(-k // 128)))


def quantize_input(x, site: str, recipe: Recipe, gate_up=None, past=None, weights=None):
    """x [M, K] -> the cached operand (q, scale): E4M3 in 1x128 tiles, or E5M6 with power-of-two scales after attention.

    gate_up [M, 2K]: what x is the SwiGLU of, times weights f32 [M] if given; activation and quantisation are then one kernel, and x
    itself is never written. past f32 [2]: what a delayed scale goes by (input, gradient); its backward's part joins the operand: (q,
    scale, past of the gradient, max |x|).
    """
    x = jax.lax.stop_gradient(x)
    if recipe.tensor:
        past = (None, None) if past is None else jax.lax.stop_gradient(past)
        q, scale, seen = _tensor(x, past[0])
        cached = q, _spread(scale, (x.shape[0], -(-x.shape[1] // 128))), *(() if past[1] is None else (past[1], seen))
    elif gate_up is not None:
        operands = jax.lax.stop_gradient((gate_up,) if weights is None else (gate_up, weights))
        cached = by_rows(lambda h, w=None: quantize.swiglu_quantize(h, weights=w), *operands)
    elif site in CACHED_WIDE:
        cached = by_rows(lambda x: quantize.quantize_tiles(x, (1, 128), "e5m6", power_of_two=True), x)
    else:
        cached = by_rows(functools.partial(quantize.quantize_tiles, power_of_two=site in DISPATCHED), x)
    return checkpoint_name(cached, f"{site}/input")


def linear(x, cached, w, recipe: Recipe, group_sizes=None, stored=None):
    """x [M, K] with its cached operand, w = (master, low [N, K], scale, transposed) -> bf16 [M, N], or the stored value.

    With group_sizes: rows sorted by expert, every group a multiple of 128 rows; w's leaves lead with E.
    """
    return _linear(recipe, x, cached, w.master, (w.low, w.scale, w.transposed, w.past), group_sizes, stored)


def followed(after, x, cached, w, recipe: Recipe, operands=(), group_sizes=None):
    """after.apply(`linear`'s y, *operands) by a recipe of tiles; its gradient reaches y as after.gradient quantises it."""
    return _followed(recipe, after, x, cached, w.master, (w.low, w.scale, w.transposed, w.past), group_sizes, operands)


def carried(x, cached, w, recipe: Recipe, group_sizes) -> Carried:
    """`linear`'s product by a recipe of tiles, with the gradient in FP8."""
    return _carried(recipe, x, cached, w.master, (w.low, w.scale, w.transposed, w.past), group_sizes)


def weight_gradient(cached, dy, recipe: Recipe, group_sizes=None):
    """dW f32 [N, K] (experts [E, N, K]) from the cached input and dy [M, N]."""
    return _weight_gradient(cached, _columns(dy, recipe, *cached[2:3]), recipe, group_sizes)


def _forward_operand(cached, recipe: Recipe):
    q, scale = cached[:2]
    return (q, scale) if q.dtype == jnp.float8_e4m3fn else by_rows(lambda q, s: quantize.requantize_tiles(q, s, (1, 128)), q, scale)


def _rows(dy, recipe: Recipe, past=None):
    """dy for the input gradient."""
    if recipe.tensor:
        q, scale, _ = _tensor(dy, past)
        return q, _spread(scale, (dy.shape[0], -(-dy.shape[1] // 128)))
    if recipe.gradient_blocks:
        q, scale = quantize.quantize_tiles(dy, (128, 128))
        return q, jnp.repeat(scale, 128, axis=0)[:dy.shape[0]]
    return by_rows(quantize.quantize_tiles, dy)


def _columns(dy, recipe: Recipe, past=None):
    """dy for the weight gradient."""
    if recipe.tensor:
        q, scale, _ = _tensor(dy, past)
        return q, _spread(scale, (-(-dy.shape[0] // 128), dy.shape[1]))
    if recipe.gradient_blocks:
        q, scale = quantize.quantize_tiles(dy, (128, 128))
        return q, jnp.repeat(scale, 128, axis=1)[:, :dy.shape[1]]
    return quantize.quantize_tiles(dy, (128, 1))


def _both(dy, recipe: Recipe, past=None):
    """(rows, columns) of dy, in one read where the recipe is V3's."""
    if recipe.tensor or recipe.gradient_blocks:
        return _rows(dy, recipe, past), _columns(dy, recipe, past)
    return by_rows(quantize.quantize_both, dy, tile=128)


def _weight_gradient(cached, columns, recipe: Recipe, group_sizes):
    def product(q, scale, *columns):
        if recipe.tensor:
            x = q, _spread(scale[0, 0], (-(-q.shape[0] // 128), q.shape[1]))
        else:
            x = quantize.requantize_tiles(q, scale, (128, 1))
        if group_sizes is None:
            return fp8_matmul.weight_gradient(*columns, *x)
        return grouped_fp8_matmul.weight_gradient(*columns, *x, group_sizes)

    if group_sizes is not None:  # rows of experts are one shard's own already
        return product(*cached[:2], *columns)
    return by_rows(product, *cached[:2], *columns, tile=128, summed=True)


def _matmul(a, a_scale, b, b_scale, recipe: Recipe):
    promotion = 128 if recipe.promote else -(-a.shape[1] // 128) * 128
    return by_rows(functools.partial(fp8_matmul.matmul, promotion=promotion), a, a_scale, whole=(b, b_scale))


def _product(recipe, cached, low, group_sizes):
    q, scale, *_ = low
    operand = _forward_operand(cached, recipe)
    if group_sizes is None:
        return _matmul(*operand, q, scale, recipe)
    return grouped_fp8_matmul.grouped_matmul(*operand, q, scale, group_sizes)


def _gradients(recipe, residuals, rows, columns):
    """(dx, dw) from both operands of dy."""
    cached, master, (_, scale, transposed, _), group_sizes, like = residuals
    if group_sizes is None:
        dx = _matmul(*rows, transposed, scale.mT, recipe)
    else:
        dx = grouped_fp8_matmul.grouped_matmul(*rows, transposed, scale.mT, group_sizes)
    return dx.astype(like.dtype), _weight_gradient(cached, columns, recipe, group_sizes).reshape(master.shape).astype(master.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(recipe, x, cached, master, low, group_sizes, stored):
    return stored if stored is not None else _product(recipe, cached, low, group_sizes).astype(x.dtype)


def _linear_forward(recipe, x, cached, master, low, group_sizes, stored):
    residuals = cached, master, low, group_sizes, x[:0]
    return _linear(recipe, x, cached, master, low, group_sizes, stored), (residuals, stored is not None)


def _linear_backward(recipe, saved, dy):
    residuals, replayed = saved
    cached = residuals[0]
    dx, dw = _gradients(recipe, residuals, *_both(dy, recipe, *cached[2:3]))
    return dx, None, dw, _seen(cached, dy), None, jnp.zeros_like(dy) if replayed else None


_linear.defvjp(_linear_forward, _linear_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _followed(recipe, after, x, cached, master, low, group_sizes, operands):
    return after.apply(_product(recipe, cached, low, group_sizes).astype(x.dtype), *operands)


def _followed_forward(recipe, after, x, cached, master, low, group_sizes, operands):
    y = _product(recipe, cached, low, group_sizes).astype(x.dtype)
    residuals = cached, master, low, group_sizes, x[:0]
    return after.apply(y, *operands), (residuals, y if after.keeps else None, operands)


def _followed_backward(recipe, after, saved, gradients):
    residuals, y, operands = saved
    rows, columns, d_operands = after.gradient(y, gradients, *operands)
    dx, dw = _gradients(recipe, residuals, rows, columns)
    return dx, None, dw, None, None, d_operands


_followed.defvjp(_followed_forward, _followed_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _carried(recipe, x, cached, master, low, group_sizes):
    y = _product(recipe, cached, low, group_sizes).astype(x.dtype)
    return Carried(y, jnp.zeros_like(y, jnp.float8_e4m3fn), jnp.zeros_like(y[:, ::128], jnp.float32))


def _carried_forward(recipe, x, cached, master, low, group_sizes):
    return _carried(recipe, x, cached, master, low, group_sizes), (cached, master, low, group_sizes, x[:0])


def _carried_backward(recipe, residuals, dy):
    rows = dy.q, dy.scale
    dx, dw = _gradients(recipe, residuals, rows, quantize.requantize_tiles(*rows, (128, 1), power_of_two=True))
    return dx, None, dw, None, None


_carried.defvjp(_carried_forward, _carried_backward)


def _seen(cached, dy):
    """The cotangent of a weight's operands: nothing, but for the past of a delayed scale what this call saw (delayed_scaling.py)."""
    return (None, None, None, jnp.stack([cached[3], jnp.max(jnp.abs(dy.astype(jnp.float32)))])) if len(cached) > 2 else None


def _tensor(x, past=None):
    """(q, scale, max |x|): one scale, by its own largest value or by that of its past."""
    x = x.astype(jnp.float32)
    seen = jnp.max(jnp.abs(x))
    scale = delayed_scaling.largest(seen, past) / 448 + 1e-30
    return _to_e4m3(x / scale), scale, seen


def _to_e4m3(x):
    return jnp.clip(x, -448, 448).astype(jnp.float8_e4m3fn)


def _spread(scale, shape: tuple[int, ...]):
    return jnp.full(shape, scale, jnp.float32)
