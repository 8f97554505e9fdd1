"""The sampler: decoding equals the full forward, draws depend on their keys alone, ends are ends, few programs are compiled."""
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model

from model import transformer
from model.config import Execution
from model.errors import UserError
from train import sampler

VOCAB, B, T, N = 64, 6, 11, 9
LENGTHS = np.array([11, 3, 7, 1, 11, 5], np.int32)
IDS = np.stack([np.arange(B) // 2, np.arange(B) % 2], axis=1).astype(np.int32)


@functools.cache
def weights(attention: str = "mla"):
    cfg = tiny_model.tiny(vocab_size=VOCAB, mtp_depth=0, attention__kind=attention)
    bias = 0.3 * jax.random.normal(jax.random.key(4), (cfg.n_moe_layers, cfg.moe.n_routed_experts))
    return cfg, Execution(), tiny_model.init(cfg, seed=3), bias


def prompts():
    return np.random.default_rng(1).integers(1, VOCAB, (B, T)).astype(np.int32)


def rollout(rows=slice(None), extra=0, pad=0, **edits):
    cfg, run, params, bias = weights()
    given = np.pad(prompts()[rows], ((0, 0), (0, extra)), constant_values=pad)
    options = dict(max_new=N, temperature=1.0, stop_ids=(5, 6), seed=7, step=2) | edits
    seed, step = options.pop("seed"), options.pop("step")
    return sampler.generate(params, bias, given, LENGTHS[rows], IDS[rows], seed, step, cfg, run, **options)


def packed(out):
    """Prompt and completion in one run, [B, T + N]."""
    rows = np.zeros((B, T + N), np.int32)
    for b in range(B):
        rows[b, :LENGTHS[b]] = prompts()[b, :LENGTHS[b]]
        rows[b, LENGTHS[b]:LENGTHS[b] + N] = out.tokens[b]
    return rows


def full_forward(rows, experts=None):
    cfg, run, params, bias = weights()
    total = jax.jit(lambda tokens, chosen: transformer.apply(params, tokens, cfg, run=run, router_bias=bias, experts=chosen)[0])
    return total(rows, experts)


@pytest.mark.parametrize("attention", ["mla", pytest.param("gqa", marks=pytest.mark.slow), pytest.param("gated", marks=pytest.mark.slow)])
def test_cached_decoding_equals_the_full_forward_in_float64(attention):
    cfg, run, params, bias = weights(attention)
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
        tokens = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (B, 18)), jnp.int32)
        whole = jax.jit(lambda t: transformer.apply(params, t, cfg, run=run, router_bias=bias)[0].logits)(tokens)
        feed = jax.jit(lambda cache, t, n: sampler.forward(params, bias, cache, t, n, cfg, run)[:2])
        cache = transformer.init_cache(cfg, B, 32, jnp.float64)
        logits, cache = feed(cache, tokens[:, :T], LENGTHS)
        held = LENGTHS.copy()
        for _ in range(3):
            np.testing.assert_allclose(logits, whole[np.arange(B), held - 1], atol=1e-10, rtol=0)
            n_valid = (held % 3 > 0).astype(np.int32)  # rows advance at their own pace; the rest feed junk that must not stay
            logits, cache = feed(cache, jnp.where(n_valid, tokens[np.arange(B), held], 1)[:, None], n_valid)
            held = held + n_valid
            logits, cache = feed(cache, tokens[np.arange(B), held][:, None], np.ones(B, np.int32))
            held = held + 1
        assert np.array_equal(cache.lengths, held)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.6])
def test_logp_and_experts_are_those_of_the_full_forward(temperature):
    out = rollout(temperature=temperature, return_experts=True)
    plain = rollout(temperature=temperature)
    assert np.array_equal(plain.tokens, out.tokens) and plain.experts is None
    rows = packed(out)
    whole = full_forward(rows)
    logp = jax.nn.log_softmax(whole.logits / (temperature or 1.0))
    for b in range(B):
        n, start = int(out.lengths[b]), int(LENGTHS[b])
        at = start - 1 + np.arange(n)
        np.testing.assert_allclose(out.logp[b, :n], logp[b, at, rows[b, at + 1]], atol=2e-5)
        assert not np.any(out.logp[b, n:]) and not np.any(out.tokens[b, n:])
        if temperature == 0:
            assert np.array_equal(np.argmax(whole.logits[b, at], axis=-1), rows[b, at + 1])
        assert np.array_equal(np.sort(out.experts[:, b, :start + n]), np.sort(whole.experts[:, b, :start + n]))
    replayed = full_forward(rows, out.experts)
    for b in range(B):
        n = int(LENGTHS[b] + out.lengths[b])
        np.testing.assert_allclose(replayed.logits[b, :n], whole.logits[b, :n], atol=2e-5)


def test_a_row_draws_the_same_whatever_its_slot_batch_and_padding():
    base = rollout()
    order = np.array([4, 2, 0, 5, 1, 3])
    for rows, extra, pad in ((order, 0, 0), (order[:2], 0, 0), (order, 4, 9), (order[:2], 13, 1)):
        again = rollout(rows, extra, pad)
        assert np.array_equal(again.tokens, np.asarray(base.tokens)[rows])
        assert np.array_equal(again.mask, np.asarray(base.mask)[rows])
        np.testing.assert_allclose(again.logp, np.asarray(base.logp)[rows], atol=1e-5)


def test_draws_change_with_every_part_of_the_key():
    tokens = np.asarray(rollout(stop_ids=()).tokens)
    assert not np.array_equal(rollout(seed=8, stop_ids=()).tokens, tokens)
    assert not np.array_equal(rollout(step=3, stop_ids=()).tokens, tokens)
    keys = sampler.sequence_keys(sampler.seeds(7, 2), jnp.asarray([[a, b] for a in range(8) for b in range(8)]))
    assert not np.array_equal(sampler.seeds(-1, 0), sampler.seeds(1, 0))
    assert len({tuple(k) for k in np.asarray(jax.random.key_data(keys)).tolist()}) == 64
    logits = jnp.zeros((64, VOCAB))
    draws = [np.asarray(sampler.draw(logits, keys, i, jnp.float32(1), jnp.float32(1))[0]) for i in range(2)]
    assert np.mean(draws[0] == draws[1]) < 0.2  # positions are independent
    assert len(set(draws[0].tolist())) > 20  # and so are rows


def test_the_stop_token_ends_a_row_and_belongs_to_it():
    free = rollout(stop_ids=())
    assert np.all(free.mask) and not np.any(free.finished) and np.all(free.lengths == N)
    stop = int(free.tokens[0, 3])
    out = rollout(stop_ids=(stop,))
    for b in range(B):
        hits = np.flatnonzero(np.asarray(free.tokens[b]) == stop)
        n = hits[0] + 1 if len(hits) else N
        assert int(out.lengths[b]) == n and bool(out.finished[b]) == bool(len(hits))
        assert np.array_equal(out.mask[b], np.arange(N) < n)
        assert np.array_equal(out.tokens[b], np.where(np.arange(N) < n, free.tokens[b], 0))
    assert int(out.lengths[0]) <= 4


@pytest.mark.parametrize("return_experts", [False, True])
def test_decoding_ends_when_every_row_has_ended(return_experts):
    free = rollout(stop_ids=(), return_experts=return_experts)
    # the last token needs no step, save where its experts are wanted
    assert int(free.steps) == N - 1 + return_experts
    first = np.unique(free.tokens[:2, 0])
    ended = rollout(slice(2), stop_ids=first.tolist(), return_experts=return_experts)
    assert int(ended.steps) == return_experts and np.all(ended.lengths == 1) and np.all(ended.finished)


def test_draws_follow_the_distribution_and_its_logp():
    logits = np.random.default_rng(0).normal(0, 2, 32)
    n, temperature, top_p = 20_000, 0.7, 0.8
    keys = sampler.sequence_keys(sampler.seeds(0, 0), jnp.stack([jnp.arange(n), jnp.zeros(n, jnp.int32)], axis=1))
    draw = jax.jit(lambda t, p: sampler.draw(jnp.broadcast_to(jnp.float32(logits)[None], (n, 32)), keys, 0, t, p))
    for cut in (1.0, top_p):
        p = np.exp(logits / temperature)
        p /= p.sum()
        order = np.argsort(-p)
        kept = order[:np.searchsorted(np.cumsum(p[order]), cut) + 1] if cut < 1 else order
        expected = np.zeros(32)
        expected[kept] = p[kept] / p[kept].sum()
        token, logp = (np.asarray(x) for x in draw(jnp.float32(temperature), jnp.float32(cut)))
        assert np.abs(np.bincount(token, minlength=32) / n - expected).max() < 4 * math.sqrt(0.25 / n)
        np.testing.assert_allclose(logp, np.log(expected[token]), atol=1e-5)


def test_stream_yields_what_generate_draws_and_compiles_log2_programs():
    cfg, run, params, bias = weights()
    batch = rollout(max_new=100, stop_ids=(5,))
    before, row = sampler.n_compiles(), int(np.argmax(batch.lengths))
    ids = list(sampler.stream(params, bias, prompts()[row, :LENGTHS[row]].tolist(), cfg, run, max_new=100, stop_ids=(5,), seed=7,
                              step=2, sequence_id=tuple(IDS[row].tolist())))
    n = int(batch.lengths[row])
    assert ids == np.asarray(batch.tokens[row, :n]).tolist()
    held = int(LENGTHS[row]) + n
    assert n > 25 and sampler.n_compiles() - before <= math.log2(held)
    # another answer of the same sizes compiles nothing
    count = sampler.n_compiles()
    list(sampler.stream(params, bias, [1, 2, 3], cfg, run, max_new=20, stop_ids=(5,), temperature=0.0))
    assert sampler.n_compiles() == count


@pytest.mark.parametrize("edit, text", [(dict(temperature=-1.0), "temperature"), (dict(top_p=0.0), "top_p"),
                                        (dict(max_new=0), "max_new"), (dict(temperature=math.nan), "temperature")])
def test_impossible_settings_are_one_line(edit, text):
    with pytest.raises(UserError, match=f"^{text}: found .* allowed: "):
        rollout(**edit)


@pytest.mark.slow
def test_layers_cut_apart_decode_as_the_stack_does():
    cfg, run, params, bias = weights()
    cache = sampler.append(params, bias, transformer.init_cache(cfg, B, 32, jnp.float32), prompts(), LENGTHS, cfg, run)[1]
    layers, apart = transformer.unstack({name: params[name] for name in ("dense", "moe")}, cache)
    step = jax.jit(lambda params, cache: sampler.append(params, bias, cache, prompts()[:, :1], jnp.ones(B, jnp.int32), cfg, run))
    (x, stacked, experts), (y, cut, chosen) = step(params, cache), step(params | layers, apart)
    np.testing.assert_allclose(x, y, atol=1e-6, rtol=0)
    assert np.array_equal(experts, chosen) and np.array_equal(stacked.lengths, cut.lengths)
    for name, leaves in cut.kv.items():
        np.testing.assert_allclose(np.concatenate(leaves), stacked.kv[name], atol=1e-6, rtol=0)
