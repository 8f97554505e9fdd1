"""GRPO and its kin against plain numpy in float64, by value and gradient; no split, order or packing of a batch may matter."""
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.errors import UserError
from train import rl, sft

KINDS = ("grpo", "bnpo", "dapo", "dr_grpo")
LENGTHS = np.array([5, 1, 7, 0, 3, 8])
B, T, MAX = len(LENGTHS), 8, 20
CLIP = dict(clip_low=0.2, clip_high=0.28)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def batch(rng, spread=0.5):
    logp, old, ref = -rng.uniform(0.1, 3, (3, B, T))
    mask = np.arange(T)[None] < LENGTHS[:, None]
    return dict(logp=logp, old=logp + spread * (old - logp), ref=ref, advantages=rng.normal(size=B), mask=mask)


def oracle(b, kind, beta, clip_low=0.2, clip_high=0.28):
    """(loss, gradient by logp), token by token, straight from the equations."""
    loss, grad, tokens = 0.0, np.zeros((B, T)), int(b["mask"].sum())
    for i in range(B):
        n = int(b["mask"][i].sum())
        for t in range(T):
            if not b["mask"][i, t]:
                continue
            weight = {"grpo": 1 / (B * n), "bnpo": 1 / tokens, "dapo": 1 / tokens, "dr_grpo": 1 / (B * MAX)}[kind]
            r, A = math.exp(b["logp"][i, t] - b["old"][i, t]), b["advantages"][i]
            clipped = min(max(r, 1 - clip_low), 1 + clip_high)
            value, slope = (r * A, r * A) if r * A <= clipped * A else (clipped * A, 0.0)
            d = b["ref"][i, t] - b["logp"][i, t]
            loss -= weight * (value - beta * (math.exp(d) - d - 1))
            grad[i, t] = -weight * (slope - beta * (1 - math.exp(d)))
    return loss, grad


@functools.cache
def compiled(kind, with_ref):
    """One program a kind: clips, and beta where there is a reference, are traced."""
    def loss(logp, old, ref, advantages, mask, clip_low, clip_high, beta):
        return rl.grpo_loss(logp, old, ref, advantages, mask, kind=kind, clip_low=clip_low, clip_high=clip_high,
                            beta=beta if with_ref else 0.0, max_length=MAX)[0]

    return jax.jit(jax.value_and_grad(loss))


def value_and_grad(b, kind, beta, clip_low=0.2, clip_high=0.28):
    ref = b["ref"] if beta else None
    return compiled(kind, ref is not None)(b["logp"], b["old"], ref, b["advantages"], b["mask"], clip_low, clip_high, beta)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_value_and_gradient_are_those_of_the_equations(rng, kind, beta):
    for clips in ({}, dict(clip_low=10.0, clip_high=10.0), dict(clip_low=0.0, clip_high=0.0)):
        b = batch(rng)
        value, grad = value_and_grad(b, kind, beta, **clips)
        expected, expected_grad = oracle(b, kind, beta, **clips)
        assert value.dtype == jnp.float64
        np.testing.assert_allclose(value, expected, rtol=1e-12)
        np.testing.assert_allclose(grad, expected_grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_at_ratio_one_is_the_policy_gradient(rng, kind):
    b = batch(rng, spread=0.0)
    _, grad = value_and_grad(b, kind, 0.0)
    totals = dict(tokens=b["mask"].sum(), answers=B)
    coefficients = rl.token_coefficients(kind, b["mask"], np.ones((B, T), int), totals, MAX)
    np.testing.assert_allclose(grad, -np.asarray(coefficients) * b["advantages"][:, None], rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_junk_reaches_neither_value_nor_gradient(kind):
    for junk, beta in itertools.product((np.nan, np.inf, -np.inf, 1e30), (0.0, 0.1)):
        clean, dirty = batch(np.random.default_rng(0)), batch(np.random.default_rng(0))
        for name in ("logp", "old", "ref"):
            dirty[name] = np.where(dirty["mask"], dirty[name], junk)
        dirty["advantages"][3] = junk  # the row without tokens
        value, grad = value_and_grad(clean, kind, beta)
        value_junk, grad_junk = value_and_grad(dirty, kind, beta)
        assert value == value_junk and np.array_equal(grad, grad_junk)
        assert not np.any(np.asarray(grad)[~clean["mask"]])


def test_a_ratio_beyond_all_bounds_is_clipped_without_nan(rng):
    b = batch(rng)
    b["old"] = b["logp"] - 800.0  # exp(800) is infinite
    b["advantages"] = np.where(np.arange(B) % 2, 1.0, 0.0)
    value, grad = value_and_grad(b, "dapo", 0.0)
    assert np.isfinite(value) and not np.any(grad)


@pytest.mark.parametrize("kind", KINDS)
def test_packing_splitting_and_order_change_nothing(rng, kind):
    """Answers cut into rows of several segments, in any order, over micro-batches: the same sum, the same gradient by token."""
    b = batch(rng)
    loss, grad = value_and_grad(b, kind, 0.04)
    totals = dict(tokens=b["mask"].sum(), answers=B)
    for groups in ([[5, 0], [2, 4], [1, 3]], [[3, 1, 4], [0, 5, 2]], [[0, 1, 2, 3, 4, 5]]):
        total, seen = 0.0, np.zeros((B, T))
        for answers in groups:  # each its own micro-batch of one packed row, with a prompt token and padding around
            width = sum(LENGTHS[a] + 1 for a in answers) + 3
            row = {k: np.full((1, width), np.nan) for k in ("logp", "old", "ref", "advantages")}
            mask, segments, where, at = np.zeros((1, width)), np.zeros((1, width), int), {}, 0
            for k, a in enumerate(answers, start=1):
                n = LENGTHS[a]
                segments[0, at:at + n + 1] = k
                here = slice(at + 1, at + 1 + n)
                mask[0, here] = 1
                row["logp"][0, here], row["old"][0, here], row["ref"][0, here] = (b[k][a, :n] for k in ("logp", "old", "ref"))
                row["advantages"][0, here] = b["advantages"][a]
                where[a], at = here, at + n + 1
            coefficients = rl.token_coefficients(kind, mask, segments, totals, MAX)

            value, g = jax.jit(jax.value_and_grad(lambda logp, row, mask, coefficients: -jnp.sum(coefficients * rl.objective(
                logp, row["old"], row["ref"], row["advantages"], mask, beta=0.04, **CLIP)[0])))(row["logp"], row, mask, coefficients)
            total += float(value)
            for a, here in where.items():
                seen[a, :LENGTHS[a]] += np.asarray(g)[0, here]
        np.testing.assert_allclose(total, loss, rtol=1e-12)
        np.testing.assert_allclose(seen, grad, rtol=1e-12, atol=1e-16)


def test_metrics_count_clipped_tokens_and_kl():
    logp = np.log(np.array([[1.5, 1.5, 0.5, 0.5]]))
    old, ref = np.zeros((1, 4)), logp + np.array([[0.1, 0.1, 0.1, -0.1]])
    masks = np.array([[1, 1, 1, 1]])
    for advantage, low, high in ((1.0, 0.0, 0.5), (-1.0, 0.5, 0.0), (0.0, 0.0, 0.0)):
        _, metrics = rl.grpo_loss(logp, old, ref, np.array([advantage]), masks, kind="grpo", beta=0.0, **CLIP)
        assert metrics["clip_ratio/low"] == low and metrics["clip_ratio/high"] == high
        np.testing.assert_allclose(metrics["kl"], (3 * (math.exp(0.1) - 1.1) + math.exp(-0.1) - 0.9) / 4, rtol=1e-12)


def test_k3_matches_the_reference_values():
    np.testing.assert_allclose(rl.k3(0.0, 0.1), 0.0051709, atol=1e-7)
    np.testing.assert_allclose(rl.k3(np.log(0.5), np.log(0.4)), 0.0231, atol=5e-5)
    np.testing.assert_allclose(rl.k3(np.log(0.4), np.log(0.5)), 0.0269, atol=5e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_any_float_dtype_is_computed_in_float32(rng, dtype):
    b = batch(rng)
    low = {k: jnp.asarray(b[k]).astype(dtype) for k in ("logp", "old", "ref", "advantages")}
    back = {k: np.asarray(v.astype(jnp.float64)) for k, v in low.items()} | dict(mask=b["mask"])
    loss, grad = jax.value_and_grad(lambda logp: rl.grpo_loss(
        logp, low["old"], low["ref"], low["advantages"], b["mask"], kind="grpo", beta=0.04, **CLIP)[0])(low["logp"])
    assert loss.dtype == jnp.float32 and grad.dtype == dtype
    np.testing.assert_allclose(loss, oracle(back, "grpo", 0.04)[0], rtol=1e-5)


def test_advantages_match_the_published_tables():
    # columns: correct answers of 8 | sample std | no std | leave one out; a correct and an incorrect one each
    table = {1: ((2.475, -0.354), (0.875, -0.125), (1.0, -0.143)), 2: ((1.620, -0.540), (0.75, -0.25), (0.857, -0.286)),
             4: ((0.935, -0.935), (0.5, -0.5), (0.571, -0.571))}
    for correct, columns in table.items():
        rewards = np.array([1.0] * correct + [0.0] * (8 - correct))
        for kind, expected in zip(("group_std", "group_mean", "rloo"), columns, strict=True):
            got = rl.group_advantages(rewards, 8, kind=kind)
            np.testing.assert_allclose([got[0], got[-1]], expected, atol=1e-3)
    np.testing.assert_allclose(rl.group_advantages([2, 1, 0.5, 0.5], 4, kind="rloo"), [1.3333, 0, -0.6667, -0.6667], atol=1e-4)


@pytest.mark.parametrize("kind", rl.ADVANTAGES)
def test_advantages_see_their_group_alone_and_vanish_in_equal_ones(rng, kind):
    rewards = rng.normal(size=(4, 3))
    rewards[1] = 0.1  # whose mean of three rounds to something else
    flat = rl.group_advantages(rewards.reshape(-1), 3, kind=kind).reshape(4, 3)
    assert np.array_equal(flat, rl.group_advantages(rewards, 3, kind=kind)) and not np.any(flat[1])
    scale = {"group_std": lambda i: rewards[i].std(ddof=1) + 1e-4, "group_mean": lambda i: 1, "rloo": lambda i: 2 / 3,
             "batch_std": lambda i: rewards.std(ddof=1) + 1e-4}[kind]
    for i in (0, 2, 3):
        np.testing.assert_allclose(flat[i], (rewards[i] - rewards[i].mean()) / scale(i), rtol=1e-12)
    jitted = jax.jit(lambda r: rl.group_advantages(r, 3, kind=kind))(jnp.asarray(rewards))
    np.testing.assert_allclose(jitted, flat, rtol=1e-12)


def test_groups_of_one_reward_are_dropped():
    assert not rl.keep_group([1, 1, 1]) and not rl.keep_group(np.zeros(4)) and not rl.keep_group([0.1] * 7)
    assert rl.keep_group([0, 0, 1.0]) and rl.keep_group(jnp.array([0.5, 0.4]))


def test_reward_metrics_have_the_usual_names():
    m = rl.reward_metrics([1, 0, 1, 1], 2, {"accuracy": [1, 0, 1, 1]}, [3, 5, 4, 4], [True, False, True, True])
    assert m == {"reward/mean": 0.75, "reward/std": math.sqrt(3) / 4, "reward/accuracy": 0.75, "frac_reward_zero_std": 0.5,
                 "completions/mean_length": 4.0, "completions/max_length": 5.0, "completions/clipped_ratio": 0.25}
    gap = rl.logp_difference(np.array([[1.0, 2.0, np.nan]]), np.array([[1.5, 2.0, 0.0]]), np.array([[1, 1, 0]]))
    assert gap == {"sampling/logp_difference/mean": 0.25, "sampling/logp_difference/max": 0.5}


def test_sft_loss_is_the_mean_over_all_completion_tokens(rng):
    b = batch(rng)
    logp = np.where(b["mask"], b["logp"], np.nan)
    np.testing.assert_allclose(sft.loss(logp, b["mask"]), -b["logp"][b["mask"]].mean(), rtol=1e-12)
    grad = jax.grad(lambda x: sft.loss(x, b["mask"]))(jnp.asarray(logp))
    np.testing.assert_allclose(grad, np.where(b["mask"], -1 / b["mask"].sum(), 0), rtol=1e-12)
    assert sft.loss(logp, np.zeros((B, T))) == 0


@pytest.mark.parametrize("edit, text", [
    (dict(kind="ppo"), "loss.kind: found 'ppo'"), (dict(kind="dr_grpo"), "max_length: found None"),
    (dict(beta=0.1), "logp_ref: found None")])
def test_bad_settings_are_one_line(rng, edit, text):
    b = batch(rng)
    options = dict(kind="grpo", beta=0.0) | CLIP | edit
    with pytest.raises(UserError, match=text):
        rl.grpo_loss(b["logp"], b["old"], None, b["advantages"], b["mask"], **options)


@pytest.mark.parametrize("size, group, kind", [(7, 2, "rloo"), (4, 1, "rloo"), (4, 2, "mean"), (0, 2, "rloo")])
def test_bad_groups_are_one_line(size, group, kind):
    with pytest.raises(UserError, match="found .* allowed: "):
        rl.group_advantages(np.zeros(size), group, kind=kind)
