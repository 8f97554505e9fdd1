"""config.json of deepseek_v3 and deepseek_v2 <-> config.model: the same model in two vocabularies.

Read as transformers 5.17.0 reads it, whose defaults stand where a key is absent: YaRN by `rope_scaling` + `rope_theta` or by
`rope_parameters`; V3's gate is always sigmoid with a bias, V2's softmax with raw weights. Written with the published files' keys.
What the other side cannot run equally is refused in one line. Training leaves: aux_loss_alpha is the balance loss, seq_aux its scope.
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model import attention, moe, rope
from model.config import ModelConfig
from model.errors import UserError, choice, leaf, require

BLOCK = [128, 128]
# What transformers 5.17.0 assumes where a key is absent; None: not limited.
DEFAULTS = {
    "deepseek_v3": dict(first_k_dense_replace=3, n_shared_experts=1, n_group=8, topk_group=4, routed_scaling_factor=2.5,
                        max_position_embeddings=4096),
    "deepseek_v2": dict(first_k_dense_replace=0, n_shared_experts=2, n_group=None, topk_group=None, routed_scaling_factor=1.0,
                        max_position_embeddings=2048),
}
# Keys that change the function computed, and the one value we compute.
FIXED = dict(hidden_act="silu", attention_bias=False, mlp_bias=False, rope_interleave=True, moe_layer_freq=1)


def read(hf: Mapping[str, Any], path: str, mtp_depth: int) -> dict[str, Any]:
    """config.model's subtree for a config.json's content; path names the file in errors, mtp_depth is what the weights hold."""
    kind = choice(hf.get("model_type"), DEFAULTS, f"{path}.model_type")
    hf = {**DEFAULTS[kind], **hf}
    for key, value in FIXED.items():
        require(hf.get(key, value) == value, f"{path}.{key}", hf.get(key), repr(value))
    quantization = hf.get("quantization_config")
    if quantization is not None:
        choice(quantization.get("quant_method"), ("fp8",), f"{path}.quantization_config.quant_method")
        found = quantization.get("weight_block_size", BLOCK)
        require(list(found or ()) == BLOCK, f"{path}.quantization_config.weight_block_size", found, str(BLOCK))

    def integer(key: str) -> int:
        return leaf(hf, key, int, path)

    n_layers = integer("num_hidden_layers")
    n_dense = min(integer("first_k_dense_replace"), n_layers)
    q_rank = hf.get("q_lora_rank", 1536)
    require(q_rank is None or isinstance(q_rank, int), f"{path}.q_lora_rank", q_rank, "null or an integer")
    if n_dense == n_layers and hf.get("n_routed_experts") is None:
        ffn = dict(kind="dense", dense={})
    else:
        ffn = dict(kind="moe", moe=dict(
            n_routed_experts=integer("n_routed_experts"), n_shared_experts=hf["n_shared_experts"] or 0,
            n_activated_experts=integer("num_experts_per_tok"), d_expert=integer("moe_intermediate_size"),
            route_scale=leaf(hf, "routed_scaling_factor", float, path), **_ROUTING[kind](hf, path)))
    return dict(
        vocab_size=integer("vocab_size"), d_model=integer("hidden_size"), n_layers=n_layers, n_dense_layers=n_dense,
        d_ff=integer("intermediate_size"), norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
        init_std=float(hf.get("initializer_range", 0.02)), mtp_depth=mtp_depth,
        attention=dict(kind="mla", mla=dict(
            n_heads=integer("num_attention_heads"), q_lora_rank=q_rank or 0, kv_lora_rank=integer("kv_lora_rank"),
            qk_nope_head_dim=integer("qk_nope_head_dim"), qk_rope_head_dim=integer("qk_rope_head_dim"),
            v_head_dim=integer("v_head_dim"))),
        rope=_read_rope(hf, path), ffn=ffn)


def _read_rope(hf: Mapping[str, Any], path: str) -> dict[str, Any]:
    name = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
    found, path = dict(hf.get(name) or {}), f"{path}.{name}"
    theta = float(found.get("rope_theta", hf.get("rope_theta", 10000.0)))
    kind = choice(found.get("rope_type", found.get("type", "default")), ("default", "yarn"), f"{path}.rope_type")
    if kind == "default":
        return dict(theta=theta, scaling=dict(kind="none", none={}))
    original = found.get("original_max_position_embeddings", hf["max_position_embeddings"])
    yarn = dict(
        factor=float(found.get("factor") or hf["max_position_embeddings"] / original), original_max_position=original,
        beta_fast=float(found.get("beta_fast") or 32), beta_slow=float(found.get("beta_slow") or 1),
        mscale=float(found.get("mscale") or 0), mscale_all_dim=float(found.get("mscale_all_dim") or 0))
    require(found.get("truncate", True) is True, f"{path}.truncate", found.get("truncate"), "True")
    factor = rope.Yarn(**yarn).rotation_factor
    given = found.get("attention_factor")
    require(given is None or abs(given - factor) < 1e-6, f"{path}.attention_factor", given, f"null or {factor}, as the mscales say")
    return dict(theta=theta, scaling=dict(kind="yarn", yarn=yarn))


def _v3_routing(hf: Mapping[str, Any], path: str) -> dict[str, Any]:
    weights = "normalised" if hf.get("norm_topk_prob", True) else "raw"
    return dict(gate=dict(kind="sigmoid", sigmoid=dict(weights=weights)), groups=_groups(hf, "top2_sum"),
                balance=dict(kind="bias", bias=dict(alpha=float(hf.get("aux_loss_alpha") or 0))))


def _v2_routing(hf: Mapping[str, Any], path: str) -> dict[str, Any]:
    # norm_topk_prob is not read: no published V2 sets it, and transformers takes the raw weights whatever it says
    method = choice(hf.get("topk_method", "greedy"), ("greedy", "group_limited_greedy"), f"{path}.topk_method")
    choice(hf.get("scoring_func", "softmax"), ("softmax",), f"{path}.scoring_func")
    alpha = float(hf.get("aux_loss_alpha") or 0)
    balance = "none" if not alpha else "aux_loss" if hf.get("seq_aux", True) else "batch_aux"
    return dict(gate=dict(kind="softmax", softmax=dict(weights="raw")),
                groups=_groups(hf, "max") if method == "group_limited_greedy" else dict(kind="none", none={}),
                balance={"kind": balance, balance: {} if balance == "none" else dict(alpha=alpha)})


def _groups(hf: Mapping[str, Any], score: str) -> dict[str, Any]:
    if (hf["n_group"] or 1) == 1:
        return dict(kind="none", none={})
    return dict(kind="limited", limited=dict(n_expert_groups=hf["n_group"], n_limited_groups=hf["topk_group"], score=score))


_ROUTING = {"deepseek_v3": _v3_routing, "deepseek_v2": _v2_routing}


def write(cfg: ModelConfig, dtype: str, fp8: bool) -> dict[str, Any]:
    """The content of config.json. Raises UserError for a model that no deepseek_v2 or deepseek_v3 is."""
    a, m, yarn = cfg.attention, cfg.moe, cfg.rope.scaling
    require(isinstance(a, attention.MLA), "model.attention.kind", type(a).__name__, "mla, to be written for Hugging Face")
    v3 = m is None or m.gate.score == "sigmoid"
    scaled = isinstance(yarn, rope.Yarn)
    hf = dict(
        architectures=[f"Deepseek{'V3' if v3 else 'V2'}ForCausalLM"], model_type="deepseek_v3" if v3 else "deepseek_v2",
        vocab_size=cfg.vocab_size, hidden_size=cfg.d_model, intermediate_size=cfg.d_ff, num_hidden_layers=cfg.n_layers,
        first_k_dense_replace=cfg.n_dense_layers, num_nextn_predict_layers=cfg.mtp_depth, num_attention_heads=a.n_heads,
        num_key_value_heads=a.n_heads, q_lora_rank=a.q_lora_rank or None, kv_lora_rank=a.kv_lora_rank,
        qk_nope_head_dim=a.qk_nope_head_dim, qk_rope_head_dim=a.qk_rope_head_dim, v_head_dim=a.v_head_dim, rms_norm_eps=cfg.norm_eps,
        initializer_range=cfg.init_std, rope_theta=cfg.rope.theta, rope_scaling=None, tie_word_embeddings=False, use_cache=True,
        max_position_embeddings=int(yarn.factor * yarn.original_max_position) if scaled else 4096,
        attention_bias=False, attention_dropout=0.0, hidden_act="silu", torch_dtype=dtype)
    if scaled:
        hf["rope_scaling"] = dict(type="yarn", factor=yarn.factor, original_max_position_embeddings=yarn.original_max_position,
                                  beta_fast=yarn.beta_fast, beta_slow=yarn.beta_slow, mscale=yarn.mscale,
                                  mscale_all_dim=yarn.mscale_all_dim)
    if m is not None:
        hf |= dict(n_routed_experts=m.n_routed_experts, n_shared_experts=m.n_shared_experts, moe_layer_freq=1,
                   num_experts_per_tok=m.n_activated_experts, moe_intermediate_size=m.d_expert, routed_scaling_factor=m.route_scale,
                   scoring_func=m.gate.score, norm_topk_prob=m.gate.weights == "normalised", **_write_routing(m, v3))
    if fp8:
        hf["quantization_config"] = dict(quant_method="fp8", fmt="e4m3", activation_scheme="dynamic", weight_block_size=BLOCK)
    return hf


def _write_routing(m: moe.MoE, v3: bool) -> dict[str, Any]:
    score = "top2_sum" if v3 else "max"
    if m.groups is not None:
        require(m.groups.score == score, "model.ffn.moe.groups.limited.score", m.groups.score, f"{score} with a {m.gate.score} gate, "
                "to be written for Hugging Face")
    if not v3 and (m.gate.weights != "raw" or m.balance.has_bias):
        raise UserError("model.ffn.moe: found a softmax gate with normalised weights or a bias, allowed: raw weights without a bias, "
                        "to be written for Hugging Face (deepseek_v2 has no other)")
    groups = dict(n_group=m.groups.n_expert_groups, topk_group=m.groups.n_limited_groups) if m.groups else dict(n_group=1, topk_group=1)
    method = "noaux_tc" if v3 else "group_limited_greedy" if m.groups else "greedy"
    return dict(topk_method=method, aux_loss_alpha=m.balance.alpha, seq_aux=m.balance.scope == "sequence", **groups)
