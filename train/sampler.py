"""Generation over the latent cache: `generate` for batches in one compiled rollout, `stream` for one answer token by token.

A rollout is a prefill of right-padded prompts (expanded MLA), then a while_loop of decode steps (absorbed MLA, V2 §2.1.2) that ends
when every row has ended. A row's randomness is a fold of (seed, step, prompt, sample, index of the token), so that neither its slot,
nor the batch around it, nor padding changes what it draws; a draw is the argmax of logits plus Gumbel noise.
Shapes: B rows, T prompt positions, N new tokens, V vocab, K chosen experts.
"""
from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from model import precision, transformer
from model.config import Execution, ModelConfig
from model.dtypes import at_least_f32
from model.errors import UserError, require
from model.norm import rms_norm
from model.transformer import Cache

SMALLEST = 16  # tokens in the smallest bucket of prompts and caches


class Rollout(NamedTuple):
    """tokens i32 [B, N] (0 after the end); logp f32 [B, N] of the distribution sampled from (0 after the end; at temperature 0: of
    the unchanged distribution); mask bool [B, N]: the completion, its stop token included; lengths i32 [B] = sum of mask; finished
    bool [B]: a stop token came; experts i32 [n_moe, B, T + N, K] or None: by which experts prompt and completion were routed, prompt
    and completion in one run without the padding between them, every token's choice there, the last one's too, valid junk after: what
    `transformer.apply(experts=...)` takes for rows packed so; steps i32: decode steps run, for all rows at once."""

    tokens: Any
    logp: Any
    mask: Any
    lengths: Any
    finished: Any
    experts: Any
    steps: Any


class _State(NamedTuple):
    """Of the decode loop: index of the next token; pending: rows whose last token must still be fed; ended: a stop token came."""

    index: Any
    cache: Cache
    pending: Any
    ended: Any
    tokens: Any
    logp: Any
    experts: Any


def generate(params, router_bias, prompts, prompt_lengths, sequence_ids, seed, step, cfg: ModelConfig, run: Execution, *,
             max_new: int, temperature=1.0, top_p=1.0, stop_ids=(), return_experts: bool = False) -> Rollout:
    """Completions of prompts i32 [B, T] (right-padded; prompt_lengths i32 [B], at least 1), sequence_ids i32 [B, 2] = (prompt, sample).

    temperature 0 is greedy; top_p 1 is off. Compiled once for each (B, T rounded up to a power of two, max_new).
    params: as stored, or from `precision.prepare`. Raises UserError.
    """
    lengths = np.asarray(prompt_lengths)
    require(max_new >= 1, "max_new", max_new, "a positive integer")
    require(bool(np.all((lengths >= 1) & (lengths <= prompts.shape[1]))), "prompt_lengths", lengths.tolist(), f"1 to {prompts.shape[1]}")
    check_sampling(temperature, top_p)
    width = bucket(prompts.shape[1])
    padded = jnp.pad(jnp.asarray(prompts, jnp.int32), ((0, 0), (0, width - prompts.shape[1])))
    stops = [*stop_ids, *[-1] * (-len(stop_ids) % 8 or 8)]  # a multiple of 8, so that their number compiles nothing
    rollout = _rollout(
        params, router_bias, padded, jnp.asarray(lengths, jnp.int32), jnp.asarray(sequence_ids, jnp.int32),
        seeds(seed, step), jnp.asarray(temperature, jnp.float32), jnp.asarray(top_p, jnp.float32),
        jnp.asarray(stops, jnp.int32), cfg=cfg, run=run, max_new=max_new,
        return_experts=return_experts and cfg.moe is not None)
    if rollout.experts is None:
        return rollout
    return rollout._replace(experts=rollout.experts[:, :, :prompts.shape[1] + max_new])


@functools.partial(jax.jit, static_argnames=("cfg", "run", "max_new", "return_experts"))
def _rollout(params, router_bias, prompts, prompt_lengths, sequence_ids, seed_and_step, temperature, top_p, stop_ids, *,
             cfg: ModelConfig, run: Execution, max_new: int, return_experts: bool) -> Rollout:
    B, T = prompts.shape
    params, keys = ready(params, run), sequence_keys(seed_and_step, sequence_ids)
    cache = transformer.init_cache(cfg, B, bucket(T + max_new), cache_dtype(params, run))
    logits, cache, chosen = forward(params, router_bias, cache, prompts, prompt_lengths, cfg, run)
    token, logp = draw(logits, keys, 0, temperature, top_p)
    ended = _is_stop(token, stop_ids)
    experts = jnp.pad(chosen, ((0, 0), (0, 0), (0, max_new), (0, 0))) if return_experts else None
    # XLA's CPU copies the slices of a stack at every token; a scan that keeps its loop needs the stack
    if jax.default_backend() == "cpu" and run.scan_unroll >= max(cfg.n_dense_layers, cfg.n_moe_layers):
        layers, cache = transformer.unstack({k: params[k] for k in ("dense", "moe") if k in params}, cache)
        params = params | layers

    def unfinished(s: _State):
        return jnp.any(s.pending) & (s.index < max_new + return_experts)

    def advance(s: _State) -> _State:
        before = jax.lax.dynamic_slice_in_dim(s.tokens, s.index - 1, 1, axis=1)
        logits, cache, chosen = forward(params, router_bias, s.cache, before, s.pending.astype(jnp.int32), cfg, run)
        experts = s.experts
        if experts is not None:  # a row that is not pending writes past the end: dropped
            place = jnp.where(s.pending, s.cache.lengths, experts.shape[2])
            experts = experts.at[:, jnp.arange(B), place].set(chosen[:, :, 0], mode="drop")
        active = ~s.ended & (s.index < max_new)
        token, logp = draw(logits, keys, s.index, temperature, top_p)
        ended = s.ended | (active & _is_stop(token, stop_ids))
        at = jnp.where(active, s.index, max_new)
        return _State(
            s.index + 1, cache, active if return_experts else ~ended, ended,
            s.tokens.at[jnp.arange(B), at].set(token, mode="drop"), s.logp.at[jnp.arange(B), at].set(logp, mode="drop"), experts)

    first = _State(
        jnp.ones((), jnp.int32), cache, jnp.ones(B, bool) if return_experts else ~ended, ended,
        jnp.zeros((B, max_new), jnp.int32).at[:, 0].set(token), jnp.zeros((B, max_new), jnp.float32).at[:, 0].set(logp), experts)
    last = jax.lax.while_loop(unfinished, advance, first)
    stops = _is_stop(last.tokens, stop_ids)
    mask = jnp.cumsum(stops, axis=1, dtype=jnp.int32) == stops.astype(jnp.int32)
    return Rollout(last.tokens, last.logp, mask, jnp.sum(mask, axis=1, dtype=jnp.int32), last.ended, last.experts,
                   last.index - 1)


def stream(params, router_bias, prompt_ids, cfg: ModelConfig, run: Execution, *, max_new: int, temperature=1.0, top_p=1.0,
           stop_ids=(), seed: int = 0, step: int = 0, sequence_id: tuple[int, int] = (0, 0)) -> Iterator[int]:
    """Yields the ids of one completion as they come, a stop id last: what `generate` draws for the same keys.

    The cache grows in powers of two, so that N tokens compile at most log2(N) programs (`n_compiles` counts them).
    """
    check_sampling(temperature, top_p)
    n = len(prompt_ids)
    require(n >= 1, "prompt", list(prompt_ids), "at least one token")
    params = ready(params, run)
    keys = sequence_keys(seeds(seed, step), jnp.asarray([sequence_id], jnp.int32))
    cache = transformer.init_cache(cfg, 1, bucket(n + 1), cache_dtype(params, run))
    tokens = jnp.pad(jnp.asarray([prompt_ids], jnp.int32), ((0, 0), (0, bucket(n) - n)))
    knobs = jnp.asarray(temperature, jnp.float32), jnp.asarray(top_p, jnp.float32)
    for index in range(max_new):
        cache = room(cache, n + index + 1)
        token, cache = _advance(params, router_bias, cache, tokens, jnp.asarray([n if index == 0 else 1], jnp.int32), keys,
                                jnp.asarray(index, jnp.int32), *knobs, cfg=cfg, run=run)
        tokens = token[:, None]
        yield int(token[0])
        if int(token[0]) in stop_ids:
            return


@functools.partial(jax.jit, static_argnames=("cfg", "run"), donate_argnames="cache")
def _advance(params, router_bias, cache, tokens, n_valid, keys, index, temperature, top_p, *, cfg, run):
    """Feeds tokens and draws the next one: (token [B], cache)."""
    logits, cache, _ = forward(params, router_bias, cache, tokens, n_valid, cfg, run)
    return draw(logits, keys, index, temperature, top_p)[0], cache


def room(cache: Cache, capacity: int) -> Cache:
    """The cache, grown if it holds fewer than `capacity` tokens a row."""
    return cache if next(iter(cache.kv.values())).shape[2] >= capacity else transformer.grow(cache, capacity)


def n_compiles() -> int:
    """Programs that `stream` has compiled in this process."""
    return _advance._cache_size()


def append(params, router_bias, cache: Cache, tokens, n_valid, cfg: ModelConfig, run: Execution):
    """Feeds right-padded tokens i32 [B, T], n_valid [B] of them real -> (x [B, T, D] before the final norm, cache, experts)."""
    n_moe = cfg.n_moe_layers if cfg.moe else 0
    aux = dict(positions=None, segment_ids=None, cache=cache, n_valid=n_valid,
               router_bias=None if router_bias is None else router_bias[:n_moe])
    layers = {k: params[k] for k in ("dense", "moe") if k in params}
    x, staged = transformer.stage(layers, transformer.embed(params, tokens, cfg, run), aux, cfg, run)
    return x, Cache(staged.kv, cache.lengths + n_valid), staged.experts


def forward(params, router_bias, cache: Cache, tokens, n_valid, cfg: ModelConfig, run: Execution):
    """`append`, and the head on the last real token of each row alone -> (logits [B, V], cache, experts i32 [n_moe, B, T, K])."""
    x, cache, experts = append(params, router_bias, cache, tokens, n_valid, cfg, run)
    last = jnp.take_along_axis(x, jnp.maximum(n_valid - 1, 0)[:, None, None], axis=1)
    return transformer.head(params, rms_norm(last, params["norm"], cfg.norm_eps))[:, 0], cache, experts


def draw(logits_BV, keys_B, index, temperature, top_p):
    """(token i32 [B], logp f32 [B]): the index-th draw of each row from softmax(logits / temperature) cut to top_p."""
    logits = logits_BV.astype(at_least_f32(logits_BV.dtype))

    def sample():
        scaled = scale_logits(logits, temperature, top_p)
        noise = jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, index), scaled.shape[1:], scaled.dtype))(keys_B)
        return jnp.argmax(scaled + noise, axis=-1).astype(jnp.int32), scaled

    def greedy():
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), logits

    token, scaled = jax.lax.cond(temperature > 0, sample, greedy)
    picked = jnp.take_along_axis(scaled, token[:, None], axis=-1)[:, 0]
    return token, (picked - jax.nn.logsumexp(scaled, axis=-1)).astype(jnp.float32)


def scale_logits(logits, temperature, top_p):
    """logits [..., V] / temperature (above 0), with all but the smallest set of probability >= top_p at -inf (ties at the edge stay)."""
    scaled = logits / temperature.astype(logits.dtype)

    def cut():
        ordered = -jnp.sort(-scaled, axis=-1)
        p = jax.nn.softmax(ordered, axis=-1)
        inside = jnp.cumsum(p, axis=-1) - p < top_p.astype(p.dtype)
        edge = jnp.min(jnp.where(inside, ordered, jnp.inf), axis=-1, keepdims=True)
        return jnp.where(scaled >= edge, scaled, -jnp.inf)

    return jax.lax.cond(top_p < 1, cut, lambda: scaled)


def seeds(seed: int, step: int):
    """(seed, step) u32 [2], any integers."""
    return jnp.asarray(np.asarray([seed, step], np.int64) & 0xFFFFFFFF, jnp.uint32)


def sequence_keys(seed_and_step, sequence_ids):
    """One key a row [B] from (seed, step) u32 [2] and (prompt, sample) i32 [B, 2]."""
    root = jax.random.fold_in(jax.random.key(seed_and_step[0]), seed_and_step[1])
    return jax.vmap(lambda pair: jax.random.fold_in(jax.random.fold_in(root, pair[0]), pair[1]))(sequence_ids)


def ready(params, run: Execution):
    """params as decoding reads them: low copies made once, masters left behind, the head cast ahead of the loop."""
    prepared = precision.prepare(params, run)
    slim = jax.tree.map(lambda w: w._replace(master=None) if precision.is_weight(w) else w, prepared, is_leaf=precision.is_weight)
    return slim if run.precision.dtype is None else slim | dict(head=slim["head"].astype(run.precision.dtype))


def cache_dtype(params, run: Execution):
    """The dtype of activations, in which the cache is kept."""
    return run.precision.dtype or params["embedding"].dtype


def bucket(n: int) -> int:
    """n rounded up to a power of two, SMALLEST at least."""
    return max(SMALLEST, 1 << (n - 1).bit_length())


def check_sampling(temperature, top_p) -> None:
    """Raises UserError for numbers that are no temperature or no top_p; traced values pass."""
    if not isinstance(temperature, jax.Array) and not (0 <= temperature < float("inf")):
        raise UserError(f"temperature: found {temperature!r}, allowed: 0 (greedy) or a positive number")
    if not isinstance(top_p, jax.Array) and not 0 < top_p <= 1:
        raise UserError(f"top_p: found {top_p!r}, allowed: above 0, up to 1 (off)")


def _is_stop(tokens, stop_ids):
    return jnp.any(tokens[..., None] == stop_ids.reshape((1,) * tokens.ndim + (-1,)), axis=-1)
