"""Speculative decoding with the MTP module as the draft (V3 §2.2, §5.4.3; Leviathan et al. 2211.17192).

Module 1 reads the main model's hidden state of position i and the embedding of token i+1, and proposes token i+2 from q. The main
model then reads both tokens at once: the proposal is kept with probability min(1, p / q), else the token is drawn from the part of p
above q, so that what comes out follows the main model's p exactly (at temperature 0: is its greedy answer). A kept proposal brings a
second token from the same step. The module has a latent cache of its own, one layer deep, at the same positions.
Shapes: one row; T position, V vocab, D d_model.
"""
from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from model import mtp, transformer
from model.config import Execution, ModelConfig
from model.dtypes import at_least_f32
from model.errors import require
from model.norm import rms_norm
from model.transformer import Cache
from train import sampler

ACCEPT, CORRECT, DRAFT = range(3)  # what a position's key is folded with; the plain draw uses it as it is


@dataclasses.dataclass
class Acceptance:
    """Counts of one answer: `rate` is the share of proposals kept (V3 §5.4.3: 0.85 to 0.9)."""

    proposed: int = 0
    accepted: int = 0

    @property
    def rate(self) -> float:
        return self.accepted / max(self.proposed, 1)


def speculate(params, router_bias, prompt_ids, cfg: ModelConfig, run: Execution, *, max_new: int, temperature=1.0, top_p=1.0,
              stop_ids=(), seed: int = 0, step: int = 0, sequence_id: tuple[int, int] = (0, 0),
              acceptance: Acceptance | None = None) -> Iterator[int]:
    """Yields the ids of one completion, one or two a step, a stop id last; counts into acceptance. Needs cfg.mtp_depth >= 1."""
    sampler.check_sampling(temperature, top_p)
    require(cfg.mtp_depth >= 1, "model.mtp_depth", cfg.mtp_depth, "1 or more: the MTP module is the draft")
    n, acceptance = len(prompt_ids), acceptance or Acceptance()
    require(n >= 1, "prompt", list(prompt_ids), "at least one token")
    params, dtype = sampler.ready(params, run), sampler.cache_dtype(params, run)
    keys = sampler.sequence_keys(sampler.seeds(seed, step), jnp.asarray([sequence_id], jnp.int32))
    one_layer = dataclasses.replace(cfg, n_layers=1, n_dense_layers=0)
    caches = [transformer.init_cache(c, 1, sampler.bucket(n + 2), dtype) for c in (cfg, one_layer)]
    knobs = jnp.asarray(temperature, jnp.float32), jnp.asarray(top_p, jnp.float32)
    tokens = jnp.pad(jnp.asarray([prompt_ids], jnp.int32), ((0, 0), (0, sampler.bucket(n) - n)))
    token, draft, q, *caches = _start(params, router_bias, *caches, tokens, jnp.asarray([n], jnp.int32), keys, *knobs, cfg=cfg, run=run)
    new, index = [int(token)], 0
    while True:
        for t in new:
            yield t
            index += 1
            if t in stop_ids or index == max_new:
                return
        caches = [sampler.room(cache, n + index + 1) for cache in caches]
        pair, kept, draft, q, *caches = _advance(
            params, router_bias, *caches, jnp.asarray(new[-1], jnp.int32), draft, q, keys, jnp.asarray(index, jnp.int32), *knobs,
            cfg=cfg, run=run)
        new = pair.tolist()[:1 + int(kept)]
        acceptance.proposed += 1
        acceptance.accepted += int(kept)


@functools.partial(jax.jit, static_argnames=("cfg", "run"), donate_argnames=("cache", "draft_cache"))
def _start(params, router_bias, cache, draft_cache, tokens, n_valid, keys, temperature, top_p, *, cfg, run):
    """Prefill of both caches: (first token, draft of the second with its q [V], caches)."""
    hidden, cache = _hidden(params, router_bias, cache, tokens, n_valid, cfg, run)
    last = n_valid[0] - 1
    p = _probabilities(transformer.head(params, hidden[0, last][None])[0], temperature, top_p)
    token = _pick(p, jax.random.fold_in(keys[0], 0))
    following = jnp.roll(tokens, -1, axis=1).at[0, last].set(token)
    draft, q, draft_cache = _propose(params, router_bias, draft_cache, hidden, following, n_valid, keys, 1, temperature, top_p, cfg, run)
    return token, draft, q, cache, draft_cache


@functools.partial(jax.jit, static_argnames=("cfg", "run"), donate_argnames=("cache", "draft_cache"))
def _advance(params, router_bias, cache, draft_cache, token, draft, q, keys, index, temperature, top_p, *, cfg, run):
    """One step of both models: (tokens i32 [2] of index and index + 1, the second real if the draft was kept, kept, next draft, its
    q, caches). A refused draft stays in the cache beyond the length, where the next token overwrites it."""
    fed = jnp.stack([token, draft])[None]
    hidden, cache = _hidden(params, router_bias, cache, fed, jnp.full(1, 2, jnp.int32), cfg, run)
    p = _probabilities(transformer.head(params, hidden[0]), temperature, top_p)
    token, kept = verify(p[0], q, draft, jax.random.fold_in(keys[0], index))
    pair = jnp.stack([token, _pick(p[1], jax.random.fold_in(keys[0], index + 1))])
    n_valid = 1 + kept.astype(jnp.int32)[None]
    cache = cache._replace(lengths=cache.lengths - 2 + n_valid)
    draft, q, draft_cache = _propose(params, router_bias, draft_cache, hidden, pair[None], n_valid, keys, index + n_valid[0],
                                     temperature, top_p, cfg, run)
    return pair, kept, draft, q, cache, draft_cache


def verify(p_V, q_V, draft, key):
    """(token, kept): draft, drawn from q, with probability min(1, p / q), else a draw from the part of p above q: a draw from p."""
    kept = jax.random.uniform(jax.random.fold_in(key, ACCEPT), dtype=q_V.dtype) * q_V[draft] < p_V[draft]
    return jnp.where(kept, draft, _pick(jnp.maximum(p_V - q_V, 0), jax.random.fold_in(key, CORRECT))), kept


def _hidden(params, router_bias, cache, tokens, n_valid, cfg, run):
    """Hidden states [1, T, D] after the final norm: what head and MTP read."""
    x, cache, _ = sampler.append(params, router_bias, cache, tokens, n_valid, cfg, run)
    return rms_norm(x, params["norm"], cfg.norm_eps), cache


def _propose(params, router_bias, cache: Cache, hidden, following, n_valid, keys, index, temperature, top_p, cfg, run):
    """Runs MTP module 1 on hidden [1, T, D] and the tokens that follow them [1, T] -> (draft of `index`, its q [V], cache)."""
    first = jax.tree.map(lambda leaf: leaf[0], {k: v for k, v in params["mtp"].items() if k != "block"})
    x = mtp.join(first, hidden, transformer.embed(params, following, cfg, run), cfg, run)
    n_moe = cfg.n_moe_layers if cfg.moe else 0
    aux = dict(positions=None, segment_ids=None, cache=cache, n_valid=n_valid,
               router_bias=None if router_bias is None else router_bias[n_moe:n_moe + 1])
    layers = {"moe" if cfg.moe else "dense": jax.tree.map(lambda leaf: leaf[:1], params["mtp"]["block"])}
    x, staged = transformer.stage(layers, x, aux, cfg, run)
    last = rms_norm(x, first["norm"], cfg.norm_eps)[0, n_valid[0] - 1]
    q = _probabilities(transformer.head(params, last[None])[0], temperature, top_p)
    draft = _pick(q, jax.random.fold_in(jax.random.fold_in(keys[0], index), DRAFT))
    return draft, q, Cache(staged.kv, cache.lengths + n_valid)


def _probabilities(logits, temperature, top_p):
    """The distribution drawn from, [..., V]: all on the largest logit at temperature 0."""
    logits = logits.astype(at_least_f32(logits.dtype))
    return jax.lax.cond(
        temperature > 0, lambda: jax.nn.softmax(sampler.scale_logits(logits, temperature, top_p), axis=-1),
        lambda: jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=logits.dtype))


def _pick(p_V, key):
    """A draw from weights p [V] that need not sum to 1."""
    return jnp.argmax(jnp.log(p_V) + jax.random.gumbel(key, p_V.shape, p_V.dtype)).astype(jnp.int32)
