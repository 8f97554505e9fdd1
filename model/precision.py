"""Which matmul runs how (V3 §3.3): `prepare`, `linear`, `linear_then`, `joint_linear`, `gate_up`, `grouped_*`, `weight_gradient`, `raw`.

Weights are stored [N, K] (outputs, inputs), FP32 masters; a pair of weights of one input is [2, N, K]; experts lead with E. A
product is x W^T. `prepare` makes, once an optimizer step, the low-precision copy each product reads; gradients reach the master.
Kinds: as_stored computes in the dtype of the parameters; bf16 and fp32 in theirs; the fp8 kinds (fp8_linear.py) in bf16 with every
matmul of a block in FP8. Norms, gate, softmax and RoPE are FP32 at least, whatever the kind; embedding and head stay bf16.
Shapes: M rows, K inputs, N outputs, E experts.
"""
from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from model import block_matmul, delayed_scaling, fp8_linear
from model import tape as tapes
from model.activation import swiglu
from model.after_linear import SwiGLU
from model.dtypes import at_least_f32
from model.errors import UserError, choice, freeze, require
from pallas_kernels import grouped_matmul
from pallas_kernels.target import is_hopper


class Weight(NamedTuple):
    """A matmul weight: FP32 master (None: stored FP8, cannot train), its copy in low precision, block scales (None: unscaled), and
    the copy's transpose, which an FP8 input gradient reads. A pair [2, N, K] is one [2N, K] in a copy made for training. past f32 [2]:
    what a delayed scale goes by (delayed_scaling.py), in a loss's weights only."""

    master: Any
    low: Any
    scale: Any
    transposed: Any = None
    past: Any = None


@dataclasses.dataclass(frozen=True)
class Precision:
    """A kind of KINDS; delayed: how fp8_delayed keeps its history."""

    kind: str = "as_stored"
    delayed: delayed_scaling.Delayed | None = None

    @property
    def dtype(self):
        """The dtype activations are computed in; None: that of the parameters."""
        return KINDS[self.kind]

    @property
    def recipe(self) -> fp8_linear.Recipe | None:
        """How the FP8 matmuls scale and accumulate; None for kinds without FP8."""
        return fp8_linear.RECIPES.get(self.kind)


# kind -> dtype of activations. as_stored leaves every array as it is.
KINDS = {"as_stored": None, "bf16": jnp.bfloat16, "fp32": jnp.float32} | {kind: jnp.bfloat16 for kind in fp8_linear.RECIPES}

OPTIONS = {"fp8_delayed": delayed_scaling.Delayed}  # kinds with leaves of their own

# The names of matmul weights in params: what `prepare` replaces. Embedding, head and gate stay as stored (V3 §3.3.1).
MATMULS = frozenset({
    "q", "q_down", "q_up", "kv_down", "kv_up", "k", "v", "out", "gate_up", "down", "shared_gate_up", "shared_down",
                     "proj"})


def parse(config: Mapping, path: str) -> Precision:
    """Freezes config.run.precision."""
    kind = choice(config["kind"], KINDS, f"{path}.kind")
    return Precision(kind, freeze(OPTIONS[kind], config[kind], f"{path}.{kind}") if kind in OPTIONS else None)


def is_weight(leaf: Any) -> bool:
    """True for a Weight: the leaf test of trees that may hold them."""
    return isinstance(leaf, Weight)


def prepare(params: Any, run) -> Any:
    """params with each matmul weight replaced by Weight(master, low, scale); nothing changes where the kind adds no copy.

    Call once an optimizer step, outside the micro-batch and layer scans.
    """
    dtype, recipe = run.precision.dtype, run.precision.recipe

    def one(path, leaf):
        name = path[-1].key
        if is_weight(leaf) or dtype is None or name not in MATMULS or (leaf.dtype == dtype and recipe is None):
            return leaf
        if recipe is None or path[0].key == "mtp" and name == "proj":
            return Weight(leaf, leaf.astype(dtype), None)
        pair = name.endswith("gate_up")
        q, transposed, scale = fp8_linear.quantize_weight(leaf.reshape(*leaf.shape[:-3], -1, leaf.shape[-1]) if pair else leaf, recipe)
        return Weight(leaf, q, scale, transposed)

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=is_weight)


def with_masters(prepared: Any, params: Any, past: Any = None) -> Any:
    """prepared with its masters (and plain leaves) taken from params: what a loss differentiates, the copies being constants. past f32
    [S, 2] is dealt to the FP8 weights, a row a layer; its gradient is what they saw (delayed_scaling.py)."""
    row = itertools.count()

    def one(old, new):
        if not is_weight(old):
            return new
        weight = old._replace(master=new, low=jax.lax.stop_gradient(old.low))
        rows = [next(row) for _ in range(len(new))] if past is not None and old.transposed is not None else []
        return weight._replace(past=past[rows[0]:rows[-1] + 1]) if rows else weight

    return jax.tree.map(one, prepared, params, is_leaf=is_weight)


def init_history(params: Any, run) -> Any:
    """The history f32 [S, 2, H] of a kind with delayed scales, S layers of FP8 weights; None for any other."""
    if run.precision.delayed is None:
        return None
    mesh = jax.sharding.get_abstract_mesh()  # the experts' shard_map would add what its shards saw
    require(mesh.empty or mesh.size == 1, "run.precision.kind", f"{run.precision.kind} on {mesh.size} devices", "one device for this kind")
    prepared = jax.tree.leaves(jax.eval_shape(lambda params: prepare(params, run), params), is_leaf=is_weight)
    return delayed_scaling.init(sum(len(w.master) for w in prepared if is_weight(w) and w.transposed is not None), run.precision.delayed)


def raw(w, dtype):
    """The plain array of a weight in dtype: dequantised if it is stored in blocks, the low copy otherwise."""
    if not is_weight(w):
        return w.astype(dtype)
    if w.scale is None:
        return (w.low if w.master is None else _low_as(w.master, w.low)).astype(dtype)
    plain = dequantize(w.low, w.scale, dtype)
    return plain if w.master is None else _low_as(w.master, plain.reshape(w.master.shape))


def dequantize(low, scale, dtype):
    """low [..., N, K] times scale [..., ceil(N/128), ceil(K/128)] repeated over 128 x 128 blocks (README_WEIGHTS of V3)."""
    n, k = low.shape[-2:]
    full = jnp.repeat(jnp.repeat(scale, 128, axis=-2), 128, axis=-1)[..., :n, :k]
    return (low.astype(jnp.float32) * full).astype(dtype)


@jax.custom_vjp
def _low_as(master, low):
    """low, with gradients flowing to master."""
    return low


_low_as.defvjp(lambda master, low: (low, master), lambda master, g: (g.astype(master.dtype), jnp.zeros_like(g)))


def linear(x, w, run, site: str, tape: tapes.LayerTape | None = None, *, gate_up=None):
    """x [..., K] times w [N, K]^T -> [..., N] in x's dtype; w [2, N, K] gives [..., 2N]. w: array or Weight.

    gate_up [..., 2K], where x is its SwiGLU: FP8 sites quantise from it in one kernel.
    """
    flat = x.reshape(-1, x.shape[-1])  # with 3-D inputs XLA's CPU weight gradient runs on one thread
    with jax.named_scope(site):
        if _is_fp8(w, run):
            gate_up = None if gate_up is None else gate_up.reshape(-1, gate_up.shape[-1])
            cached = fp8_linear.quantize_input(flat, site, run.precision.recipe, gate_up, w.past)
            y = tapes.write(tape, site, cached, lambda stored: fp8_linear.linear(flat, cached, w, run.precision.recipe, stored=stored))
        else:
            merged = _merge(w, 0, x.dtype)
            y = tapes.write(tape, site, flat, lambda stored: _dense(flat, merged, stored))
    return y.reshape(*x.shape[:-1], y.shape[-1])


def joins(ws, run, tape: tapes.LayerTape | None = None) -> bool:
    """Whether `joint_linear` takes these weights: low-precision copies of training. Not weights as stored, a tape's (it knows sites), and
    FP8 weights whose blocks another would break into."""
    recipe = run.precision.recipe
    if tape is not None and tape.tape is not None or not all(is_weight(w) and w.master is not None for w in ws):
        return False
    return recipe is None or not recipe.tensor and all(w.master.shape[0] % 128 == 0 for w in ws[:-1])


def joint_linear(x, ws, run, site: str):
    """x [..., K] times all of ws [N1, K]^T, [N2, K]^T, ... -> [..., N1 + N2 + ...] as one product, whose input gradient is then one as
    well, where several would be written and added."""
    return linear(x, _join(ws), run, site)


def _join(ws) -> Weight:
    """One Weight [N1 + N2 + ..., K]."""
    def along(axis, *leaves):
        return None if leaves[0] is None else jnp.concatenate(leaves, axis)

    master, low, scale, transposed, _ = zip(*ws, strict=True)
    return Weight(along(0, *master), along(0, *low), along(0, *scale), along(1, *transposed))


def fuses(w, run, tape: tapes.LayerTape | None = None) -> bool:
    """Whether w's gradients are quantised where they are made (`linear_then`, `fp8_linear.carried`): under a recipe of tiles, where no tape
    takes the matmuls apart."""
    return _is_fp8(w, run) and run.precision.recipe.tiles and (tape is None or tape.tape is None)


def linear_then(after, x, w, run, site: str, tape: tapes.LayerTape | None = None, *operands):
    """after.apply(`linear`'s y [M, N], *operands) for x [..., K], M its leading axes in one; `after` is of after_linear.py."""
    flat = x.reshape(-1, x.shape[-1])
    if not fuses(w, run, tape):
        return after.apply(linear(flat, w, run, site, tape), *operands)
    with jax.named_scope(site):
        recipe = run.precision.recipe
        return fp8_linear.followed(after, flat, fp8_linear.quantize_input(flat, site, recipe), w, recipe, operands)


def gate_up(x, w, run, site: str, tape: tapes.LayerTape | None = None):
    """(gate and up [..., 2F], `linear`'s of w [2, F, K]; hidden [..., F], their SwiGLU), for a `linear` that takes both."""
    return tuple(y.reshape(*x.shape[:-1], -1) for y in linear_then(SwiGLU(), x, w, run, site, tape))


def grouped_linear(rows, group_sizes, w, run, site: str, tape: tapes.LayerTape | None = None, *, align: int = 1, gate_up=None,
                   quantized=None):
    """rows [M, K], sorted by expert, times each one's w [E, N, K]^T (or [E, 2, N, K]) -> [M, N]; rows past the last group give 0.

    group_sizes i32 [E]; `align` is a number every group size is known to be a multiple of (dispatch pads to it). gate_up as in
    `linear`; `quantized`: rows as dispatch brought them in FP8 (`quantize_tokens`).
    """
    with jax.named_scope(site):
        if _is_fp8(w, run):
            recipe = run.precision.recipe
            cached = fp8_linear.quantize_input(rows, site, recipe, gate_up, w.past) if quantized is None else quantized
            return tapes.write(tape, site, cached, lambda stored: fp8_linear.linear(rows, cached, w, recipe, group_sizes, stored),
                               group_sizes)
        static = (choose_experts(run.experts, rows.dtype), align)
        w = _merge(w, 1, rows.dtype)
        return tapes.write(tape, site, rows, lambda stored: _grouped(static, rows, w, group_sizes, stored), group_sizes)


def grouped_gate_up(rows, group_sizes, w, run, site: str, tape: tapes.LayerTape | None = None, *, align: int = 1, quantized=None,
                    weights=None):
    """(gate and up [M, 2F] as `grouped_linear` has them for w [E, 2, F, K]; hidden [M, F], their SwiGLU), for `grouped_down`.

    weights f32 [M], where it `fuses` alone: what each row of hidden is multiplied by.
    """
    if fuses(w, run, tape):
        with jax.named_scope(site):
            recipe = run.precision.recipe
            cached = fp8_linear.quantize_input(rows, site, recipe) if quantized is None else quantized
            return fp8_linear.followed(SwiGLU(), rows, cached, w, recipe, () if weights is None else (weights,), group_sizes)
    if _is_fp8(w, run) or choose_experts(run.experts, rows.dtype) != "kernel":
        y = grouped_linear(rows, group_sizes, w, run, site, tape, align=align, quantized=quantized)
        return y, swiglu(y)
    with jax.named_scope(site):
        y, hidden = _grouped_swiglu(rows, _merge(w, 1, rows.dtype), group_sizes, tapes.stored(tape, site))
        y = tapes.write(tape, site, rows, lambda stored: y, group_sizes)
        return y, swiglu(y, hidden)


def grouped_down(hidden, group_sizes, w, run, site: str, tape: tapes.LayerTape | None = None, *, align: int = 1, gate_up=None,
                 weights=None):
    """`grouped_linear` of hidden [M, F], the SwiGLU of gate_up [M, 2F]; with the weights that `grouped_gate_up` had, as an
    `fp8_linear.Carried`."""
    if weights is None:
        return grouped_linear(hidden, group_sizes, w, run, site, tape, align=align, gate_up=gate_up)
    with jax.named_scope(site):
        cached = fp8_linear.quantize_input(hidden, site, run.precision.recipe, gate_up, weights=weights)
        return fp8_linear.carried(hidden, cached, w, run.precision.recipe, group_sizes)


def quantize_tokens(x, w, run, site: str):
    """x [M, K] in FP8 as `grouped_linear` caches its rows, for a dispatch that moves bytes (V3 §3.3.3); None where w's kind has no tiles
    that a row could keep on its way."""
    recipe = run.precision.recipe
    return fp8_linear.quantize_input(x, site, recipe) if _is_fp8(w, run) and not recipe.tensor else None


def weight_gradient(x, dy, site: str, run, group_sizes=None):
    """The weight part of a backward: dy^T x, f32 or wider, [N, K] (experts: [E, N, K]) from a record's input and its dy.

    x [M, K], dy [M, N] as recorded by the tape of `linear`; with group_sizes as recorded by that of `grouped_linear`.
    """
    with jax.named_scope(f"{site}/weight_gradient"):
        if isinstance(x, tuple):  # the quantised input of an FP8 site
            return fp8_linear.weight_gradient(x, dy, run.precision.recipe, group_sizes)
        if group_sizes is None:
            return _dense_weight_gradient(x, dy)
        return EXPERTS[choose_experts(run.experts, x.dtype)].weight_gradient(x, dy, group_sizes, 1)


def _is_fp8(w, run) -> bool:
    return is_weight(w) and w.transposed is not None and run.precision.recipe is not None


def choose_experts(kind: str, dtype) -> str:
    """The implementation of expert products: 'auto' takes our kernel on a Hopper GPU in bf16, the block form elsewhere."""
    if kind in ("auto", "masked"):
        return "kernel" if dtype == jnp.bfloat16 and is_hopper() else "block"
    return kind


# our bf16 kernel takes the groups as they are; its weight gradient wants them padded to 64 rows, as dispatch pads them on a GPU
EXPERTS = block_matmul.KINDS | {"kernel": block_matmul.Grouped(
    lambda rows, w, sizes, align: grouped_matmul.matmul(rows, w, sizes),
    lambda dy, w, sizes, align: grouped_matmul.dgrad(dy, w, sizes),
    lambda rows, dy, sizes, align: grouped_matmul.weight_gradient(dy, rows, sizes))}


def _merge(w, axis: int, dtype):
    """A weight [..., 2, N, K] seen as [..., 2N, K]; one stored in blocks is dequantised to dtype first (edge blocks may be partial)."""
    def flat(leaf):
        return None if leaf is None else leaf.reshape(*leaf.shape[:axis], -1, leaf.shape[-1])

    if not is_weight(w):
        return flat(w)
    if w.scale is None:
        return Weight(flat(w.master), flat(w.low), None)
    return Weight(None, flat(dequantize(w.low, w.scale, dtype)), None)


def _operand(w, dtype):
    return (w.low if is_weight(w) else w).astype(dtype)


def _gradient_of(w, dw):
    """dw as the cotangent of w: of the array, or of the master with nothing for the copy."""
    if not is_weight(w):
        return dw.astype(w.dtype)
    return Weight(None if w.master is None else dw.astype(w.master.dtype), jnp.zeros_like(w.low), None)


def _refuse_stored(w):
    if is_weight(w) and w.master is None:
        raise UserError("params: weights stored in FP8 have no masters and cannot train, allowed: load them with a float dtype")


def _dense_weight_gradient(x, dy):
    dtype = at_least_f32(x.dtype)
    return jax.lax.dot_general(dy, x, (((0,), (0,)), ((), ())), preferred_element_type=dtype)


@jax.custom_vjp
def _dense(x, w, stored):
    """x w^T, or its stored value (the product is then dropped, its gradients are not)."""
    return stored if stored is not None else jax.lax.dot_general(x, _operand(w, x.dtype), (((1,), (1,)), ((), ())))


def _dense_forward(x, w, stored):
    _refuse_stored(w)
    return _dense(x, w, stored), (x, w, stored is not None)


def _dense_backward(residuals, dy):
    x, w, replayed = residuals
    dx = jax.lax.dot_general(dy, _operand(w, dy.dtype), (((1,), (0,)), ((), ())))
    return dx, _gradient_of(w, _dense_weight_gradient(x, dy)), jnp.zeros_like(dy) if replayed else None


_dense.defvjp(_dense_forward, _dense_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(static, rows, w, group_sizes, stored):
    """Each group's rows times its expert's weight, or the stored value."""
    if stored is not None:
        return stored
    implementation, align = static
    return EXPERTS[implementation].product(rows, _operand(w, rows.dtype), group_sizes, align)


def _grouped_forward(static, rows, w, group_sizes, stored):
    _refuse_stored(w)
    return _grouped(static, rows, w, group_sizes, stored), (rows, w, group_sizes, stored is not None)


def _grouped_backward(static, residuals, dy):
    rows, w, group_sizes, replayed = residuals
    implementation, align = static
    kind = EXPERTS[implementation]
    dx = kind.input_gradient(dy, _operand(w, dy.dtype), group_sizes, align)
    dw = kind.weight_gradient(rows, dy, group_sizes, align)
    return dx, _gradient_of(w, dw), None, jnp.zeros_like(dy) if replayed else None


_grouped.defvjp(_grouped_forward, _grouped_backward)


@jax.custom_vjp
def _grouped_swiglu(rows, w, group_sizes, stored):
    """`_grouped` by gate and up, and silu(gate) * up from the same kernel; of a stored value None."""
    if stored is not None:
        return stored, None
    return grouped_matmul.matmul_swiglu(rows, _operand(w, rows.dtype).reshape(group_sizes.shape[0], 2, -1, rows.shape[1]), group_sizes)


def _grouped_swiglu_forward(rows, w, group_sizes, stored):
    _refuse_stored(w)
    return _grouped_swiglu(rows, w, group_sizes, stored), (rows, w, group_sizes, stored is not None)


_grouped_swiglu.defvjp(_grouped_swiglu_forward, lambda residuals, dy: _grouped_backward(("kernel", 1), residuals, dy[0]))
