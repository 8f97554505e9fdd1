"""DeepSeekMoE (V3 §2.1.2, eq. 12-20; V2 §2.2): shared and routed experts, the gate, balance, and the bias rule.

The gate scores in float32: s = sigmoid(x e_i) (V3) or softmax (V2). A bias joins the scores for the choice alone; groups of
experts (nodes) are limited first, those not kept masked with -inf; weights are the unbiased scores of the chosen, normalised
(V3) or raw (V2), times route_scale. No token is ever dropped. Balance: the bias moves by the sign rule after each step
(`update_bias`), and a small sequence-wise loss remains (eq. 17-20, whose f counts the top-K of the unbiased scores).
Shapes: B batch, T position (or tokens), D d_model, F d_expert, E routed experts, K chosen, M rows.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from model import expert_parallel, precision
from model.dtypes import at_least_f32
from model.errors import choice, freeze, freeze_kind, leaf, require
from model.ffn import dense_ffn, swiglu
from model.sharding import normal, param

GROUP_SCORES = ("top2_sum", "max")
WEIGHTS = ("normalised", "raw")


@dataclasses.dataclass(frozen=True)
class Gate:
    """score: sigmoid or softmax; weights: normalised over the chosen, or raw."""

    score: str
    weights: str


@dataclasses.dataclass(frozen=True)
class Groups:
    """Node-limited routing: of n_expert_groups equal groups the n_limited_groups best are kept."""

    n_expert_groups: int
    n_limited_groups: int
    score: str

    def __post_init__(self):
        require(1 <= self.n_limited_groups <= self.n_expert_groups, "n_limited_groups", self.n_limited_groups,
                f"1 to n_expert_groups={self.n_expert_groups}")
        choice(self.score, GROUP_SCORES, "score")


@dataclasses.dataclass(frozen=True)
class Balance:
    """has_bias: the sign rule acts; alpha of the balance loss; scope: over each sequence, or over the micro-batch's tokens."""

    has_bias: bool
    alpha: float
    scope: str = "sequence"


@dataclasses.dataclass(frozen=True)
class MoE:
    """One MoE layer's shapes and routing."""

    n_routed_experts: int
    n_shared_experts: int
    n_activated_experts: int
    d_expert: int
    route_scale: float
    gate: Gate
    groups: Groups | None
    balance: Balance

    def __post_init__(self):
        E, K = self.n_routed_experts, self.n_activated_experts
        require(E >= 1, "n_routed_experts", E, "a positive integer")
        require(1 <= K <= E, "n_activated_experts", K, f"1 to n_routed_experts={E}")
        require(self.n_shared_experts >= 0, "n_shared_experts", self.n_shared_experts, "0 or more")
        require(self.d_expert >= 1, "d_expert", self.d_expert, "a positive integer")
        if self.groups:
            n, kept = self.groups.n_expert_groups, self.groups.n_limited_groups
            require(E % n == 0, "groups.limited.n_expert_groups", n, f"a divisor of n_routed_experts={E}")
            require(K <= E // n * kept, "n_activated_experts", K, f"at most the {E // n * kept} experts of {kept} groups")
            require(self.groups.score == "max" or E // n >= 2, "groups.limited.n_expert_groups", n,
                    "groups of at least 2 experts for score 'top2_sum'")

    def num_params(self, d_model: int) -> int:
        """Leaves of one MoE FFN, and the router bias where the kind has one."""
        return self._count(d_model, self.n_routed_experts)

    def num_activated(self, d_model: int) -> int:
        return self._count(d_model, self.n_activated_experts)

    def _count(self, d_model: int, routed: int) -> int:
        bias = self.n_routed_experts if self.balance.has_bias else 0
        return self.n_routed_experts * d_model + bias + (routed + self.n_shared_experts) * 3 * d_model * self.d_expert

    def matmul_params(self, d_model: int) -> int:
        """Weights a token is multiplied with."""
        experts = self.n_activated_experts + self.n_shared_experts
        return self.n_routed_experts * d_model + experts * 3 * d_model * self.d_expert


class Routing(NamedTuple):
    """load f32 [E]: tokens routed to each expert; balance: the layer's balance loss summed over rows; experts i32 [B, T, K]."""

    load: Any
    balance: Any
    experts: Any


class MoEFFN(nn.Module):
    """Residual stream and x, its norm, [B, T, D] -> (stream + shared(x) + sum of the K routed experts, Routing); valid bool [B, T] marks
    what load and balance count."""

    cfg: Any
    run: Any

    @nn.compact
    def __call__(self, stream_BTD, x_BTD, bias_E, valid_BT, tape):
        m, run, init = self.cfg.moe, self.run, normal(self.cfg.init_std)
        B, T, D = x_BTD.shape
        w_gate = param(self, "gate", (m.n_routed_experts, D), ("gate", "embed"), init)
        w_up = param(self, "gate_up", (m.n_routed_experts, 2, m.d_expert, D), ("expert", "pair", "expert_ffn", "embed"), init)
        w_down = param(self, "down", (m.n_routed_experts, D, m.d_expert), ("expert", "embed", "expert_ffn"), init)

        x_MD = x_BTD.reshape(B * T, D)
        with jax.named_scope("moe/gate"):
            given = None if tape.tape is None or tape.tape.experts is None else tape.tape.experts.reshape(B * T, -1)
            _, experts = gate(gate_logits(x_MD, w_gate), bias_E, self.cfg, experts=given)

        def weigh(x_MD):
            """(weights [M, K], Routing) of the experts chosen above; with their gradient, so behind dispatch. XLA makes the logits once."""
            with jax.named_scope("moe/gate"):
                logits = gate_logits(x_MD, w_gate)
                tape.probe("moe", "gate", logits.reshape(B, T, -1))
                weights, _ = gate(logits, bias_E, self.cfg, experts=experts)
                return weights, Routing(
                    load=_load(experts, valid_BT.reshape(-1), m.n_routed_experts),
                    balance=balance_loss(scores(logits, m).reshape(B, T, -1), valid_BT, m),
                    experts=experts.reshape(B, T, -1))

        def shared(x_MD):
            x_BTD = x_MD.reshape(B, T, D)
            return dense_ffn(self, x_BTD, m.n_shared_experts * m.d_expert, "moe/shared_", tape, prefix="shared_").reshape(B * T, D)

        def run_experts(rows, quantized, group_sizes, align, w_up, w_down, tape):
            """What lies between dispatch and combine: rows [M, D] sorted by expert -> rows."""
            gate_up, hidden = precision.grouped_gate_up(rows, group_sizes, w_up, run, "moe/gate_up", tape, align=align, quantized=quantized)
            hidden = swiglu(gate_up, hidden)
            return precision.grouped_linear(hidden, group_sizes, w_down, run, "moe/down", tape, align=align, gate_up=gate_up)

        readers, stream_MD = (weigh, shared) if m.n_shared_experts else (weigh,), stream_BTD.reshape(B * T, D)
        if _all_experts(run, B * T, m):
            (weights, routing), *more = (read(x_MD) for read in readers)
            out = sum((*more, stream_MD), _masked(x_MD, weights, experts, w_up, w_down, run, tape))
        else:
            out, routing = expert_parallel.apply(run_experts, readers, (stream_MD,), x_MD, experts, w_up, w_down, self.cfg, run, tape)
        return out.reshape(B, T, D), routing


def gate_logits(x_MD, w_gate):
    """x [M, D] times the gate's [E, D] -> [M, E], both in float32 at least."""
    wide = at_least_f32(x_MD.dtype)
    return jax.lax.dot_general(x_MD.astype(wide), w_gate.astype(wide), (((1,), (1,)), ((), ())))


def scores(logits_TE, moe: MoE):
    """Affinities s [T, E] in float32 at least (eq. 15)."""
    wide = logits_TE.astype(at_least_f32(logits_TE.dtype))
    return SCORES[moe.gate.score](wide)


def gate(logits, bias, cfg, *, experts=None):
    """(weights [T, K], experts i32 [T, K]) from logits [T, E] and bias [E] or None (eq. 13-16 and node-limited routing).

    `experts` gives the choice instead (a rollout's, a forward's): weights follow from the scores all the same.
    """
    moe, E = cfg.moe, cfg.moe.n_routed_experts
    s = scores(logits, moe)
    if experts is None:
        biased = jax.lax.stop_gradient(s if bias is None else s + bias.astype(s.dtype)[None])
        place = ranks(limit_groups(biased, moe.groups))
        k, index = (jax.lax.broadcasted_iota(jnp.int32, (1, moe.n_activated_experts, E), axis) for axis in (1, 2))
        experts = jnp.min(jnp.where(place[:, None] == k, index, E - 1), axis=-1)
    chosen = experts[..., None] == jnp.arange(E, dtype=experts.dtype)[None, None]
    weights = jnp.sum(jnp.where(chosen, s[:, None], 0), axis=-1)  # not a gather, whose gradient would scatter
    if moe.gate.weights == "normalised":
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)  # the published code's guard
    return weights * moe.route_scale, experts.astype(jnp.int32)


def ranks(x):
    """i32 [..., n]: the place of each of n numbers in descending order, equal ones by index, as lax.top_k has them. Every pair is compared:
    on a GPU a sort of so few costs more, and on a mesh it would gather what it sorts."""
    index = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    mine, other, at, other_at = x[..., :, None], x[..., None, :], index[..., :, None], index[..., None, :]
    return jnp.sum((other > mine) | (other == mine) & (other_at < at), axis=-1, dtype=jnp.int32)


def limit_groups(biased_TE, groups: Groups | None):
    """The scores with every group but the n_limited_groups best at -inf, also where scores are negative."""
    if groups is None or groups.n_limited_groups == groups.n_expert_groups:
        return biased_TE
    T, E = biased_TE.shape
    grouped = biased_TE.reshape(T, groups.n_expert_groups, -1)
    best = jnp.max(grouped, axis=-1) if groups.score == "max" else jnp.sum(jnp.where(ranks(grouped) < 2, grouped, 0), axis=-1)
    keep = ranks(best) < groups.n_limited_groups
    return jnp.where(keep[..., None], grouped, -jnp.inf).reshape(T, E)


def balance_loss(s_BTE, valid_BT, moe: MoE):
    """alpha sum_i f_i P_i (eq. 17-20), summed over the B sequences; scope 'batch': over all tokens at once, times B.

    Only the 'batch' scope depends on how a batch is split into micro-batches.
    """
    alpha, E, K = moe.balance.alpha, moe.n_routed_experts, moe.n_activated_experts
    if not alpha:
        return jnp.zeros((), s_BTE.dtype)
    B = s_BTE.shape[0]
    if moe.balance.scope == "batch":
        s_BTE, valid_BT = s_BTE.reshape(1, -1, E), valid_BT.reshape(1, -1)
    valid = valid_BT.astype(s_BTE.dtype)[..., None]
    n = jnp.maximum(jnp.sum(valid, axis=1), 1)
    hits = (ranks(jax.lax.stop_gradient(s_BTE)) < K).astype(s_BTE.dtype)
    f = jnp.sum(hits * valid, axis=1) * (E / K) / n
    p = jnp.sum(s_BTE / (jnp.sum(s_BTE, axis=-1, keepdims=True) + 1e-20) * valid, axis=1) / n
    return alpha * jnp.sum(f * p) * (B / s_BTE.shape[0])


def update_bias(router_bias, load, rate):
    """b_i + rate * sign(mean load - load_i), layer by layer (V3 §2.1.2; 2408.15664 Alg. 1): router_bias, load f32 [L, E]."""
    return router_bias + rate * jnp.sign(jnp.mean(load, axis=-1, keepdims=True) - load)


def max_violation(load):
    """MaxVio [L] = max load / mean load - 1 (2408.15664 §3): load f32 [L, E]."""
    mean = jnp.maximum(jnp.mean(load, axis=-1), 1e-9)
    return jnp.max(load, axis=-1) / mean - 1


def _load(experts_MK, valid_M, n_experts: int):
    """f32 [E]: how often each expert was chosen; compared and summed, as atomics on few counters are slow."""
    chosen = jnp.where(valid_M[:, None], experts_MK, n_experts).reshape(-1, 1)
    return jnp.sum(chosen == jnp.arange(n_experts, dtype=chosen.dtype)[None], axis=0, dtype=jnp.int32).astype(jnp.float32)


def _all_experts(run, n_tokens: int, moe: MoE) -> bool:
    """Decoding computes every expert on every token: with so few rows reading the weights is the cost, and each is read once."""
    if run.experts == "masked":
        return True
    return run.experts == "auto" and n_tokens * moe.n_activated_experts <= 4 * moe.n_routed_experts


def _masked(x_MD, weights_MK, experts_MK, w_up, w_down, run, tape):
    """Every expert on every token, the others weighted 0."""
    with jax.named_scope("moe/masked"):
        dtype, E = x_MD.dtype, w_down.shape[0] if not precision.is_weight(w_down) else w_down.low.shape[0]
        up, down = precision.raw(w_up, dtype), precision.raw(w_down, dtype)
        gate_up = jnp.einsum("MD,EPFD->EMPF", x_MD, up)
        hidden = jax.nn.silu(gate_up[:, :, 0]) * gate_up[:, :, 1]
        one_hot = jax.nn.one_hot(experts_MK, E, dtype=weights_MK.dtype)
        weight_EM = jnp.einsum("MKE,MK->EM", one_hot, weights_MK)
        out = jnp.einsum("EMF,EDF->EMD", hidden, down)
        return jnp.einsum("EMD,EM->MD", out.astype(weight_EM.dtype), weight_EM).astype(dtype)


def _balance(config: Mapping, path: str, *, has_bias: bool = False, scope: str = "sequence") -> Balance:
    alpha = leaf(config, "alpha", float, path)
    require(alpha >= 0, f"{path}.alpha", alpha, "0 or more")
    return Balance(has_bias, alpha, scope)


def parse(config: Mapping, path: str) -> MoE:
    """Freezes config.model.ffn.moe."""
    gate_kind = choice(config["gate"]["kind"], SCORES, f"{path}.gate.kind")
    weights = choice(config["gate"][gate_kind]["weights"], WEIGHTS, f"{path}.gate.{gate_kind}.weights")
    plain = {k: v for k, v in config.items() if k not in ("gate", "groups", "balance")}
    return freeze(MoE, plain, path, gate=Gate(gate_kind, weights), groups=freeze_kind(GROUPS, config["groups"], f"{path}.groups"),
                  balance=freeze_kind(BALANCES, config["balance"], f"{path}.balance"))


SCORES = {"sigmoid": jax.nn.sigmoid, "softmax": jax.nn.softmax}
GROUPS = {"limited": Groups, "none": lambda config, path: None}
BALANCES = {
    "bias": lambda config, path: _balance(config, path, has_bias=True),
    "aux_loss": _balance,
    "batch_aux": lambda config, path: _balance(config, path, scope="batch"),
    "none": lambda config, path: Balance(False, 0.0),
}
