"""Speculative decoding: greedy output unchanged, draws follow the main model, the MTP cache equals the MTP forward."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model

from model import transformer
from model.config import Execution
from model.errors import UserError
from train import sampler, speculation
from train.speculation import Acceptance, speculate

VOCAB, PROMPT = 32, [3, 1, 4, 1, 5]


@functools.cache
def weights():
    cfg = tiny_model.tiny(vocab_size=VOCAB, n_layers=2)
    bias = 0.3 * jax.random.normal(jax.random.key(4), (cfg.n_moe_layers + 1, cfg.moe.n_routed_experts))
    return cfg, Execution(), tiny_model.init(cfg, seed=3), bias


@functools.cache
def agreeing():
    """A model whose MTP module is no bad draft: head and embedding dominate, blocks add little."""
    cfg, run, params, bias = weights()
    quiet = lambda path, leaf: 0.02 * leaf if path[-1].key in ("out", "down", "shared_down") else leaf  # noqa: E731
    params = jax.tree_util.tree_map_with_path(quiet, params)
    half = jnp.concatenate([jnp.eye(cfg.d_model), jnp.zeros((cfg.d_model, cfg.d_model))], axis=1)  # the embedding goes through
    params["mtp"] |= dict(proj=half[None], norm=params["norm"][None], enorm=jnp.ones((1, cfg.d_model)))
    return cfg, run, params, bias


@pytest.mark.parametrize("model", [weights, agreeing])
def test_greedy_output_is_that_of_plain_decoding(model):
    cfg, run, params, bias = model()
    plain = list(sampler.stream(params, bias, PROMPT, cfg, run, max_new=40, temperature=0.0, stop_ids=(VOCAB,)))
    counts = Acceptance()
    fast = list(speculate(params, bias, PROMPT, cfg, run, max_new=40, temperature=0.0, stop_ids=(VOCAB,), acceptance=counts))
    assert fast == plain and len(fast) == 40
    assert counts.proposed + counts.accepted + 1 in (40, 41)  # every step brings one token, and one more where the draft is kept
    assert counts.rate > 0.5 if model is agreeing else counts.rate < 1
    stopped = list(speculate(params, bias, PROMPT, cfg, run, max_new=40, temperature=0.0, stop_ids=(plain[7],)))
    assert stopped == plain[:plain.index(plain[7]) + 1]


def test_draft_of_the_cached_module_is_that_of_the_mtp_forward(monkeypatch):
    cfg, run, params, bias = agreeing()  # here some drafts are kept and some are not
    drafts, advance = {}, speculation._advance

    def watched(*args, **kwargs):
        drafts[int(args[8])] = np.asarray(args[6])  # by the index of the token that it proposes
        return advance(*args, **kwargs)

    monkeypatch.setattr(speculation, "_advance", watched)
    counts = Acceptance()
    ids = list(speculate(params, bias, PROMPT, cfg, run, max_new=40, seed=5, stop_ids=(VOCAB,), acceptance=counts))
    assert 0 < counts.accepted < counts.proposed
    tokens = jnp.asarray([PROMPT + ids], jnp.int32)
    output = jax.jit(lambda t: transformer.apply(params, t, cfg, run=run, router_bias=bias)[0])(tokens)
    expected = jax.nn.softmax(output.mtp_logits[0][0], axis=-1)
    for index, q in drafts.items():  # position i of module 1 predicts token i + 2
        np.testing.assert_allclose(q, expected[len(PROMPT) + index - 2], atol=1e-5)


def test_what_is_kept_or_corrected_follows_the_main_model():
    n, draws = 40_000, np.random.default_rng(0)
    p, q = draws.dirichlet(np.ones(12), 2)
    q[3], p[5] = 0, 0  # never proposed; never to come out
    p, q = p / p.sum(), q / q.sum()
    keys = jax.vmap(jax.random.key)(jnp.arange(n))
    drafts = jnp.asarray(draws.choice(12, n, p=q), jnp.int32)
    tokens, kept = jax.jit(jax.vmap(speculation.verify, (None, None, 0, 0)))(jnp.float32(p), jnp.float32(q), drafts, keys)
    assert np.all(np.abs(np.bincount(tokens, minlength=12) / n - p) < 4.5 * np.sqrt(p / n) + 1e-9)
    np.testing.assert_allclose(np.mean(kept), np.minimum(p, q).sum(), atol=0.01)  # the best rate there is
    same, always = jax.jit(jax.vmap(speculation.verify, (None, None, 0, 0)))(jnp.float32(q), jnp.float32(q), drafts, keys)
    assert np.all(always) and np.array_equal(same, drafts)


def test_a_model_without_mtp_cannot_speculate():
    cfg = tiny_model.tiny(mtp_depth=0)
    with pytest.raises(UserError, match="model.mtp_depth: found 0"):
        next(speculate({}, None, [1], cfg, Execution(), max_new=1))
