"""The gate of a MoE layer in plain jnp: the specification, the CPU path and that of what the kernel does not take.

Letters: B sequences, T positions, E experts, K chosen. All but `route_backward` has its gradients by JAX.
"""
import dataclasses

import jax
import jax.numpy as jnp

SCORES = {"sigmoid": jax.nn.sigmoid, "softmax": jax.nn.softmax}
TINY = 1e-20  # beside every divisor: the published code's guard


@dataclasses.dataclass(frozen=True)
class Rule:
    """How experts are chosen and weighted: weights are 'normalised' over the chosen or 'raw', times `scale`; of `n_groups` equal groups of
    experts the `n_kept` best by 'top2_sum' or 'max' take part."""

    n_chosen: int
    score: str
    weights: str
    scale: float
    n_groups: int = 1
    n_kept: int = 1
    group_score: str = "max"

    @property
    def limited(self) -> bool:
        return self.n_kept < self.n_groups


def scores(logits: jax.Array, rule: Rule) -> jax.Array:
    """Affinities s [..., E] (eq. 15), in float32 (float64 for float64)."""
    return SCORES[rule.score](logits if logits.dtype == jnp.float64 else logits.astype(jnp.float32))


def ranks(x: jax.Array) -> jax.Array:
    """i32 [..., n]: the place of each of n numbers in descending order, equal ones by index, as lax.top_k has them. Every pair is compared:
    on a GPU a sort of so few costs more, and on a mesh it would gather what it sorts. NaN is first, and takes no other's place."""
    index = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    mine, other, at, other_at = x[..., :, None], x[..., None, :], index[..., :, None], index[..., None, :]
    return jnp.sum((other > mine) | (other == mine) & (other_at < at), axis=-1, dtype=jnp.int32)


def limit_groups(biased: jax.Array, rule: Rule) -> jax.Array:
    """The scores [..., E] with every group but the n_kept best at -inf, also where scores are negative."""
    if not rule.limited:
        return biased
    grouped = biased.reshape(*biased.shape[:-1], rule.n_groups, -1)
    best = jnp.max(grouped, axis=-1) if rule.group_score == "max" else jnp.sum(jnp.where(ranks(grouped) < 2, grouped, 0), axis=-1)
    keep = ranks(best) < rule.n_kept
    return jnp.where(keep[..., None], grouped, -jnp.inf).reshape(biased.shape)


def choose(s: jax.Array, bias: jax.Array | None, rule: Rule) -> jax.Array:
    """i32 [..., K] from scores [..., E] and bias [E] or None (eq. 16 and node-limited routing), the best first."""
    E = s.shape[-1]
    biased = s if bias is None else s + bias.astype(s.dtype).reshape((1,) * (s.ndim - 1) + (E,))
    place = ranks(limit_groups(jax.lax.stop_gradient(biased), rule))
    k, index = (jax.lax.broadcasted_iota(jnp.int32, (1,) * (s.ndim - 1) + (rule.n_chosen, E), s.ndim - 1 + axis) for axis in (0, 1))
    return jnp.min(jnp.where(place[..., None, :] == k, index, E - 1), axis=-1)


def _chosen(experts: jax.Array, n_experts: int) -> jax.Array:
    """bool [..., K, E]."""
    return experts[..., None] == jax.lax.broadcasted_iota(jnp.int32, (1,) * experts.ndim + (n_experts,), experts.ndim)


def weigh(s: jax.Array, experts: jax.Array, rule: Rule) -> jax.Array:
    """Weights [..., K] of the experts [..., K] from all scores [..., E] (eq. 13-14)."""
    weights = jnp.sum(jnp.where(_chosen(experts, s.shape[-1]), s[..., None, :], 0), axis=-1)  # not a gather, whose gradient would scatter
    if rule.weights == "normalised":
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + TINY)
    return weights * rule.scale


def balance_sums(s: jax.Array, valid: jax.Array, rule: Rule) -> tuple[jax.Array, jax.Array]:
    """(hits, shares) [B, E] of s [B, T, E] over the valid tokens (bool [B, T]): how often an expert is of the top K of the unbiased scores
    (eq. 18), and the sum of s / sum of s (eq. 19-20)."""
    valid = valid.astype(s.dtype)[..., None]
    hits = (ranks(jax.lax.stop_gradient(s)) < rule.n_chosen).astype(s.dtype)
    return jnp.sum(hits * valid, axis=1), jnp.sum(s / (jnp.sum(s, axis=-1, keepdims=True) + TINY) * valid, axis=1)


def load(experts: jax.Array, valid: jax.Array, n_experts: int) -> jax.Array:
    """i32 [B, E]: how often a valid token chose each expert; compared and summed, as atomics on few counters are slow."""
    B, T, K = experts.shape
    chosen = jnp.where(valid[..., None], experts, n_experts).reshape(B, T * K)
    return jnp.sum(_chosen(chosen, n_experts), axis=1, dtype=jnp.int32)


def route(logits: jax.Array, bias: jax.Array | None, valid: jax.Array, rule: Rule, experts: jax.Array | None = None):
    """logits [B, T, E], bias [E] or None, valid bool [B, T] -> (experts i32 [B, T, K], weights [B, T, K], sums [B, 3, E]: load, hits,
    shares). `experts` gives the choice instead."""
    s = scores(logits, rule)
    experts = choose(s, bias, rule) if experts is None else experts
    counts = load(experts, valid, s.shape[-1]).astype(s.dtype)
    return experts, weigh(s, experts, rule), jnp.stack((counts, *balance_sums(s, valid, rule)), axis=1)


def route_backward(logits: jax.Array, experts: jax.Array, valid: jax.Array, d_weights: jax.Array, d_shares: jax.Array, rule: Rule):
    """The gradient of logits [B, T, E] from those of weights [B, T, K] and shares [B, E]; load and hits have none."""
    s = scores(logits, rule)
    chosen, d_weights = _chosen(experts, s.shape[-1]).astype(s.dtype), d_weights * rule.scale
    d_s = jnp.sum(chosen * d_weights[..., None], axis=-2)
    if rule.weights == "normalised":
        times = jnp.sum(chosen, axis=-2)
        total = jnp.sum(times * s, axis=-1, keepdims=True) + TINY
        d_s = (d_s - times * jnp.sum(d_s * s, axis=-1, keepdims=True) / total) / total
    total = jnp.sum(s, axis=-1, keepdims=True) + TINY
    d_shares = d_shares[:, None] * valid.astype(s.dtype)[..., None]
    d_s += (d_shares - jnp.sum(d_shares * s, axis=-1, keepdims=True) / total) / total
    return s * (d_s - jnp.sum(d_s * s, axis=-1, keepdims=True)) if rule.score == "softmax" else d_s * s * (1 - s)
