"""The training step: sums over micro-batches, alignment of losses, knobs that do not recompile."""
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import init, tiny

from configs import deepseek_v3
from model import config as model_config
from model.config import Execution
from train import optimizer as optimizers
from train import pretrain
from train import state as states
from train import step as steps

T, ROWS = 12, 4
KNOBS = dict(lr=0.01, clip=1e9, mtp_weight=0.3, bias_rate=0.05)


def packed(rng, n_rows=ROWS, vocab=61):
    """Rows of isolated segments, some padded, with uneven weights, zero at a segment's first token; some segments have none."""
    tokens = rng.integers(0, vocab, (n_rows, T)).astype(np.int32)
    segments, positions, weight = (np.zeros((n_rows, T), d) for d in (np.int32, np.int32, np.float64))
    for r in range(n_rows):
        cuts = np.sort(rng.choice(np.arange(1, T), 3, replace=False)).tolist()
        for s, (a, b) in enumerate(zip([0, *cuts], cuts, strict=False), 1):  # what follows the last cut is padding
            segments[r, a:b], positions[r, a:b] = s, np.arange(b - a)
            weight[r, a + 1:b] = rng.choice([0, 0.25, 1.0], b - a - 1) if s != 2 else 0
    weight[0, 1] = 1.0 if segments[0, 1] == segments[0, 0] else 0.0
    return dict(tokens=tokens, segment_ids=segments, positions=positions, weight=weight)


def split(columns, n_micro, n_padded=None):
    """[rows, T] -> [n_micro, rows / n_micro, T], and empty micro-batches up to n_padded."""
    out = {k: v.reshape(n_micro, -1, *v.shape[1:]) for k, v in columns.items()}
    return {k: np.pad(v, [(0, (n_padded or n_micro) - n_micro)] + [(0, 0)] * (v.ndim - 1)) for k, v in out.items()}


def batch_of(columns, **knobs):
    return dict(columns, knobs={k: np.float32(v) if isinstance(v, float) else np.int32(v) for k, v in (KNOBS | knobs).items()})


def descent():
    """p - lr * grad, with the gradient itself as optimizer state: shows what a step differentiated."""
    def update(grads, opt_state, params, lr, clip):
        norm = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(grads)))
        return jax.tree.map(lambda p, g: p - lr.astype(p.dtype) * g, params, grads), grads, norm

    return optimizers.Optimizer(lambda params: jax.tree.map(jnp.zeros_like, params), update, None, 1.0)


@pytest.fixture(scope="module")
def model():
    """(cfg, jitted step, state) in float64 with descent; the balance loss is made large so that its share shows."""
    cfg = tiny(n_layers=2, ffn__moe__balance__bias__alpha=0.01)
    with jax.enable_x64(True):
        params = init(cfg, dtype=jnp.float64)
        bias = jnp.asarray(np.random.default_rng(3).normal(0, 0.05, (2, 8)), jnp.float32)
        step = jax.jit(steps.make_train_step(cfg, Execution(), descent(), pretrain.loss_of(1)))
        return cfg, step, states.from_params(params, bias, descent())


def relative(a, b):
    return max(np.max(np.abs(np.asarray(x) - np.asarray(y)) / (1e-3 + np.abs(np.asarray(y)))) for x, y in
               zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_micro_batches_and_a_partly_filled_ramp_equal_the_whole_batch(model, rng):
    """Loss, metrics, gradients, parameters and router bias to 1e-12, whatever the split; empty micro-batches change nothing, and a
    batch that fills more of them compiles nothing new."""
    _, step, state = model
    columns = packed(rng)
    with jax.enable_x64(True):
        whole, metrics = step(state, batch_of(split(columns, 1)), None)
        compiled = step._cache_size()
        for n_micro, n_padded, knobs in ((4, 4, {}), (2, 3, dict(n_micro=2))):
            new, others = step(state, batch_of(split(columns, n_micro, n_padded), **knobs), None)
            assert metrics.keys() == others.keys()
            assert relative(others, metrics) < 1e-12 and relative(new, whole) < 1e-12
        assert step._cache_size() == compiled + 2
        step(state, batch_of(split(packed(rng, 6), 3), n_micro=3), None)
        assert step._cache_size() == compiled + 2
        assert max(float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(whole.opt_state)) > 1e-3


@pytest.mark.slow
def test_rows_without_segment_ids_count_only_where_a_micro_batch_is_filled(model, rng):
    """Packed end to end (V3 §4.1) a batch has no segment ids: the balance loss must still be shared by the real rows alone."""
    _, step, state = model
    columns = {k: v for k, v in packed(rng).items() if k in ("tokens", "weight")}
    with jax.enable_x64(True):
        whole, metrics = step(state, batch_of(split(columns, 1)), None)
        new, others = step(state, batch_of(split(columns, 2, 3), n_micro=2), None)
        assert relative(others, metrics) < 1e-12 and relative(new, whole) < 1e-12


def test_knobs_change_without_recompiling_and_act(model, rng):
    _, step, state = model
    batch = split(packed(rng), 1)
    with jax.enable_x64(True):
        first, a = step(state, batch_of(batch), None)
        n = step._cache_size()
        still, b = step(state, batch_of(batch, lr=0.0, mtp_weight=0.0, bias_rate=0.0), None)
        assert step._cache_size() == n
        assert relative(still.params, state.params) == 0 and np.array_equal(still.router_bias, state.router_bias)
        assert float(a["loss"] - b["loss"]) == pytest.approx(0.3 * float(a["mtp_loss"]), rel=1e-6)
        assert float(a["main_loss"]) == float(b["main_loss"]) and not np.array_equal(first.router_bias, state.router_bias)


def test_metrics_are_named_scalars_and_add_up(model, rng):
    cfg, step, state = model
    columns = packed(rng)
    with jax.enable_x64(True):
        new, m = jax.device_get(step(state, batch_of(split(columns, 4)), None))
    assert set(m) == {"loss", "main_loss", "mtp_loss", "moe/load", "moe/bias", "moe/balance_loss", "moe/max_violation", "grad_norm",
                      "tokens"}
    assert all(np.shape(v) == (() if k not in ("moe/load", "moe/bias") else (2, 8)) for k, v in m.items())
    assert m["loss"] == pytest.approx(m["main_loss"] + 0.3 * m["mtp_loss"] + m["moe/balance_loss"], rel=1e-6)
    assert m["tokens"] == np.count_nonzero(columns["weight"]) and new.step == 1
    assert m["grad_norm"] == pytest.approx(np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(new.opt_state))))
    # every real token of the main layer counts for K experts, padding for none
    assert m["moe/load"][0].sum() == 2 * np.count_nonzero(columns["segment_ids"])
    assert m["moe/max_violation"] == pytest.approx(np.mean(m["moe/load"].max(1) / m["moe/load"].mean(1) - 1), rel=1e-6)


def test_the_router_bias_follows_the_loads_of_the_whole_batch(model, rng):
    """b += rate * sign(mean load - load), once a step, from the sum over micro-batches (V3 §2.1.2)."""
    _, step, state = model
    with jax.enable_x64(True):
        new, m = jax.device_get(step(state, batch_of(split(packed(rng), 4)), None))
    moved = 0.05 * np.sign(m["moe/load"].mean(1, keepdims=True) - m["moe/load"])
    np.testing.assert_allclose(new.router_bias, np.asarray(state.router_bias) + moved, atol=1e-6)


def test_a_dense_model_under_a_mesh_keeps_its_layout_and_its_ema_follows(rng):
    """router_bias None stays None; every leaf of the state leaves a step laid out as it came; the EMA is decay * ema + (1 - decay) *
    new parameters; a second step compiles nothing."""
    config = deepseek_v3.get_config("tiny").optimizer
    config.ema.kind, config.ema.host.decay = "host", 0.75
    opt, run = optimizers.parse(config), model_config.parse_run(deepseek_v3.run())
    cfg = tiny(n_layers=1, n_dense_layers=1, mtp_depth=0, ffn__kind="dense")
    mesh = jax.make_mesh((1, 1, 1, 2, 1), ("pipe", "node", "expert", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 5,
                         devices=jax.devices()[:2])
    batch = jax.tree.map(lambda x: x.astype(np.float32) if x.dtype == np.float64 else x, batch_of(split(packed(rng), 1)))
    with jax.set_mesh(mesh):
        layout = states.shardings(mesh, cfg, jax.eval_shape(lambda k: states.create(k, cfg, opt), jax.random.key(0)))
        state = states.create_sharded(mesh, jax.random.key(0), cfg, opt)
        ema = jax.tree.map(np.array, state.params)
        step = steps.compile_step(steps.make_train_step(cfg, run, opt, pretrain.loss_of(0)), mesh, layout)
        for _ in range(2):
            state, metrics = step(state, batch, None)
            ema = jax.tree.map(lambda e, p: 0.75 * e + 0.25 * np.asarray(p), ema, state.params)
    assert step.jitted._cache_size() == 1 and state.router_bias is None
    assert set(metrics) == {"loss", "main_loss", "grad_norm", "tokens"}
    assert all(jax.tree.leaves(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, layout)))
    assert relative(state.ema, ema) < 1e-5 and relative(state.ema, state.params) > 1e-4


@pytest.mark.parametrize("with_segments", [True, False])
def test_totals_are_counted_over_the_whole_batch(rng, with_segments):
    """tokens, answers (segments with a weighted token), weight and rows against a plain loop."""
    for _ in range(20):
        columns = packed(rng, n_rows=6)
        if not with_segments:
            columns = {k: columns[k] for k in ("tokens", "weight")}
        answers, segments = 0, columns.get("segment_ids", np.ones((6, T), int))
        for row, weights in zip(segments, columns["weight"], strict=True):
            answers += len({s for s, w in zip(row, weights, strict=True) if w != 0})
        got = steps.count_totals(split(columns, 3))
        assert float(got["answers"]) == answers and float(got["tokens"]) == np.count_nonzero(columns["weight"])
        assert float(got["weight"]) == pytest.approx(columns["weight"].sum()) and float(got["rows"]) == 6
    empty = {k: np.zeros_like(v) for k, v in columns.items()}
    assert float(steps.count_totals(split(empty, 3))["rows"]) == (1 if with_segments else 6)


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.parametrize("isolated", [True, False])
def test_pretraining_loss_at_every_depth_is_the_papers(rng, isolated):
    """V3 eq. 22-25 by a loop: depth k's position i, which has seen token i+1+k, predicts token i+2+k where both lie in one segment; all
    depths share one count; the weight is that of the predicted token (a prompt's may be above 0)."""
    V, depth = 61, 2
    columns = packed(rng)
    logits, mtp = rng.normal(size=(ROWS, T, V)), [rng.normal(size=(ROWS, T, V)) for _ in range(depth)]
    seg = columns["segment_ids"] if isolated else np.ones((ROWS, T), int)
    if not isolated:
        columns.pop("segment_ids")
        columns["weight"] = rng.random((ROWS, T)) * (np.arange(T) > 0)
    tokens, weight, sums = columns["tokens"], columns["weight"], np.zeros(1 + depth)
    for b in range(ROWS):
        for t in range(T):
            if t >= 1:
                sums[0] -= weight[b, t] * log_softmax(logits[b, t - 1])[tokens[b, t]]
            for k in range(depth):
                if t - 2 - k >= 0 and seg[b, t] == seg[b, t - 2 - k]:
                    sums[1 + k] -= weight[b, t] * log_softmax(mtp[k][b, t - 2 - k])[tokens[b, t]]
    with jax.enable_x64(True):
        output = types.SimpleNamespace(logits=jnp.asarray(logits), mtp_logits=[jnp.asarray(x) for x in mtp])
        total, metrics = pretrain.loss_of(depth)(output, columns | dict(knobs=dict(mtp_weight=np.float32(0.3))), dict(weight=weight.sum()))
        expected = sums / weight.sum()
        assert float(metrics["main_loss"]) == pytest.approx(expected[0], rel=1e-12)
        assert float(metrics["mtp_loss"]) == pytest.approx(expected[1:].mean(), rel=1e-12)
        assert float(total) == pytest.approx(expected[0] + np.float32(0.3) * expected[1:].mean(), rel=1e-12)
