"""Delayed scaling: the history against a loop in numpy, the linear that scales by it and says what it saw, the state through steps."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

import main
from model import delayed_scaling, precision
from model.config import Execution
from model.delayed_scaling import Delayed
from model.errors import UserError, freeze
from model.tape import LayerTape, Tape
from train import checkpoint

M, N, K = 24, 16, 40  # one shape: the products compile once
DELAYED = Execution(precision=precision.Precision("fp8_delayed", Delayed(4, 0)))


def test_the_history_is_that_of_a_loop(rng):
    spec, steps = Delayed(3, 2), rng.lognormal(size=(7, 5, 2)).astype(np.float32)
    steps[2, 1, 0], steps[4, 3, 1] = np.nan, np.inf
    history = delayed_scaling.init(5, spec)
    assert not np.any(delayed_scaling.expected(history, spec))
    for i, seen in enumerate(steps):
        history = delayed_scaling.update(history, seen)
        want = np.where(np.isfinite(steps), steps, 0)[max(0, i - 2):i + 1].max(axis=0) * 4
        np.testing.assert_allclose(delayed_scaling.expected(history, spec), want, rtol=1e-6)
    assert history.shape == (5, 2, 3)


@pytest.mark.parametrize("edit", [dict(history=0), dict(margin=-1)])
def test_bad_leaves_are_named(edit):
    with pytest.raises(UserError, match=f"fp8_delayed.{next(iter(edit))}"):
        freeze(Delayed, dict(history=8, margin=0) | edit, "run.precision.fp8_delayed")


@pytest.fixture(scope="module")
def linear():
    """jitted (x, w, dy, past) -> the output, gradients of x, w and past, a record's input, and its weight part."""
    def one(x, w, dy, past):
        prepared = precision.prepare({"moe": {"q": w[None]}}, DELAYED)

        def product(x, w, past):
            weight = precision.with_masters(prepared, {"moe": {"q": w[None]}}, past)["moe"]["q"]
            tape = LayerTape(Tape())
            y = precision.linear(x, jax.tree.map(lambda leaf: leaf[0], weight), DELAYED, "ffn/down", tape)
            return y, tape.records["ffn/down"].input

        y, pull, cached = jax.vjp(product, x, w, past, has_aux=True)
        return y, *pull(dy), cached, precision.weight_gradient(cached, dy, "ffn/down", DELAYED)

    return jax.jit(one)


def test_a_linear_scales_by_its_past_and_tells_what_it_saw(linear, rng):
    x, dy = (jnp.array(rng.normal(size=shape), jnp.bfloat16) for shape in ((M, K), (M, N)))
    w = jnp.array(rng.normal(size=(N, K)), jnp.float32)
    own = np.array([[np.abs(np.asarray(v, np.float32)).max() for v in (x, dy)]], np.float32)
    plain = dataclasses.replace(DELAYED, precision=precision.Precision("fp8_tensor"))

    @jax.jit
    def current(x, w, dy):
        weight = precision.prepare({"q": w}, plain)["q"]
        y, pull = jax.vjp(lambda x, w: precision.linear(x, weight._replace(master=w), plain, "ffn/down"), x, w)
        return y, *pull(dy)

    for past in (own, np.zeros_like(own)):  # a past that is right, and none: the scale of now
        found = linear(x, w, dy, past)
        for got, want in zip(found[:3], current(x, w, dy), strict=True):
            np.testing.assert_array_equal(got, want)
        np.testing.assert_array_equal(found[3], own)
    low = own / 4  # values have grown since: what is past the scale saturates, and is seen all the same
    y, dx, dw, seen, cached, weight_part = linear(x, w, dy, low)
    np.testing.assert_array_equal(seen, own)
    np.testing.assert_array_equal(dw, weight_part)  # a pipeline's split backward has the same scales
    read = np.asarray(cached[0], np.float32) * np.asarray(cached[1])[0, 0]
    assert np.abs(read).max() == pytest.approx(own[0, 0] / 4, rel=1e-6)
    np.testing.assert_allclose(read, np.clip(np.asarray(x, np.float32), -low[0, 0], low[0, 0]), rtol=0.07, atol=low[0, 0] / 448 / 512)


@pytest.mark.slow
def test_training_carries_the_history_through_micro_batches_and_checkpoints(tmp_path, capsys):
    """Six steps in one go, and in two; in whole batches, and in two micro-batches a step: the same largest values."""
    kind = ("run.precision.kind=fp8_delayed", "run.precision.fp8_delayed.history=4", "optimizer.ema.kind=none", "checkpoint.every=2")
    states = {}
    for name, edits in dict(once=("",), resumed=("stop_after_s=1e-6", ""), whole=("pretrain.n_micro=1",)).items():
        for edit in edits:
            assert main.run(tiny_run.arguments(tmp_path / name, *kind, *filter(None, [edit]), steps=6)) == 0
        # dense 7 and MoE 9 weights of one layer each, and the MTP block's 9; an array of another shape would not load
        like = jax.ShapeDtypeStruct((7 + 9 + 9, 2, 4), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
        held = checkpoint.ocp.load_checkpointables(checkpoint.find(tmp_path / name), {"amax": like})
        states[name] = np.asarray(held["amax"]), tiny_run.lines(tmp_path / name)
    assert "stopped after" in capsys.readouterr().out
    amax, lines = states["once"]
    assert np.all(amax > 0) and np.all(np.isfinite(amax))
    np.testing.assert_array_equal(states["resumed"][0], amax)
    losses = [[line["loss"] for line in found if "loss" in line] for found in (lines, states["resumed"][1])]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    np.testing.assert_allclose(states["whole"][0][:, 0, -1], amax[:, 0, -1], rtol=0.1)


@pytest.mark.slow
def test_several_devices_are_refused(tmp_path, capsys):
    assert main.run(tiny_run.arguments(tmp_path, "run.precision.kind=fp8_delayed", "mesh.fsdp=2")) == 2
    assert "one device for this kind" in capsys.readouterr().err
