"""Group relative policy optimisation (GRPO): DeepSeekMath 2402.03300, as used by R1 (§2.2.1, eq. 1-3) and V3 (§5.2.2, eq. 26-28).

Loss = -sum over tokens of coefficient * objective, with r = pi(o_t) / pi_old(o_t) and A the advantage of the answer:
    objective = min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) - beta * (pi_ref / pi - log(pi_ref / pi) - 1)
The kinds differ in the coefficient alone (`token_coefficients`), the advantages in `ADVANTAGES`:
    grpo     1 / (answers * length of the answer)   mean over answers of token means (2402.03300 eq. 3)
    bnpo     1 / tokens                             token mean
    dapo     1 / tokens                             token mean over the whole batch (2503.14476 eq. 8)
    dr_grpo  1 / (answers * max_length)             no length bias (2503.20783 §3)
Everything is added, never averaged over rows, so that no split, packing or order of a batch changes a step.
Shapes: B rows, T position, N answers (groups in a row, G answers each).
"""
from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from model.dtypes import at_least_f32
from model.errors import UserError, choice, require

STD_GUARD = 1e-4  # added to a standard deviation

def grpo_loss(logp, logp_old, logp_ref, advantages, mask, *, kind: str, clip_low, clip_high, beta, max_length=None):
    """(loss, metrics) of answers one a row: logp, logp_old, logp_ref [B, T] of any float dtype, advantages [B], mask [B, T].

    clip_low, clip_high are epsilons; logp_ref may be None if beta is 0; what masked positions hold never matters; a row without
    tokens counts as an answer of value 0. max_length: of dr_grpo. metrics (means over tokens): kl, clip_ratio/low, clip_ratio/high.
    Raises UserError.
    """
    mask = jnp.asarray(mask).astype(bool)
    logp = jnp.asarray(logp)
    per_token, parts = objective(logp, logp_old, logp_ref, jnp.broadcast_to(jnp.asarray(advantages)[:, None], mask.shape), mask,
                                 clip_low=clip_low, clip_high=clip_high, beta=beta)
    totals = dict(tokens=jnp.sum(mask), answers=mask.shape[0])
    one_segment = jnp.ones(mask.shape, jnp.int32)
    coefficients = token_coefficients(kind, mask, one_segment, totals, max_length).astype(per_token.dtype)
    mean = 1 / jnp.maximum(totals["tokens"], 1).astype(per_token.dtype)
    return -jnp.sum(coefficients * per_token), {name: jnp.sum(part) * mean for name, part in parts.items()}


def objective(logp, logp_old, logp_ref, advantages, mask, *, clip_low, clip_high, beta) -> tuple[Any, dict[str, Any]]:
    """(per-token objective [B, T], parts): all arrays [B, T], 0 where masked; parts to be summed: kl, clip_ratio/low, clip_ratio/high.

    Computed in float32 at least. A clipped token has no gradient, and neither has an advantage of 0, however far its ratio is off.
    """
    mask = jnp.asarray(mask).astype(bool)
    dtype = at_least_f32(jnp.asarray(logp).dtype)
    logp, logp_old, advantages = (jnp.where(mask, jnp.asarray(x).astype(dtype), 0) for x in (logp, logp_old, advantages))
    clip_low, clip_high = (jnp.asarray(x).astype(dtype) for x in (clip_low, clip_high))
    log_ratio = logp - logp_old
    ratio = jnp.exp(jax.lax.stop_gradient(log_ratio))
    high, low = (advantages > 0) & (ratio > 1 + clip_high), (advantages < 0) & (ratio < 1 - clip_low)
    constant = high | low | (advantages == 0)
    bound = jnp.where(high, 1 + clip_high, 1 - clip_low)
    # exp of what is clipped away could be infinite, and its gradient 0 * inf
    value = advantages * jnp.where(constant, bound, jnp.exp(jnp.where(constant, 0, log_ratio)))
    kl = jnp.zeros_like(logp)
    if logp_ref is not None:
        kl = k3(logp, jnp.where(mask, jnp.asarray(logp_ref).astype(dtype), 0))
    if _is_zero(beta):
        kl = jax.lax.stop_gradient(kl)
    elif logp_ref is None:
        raise UserError(f"logp_ref: found None with beta={beta}, allowed: log-probs of the reference, or beta=0")
    else:
        value = value - jnp.asarray(beta).astype(dtype) * kl
    return value, {"kl": kl, "clip_ratio/low": low.astype(dtype), "clip_ratio/high": high.astype(dtype)}


def k3(logp, logp_ref):
    """Schulman's estimator of KL(pi | ref) from samples of pi: exp(d) - d - 1 with d = logp_ref - logp; never negative."""
    d = logp_ref - logp
    return jnp.exp(d) - d - 1


def token_coefficients(kind: str, mask, segment_ids, totals, max_length=None):
    """What each token's objective is multiplied with, [B, T], 0 where masked, in rows of packed answers (one a segment).

    totals = dict(tokens, answers), counted over the whole batch that makes a step: its tokens in masks, its answers (those without
    tokens too). The sum over any split of the batch into rows and micro-batches is the same. Raises UserError.
    """
    choice(kind, COEFFICIENTS, "loss.kind")
    if kind == "dr_grpo":
        require(max_length is not None, "max_length", max_length, "the longest completion, which loss.kind 'dr_grpo' divides by")
    counted = jnp.asarray(mask).astype(bool).astype(float)
    segment_ids = jnp.asarray(segment_ids)
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    length = jnp.sum(jnp.where(same, counted[:, None, :], 0), axis=-1)
    totals = {name: jnp.asarray(totals[name]).astype(counted.dtype) for name in ("tokens", "answers")}
    return counted * COEFFICIENTS[kind](length, totals, max_length)


def group_advantages(rewards, group_size: int, *, kind: str):
    """Advantages of rewards [N], N/G groups in a row, in the same shape; exactly 0 in a group whose rewards are equal.

    group_std: (r - mean) / (sample std + 1e-4) (R1 eq. 3); group_mean: r - mean (Dr. GRPO); rloo: r - mean of the others
    (2402.14740); batch_std: (r - mean of the group) / (sample std of all rewards + 1e-4). numpy in, numpy out (float64); else jax.
    Raises UserError.
    """
    rewards = rewards if isinstance(rewards, jax.Array) else np.asarray(rewards, np.float64)
    choice(kind, ADVANTAGES, "advantage.kind")
    require(group_size >= 2, "group_size", group_size, "at least 2: an advantage compares answers")
    require(rewards.size > 0 and rewards.size % group_size == 0, "rewards", rewards.size, f"a multiple of group_size={group_size}")
    return ADVANTAGES[kind](rewards.reshape(-1, group_size), group_size).reshape(rewards.shape)


def keep_group(rewards) -> bool:
    """False for a group whose rewards are all equal: it teaches nothing (dynamic sampling, 2503.14476 §3.2)."""
    rewards = np.asarray(rewards)
    return bool(rewards.max() > rewards.min())


def reward_metrics(rewards, group_size: int, by_function: dict[str, Any], lengths, finished) -> dict[str, float]:
    """What people watch, from one step's answers [N]: reward/..., frac_reward_zero_std, completions/... (lengths in tokens)."""
    rewards, lengths, ended = np.asarray(rewards, np.float64), np.asarray(lengths), np.asarray(finished, bool)
    dead = [not keep_group(group) for group in rewards.reshape(-1, group_size)]
    return {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        **{f"reward/{name}": float(np.mean(values)) for name, values in by_function.items()},
        "frac_reward_zero_std": float(np.mean(dead)),
        "completions/mean_length": float(lengths.mean()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": float(1 - ended.mean()),
    }


def logp_difference(logp, logp_sampler, mask) -> dict[str, Any]:
    """sampling/logp_difference/mean and /max: |trainer - sampler| over the tokens of mask, all [B, T]; 0 without tokens."""
    mask = jnp.asarray(mask).astype(bool)
    gap = jnp.where(mask, jnp.abs(jnp.where(mask, logp, 0) - jnp.where(mask, logp_sampler, 0)), 0)
    return {"sampling/logp_difference/mean": jnp.sum(gap) / jnp.maximum(jnp.sum(mask), 1).astype(gap.dtype),
            "sampling/logp_difference/max": jnp.max(gap)}


def _centred(r):
    """r [groups, G] less its group's mean; exactly 0 where all are equal, which rounding would leave at 1e-17 over 1e-4."""
    xp = jnp if isinstance(r, jax.Array) else np
    equal = r.max(axis=1, keepdims=True) == r.min(axis=1, keepdims=True)
    return xp.where(equal, 0, r - r.mean(axis=1, keepdims=True))


def _positive(n):
    """n, or 1 where there is nothing to divide."""
    return jnp.maximum(n, 1)


def _is_zero(beta) -> bool:
    return not isinstance(beta, jax.core.Tracer) and float(beta) == 0


# kind -> (tokens of the answer [B, T], totals, max_length) -> coefficient of its tokens, [B, T] or scalar
COEFFICIENTS = {
    "grpo": lambda length, totals, max_length: 1 / (_positive(totals["answers"]) * _positive(length)),
    "bnpo": lambda length, totals, max_length: 1 / _positive(totals["tokens"]),
    "dapo": lambda length, totals, max_length: 1 / _positive(totals["tokens"]),
    "dr_grpo": lambda length, totals, max_length: 1 / (_positive(totals["answers"]) * max_length),
}

# kind -> (rewards [groups, G], G) -> advantages [groups, G]
ADVANTAGES = {
    "group_std": lambda r, G: _centred(r) / (r.std(axis=1, ddof=1, keepdims=True) + STD_GUARD),
    "group_mean": lambda r, G: _centred(r),
    "rloo": lambda r, G: _centred(r) * (G / (G - 1)),
    "batch_std": lambda r, G: _centred(r) / (r.std(ddof=1) + STD_GUARD),
}
