"""The training step, one pure function: forward, loss, gradients over micro-batches, clip, update, router bias, EMA, metrics.

A batch is dict(tokens, weight, ...: [n_micro, B, T], knobs: dict of scalars), with segment_ids and positions where documents are
kept apart (without them a row is one causal sequence). `loss(output, microbatch, totals) -> (sum, metrics)` returns sums:
micro-batches, rows and shards are only added, never averaged, so that no split of a batch changes a step (only the `batch_aux`
balance loss sees the split). `totals` = counts over the whole batch: tokens (of weight other than 0), answers (segments with such
tokens), weight, rows (with a real token). Metrics are scalars but 'moe/load' f32 [n_moe + J, E]: loss, the loss's own,
moe/balance_loss (a row's mean), moe/max_violation, grad_norm, tokens.
"""
from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from model import delayed_scaling, precision, sharding, transformer
from model.config import Execution, ModelConfig
from model.moe import max_violation, update_bias
from train.optimizer import Optimizer
from train.state import TrainState


def make_train_step(cfg: ModelConfig, run: Execution, optimizer: Optimizer, loss: Callable) -> Callable:
    """step(state, batch, rng) -> (state, metrics). Knobs read here: lr, clip, bias_rate, and optionally n_micro, how many of the
    micro-batches are filled (a batch ramp); a loss reads its own."""
    def step(state: TrainState, batch, rng) -> tuple[TrainState, dict]:
        del rng  # no step draws: dropout-free, and a loss that needs keys takes them as columns
        knobs, columns = batch["knobs"], {k: v for k, v in batch.items() if k != "knobs"}
        totals = count_totals(columns, knobs.get("n_micro"))
        params, prepared = gather(state.params, precision.prepare(state.params, run), cfg, optimizer.layout)

        past = None if state.amax is None else delayed_scaling.expected(state.amax, run.precision.delayed)

        def microbatch_loss(params, past, prepared, microbatch, router_bias, totals):
            weights = precision.with_masters(prepared, params, past)
            experts = jnp.moveaxis(microbatch["experts"], 2, 0) if "experts" in microbatch else None  # a column is [B, T, n_moe, K]
            output, metrics = transformer.apply(
                weights, microbatch["tokens"], cfg, run=run, positions=microbatch.get("positions"),
                segment_ids=microbatch.get("segment_ids"), router_bias=router_bias, experts=experts)
            total, sums = loss(output, microbatch, totals)
            if metrics:
                total = total + metrics["moe/balance_loss"].astype(total.dtype) / totals["rows"].astype(total.dtype)
            return total, sums | metrics | {"loss": total}

        def one(i):
            microbatch = {k: v[i] for k, v in columns.items()} | dict(knobs=knobs)
            (_, metrics), (grads, seen) = jax.value_and_grad(microbatch_loss, argnums=(0, 1), has_aux=True)(
                params, past, prepared, microbatch, state.router_bias, totals)
            return grads, metrics, seen

        def join(total, new):
            return *jax.tree.map(jnp.add, total[:2], new[:2]), jax.tree.map(jnp.maximum, total[2], new[2])

        n_micro = columns["tokens"].shape[0]
        if n_micro == 1:
            grads, metrics, seen = one(0)
        else:
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(one, 0))
            bound = knobs.get("n_micro", n_micro)
            grads, metrics, seen = jax.lax.fori_loop(0, bound, lambda i, total: join(total, one(i)), zeros)
        masters, opt_state, grad_norm = optimizer.update(grads, state.opt_state, state.params, knobs["lr"], knobs["clip"])
        router_bias, ema = state.router_bias, state.ema
        if router_bias is not None:
            router_bias = update_bias(router_bias, metrics["moe/load"], knobs["bias_rate"].astype(router_bias.dtype))
            metrics["moe/bias"] = router_bias
        if ema is not None:
            decay = optimizer.ema.decay  # from host memory and, by the step's out_shardings, back
            ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, jax.device_put(ema, jax.memory.Space.Device), masters)
        if "moe/load" in metrics:
            metrics["moe/balance_loss"] /= totals["rows"].astype(metrics["moe/balance_loss"].dtype)
            metrics["moe/max_violation"] = jnp.mean(max_violation(metrics["moe/load"]))
        metrics |= {"grad_norm": grad_norm, "tokens": totals["tokens"]}
        amax = None if seen is None else delayed_scaling.update(state.amax, seen)
        return TrainState(state.step + 1, masters, router_bias, opt_state, ema, amax), metrics

    return step


def gather(params, prepared, cfg: ModelConfig, layout: sharding.Layout):
    """(params, prepared) as a step uses them. Under ZeRO-1 gathered here, once a step; where a kind has low-precision copies it is these
    that move, as nothing reads the masters. The gradients need no word: XLA adds them up in the layout of the moments."""
    if layout.in_use is None:
        return params, prepared

    def one(names, leaf):
        if not precision.is_weight(leaf):
            return sharding.constrain(leaf, names, layout.in_use)
        names = tuple(n for n in names if n != "pair") if leaf.low.ndim < len(names) else names  # a pair's copy is one matrix
        names = [names, names, (*names[:-2], names[-1], names[-2])]
        # split first: else XLA makes the copies where they are used, of gathered masters
        low = [None if x is None else sharding.constrain(sharding.constrain(x, n, layout.at_rest), n, layout.in_use)
               for x, n in zip(leaf[1:4], names, strict=True)]
        return precision.Weight(leaf.master, *low)

    axes, is_names = transformer.axes(cfg), lambda x: isinstance(x, tuple)
    return tuple(jax.tree.map(one, axes, tree, is_leaf=is_names) for tree in (params, prepared))


def count_totals(columns, n_filled=None) -> dict:
    """Sums over the whole batch [n_micro, B, T], of which n_filled micro-batches are real (default: all): tokens with weight,
    answers (segments that hold any), weight, rows (at least 1); float32."""
    weight = columns["weight"]
    counted, segments = (weight != 0).astype(jnp.int32), columns.get("segment_ids", jnp.ones(weight.shape, jnp.int32))
    before = jnp.pad(segments[..., :-1], [(0, 0)] * (segments.ndim - 1) + [(1, 0)])
    # a segment counts once: at its first weighted token
    order = jnp.cumsum(counted, axis=-1, dtype=jnp.int32)
    start = jax.lax.cummax(jnp.where(segments != before, order - counted, 0), axis=segments.ndim - 1)
    answers = jnp.sum((counted == 1) & (order - start == 1))
    rows = jnp.any(segments > 0, axis=-1)
    if n_filled is not None:
        rows &= jnp.arange(rows.shape[0], dtype=jnp.int32)[:, None] < n_filled
    as_float = lambda x: x.astype(jnp.float32)  # noqa: E731
    return dict(tokens=as_float(jnp.sum(counted)), answers=as_float(answers), weight=jnp.sum(weight),
                rows=jnp.maximum(as_float(jnp.sum(rows)), 1))


def compile_step(step: Callable, mesh, state_shardings):
    """The step jitted over a mesh: state donated and kept in its layout, batches split over the data axes; each process gives its rows
    (sharding.rows_here). `.jitted` is the jitted function itself."""
    columns = jax.NamedSharding(mesh, jax.P(None, *sharding.spec(("batch",))))
    replicated = jax.NamedSharding(mesh, jax.P())

    def place(batch):
        return {k: v if k == "knobs" else jax.make_array_from_process_local_data(columns, v) for k, v in batch.items()}

    jitted = jax.jit(step, donate_argnums=0, out_shardings=(state_shardings, replicated))

    def run(state, batch, rng):
        return jitted(state, place(batch), rng)

    run.jitted = jitted
    return run

