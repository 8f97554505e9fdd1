"""What a run needs on each device of a mesh: exact for state, by formula for what the backward keeps."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import tiny, tiny_config

from configs import deepseek_v3
from model import config as model_config
from model import transformer
from model.errors import UserError
from train import optimizer as optimizers
from train import plan

ONE = dict(pipe=1, node=1, expert=1, fsdp=1, tensor=1)
V3_MESH = dict(pipe=16, node=8, expert=8, fsdp=2, tensor=1)


def preset(name, **model):
    config = deepseek_v3.get_config(name)
    config.model.update(model)
    run = dataclasses.replace(model_config.parse_run(config.run), precision=model_config.precision.Precision("bf16"), remat="full")
    return model_config.parse(config.model), run, optimizers.parse(config.optimizer)


def test_one_device_holds_every_parameter_and_two_bytes_a_moment():
    cfg, run, optimizer = preset("671b")
    need = plan.needs(cfg, run, optimizer, ONE, 1, 4096)
    n = cfg.num_params()
    leaves = n["total"] + n["mtp"] - (cfg.n_moe_layers + cfg.mtp_depth) * cfg.moe.n_routed_experts  # without the router biases
    assert need["masters (float32)"] == need["gradients (float32)"] == 4 * leaves
    assert need["moments"] == 4 * leaves + 4  # two of bf16, and the count of steps
    assert 0.99 * 2 * leaves < need["low-precision copies"] < 2 * leaves  # not the embedding, head, gates, norms


def test_v3_on_2048_devices_is_split_sixteen_by_sixty_four():
    cfg, run, optimizer = preset("671b", mtp_depth=0)
    need, whole = (plan.needs(cfg, run, optimizer, mesh, 1, 4096) for mesh in (V3_MESH, ONE))
    stage = 4 * (4 * cfg.moe.n_routed_experts * 3 * 7168 * 2048) / 128  # four layers of experts, over 64 and over 2 of fsdp
    assert stage < need["masters (float32)"] < whole["masters (float32)"] / 128
    # 1F1B keeps as many micro-batches in flight as there are stages: about what all layers keep of one
    assert abs(need["kept for the backward"] / whole["kept for the backward"] - 1) < 0.06
    assert [sum(stage.values()) for stage in plan.split_layers(cfg, 16)] == [4] * 13 + [3] * 3


def test_formula_of_what_is_kept_is_at_least_half_of_what_autodiff_keeps():
    """The formula counts each tensor once; autodiff also keeps what elementwise parts were made of. Float32 on a CPU, where attention
    keeps the exponentials of its scores as well: these are taken off, and the masters, which are no activations."""
    cfg = tiny(mtp_depth=0, n_layers=4, n_dense_layers=2, ffn__moe__n_shared_experts=1)
    run = model_config.parse_run(deepseek_v3.get_config("tiny").run)
    B, T, H = 64, 16, cfg.attention.n_heads  # rows enough that padding the groups of experts is an eighth at most

    def backward(params, x):
        aux = dict(positions=None, segment_ids=None, router_bias=None)
        layers = {k: params[k] for k in ("dense", "moe")}
        return jax.vjp(lambda layers, x: transformer.stage(layers, x, aux, cfg, run)[0], layers, x)[1]

    params = jax.eval_shape(lambda: transformer.init(jax.random.key(0), cfg))
    kept = jax.eval_shape(backward, params, jax.ShapeDtypeStruct((B, T, cfg.d_model), jnp.float32))
    weights = [leaf.shape for leaf in jax.tree.leaves(params)]
    found = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept) if leaf.shape not in weights)
    scores = 4 * cfg.n_layers * B * H * T * T
    each = plan.kept_bytes(cfg, run, 1, 1, 10**9)  # as if of many tokens: a CPU pads no group to 128 rows
    formula = B * T * (cfg.n_dense_layers * each["dense"] + cfg.n_moe_layers * each["moe"])
    assert 0.5 < formula / (found - scores) < 1, (formula, found, scores)


def test_sizes_are_filled_in_without_devices():
    config = deepseek_v3.get_config("671b").mesh
    assert plan.mesh_sizes(config, 2048)["fsdp"] == 2048
    config.expert = 3
    with pytest.raises(UserError, match="mesh: found .*'expert': 3.* a product of 2048 devices"):
        plan.mesh_sizes(config, 2048)


@pytest.mark.slow
def test_the_job_prints_a_table_and_compiles_for_the_devices_at_hand(tmp_path, capsys):
    config = deepseek_v3.get_config("tiny")
    config.model = tiny_config(n_layers=2, mtp_depth=0)
    config.run.scan_unroll = 1
    config.plan.update(dict(seq_len=8))
    config.mesh.expert = 2
    config.plan.program.kind = "here"
    config.plan.program.here.steps = 1
    result = plan.plan(config, str(tmp_path))
    assert "kept for the backward" in capsys.readouterr().out
    found = result["program"]
    assert found["devices in the mesh"] == 8 and found["a step, ms"] > 0
    state = sum(result["gib"][k] for k in ("masters (float32)", "moments"))
    tokens = 8 * 8 * 2 / 8 / 2**30
    np.testing.assert_allclose(found["arguments, GiB"], state + tokens, atol=1e-3)
