"""Checkpoints: what goes in comes out to the bit, whole or not at all; weights of any of them start another run."""
import gc
import json
import os
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import tiny, tiny_config

from configs import deepseek_v3
from model import precision
from model.config import Execution
from model.errors import UserError
from train import checkpoint
from train import optimizer as optimizers
from train import state as states
from train.loop import InitFrom
from train.pretrain import loss_of
from train.step import compile_step, make_train_step


def make_state(cfg, seed=0, step=3, **edits):
    """A state of random leaves, as a trained one has; bf16 moments unless edits say otherwise."""
    config = deepseek_v3.get_config("tiny").optimizer
    for path, value in edits.items():
        node, *rest = path.split("__")
        config[node][rest[0]] = value
    state = jax.eval_shape(lambda key: states.create(key, cfg, optimizers.parse(config)), jax.random.key(0))
    rng = np.random.default_rng(seed)

    def draw(leaf):
        return jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype) if leaf.shape else jnp.asarray(step, leaf.dtype)

    return jax.tree.map(draw, state)


def assert_bitwise(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape, path
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


def spec(path, include=".*", exclude="", rename=(), ema=False):
    return InitFrom(str(path), include, exclude, rename, ema)


def test_a_folder_may_be_named_from_where_one_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = states.TrainState(jnp.int32(3), {"norm": jnp.arange(8.0)}, None, None, None)
    checkpoint.save(pathlib.Path("runs") / "checkpoints", state, {}, {})
    assert_bitwise(checkpoint.restore(pathlib.Path("runs/checkpoints/final"), state)[0], state)


@pytest.mark.parametrize("name, edits, model", [
    ("adamw_ema", dict(ema__kind="host"), {}), ("muon", {}, {}),
    ("no_bias", {}, dict(ffn__moe__balance__kind="aux_loss")), ("dense", {}, dict(ffn__kind="dense", mtp_depth=0))])
def test_every_leaf_comes_back_to_the_bit(tmp_path, name, edits, model):
    cfg, model = tiny(**model), tiny_config(**model).to_dict()
    state = make_state(cfg, **edits)
    if name == "muon":
        config = deepseek_v3.get_config("tiny").optimizer
        config.kind = "muon"
        state = state._replace(opt_state=optimizers.parse(config).init(state.params))
    path = checkpoint.save(tmp_path / "checkpoints", state, model, {"data": {"next_index": 7}})
    like = jax.eval_shape(lambda: state)
    restored, extra = checkpoint.restore(path, like)
    assert_bitwise(restored, state)
    assert extra == {"data": {"next_index": 7}} and path == tmp_path / "checkpoints" / "3"
    assert (state.router_bias is None) == (name in ("no_bias", "dense")) and (state.ema is None) == (name != "adamw_ema")
    loaded_cfg, params, bias = checkpoint.load_params(tmp_path)
    assert loaded_cfg == cfg
    assert_bitwise((params, bias), (state.params, state.router_bias))


def test_a_state_comes_back_on_another_mesh(tmp_path):
    cfg = tiny(n_layers=2)
    state = make_state(cfg, ema__kind="host")
    path = checkpoint.save(tmp_path, state, {}, {})
    mesh = jax.make_mesh((1, 1, 2, 2, 1), ("pipe", "node", "expert", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 5,
                         devices=jax.devices()[:4])
    layout = states.shardings(mesh, cfg, jax.eval_shape(lambda: state))
    restored, _ = checkpoint.restore(path, jax.eval_shape(lambda: state), layout)
    assert_bitwise(restored, state)
    assert all(jax.tree.leaves(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), restored, layout)))


def test_the_newest_are_kept_and_final_points_at_the_last(tmp_path):
    state = make_state(tiny(n_layers=1, mtp_depth=0))
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, state._replace(step=jnp.asarray(step, jnp.int32)), {}, {}, keep=2)
    assert checkpoint.steps(tmp_path) == [2, 3] and os.readlink(tmp_path / "final") == "3"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "3", "final"]


def test_an_interrupted_save_is_not_seen_and_cleared_away(tmp_path):
    """What a killed save, removal or relinking leaves is no checkpoint; `clean` takes it and nothing else (test_resume.py kills)."""
    state = make_state(tiny(n_layers=1, mtp_depth=0))
    checkpoint.save(tmp_path, state, {}, {})
    shutil.copytree(tmp_path / "3", tmp_path / "4.orbax-checkpoint-tmp-17")
    shutil.copytree(tmp_path / "3" / "params", tmp_path / "5" / "params")
    (tmp_path / ".final.123").symlink_to("5")
    assert checkpoint.steps(tmp_path) == [3] and checkpoint.find(tmp_path) == (tmp_path / "3").resolve()
    checkpoint.clean(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"3", "5", "final"} and os.readlink(tmp_path / "final") == "3"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A recipe's run: stages sft (with EMA) and rl; (folder, states)."""
    folder = tmp_path_factory.mktemp("run")
    cfg = tiny(n_layers=2)
    sft, rl = make_state(cfg, 1, 5, ema__kind="host"), make_state(cfg, 2, 9)
    for name, state in (("sft", sft), ("rl", rl)):
        checkpoint.save(folder / "checkpoints" / name, state, tiny_config(n_layers=2).to_dict(), {})
    return folder, sft, rl


def test_params_are_found_by_run_stage_and_step(run_folder, tmp_path):
    folder, sft, rl = run_folder
    for path in (folder / "checkpoints" / "rl", folder / "checkpoints" / "rl" / "9", folder / "checkpoints" / "rl" / "final"):
        assert_bitwise(checkpoint.load_params(path)[1], rl.params)
    assert_bitwise(checkpoint.load_params(folder / "checkpoints" / "sft", ema=True)[1], sft.ema)
    with pytest.raises(UserError, match="has no ema, allowed: one of opt_state, params"):
        checkpoint.load_params(folder / "checkpoints" / "rl", ema=True)
    with pytest.raises(UserError, match="init_from.path: found"):
        checkpoint.load_params(tmp_path)
    with pytest.raises(UserError, match="eval.path: found"):
        checkpoint.load_params(tmp_path / "nowhere", leaf="eval")


def test_fp8_weights_of_an_import_are_stored_as_they_are(tmp_path, rng):
    """Weight(None, q, scale) leaves round-trip to the bit, and a warm start dequantises them."""
    cfg = tiny(n_layers=1, n_dense_layers=1, mtp_depth=0)
    params = make_state(cfg).params
    w = params["dense"]["attention"]["kv_down"]
    low = jnp.asarray(rng.normal(size=w.shape), jnp.float8_e4m3fn)
    scale = jnp.full((*w.shape[:-2], 1, 1), 0.5, jnp.float32)
    params["dense"]["attention"]["kv_down"] = precision.Weight(None, low, scale)
    params["dense"]["attention"]["out"] = params["dense"]["attention"]["out"].astype(jnp.bfloat16)
    model = tiny_config(n_layers=1, n_dense_layers=1, mtp_depth=0).to_dict()
    checkpoint.save_params(tmp_path / "checkpoints", 0, model, params, None)
    _, loaded, bias = checkpoint.load_params(tmp_path)
    assert bias is None
    assert_bitwise(loaded, params)
    fresh, _ = checkpoint.warm_start(spec(tmp_path), make_state(cfg, 5).params, None, cfg)
    np.testing.assert_array_equal(fresh["dense"]["attention"]["kv_down"], np.asarray(low, np.float32) * 0.5)
    assert fresh["dense"]["attention"]["out"].dtype == jnp.float32


def test_warm_start_takes_what_include_exclude_and_rename_say(run_folder):
    folder, sft, _ = run_folder
    cfg, path = tiny(n_layers=2), folder / "checkpoints" / "sft"
    fresh = make_state(cfg, 7)
    params, bias = checkpoint.warm_start(spec(path, include="^(moe|head)", exclude="gate"), fresh.params, fresh.router_bias, cfg)
    names, leaves = optimizers.path_names(params), map(jax.tree.leaves, (params, sft.params, fresh.params))
    for name, got, source, own in zip(names, *leaves, strict=True):
        taken = re.search("^(moe|head)", name) and not re.search("gate", name)
        assert np.array_equal(got, source if taken else own), name
    assert np.array_equal(bias, sft.router_bias) and {n.split("/")[0] for n in names} >= {"moe", "head", "embedding", "mtp", "dense"}
    swapped, _ = checkpoint.warm_start(spec(path, include="^head$", rename=(("^head$", "embedding"),), ema=True), fresh.params, None, cfg)
    assert np.array_equal(swapped["head"], sft.ema["embedding"])


@pytest.mark.parametrize("edits, model, said", [
    (dict(include="nothing"), {}, "init_from.include: found 'nothing'"),
    (dict(rename=(("^head$", "tail"),)), {}, "has no tail, allowed: dense/"),
    ({}, dict(d_ff=40), "has shape .*, allowed: .* of dense/"),
    (dict(ema=True), {}, "has no ema")])
def test_a_warm_start_that_does_not_fit_is_one_line(run_folder, edits, model, said):
    folder, _, _ = run_folder
    cfg = tiny(n_layers=2, **model)
    with pytest.raises(UserError, match=said) as error:
        fresh = make_state(cfg)
        checkpoint.warm_start(spec(folder / "checkpoints" / "rl", **edits), fresh.params, fresh.router_bias, cfg)
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:coroutine", "ignore::pytest.PytestUnraisableExceptionWarning")  # orbax's own, as a load fails
@pytest.mark.parametrize("damage", ["truncate", "remove_data", "metadata", "empty_metadata"])
def test_a_damaged_checkpoint_is_one_line(tmp_path, damage):
    cfg = tiny(n_layers=1, mtp_depth=0)
    state = make_state(cfg)
    path = checkpoint.save(tmp_path, state, tiny_config(n_layers=1, mtp_depth=0).to_dict(), {})
    if damage == "truncate":
        for file in (path / "params").rglob("d/*"):
            file.write_bytes(file.read_bytes()[:50])
    elif damage == "remove_data":
        for file in (path / "params").rglob("manifest.ocdbt"):
            file.unlink()
    elif damage == "metadata":
        (path / "params" / "_METADATA").unlink()
    else:
        (path / "_CHECKPOINT_METADATA").write_text(json.dumps({}))
    for load in (lambda: checkpoint.load_params(path), lambda: checkpoint.restore(path, jax.eval_shape(lambda: state))):
        with pytest.raises(UserError) as error:
            load()
        gc.collect()
        assert "\n" not in str(error.value) and str(path) in str(error.value), error.value


@pytest.mark.gpu
def test_the_ema_stays_in_host_memory_through_steps_and_a_restart(tmp_path, rng):
    """On a GPU: pinned_host when made, after a step, and when restored, to the bit; the rest on the device."""
    config = deepseek_v3.get_config("tiny").optimizer
    config.ema.kind = "host"
    cfg, opt = tiny(n_layers=2), optimizers.parse(config)
    mesh = jax.make_mesh((1,) * 5, ("pipe", "node", "expert", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 5,
                         devices=jax.devices()[:1])
    columns = dict(tokens=rng.integers(0, 61, (1, 4, 12)).astype(np.int32), weight=np.ones((1, 4, 12), np.float32))
    knobs = dict(lr=np.float32(1e-2), clip=np.float32(1), bias_rate=np.float32(1e-3), mtp_weight=np.float32(0.3))
    with jax.set_mesh(mesh):
        state = states.create_sharded(mesh, jax.random.key(0), cfg, opt)
        layout = states.shardings(mesh, cfg, state)
        step = compile_step(make_train_step(cfg, Execution(), opt, loss_of(1)), mesh, layout)
        for _ in range(2):
            state, _ = step(state, columns | dict(knobs=knobs), jax.random.key(1))
        path = checkpoint.save(tmp_path, state, {}, {})
        restored, _ = checkpoint.restore(path, jax.eval_shape(lambda: state), layout)
    assert_bitwise(jax.device_get(restored), jax.device_get(state))
    for s in (state, restored):
        assert {x.sharding.memory_kind for x in jax.tree.leaves(s.ema)} == {"pinned_host"}
        assert {x.sharding.memory_kind for x in jax.tree.leaves((s.params, s.opt_state))} == {"device"}
