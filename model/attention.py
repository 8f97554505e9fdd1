"""Multi-head latent attention (V3 §2.1.1, eq. 1-11; V2 §2.1, App. C), and multi-head, grouped- and multi-query attention beside it.

MLA keeps, per token and layer, the normalised latent c_t^KV and one rotated key k_t^R shared by all heads, and nothing else.
Training and prefill expand the latent to per-head keys and values; decoding absorbs W^UK into the query and W^UV into the output
(V2 §2.1.2), which is multi-query attention over the cache. Both are the same function of the same parameters.
Gated attention (Qiu et al. 2505.06708) is MLA whose heads a sigmoid of the block's input scales before the output projection.
A kind is a frozen dataclass (its shapes and counts) and a Linen module with `__call__(x, layout, cache, tape) -> (out, cache)`.
Shapes: B batch, T query, S key, D d_model, H heads, G key/value heads, N qk_nope_head_dim, R qk_rope_head_dim, P v_head_dim,
C kv_lora_rank, Q q_lora_rank.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo

from model import block_attention, precision
from model.after_linear import KeysValues, Rotated
from model.dtypes import at_least_f32
from model.errors import freeze, require
from model.norm import norm_param, rms_norm, split_rms_norm
from model.rope import rotate
from model.sharding import constrain, normal, param

LATENT_EPS = 1e-6  # of the norms of c^Q and c^KV in all published models, whatever their norm_eps (Moonlight's is 1e-5)


class Layout(NamedTuple):
    """Where the tokens of a call stand: rotation = cos, sin [B, T, R/2]; mask bool [B, T, S] or [B, T, T]; write [B, T] (cache rows)."""

    rotation: Any
    mask: Any
    write: Any = None
    causal_only: bool = False


class LayerCache(NamedTuple):
    """The cache as one layer sees it: kv, the kind's arrays [L, B, S, ...] of all layers, and layer i32 [], its own row of them."""

    kv: dict[str, Any]
    layer: Any


@dataclasses.dataclass(frozen=True)
class MLA:
    """Shapes of MLA; q_lora_rank 0: queries straight from x (V2-Lite)."""

    n_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    def __post_init__(self):
        for name in ("n_heads", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "a positive integer")
        require(self.q_lora_rank >= 0, "q_lora_rank", self.q_lora_rank, "0 (no compression of queries) or more")
        require(self.qk_rope_head_dim >= 2 and self.qk_rope_head_dim % 2 == 0, "qk_rope_head_dim", self.qk_rope_head_dim,
                "a positive even integer")

    @property
    def rotated(self) -> int:
        return self.qk_rope_head_dim

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def num_params(self, d_model: int) -> int:
        """Leaves of one attention layer."""
        return self.matmul_params(d_model) + self.q_lora_rank + self.kv_lora_rank

    def matmul_params(self, d_model: int) -> int:
        q_out = self.n_heads * self.qk_head_dim
        q = d_model * self.q_lora_rank + self.q_lora_rank * q_out if self.q_lora_rank else d_model * q_out
        kv = d_model * (self.kv_lora_rank + self.qk_rope_head_dim)
        kv += self.kv_lora_rank * self.n_heads * (self.qk_nope_head_dim + self.v_head_dim)
        return q + kv + self.n_heads * self.v_head_dim * d_model

    def core_flops(self, keys: float) -> float:
        """Forward FLOPs a token of scores and values over this many keys."""
        return 2 * self.n_heads * keys * (self.qk_head_dim + self.v_head_dim)

    def cache_shapes(self) -> dict[str, tuple[int, ...]]:
        """Trailing shapes of the cache arrays, a token and layer."""
        return {"c": (self.kv_lora_rank,), "k_rope": (self.qk_rope_head_dim,)}

    def module(self, cfg, run) -> nn.Module:
        return LatentAttention(cfg, run, name="attention")


@dataclasses.dataclass(frozen=True)
class GroupedQuery:
    """Shapes of MHA (n_kv_heads = n_heads), GQA and MQA (n_kv_heads = 1); RoPE on the whole head."""

    n_heads: int
    n_kv_heads: int
    head_dim: int

    def __post_init__(self):
        require(self.n_heads >= 1, "n_heads", self.n_heads, "a positive integer")
        require(self.n_kv_heads >= 1 and self.n_heads % self.n_kv_heads == 0, "n_kv_heads", self.n_kv_heads,
                f"a divisor of n_heads={self.n_heads}")
        require(self.head_dim >= 2 and self.head_dim % 2 == 0, "head_dim", self.head_dim, "a positive even integer")

    @property
    def rotated(self) -> int:
        return self.head_dim

    def num_params(self, d_model: int) -> int:
        return self.matmul_params(d_model)

    def matmul_params(self, d_model: int) -> int:
        return 2 * d_model * self.head_dim * (self.n_heads + self.n_kv_heads)

    def core_flops(self, keys: float) -> float:
        return 4 * self.n_heads * keys * self.head_dim

    def cache_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"k": (self.n_kv_heads, self.head_dim), "v": (self.n_kv_heads, self.head_dim)}

    def module(self, cfg, run) -> nn.Module:
        return GroupedQueryAttention(cfg, run, name="attention")


@dataclasses.dataclass(frozen=True)
class Gated:
    """MLA with a gate on every channel of every head; its leaves are MLA's."""

    mla: MLA

    @property
    def rotated(self) -> int:
        return self.mla.rotated

    def num_params(self, d_model: int) -> int:
        return self.mla.num_params(d_model) + self.mla.n_heads * self.mla.v_head_dim * d_model

    def matmul_params(self, d_model: int) -> int:
        return self.mla.matmul_params(d_model) + self.mla.n_heads * self.mla.v_head_dim * d_model

    def core_flops(self, keys: float) -> float:
        return self.mla.core_flops(keys)

    def cache_shapes(self) -> dict[str, tuple[int, ...]]:
        return self.mla.cache_shapes()

    def module(self, cfg, run) -> nn.Module:
        return GatedAttention(cfg, run, name="attention")


class LatentAttention(nn.Module):
    """MLA: x [B, T, D] -> (out [B, T, D], LayerCache of c [L, B, S, C] and k_rope [L, B, S, R], or None)."""

    cfg: Any
    run: Any

    @nn.compact
    def __call__(self, x_BTD, layout: Layout, cache, tape):
        heads, cache = latent_heads(self, self.cfg.attention, x_BTD, layout, cache, tape)
        w_out = param(self, "out", (x_BTD.shape[-1], heads.shape[-1]), ("embed", "heads"), normal(self.cfg.init_std))
        return precision.linear(heads, w_out, self.run, "mla/out", tape), cache


class GatedAttention(nn.Module):
    """Gated: out = W^O (heads * sigmoid(W^G x)); shapes and cache are LatentAttention's. W^G stays out of precision.MATMULS: never FP8."""

    cfg: Any
    run: Any

    @nn.compact
    def __call__(self, x_BTD, layout: Layout, cache, tape):
        heads, cache = latent_heads(self, self.cfg.attention.mla, x_BTD, layout, cache, tape)
        w_out = param(self, "out", (x_BTD.shape[-1], heads.shape[-1]), ("embed", "heads"), normal(self.cfg.init_std))
        w_gate = param(self, "head_gate", (heads.shape[-1], x_BTD.shape[-1]), ("heads", "embed"), normal(self.cfg.init_std))
        gate = jax.nn.sigmoid(precision.linear(x_BTD, w_gate, self.run, "mla/head_gate", tape))
        return precision.linear(tape.probe("mla", "gated", heads * gate), w_out, self.run, "mla/out", tape), cache


def latent_heads(module: nn.Module, a: MLA, x_BTD, layout: Layout, cache, tape):
    """MLA up to its output projection, as part of a module: x [B, T, D] -> (heads [B, T, H * P], the layer's cache or None)."""
    run, init = module.run, normal(module.cfg.init_std)
    B, T, D = x_BTD.shape
    q_width, kv_width = a.n_heads * a.qk_head_dim, a.n_heads * (a.qk_nope_head_dim + a.v_head_dim)

    w_kv_down = param(module, "kv_down", (a.kv_lora_rank + a.qk_rope_head_dim, D), ("kv_lora", "embed"), init)
    if a.q_lora_rank:
        w_q_down = param(module, "q_down", (a.q_lora_rank, D), ("q_lora", "embed"), init)
        q_norm = norm_param(module, "q_norm", a.q_lora_rank, "q_lora")
        w_q_up = param(module, "q_up", (q_width, a.q_lora_rank), ("heads", "q_lora"), init)
    else:
        w_q = param(module, "q", (q_width, D), ("heads", "embed"), init)
    kv_norm = norm_param(module, "kv_norm", a.kv_lora_rank, "kv_lora")
    w_kv_up = param(module, "kv_up", (kv_width, a.kv_lora_rank), ("heads", "kv_lora"), init)

    if a.q_lora_rank:
        c_q, c, k_rope = _latents(x_BTD, (w_q_down, w_kv_down), (q_norm, kv_norm), run, tape)
        queries = tape.probe("mla", "c_q", c_q), w_q_up, run, "mla/q_up"
    else:
        c, k_rope = split_rms_norm(precision.linear(x_BTD, w_kv_down, run, "mla/kv_down", tape), (kv_norm,), LATENT_EPS)
        queries = x_BTD, w_q, run, "mla/q"
    q_BTHK = precision.linear_then(Rotated(a.n_heads), *queries, tape, *layout.rotation)
    c = tape.probe("mla", "c_kv", c)
    k_rope = rotate(k_rope[:, :, None], layout.rotation)[:, :, 0]
    if cache is not None:
        cache, held = append(cache, {"c": c, "k_rope": k_rope}, layout.write)
        c, k_rope = held["c"].astype(x_BTD.dtype), held["k_rope"].astype(x_BTD.dtype)

    scale = a.qk_head_dim ** -0.5 * module.cfg.rope.scaling.softmax_factor
    if cache is not None and run.absorbed_max >= T:
        q_nope, q_rope = jnp.split(q_BTHK, [a.qk_nope_head_dim], axis=-1)
        out = _absorbed(q_nope, q_rope, c, k_rope, precision.raw(w_kv_up, x_BTD.dtype), layout.mask, scale, a)
    else:
        k, v = precision.linear_then(KeysValues(a.n_heads, a.qk_nope_head_dim), c, w_kv_up, run, "mla/kv_up", tape, k_rope)
        out = core(q_BTHK, k, v, layout, scale, run)
    return tape.probe("mla", "core", out).reshape(B, T, a.n_heads * a.v_head_dim), cache


def _latents(x_BTD, weights, norms, run, tape):
    """By weights and norms of (q_down, kv_down): c^Q [B, T, Q] and c^KV [B, T, C], normalised, and k^R [B, T, R] before its rotation."""
    sites = "mla/q_down", "mla/kv_down"
    if precision.joins(weights, run, tape):
        return split_rms_norm(precision.joint_linear(x_BTD, weights, run, sites[0]), norms, LATENT_EPS)
    c_q, down = (precision.linear(x_BTD, w, run, site, tape) for w, site in zip(weights, sites, strict=True))
    return rms_norm(c_q, norms[0], LATENT_EPS), *split_rms_norm(down, norms[1:], LATENT_EPS)


class GroupedQueryAttention(nn.Module):
    """MHA, GQA, MQA: x [B, T, D] -> (out [B, T, D], LayerCache of k, v [L, B, S, G, P], or None)."""

    cfg: Any
    run: Any

    @nn.compact
    def __call__(self, x_BTD, layout: Layout, cache, tape):
        a, run, init = self.cfg.attention, self.run, normal(self.cfg.init_std)
        B, T, D = x_BTD.shape

        def project(name, heads):
            w = param(self, name, (heads * a.head_dim, D), ("heads", "embed"), init)
            return precision.linear(x_BTD, w, run, f"gqa/{name}", tape).reshape(B, T, heads, a.head_dim)

        q = rotate(project("q", a.n_heads), layout.rotation)
        k, v = rotate(project("k", a.n_kv_heads), layout.rotation), project("v", a.n_kv_heads)
        w_out = param(self, "out", (D, a.n_heads * a.head_dim), ("embed", "heads"), init)
        if cache is not None:
            cache, held = append(cache, {"k": k, "v": v}, layout.write)
            k, v = held["k"].astype(x_BTD.dtype), held["v"].astype(x_BTD.dtype)
        out = tape.probe("gqa", "core", core(q, k, v, layout, a.head_dim ** -0.5, run))
        return precision.linear(out.reshape(B, T, -1), w_out, run, "gqa/out", tape), cache


def append(cache: LayerCache, new: dict[str, Any], write_BT) -> tuple[LayerCache, dict[str, Any]]:
    """Puts the rows new [B, T, ...] at write [B, T]; past the capacity they are dropped. Returns the cache and its layer's arrays
    [B, S, ...]. One scatter into the whole cache: as scan inputs and outputs its layers would be copied at every decode step."""
    batch = jnp.arange(write_BT.shape[0])[:, None]
    kv = {k: v.at[cache.layer, batch, write_BT].set(new[k].astype(v.dtype), mode="drop") for k, v in cache.kv.items()}
    return cache._replace(kv=kv), {k: jax.lax.dynamic_index_in_dim(v, cache.layer, keepdims=False) for k, v in kv.items()}


def _absorbed(q_nope, q_rope, c_BSC, k_rope_BSR, w_kv_up, mask, scale, a: MLA):
    """Attention over the latent cache: score = q^N W^UK c + q^R k^R; out = (softmax c) W^UV (V2 §2.1.2)."""
    with jax.named_scope("mla/absorbed"):
        w = w_kv_up.reshape(a.n_heads, a.qk_nope_head_dim + a.v_head_dim, a.kv_lora_rank)
        w_k, w_v = w[:, :a.qk_nope_head_dim], w[:, a.qk_nope_head_dim:]
        q_BTHC = jnp.einsum("BTHN,HNC->BTHC", q_nope, w_k)
        scores = jnp.einsum("BTHC,BSC->BHTS", q_BTHC, c_BSC) + jnp.einsum("BTHR,BSR->BHTS", q_rope, k_rope_BSR)
        weights = _softmax(scores, mask, scale)
        # heads and queries as one axis: XLA's CPU runs this product by its matmul library, one over four axes by a plain loop
        mixed = jnp.einsum("BMS,BSC->BMC", weights.reshape(weights.shape[0], -1, weights.shape[-1]), c_BSC)
        return jnp.einsum("BHTC,HPC->BTHP", mixed.reshape(*weights.shape[:3], -1), w_v)


def core(q_BTHK, k_BSGK, v_BSGP, layout: Layout, scale: float, run):
    """softmax(q k^T scale) v in float32 at least -> [B, T, H, P]; k and v heads are repeated over the query heads of a group."""
    with jax.named_scope("mla/core"):
        if _use_cudnn(run.attention, layout, q_BTHK):
            return _cudnn(q_BTHK, k_BSGK, v_BSGP, scale)
        repeats = q_BTHK.shape[2] // k_BSGK.shape[2]
        if repeats > 1:
            k_BSGK, v_BSGP = jnp.repeat(k_BSGK, repeats, axis=2), jnp.repeat(v_BSGP, repeats, axis=2)
        if _use_blocks(layout, q_BTHK):
            return block_attention.attend(q_BTHK, k_BSGK, v_BSGP, layout.mask, scale)
        q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q_BTHK, k_BSGK, v_BSGP))
        q = constrain(q, ("batch", "heads", "seq", "head"))
        weights = _softmax(jnp.einsum("BHTK,BHSK->BHTS", q, k), layout.mask, scale)
        return jnp.swapaxes(jnp.einsum("BHTS,BHSP->BHTP", weights, v), 1, 2)


def _cudnn(q, k, v, scale: float):
    """Causal attention by cuDNN, v narrower than q and k as MLA's is. `jax.nn.dot_product_attention` would want v padded to their width;
    the function beneath it takes them as they are (jax is pinned; tests/test_attention.py holds it on a GPU)."""
    return fused_attention_stablehlo.dot_product_attention(
        q, k, v, scale=scale, mask_type=fused_attention_stablehlo.MaskType.CAUSAL, qkv_layout="BTNH")


def _use_cudnn(kind: str, layout: Layout, q) -> bool:
    if kind == "auto":
        return layout.causal_only and q.dtype == jnp.bfloat16 and jax.default_backend() == "gpu"
    return kind == "cudnn" and layout.causal_only


def _use_blocks(layout: Layout, q) -> bool:
    """On a CPU, where each pass over the scores costs as much as a product; narrower floats keep their rounding of the weights."""
    return jax.default_backend() == "cpu" and layout.write is None and q.dtype == at_least_f32(q.dtype)


def _softmax(scores_BHTS, mask_BTS, scale: float):
    """Masked softmax over S in float32 at least, back in the dtype of the scores; a row that sees nothing gives junk, finite."""
    wide = scores_BHTS.astype(at_least_f32(scores_BHTS.dtype)) * scale
    wide = jnp.where(mask_BTS[:, None], wide, jnp.finfo(wide.dtype).min)
    return jax.nn.softmax(wide, axis=-1).astype(scores_BHTS.dtype)


def _multi_head(config: Mapping, path: str) -> GroupedQuery:
    return freeze(GroupedQuery, config, path, n_kv_heads=config["n_heads"])


def _multi_query(config: Mapping, path: str) -> GroupedQuery:
    return freeze(GroupedQuery, config, path, n_kv_heads=1)


KINDS = {
    "mla": MLA,
    "gqa": GroupedQuery,
    "mha": _multi_head,
    "mqa": _multi_query,
    "gated": lambda config, path: Gated(freeze(MLA, config, path)),
}
