"""Presets against the papers' tables, counts by formula, RoPE and YaRN against the published vectors."""
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import forward, init, random_tokens, tiny, tiny_config

from configs import deepseek_v3
from model import attention, rope, sharding, transformer
from model import config as model_config
from model.config import Execution
from model.errors import UserError


def preset(name):
    return model_config.parse(deepseek_v3.get_config(name).model)


def test_671b_is_the_papers_table():
    cfg = preset("671b")
    a, m = cfg.attention, cfg.moe
    assert (cfg.vocab_size, cfg.d_model, cfg.n_layers, cfg.n_dense_layers, cfg.d_ff, cfg.mtp_depth) == (129280, 7168, 61, 3, 18432, 1)
    assert dataclasses.astuple(a) == (128, 1536, 512, 128, 64, 128)
    assert (m.n_routed_experts, m.n_shared_experts, m.n_activated_experts, m.d_expert, m.route_scale) == (256, 1, 8, 2048, 2.5)
    assert dataclasses.astuple(m.groups) == (8, 4, "top2_sum") and dataclasses.astuple(m.gate) == ("sigmoid", "normalised")
    assert dataclasses.astuple(m.balance) == (True, 1e-4, "sequence")
    assert (cfg.init_std, cfg.norm_eps, cfg.rope.theta) == (0.006, 1e-6, 10000)


@pytest.mark.parametrize("name, total, activated, mtp", [
    ("671b", 671_026_419_200, 36_625_618_432, 11_610_068_224), ("v2", 235_741_434_880, 20_851_512_320, 0),
    ("v2_lite", 15_706_484_224, 2_451_435_008, 0), ("moonlight", 15_960_110_208, None, 0), ("700m", None, None, 0),
    ("v3_layer", None, None, 0), ("tiny", None, None, None)])
def test_counts_by_formula_are_the_leaves_and_the_published_totals(name, total, activated, mtp):
    cfg = preset(name)
    counts, shapes = cfg.num_params(), jax.eval_shape(lambda key: transformer.init(key, cfg), jax.random.key(0))
    leaves = {k: sum(leaf.size for leaf in jax.tree.leaves(v)) for k, v in shapes.items()}
    bias = cfg.moe.n_routed_experts if cfg.has_bias else 0
    assert counts["total"] == sum(n for k, n in leaves.items() if k != "mtp") + cfg.n_moe_layers * bias
    assert counts["mtp"] == leaves.get("mtp", 0) + cfg.mtp_depth * bias
    for key, published in dict(total=total, activated=activated, mtp=mtp).items():
        assert published is None or counts[key] == published


def test_flops_by_formula_are_the_published_ones():
    flops = preset("671b").flops_per_token(4096)
    assert abs(flops["training"] / 1e9 - 250.46) < 0.1 and flops["training"] == 3 * flops["forward"]
    assert abs((flops["training"] + flops["mtp_training"]) / 1e9 - 260.65) < 6  # the published figure leaves MTP's second head out
    assert abs(preset("671b").flops_per_token(4096, causal=False)["training"] / 1e9 - 281.16) < 0.1


@pytest.mark.parametrize("edits", [dict(), dict(attention__kind="gqa", ffn__kind="dense")], ids=str)
def test_flops_by_formula_are_those_of_the_compiled_model(edits):
    # all experts chosen and computed densely, so that no padding is counted; scans unrolled, as a rolled body is counted once
    cfg = tiny(d_model=128, d_ff=256, vocab_size=512, ffn__moe__n_activated_experts=8, ffn__moe__groups__kind="none",
               attention__mla__n_heads=4, attention__mla__q_lora_rank=48, attention__mla__kv_lora_rank=64,
               attention__mla__qk_nope_head_dim=32, attention__mla__qk_rope_head_dim=16, attention__mla__v_head_dim=32,
               attention__gqa__head_dim=32, ffn__moe__d_expert=128, **edits)
    shapes = jax.eval_shape(lambda: init(cfg))
    tokens = jax.ShapeDtypeStruct((4, 64), jnp.int32)
    lowered = jax.jit(transformer.apply, static_argnames=("cfg", "run")).lower(
        shapes, tokens, cfg, run=Execution(experts="masked", scan_unroll=8))
    formula = cfg.flops_per_token(64, causal=False)
    want = (formula["forward"] + formula["mtp_forward"]) * 4 * 64
    assert abs(lowered.compile().cost_analysis()["flops"] / want - 1) < 0.02


def test_yarn_frequencies_and_scales_are_the_published_ones():
    yarn = rope.Yarn(factor=40.0, original_max_position=4096, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0)
    f = yarn.frequencies(10000.0, 64)
    for j, want in {0: 1.0, 10: 0.056234133, 11: 0.039006927, 16: 0.0055, 20: 0.00079056942, 22: 0.00017782794, 31: 3.3338036e-06}.items():
        assert math.isclose(f[j], want, rel_tol=1e-6)
    assert math.isclose(192 ** -0.5 * yarn.softmax_factor, 0.13523378, rel_tol=1e-6) and yarn.rotation_factor == 1
    lite = dataclasses.replace(yarn, mscale=0.707, mscale_all_dim=0.707)
    assert math.isclose(192 ** -0.5 * lite.softmax_factor, 0.11472139, rel_tol=1e-6)
    np.testing.assert_allclose(rope.NoScaling().frequencies(10000.0, 64), 10000.0 ** (-np.arange(0, 64, 2) / 64))


def test_rotation_acts_on_neighbouring_pairs_and_scores_depend_on_distance_alone(rng):
    r = rope.Rope(10000.0, rope.NoScaling())
    x = jnp.array(rng.normal(size=(1, 3, 2, 8)), jnp.float32)
    positions = jnp.array([[0, 3, 7]], jnp.int32)
    got = np.asarray(rope.rotate(x, r.rotation(positions, 8)))
    angle = np.asarray(positions)[0][:, None] * 10000.0 ** (-np.arange(0, 8, 2) / 8)
    want = (np.asarray(x)[0].reshape(3, 2, 4, 2) @ np.array([1, 1j]))[None] * np.exp(1j * angle)[None, :, None]
    np.testing.assert_allclose(got.reshape(1, 3, 2, 4, 2) @ np.array([1, 1j]), want, atol=1e-5)
    q, k = x[:, :1], x[:, 1:2]

    def score(i, j):
        turn = [rope.rotate(v, r.rotation(jnp.array([[p]], jnp.int32), 8)) for v, p in ((q, i), (k, j))]
        return float(jnp.sum(turn[0] * turn[1]))

    assert abs(score(9, 5) - score(104, 100)) < 1e-4


def test_the_tail_of_a_head_is_rotated_and_its_gradient_rotated_back(rng):
    rotation = rope.Rope(10000.0, rope.NoScaling()).rotation(jnp.array([[0, 3, 7]], jnp.int32), 4)
    rotation = tuple(1.3 * part for part in rotation)  # YaRN's factor
    x, g = (jnp.array(rng.normal(size=(1, 3, 2, 10)), jnp.float32) for _ in range(2))

    def cut(x):
        return jnp.concatenate([x[..., :6], rope.rotate(x[..., 6:], rotation)], axis=-1)

    (want, pull), (got, pulled) = (jax.vjp(f, x) for f in (cut, lambda x: rope.rotate_tail(x, rotation)))
    np.testing.assert_array_equal(got, want)
    np.testing.assert_allclose(pulled(g)[0], pull(g)[0], rtol=1e-6)


@pytest.mark.parametrize("edits, words", [
    (dict(attention__kind="mlaa"), f"model.attention.kind: found 'mlaa', allowed: {', '.join(attention.KINDS)} (did you mean 'mla'?)"),
    (dict(d_model=0), "model.d_model: found 0"), (dict(n_dense_layers=9), "model.n_dense_layers: found 9"),
    (dict(ffn__moe__n_activated_experts=5), "n_activated_experts: found 5"), (dict(mtp_depth=-1), "model.mtp_depth"),
    (dict(attention__mla__qk_rope_head_dim=3), "model.attention.mla.qk_rope_head_dim: found 3"),
    (dict(ffn__moe__groups__limited__n_expert_groups=3), "n_expert_groups: found 3"),
    (dict(attention__kind="gqa", attention__gqa__n_kv_heads=3), "model.attention.gqa.n_kv_heads: found 3"),
    (dict(ffn__moe__gate__kind="tanh"), "model.ffn.moe.gate.kind: found 'tanh'"),
    (dict(rope__scaling__kind="ntk"), "model.rope.scaling.kind: found 'ntk'")], ids=str)
def test_a_wrong_model_is_one_line_that_names_the_leaf(edits, words):
    with pytest.raises(UserError) as error:
        model_config.parse(tiny_config(**edits))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_configs_are_hashable_and_kinds_change_by_flag_alone():
    assert hash(tiny()) == hash(tiny()) and hash(model_config.parse_run(deepseek_v3.get_config("tiny").run))
    for kind in ("gqa", "mha", "mqa"):
        assert tiny(attention__kind=kind).attention.n_kv_heads == dict(gqa=2, mha=4, mqa=1)[kind]
    dense = tiny(ffn__kind="dense")
    assert dense.moe is None and dense.n_moe_layers == 0 and "moe" not in init(dense)
    assert "moe/load" not in forward(init(dense), random_tokens(dense, (1, 4)), dense)[1]


def test_every_leaf_has_logical_axes_that_the_table_knows():
    for cfg in (tiny(), tiny(attention__kind="gqa"), tiny(attention__mla__q_lora_rank=0, mtp_depth=2)):
        axes, shapes = transformer.axes(cfg), jax.eval_shape(lambda cfg=cfg: transformer.init(jax.random.key(0), cfg))
        jax.tree.map(lambda names, leaf: sharding.spec(names) and None if len(names) == leaf.ndim else pytest.fail(str(names)), axes,
                     shapes, is_leaf=lambda x: isinstance(x, tuple))
    with pytest.raises(ValueError, match="one mesh axis"):
        sharding.spec(("heads", "ffn"))
    with pytest.raises(KeyError):
        sharding.spec(("heds",))


def test_a_mesh_that_does_not_fit_names_what_does():
    sizes = dict(pipe=1, node=1, expert=3, fsdp=2, tensor=1)
    with pytest.raises(UserError, match="mesh: found .* = 6 devices, allowed: 8 devices here: expert=2"):
        sharding.make_mesh(sizes)
    assert sharding.make_mesh(dict(sizes, expert=2, fsdp=-1)).shape["fsdp"] == 4
