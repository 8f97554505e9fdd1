"""DeepSeekMoE (V3 §2.1.2, eq. 12-20; V2 §2.2): shared and routed experts, the gate, balance, and the bias rule.

The gate scores in float32: s = sigmoid(x e_i) (V3) or softmax (V2). A bias joins the scores for the choice alone; groups of
experts (nodes) are limited first, those not kept masked with -inf; weights are the unbiased scores of the chosen, normalised
(V3) or raw (V2), times route_scale. No token is ever dropped. Balance: the bias moves by the sign rule after each step
(`update_bias`), and a small sequence-wise loss remains (eq. 17-20, whose f counts the top-K of the unbiased scores). The formulas after the
logits are `pallas_kernels/gate`'s, on Hopper in one kernel each way.
Shapes: B batch, T position (or tokens), D d_model, F d_expert, E routed experts, K chosen, M rows.
"""
from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from model import expert_parallel, precision
from model.dtypes import at_least_f32
from model.errors import choice, freeze, freeze_kind, leaf, require
from model.ffn import dense_ffn
from model.sharding import by_rows, normal, param, row_shards
from pallas_kernels import gate as gate_kernel
from pallas_kernels.gate import reference as gating
from pallas_kernels.gate.reference import Rule

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

    @property
    def rule(self) -> Rule:
        """What the gate needs to know."""
        groups = self.groups or Groups(1, 1, "max")
        return Rule(self.n_activated_experts, self.gate.score, self.gate.weights, self.route_scale, groups.n_expert_groups,
                    groups.n_limited_groups, groups.score)

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

        x_MD, rule = x_BTD.reshape(B * T, D), m.rule
        logits_of = lambda x_MD: gate_logits(x_MD, w_gate).reshape(B, T, -1)  # noqa: E731
        with jax.named_scope("moe/gate"):
            given = None if tape.tape is None or tape.tape.experts is None else tape.tape.experts.reshape(B, T, -1)
            routed = choose(jax.lax.stop_gradient(logits_of(x_MD)), bias_E, valid_BT, rule, given)
            experts = routed.experts.reshape(B * T, -1)

        def weigh(x_MD):
            """(weights [M, K], Routing) of the experts chosen above; with their gradient, so behind dispatch. XLA makes the logits once."""
            with jax.named_scope("moe/gate"):
                logits = logits_of(x_MD)
                tape.probe("moe", "gate", logits)
                weights, sums = weights_and_sums(logits, valid_BT, routed, rule)
                load, hits, shares = (sums[:, i] for i in range(3))
                return weights.reshape(B * T, -1), Routing(
                    load=jnp.sum(load, axis=0).astype(jnp.float32), balance=balance_of(hits, shares, valid_BT, m), experts=routed.experts)

        def shared(x_MD):
            x_BTD = x_MD.reshape(B, T, D)
            return dense_ffn(self, x_BTD, m.n_shared_experts * m.d_expert, "moe/shared_", tape, prefix="shared_").reshape(B * T, D)

        readers, stream_MD = (weigh, shared) if m.n_shared_experts else (weigh,), stream_BTD.reshape(B * T, D)
        if _all_experts(run, B * T, m):
            (weights, routing), *more = (read(x_MD) for read in readers)
            out = sum((*more, stream_MD), _masked(x_MD, weights, experts, w_up, w_down, run, tape))
        else:
            local = functools.partial(run_experts, run)
            out, routing = expert_parallel.apply(local, readers, (stream_MD,), x_MD, experts, w_up, w_down, self.cfg, run, tape)
        return out.reshape(B, T, D), routing


def run_experts(run, rows, quantized, group_sizes, align, weights, w_up, w_down, tape):
    """What lies between dispatch and combine: rows [M, D] sorted by expert -> rows, times weights f32 [M] if given."""
    gate_up, hidden = precision.grouped_gate_up(rows, group_sizes, w_up, run, "moe/gate_up", tape, align=align, quantized=quantized,
                                                weights=weights)
    return precision.grouped_down(hidden, group_sizes, w_down, run, "moe/down", tape, align=align, gate_up=gate_up, weights=weights)


def gate_logits(x_MD, w_gate):
    """x [M, D] times the gate's [E, D] -> [M, E], both in float32 at least."""
    wide = at_least_f32(x_MD.dtype)
    return jax.lax.dot_general(x_MD.astype(wide), w_gate.astype(wide), (((1,), (1,)), ((), ())))


def gate(logits, bias, cfg):
    """(weights [T, K], experts i32 [T, K]) from logits [T, E] and bias [E] or None (eq. 13-16 and node-limited routing)."""
    rule = cfg.moe.rule
    s = gating.scores(logits, rule)
    experts = gating.choose(s, bias, rule)
    return gating.weigh(s, experts, rule), experts


class Routed(NamedTuple):
    """experts i32 [B, T, K]; weights [B, T, K] and sums [B, 3, E] (load, hits, shares) without a gradient, where our kernel made them."""

    experts: Any
    weights: Any = None
    sums: Any = None


def choose(logits_BTE, bias, valid_BT, rule, given=None) -> Routed:
    """The experts of each token, or those `given` (a rollout's, a forward's): weights follow from the scores all the same."""
    if given is not None:
        return Routed(given.astype(jnp.int32))
    if logits_BTE.shape[0] % row_shards() or not gate_kernel.takes_kernel(logits_BTE, rule):
        return Routed(gating.choose(gating.scores(logits_BTE, rule), bias, rule))

    def local(logits, valid, *bias):
        return gate_kernel.route(logits, *(bias or (None,)), valid, rule)

    return Routed(*by_rows(local, logits_BTE, valid_BT, whole=() if bias is None else (jax.lax.stop_gradient(bias),)))


def weights_and_sums(logits_BTE, valid_BT, routed: Routed, rule):
    """(weights [B, T, K], sums [B, 3, E]) of the experts chosen, with the gradient of the logits."""
    if routed.weights is None:
        return gating.route(logits_BTE, None, valid_BT, rule, routed.experts)[1:]
    return attached(rule, logits_BTE, valid_BT, routed)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attached(rule, logits_BTE, valid_BT, routed: Routed):
    """What the kernel made of these logits: the second kernel is its gradient."""
    return routed.weights, routed.sums


def _attached_forward(rule, logits, valid, routed):
    return attached(rule, logits, valid, routed), (logits, routed.experts, valid)


def _attached_backward(rule, residuals, gradients):
    d_weights, d_sums = gradients
    backward = functools.partial(gate_kernel.route_backward, rule=rule)
    return by_rows(backward, *residuals, d_weights, d_sums[:, 2]), None, None


attached.defvjp(_attached_forward, _attached_backward)


def balance_of(hits_BE, shares_BE, valid_BT, moe: MoE):
    """alpha sum_i f_i P_i (eq. 17-20), summed over the B sequences; scope 'batch': over all tokens at once, times B.

    hits, shares: sums over the valid tokens (`pallas_kernels/gate`). Only the 'batch' scope depends on how a batch is split into
    micro-batches.
    """
    alpha, E, K = moe.balance.alpha, moe.n_routed_experts, moe.n_activated_experts
    if not alpha:
        return jnp.zeros((), shares_BE.dtype)
    B, n = hits_BE.shape[0], jnp.sum(valid_BT.astype(shares_BE.dtype), axis=1, keepdims=True)
    if moe.balance.scope == "batch":
        hits_BE, shares_BE, n = (jnp.sum(x, axis=0, keepdims=True) for x in (hits_BE, shares_BE, n))
    n = jnp.maximum(n, 1)
    return alpha * jnp.sum(hits_BE * (E / K) / n * (shares_BE / n)) * (B / n.shape[0])


def update_bias(router_bias, load, rate):
    """b_i + rate * sign(mean load - load_i), layer by layer (V3 §2.1.2; 2408.15664 Alg. 1): router_bias, load f32 [L, E]."""
    return router_bias + rate * jnp.sign(jnp.mean(load, axis=-1, keepdims=True) - load)


def max_violation(load):
    """MaxVio [L] = max load / mean load - 1 (2408.15664 §3): load f32 [L, E]."""
    mean = jnp.maximum(jnp.mean(load, axis=-1), 1e-9)
    return jnp.max(load, axis=-1) / mean - 1


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
    gate_kind = choice(config["gate"]["kind"], gating.SCORES, f"{path}.gate.kind")
    weights = choice(config["gate"][gate_kind]["weights"], WEIGHTS, f"{path}.gate.{gate_kind}.weights")
    plain = {k: v for k, v in config.items() if k not in ("gate", "groups", "balance")}
    return freeze(MoE, plain, path, gate=Gate(gate_kind, weights), groups=freeze_kind(GROUPS, config["groups"], f"{path}.groups"),
                  balance=freeze_kind(BALANCES, config["balance"], f"{path}.balance"))


GROUPS = {"limited": Groups, "none": lambda config, path: None}
BALANCES = {
    "bias": lambda config, path: _balance(config, path, has_bias=True),
    "aux_loss": _balance,
    "batch_aux": lambda config, path: _balance(config, path, scope="batch"),
    "none": lambda config, path: Balance(False, 0.0),
}
