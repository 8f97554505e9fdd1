"""The two frozen dataclasses below every job: ModelConfig (what a checkpoint needs) and Execution (how it runs).

`parse(config.model)` and `parse_run(config.run)` are where a ConfigDict ends: types and sizes are checked once, here, and every
error is one line that names the leaf, what was found and what is allowed. A component is `dict(kind=K, K=dict(...), ...)`; its
kinds and their dataclasses live in the file that owns it (attention.py, ffn.py, moe.py, rope.py, precision.py).
Counts by formula follow V3 §4.2 and the published totals (671,026,419,200 / 36,625,618,432 activated / MTP 11,610,068,224).
"""
from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from model import attention, moe, precision, rope
from model.errors import choice, freeze_kind, leaf, require

REMAT_KINDS = ("none", "full", "names")
ATTENTION_IMPLEMENTATIONS = ("auto", "xla", "cudnn")
EXPERT_IMPLEMENTATIONS = ("auto", "block", "masked", "ragged", "kernel")
EXCHANGE_KINDS = ("auto", "none", "one_hop")
FFN_KINDS = {"moe": moe.parse, "dense": lambda config, path: None}  # dense: every layer has the width d_ff


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shapes, routing and MTP of one model.

    | field | paper | Hugging Face |
    |---|---|---|
    | vocab_size | V | vocab_size |
    | d_model | d | hidden_size |
    | n_layers, n_dense_layers | l | num_hidden_layers, first_k_dense_replace |
    | d_ff | FFN width of the dense layers | intermediate_size |
    | attention.n_heads, q_lora_rank, kv_lora_rank | n_h, d'_c, d_c | num_attention_heads, q_lora_rank, kv_lora_rank |
    | attention.qk_nope_head_dim, qk_rope_head_dim, v_head_dim | d_h, d_h^R, d_h | same |
    | moe.n_routed_experts, n_shared_experts, n_activated_experts | N_r, N_s, K_r | same, num_experts_per_tok |
    | moe.d_expert | expert width | moe_intermediate_size |
    | moe.groups.n_expert_groups, n_limited_groups | nodes, M | n_group, topk_group |
    | moe.route_scale, moe.gate | - | routed_scaling_factor, scoring_func |
    | mtp_depth | D | num_nextn_predict_layers |
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_dense_layers: int
    d_ff: int
    norm_eps: float
    init_std: float
    mtp_depth: int
    attention: Any
    rope: rope.Rope
    moe: moe.MoE | None

    @property
    def n_moe_layers(self) -> int:
        return self.n_layers - self.n_dense_layers

    @property
    def has_bias(self) -> bool:
        """True where the routing kind keeps a bias beside the parameters."""
        return self.moe is not None and self.moe.balance.has_bias

    def dense(self) -> ModelConfig:
        """The same model as its dense layers see it."""
        return dataclasses.replace(self, moe=None)

    def num_params(self) -> dict[str, int]:
        """total, activated (without the input embedding, K routed and all shared experts), mtp (leaves of the MTP modules)."""
        d, attn = self.d_model, self.attention.num_params(self.d_model) + 2 * self.d_model
        dense = attn + 3 * d * self.d_ff
        outer = self.vocab_size * d + d
        if self.moe is None:
            total = activated = self.n_layers * dense
            block = dense
        else:
            block, active = attn + self.moe.num_params(d), attn + self.moe.num_activated(d)
            total = self.n_dense_layers * dense + self.n_moe_layers * block
            activated = self.n_dense_layers * dense + self.n_moe_layers * active
        mtp = self.mtp_depth * (block + 2 * d * d + 3 * d)
        return dict(total=total + outer + self.vocab_size * d, activated=activated + outer, mtp=mtp)

    def flops_per_token(self, seq_len: int, causal: bool = True) -> dict[str, float]:
        """FLOPs of the main model a token (forward; training = 3 x forward), the MTP modules apart as mtp_forward, mtp_training.

        Matrix products only: 2 a weight, and attention over seq_len keys, or half of them if causal.
        """
        keys = seq_len / 2 if causal else seq_len
        d, attn = self.d_model, 2 * self.attention.matmul_params(self.d_model) + self.attention.core_flops(keys)
        dense = attn + 6 * d * self.d_ff
        block = dense if self.moe is None else attn + 2 * self.moe.matmul_params(d)
        head = 2 * self.vocab_size * d
        forward = self.n_dense_layers * dense + self.n_moe_layers * block + head
        mtp = self.mtp_depth * (block + 4 * d * d + head)
        return dict(forward=forward, training=3 * forward, mtp_forward=mtp, mtp_training=3 * mtp)


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a model runs; the default computes in the dtype of the parameters ('as_stored') with nothing recomputed.

    precision: a kind of precision.KINDS. remat: none, full, or names (recompute all but `remat_save`). attention, experts,
    exchange: implementations ('auto' chooses by device). scan_unroll: layers a scan step. absorbed_max: appends of at most this
    many tokens use absorbed MLA. probes: patterns such as 'mla/*/c_kv' of intermediates to return.
    """

    precision: precision.Precision = precision.Precision()
    remat: str = "none"
    remat_save: tuple[str, ...] = ()
    attention: str = "auto"
    experts: str = "auto"
    exchange: str = "auto"
    scan_unroll: int = 1
    absorbed_max: int = 4
    probes: tuple[str, ...] = ()


def parse(config: Mapping) -> ModelConfig:
    """Freezes and validates config.model. Raises UserError."""
    plain = {k: leaf(config, k, t, "model") for k, t in dict(
        vocab_size=int, d_model=int, n_layers=int, n_dense_layers=int, d_ff=int, norm_eps=float, init_std=float,
        mtp_depth=int).items()}
    for name in ("vocab_size", "d_model", "n_layers", "d_ff"):
        require(plain[name] >= 1, f"model.{name}", plain[name], "a positive integer")
    require(0 <= plain["mtp_depth"] <= 8, "model.mtp_depth", plain["mtp_depth"], "0 to 8")
    attn = freeze_kind(attention.KINDS, config["attention"], "model.attention")
    experts = freeze_kind(FFN_KINDS, config["ffn"], "model.ffn")
    if experts is None:
        plain["n_dense_layers"] = plain["n_layers"]
    n_dense = plain["n_dense_layers"]
    require(0 <= n_dense <= plain["n_layers"], "model.n_dense_layers", n_dense, f"0 to n_layers={plain['n_layers']}")
    return ModelConfig(attention=attn, rope=rope.parse(config["rope"]), moe=experts, **plain)


def parse_run(config: Mapping) -> Execution:
    """Freezes and validates config.run. Raises UserError."""
    remat = choice(config["remat"]["kind"], REMAT_KINDS, "run.remat.kind")
    unroll = leaf(config, "scan_unroll", int, "run")
    require(unroll >= 1, "run.scan_unroll", unroll, "a positive integer")
    return Execution(
        precision=precision.parse(config["precision"], "run.precision"),
        remat=remat,
        remat_save=tuple(config["remat"]["names"]["save"]) if remat == "names" else (),
        attention=choice(config["attention"]["kind"], ATTENTION_IMPLEMENTATIONS, "run.attention.kind"),
        experts=choice(config["experts"]["kind"], EXPERT_IMPLEMENTATIONS, "run.experts.kind"),
        exchange=choice(config["exchange"]["kind"], EXCHANGE_KINDS, "run.exchange.kind"),
        scan_unroll=unroll,
        absorbed_max=leaf(config, "absorbed_max", int, "run"),
        probes=tuple(config["probes"]),
    )
