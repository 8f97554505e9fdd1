"""DeepSeek-V3 as three pure functions in turn: embed -> stage (dense blocks, MoE blocks) -> tail (norm, head, MTP) (V3 §2).

params = dict(embedding [V, D], dense {.. [L, ...]}, moe {.. [L, ...]}, norm [D], head [V, D], mtp {.. [J, ...]}), the stacks present
only where there are such layers; `outer` is what is not in a stack: embedding, norm, head, mtp. State is an argument: router bias
in, expert load out; cache in, cache out. Shapes: B batch, T position, S cache position, D d_model, V vocab, L layers, J MTP depth.
"""
from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.core import meta

from model import mtp, precision
from model import tape as tapes
from model.attention import LayerCache, Layout
from model.block import RESIDUAL, Block
from model.config import Execution, ModelConfig
from model.norm import rms_norm
from model.sharding import Named, constrain

AS_STORED = Execution()


class Cache(NamedTuple):
    """kv: the attention kind's arrays [L, B, S, ...], or of each a tuple of L [1, B, S, ...] (`unstack`); lengths i32 [B]: tokens held by
    each row."""

    kv: dict[str, Any]
    lengths: Any


class StageOutput(NamedTuple):
    """load f32 [L_moe, E] (None without experts), balance scalar (sum), experts i32 [L_moe, B, T, K], records by stack and site
    ([L, ...], with a tape), kv (with a cache), probes by name."""

    load: Any
    balance: Any
    experts: Any
    records: dict[str, dict[str, tapes.Record]]
    kv: Any
    probes: dict[str, Any]


class Output(NamedTuple):
    """logits [B, T, V] and hidden [B, T, D] after the final norm; by MTP depth k: mtp_logits[k], mtp_hidden[k], whose position i has
    seen token i+1+k and predicts token i+2+k (junk in the last k+1 positions); routing of the MTP modules; cache; probes; experts."""

    logits: Any
    hidden: Any
    mtp_logits: list[Any]
    mtp_hidden: list[Any]
    mtp_routing: list[Any]
    cache: Cache | None
    probes: dict[str, Any]
    experts: Any


def init(rng, cfg: ModelConfig):
    """Random params, float32: matrices normal(init_std), norms 1. Call it under jit (outside it took 20 s, inside under 2)."""
    return meta.unbox(_boxed(rng, cfg))


def axes(cfg: ModelConfig):
    """The logical axes of every leaf of params, as tuples in the same tree."""
    boxed = jax.eval_shape(functools.partial(_boxed, cfg=cfg), jax.random.key(0))
    stacked = {"dense", "moe", "mtp"}
    return jax.tree_util.tree_map_with_path(
        lambda path, box: (("layers",) if path[0].key in stacked else ()) + tuple(box.names), boxed,
        is_leaf=lambda x: isinstance(x, Named))


def init_cache(cfg: ModelConfig, batch_size: int, capacity: int, dtype) -> Cache:
    """An empty cache of `capacity` tokens a row."""
    kv = {name: jnp.zeros((cfg.n_layers, batch_size, capacity, *shape), dtype)
          for name, shape in cfg.attention.cache_shapes().items()}
    return Cache(kv, jnp.zeros(batch_size, jnp.int32))


def grow(cache: Cache, capacity: int) -> Cache:
    """The cache copied into the next power of two that holds `capacity` tokens."""
    held = next(iter(cache.kv.values())).shape[2]
    size = max(held, 1 << (capacity - 1).bit_length())
    return cache._replace(kv={k: jnp.pad(v, [(0, 0), (0, 0), (0, size - held)] + [(0, 0)] * (v.ndim - 3))
                              for k, v in cache.kv.items()})


def unstack(layers, cache: Cache) -> tuple[dict[str, tuple], Cache]:
    """The stacks {name: {.. [L, ...]}} and the cache cut into tuples of layers, as `stage` takes them too: a loop around it then reads
    them in place, where slices of a stack would be copied at every turn."""
    cut = {name: tuple(jax.tree.map(lambda leaf, i=i: leaf[i], stack) for i in range(_depth(stack))) for name, stack in layers.items()}
    return cut, cache._replace(kv={name: tuple(jnp.split(leaf, leaf.shape[0])) for name, leaf in cache.kv.items()})


def apply(params, tokens, cfg: ModelConfig, *, run: Execution = AS_STORED, positions=None, segment_ids=None, router_bias=None,
          cache: Cache | None = None, n_valid=None, experts=None) -> tuple[Output, dict[str, Any]]:
    """Logits for tokens i32 [B, T]; see Output. metrics: 'moe/load' f32 [n_moe + J, E], 'moe/balance_loss' (sum over rows).

    positions i32 [B, T] (default: from 0, or from the cache's lengths); segment_ids i32 [B, T] (0: padding; tokens attend within
    their segment; default: one segment); router_bias f32 [n_moe + J, E]. With a cache the right-padded tokens (n_valid [B] of them
    real, default T) are appended at each row's own length. experts i32 [n_moe, B, T, K] are routed by instead of the gate's choice.
    """
    n_moe = cfg.n_moe_layers if cfg.moe else 0
    aux = dict(positions=positions, segment_ids=segment_ids, tokens=tokens, cache=cache, n_valid=n_valid, router_bias=None)
    stacks = {k: params[k] for k in ("dense", "moe") if k in params}
    tape = None if experts is None else {"moe": tapes.Tape(experts=experts)}

    x = embed(params, tokens, cfg, run)
    x, staged = stage(stacks, x, aux | dict(router_bias=None if router_bias is None else router_bias[:n_moe]), cfg, run, tape=tape)
    output = tail(params, x, aux | dict(router_bias=None if router_bias is None else router_bias[n_moe:]), cfg, run)

    if cache is not None:
        output = output._replace(cache=Cache(staged.kv, cache.lengths + (tokens.shape[1] if n_valid is None else n_valid)))
    loads = [staged.load] if staged.load is not None else []
    loads += [routing.load[None] for routing in output.mtp_routing if routing is not None]
    balance = sum((r.balance for r in output.mtp_routing if r is not None), staged.balance)
    metrics = {"moe/load": jnp.concatenate(loads), "moe/balance_loss": balance} if loads else {}
    return output._replace(probes=staged.probes, experts=staged.experts), metrics


def embed(outer, tokens, cfg: ModelConfig, run: Execution):
    """tokens i32 [B, T] -> x [B, T, D] in the dtype of activations."""
    with jax.named_scope("embedding"):
        table = outer["embedding"]
        return constrain(table[tokens].astype(run.precision.dtype or table.dtype), RESIDUAL)


def stage(layers, x, aux, cfg: ModelConfig, run: Execution, *, tape=None):
    """Runs slices of the dense and MoE stacks: layers = dict(dense={..[l, ...]}, moe={..[l, ...]}) -> (x, StageOutput).

    aux = dict(positions, segment_ids, router_bias (this slice's rows), and optionally cache (this slice's kv), n_valid, first_layer).
    Stacks and kv may come as `unstack` cuts them, for calls without a tape.
    tape: {'dense': Tape, 'moe': Tape}, each stacked over the slice's layers (model/tape.py); records come back the same way.
    """
    first, cache = aux.get("first_layer", 0), aux.get("cache")
    layout, valid = layout_of(*x.shape[:2], aux, cfg, x.dtype)
    parts, kv = {}, None if cache is None else cache.kv
    for name in [k for k in ("dense", "moe") if k in layers]:
        stack_cfg = cfg.dense() if name == "dense" else cfg
        n = _depth(layers[name])
        start = first - aux.get("first_layer", 0)  # the cache holds this slice's layers
        xs = dict(params=layers[name], bias=aux["router_bias"] if name == "moe" else None,
                  row=jnp.arange(start, start + n, dtype=jnp.int32), tape=None if tape is None else tape.get(name))
        body = _remat(functools.partial(_layer, layout=layout, valid=valid, cfg=stack_cfg, run=run), run)
        if isinstance(layers[name], tuple):
            (x, kv), parts[name] = _unrolled(body, (x, kv), xs, start)
        else:
            (x, kv), parts[name] = jax.lax.scan(body, (x, kv), xs, unroll=min(run.scan_unroll, n))
        parts[name]["probes"] = tapes.select_probes(parts[name]["probes"], first, run.probes)
        first += n
    routing = parts["moe"]["routing"] if "moe" in parts else None
    return x, StageOutput(
        load=None if routing is None else routing.load,
        balance=jnp.zeros((), jnp.float32) if routing is None else jnp.sum(routing.balance),
        experts=None if routing is None else routing.experts,
        records={name: part["records"] for name, part in parts.items()},
        kv=kv,
        probes={k: v for part in parts.values() for k, v in part["probes"].items()})


def tail(outer, x, aux, cfg: ModelConfig, run: Execution) -> Output:
    """Final norm, head, and the MTP modules (absent with a cache): aux as for stage, with tokens and the MTP rows of router_bias."""
    hidden = rms_norm(x, outer["norm"], cfg.norm_eps)
    hiddens, routings = [], []
    if cfg.mtp_depth and aux.get("cache") is None and "mtp" in outer:
        layout, valid = layout_of(*x.shape[:2], aux, cfg, x.dtype)
        hiddens, routings = mtp.forward(outer["mtp"], hidden, aux["tokens"], functools.partial(embed, outer, cfg=cfg, run=run),
                                        layout, aux["router_bias"], valid, cfg, run)
    return Output(head(outer, hidden), hidden, [head(outer, h) for h in hiddens], hiddens, routings, None, {}, None)


def head(outer, hidden):
    """Logits [..., V] of hidden states [..., D]: the one output head, shared with MTP; never FP8 (V3 §3.3.1)."""
    with jax.named_scope("head"):
        flat = hidden.reshape(-1, hidden.shape[-1])
        logits = jax.lax.dot_general(flat, outer["head"].astype(flat.dtype), (((1,), (1,)), ((), ())))
        return constrain(logits.reshape(*hidden.shape[:-1], -1), ("batch", "seq", "vocab"))


def _layer(carry, item, *, layout, valid, cfg, run):
    """One scan step: (x, the whole cache) and a layer's slice of everything in, what it leaves behind out."""
    x, kv = carry
    notes, cache = tapes.LayerTape(item["tape"], run.probes), None if kv is None else LayerCache(kv, item["row"])
    x, routing, cache = Block(cfg, run).apply({"params": item["params"]}, x, layout, item["bias"], valid, cache, notes)
    return (x, None if kv is None else cache.kv), dict(routing=routing, records=notes.records, probes=notes.probes)


def _unrolled(body, carry, xs, start: int):
    """The scan of `stage` over layers cut apart, each with its own cache."""
    (x, kv), outs = carry, []
    for i, params in enumerate(xs["params"]):
        own, bias = {name: leaves[start + i] for name, leaves in kv.items()}, None if xs["bias"] is None else xs["bias"][i]
        (x, own), out = body((x, own), dict(params=params, bias=bias, row=jnp.zeros((), jnp.int32), tape=None))
        kv = {name: (*leaves[:start + i], own[name], *leaves[start + i + 1:]) for name, leaves in kv.items()}
        outs.append(out)
    return (x, kv), jax.tree.map(lambda *leaves: jnp.stack(leaves), *outs)


def _depth(stack) -> int:
    """Layers of a stack, or of a tuple of layers."""
    if isinstance(stack, tuple):
        return len(stack)
    first = jax.tree.leaves(stack, is_leaf=precision.is_weight)[0]
    return (first.low if precision.is_weight(first) else first).shape[0]


def _remat(body, run: Execution):
    if run.remat == "none":
        return body
    names = jax.checkpoint_policies.save_only_these_names(*run.remat_save)
    return jax.checkpoint(body, policy=None if run.remat == "full" else names, prevent_cse=False)


def layout_of(B: int, T: int, aux, cfg: ModelConfig, dtype) -> tuple[Layout, Any]:
    """Positions, mask and cache rows of this call, and which tokens are real (bool [B, T])."""
    cache, segments, positions = aux.get("cache"), aux["segment_ids"], aux["positions"]
    index = jnp.arange(T, dtype=jnp.int32)[None]
    if cache is None:
        mask = (index[..., None] >= index[:, None, :]) if segments is None else (
            (index[..., None] >= index[:, None, :]) & (segments[..., None] == segments[:, None, :]))
        positions = index if positions is None else positions
        valid = jnp.ones((B, T), bool) if segments is None else segments > 0
        return Layout(cfg.rope.rotation(positions, cfg.attention.rotated, dtype), mask, causal_only=segments is None), valid
    capacity = jax.tree.leaves(cache.kv)[0].shape[2]
    n_valid = jnp.full(cache.lengths.shape, T) if aux.get("n_valid") is None else aux["n_valid"]
    valid, rows = index < n_valid[:, None], cache.lengths[:, None] + index
    mask = jnp.arange(capacity, dtype=jnp.int32)[None, None] <= rows[..., None]
    rotation = cfg.rope.rotation(rows if positions is None else positions, cfg.attention.rotated, dtype)
    return Layout(rotation, mask, jnp.where(valid, rows, capacity)), valid


def _boxed(rng, cfg: ModelConfig):
    """Params with their logical axes: blocks by vmap over folded keys, so that a layer's weights do not depend on the others."""
    run, D = Execution(), cfg.d_model
    layout, _ = layout_of(1, 1, dict(segment_ids=None, positions=None), cfg, jnp.float32)
    x, valid, bias = jnp.zeros((1, 1, D), jnp.float32), jnp.ones((1, 1), bool), None

    def block(stack_cfg):
        return lambda key: Block(stack_cfg, run).init(key, x, layout, bias, valid, None, tapes.LayerTape())["params"]

    def mtp_module(key):
        return mtp.MTPModule(cfg, run).init(key, x, x, layout, bias, valid)["params"]

    def matrix(purpose, axes):
        draw = cfg.init_std * jax.random.normal(jax.random.fold_in(rng, purpose), (cfg.vocab_size, D), jnp.float32)
        return Named(draw, axes)

    def stack(purpose, make, n):
        return jax.vmap(make)(jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(rng, purpose), i))(jnp.arange(n)))

    params = dict(embedding=matrix(0, ("vocab", "embed")), norm=Named(jnp.ones(D, jnp.float32), ("embed",)),
                  head=matrix(1, ("vocab", "embed")))
    if cfg.n_dense_layers:
        params["dense"] = stack(2, block(cfg.dense()), cfg.n_dense_layers)
    if cfg.n_moe_layers:
        params["moe"] = stack(3, block(cfg), cfg.n_moe_layers)
    if cfg.mtp_depth:
        params["mtp"] = stack(4, mtp_module, cfg.mtp_depth)
    return params
