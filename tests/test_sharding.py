"""The same step on any mesh: loss, gradients and loads of 8 virtual devices equal those of one; the collectives are counted."""
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import init, random_tokens, tiny

from model import sharding, transformer
from model.config import Execution

MESHES = [dict(node=2, expert=2, fsdp=2), *(
    pytest.param(shape, marks=pytest.mark.slow) for shape in (
        dict(expert=4, tensor=2), dict(fsdp=8), dict(expert=8), dict(expert=2, fsdp=4), dict(tensor=2, fsdp=4), dict(tensor=8),
        dict(node=4, expert=2),
        dict(node=2, expert=2, tensor=2), dict(node=2, fsdp=2, tensor=2)))]
RUN = Execution(experts="block")


def loss_of(cfg):
    def loss(params, tokens):
        out, metrics = transformer.apply(params, tokens, cfg, run=RUN)
        mtp = jnp.mean(out.mtp_logits[0] ** 2) if out.mtp_logits else 0.0
        return jnp.mean(jax.nn.logsumexp(out.logits, axis=-1)) + mtp + metrics["moe/balance_loss"], metrics["moe/load"]

    return jax.value_and_grad(loss, has_aux=True)


def place(mesh, cfg, params, tokens):
    axes = transformer.axes(cfg)
    params = jax.tree.map(lambda names, leaf: jax.device_put(leaf, sharding.sharding(mesh, names, leaf.shape)), axes, params,
                          is_leaf=lambda x: isinstance(x, tuple))
    return params, jax.device_put(tokens, jax.NamedSharding(mesh, sharding.spec(("batch",))))


def mesh_of(shape):
    return sharding.make_mesh({axis: shape.get(axis, 1) for axis in sharding.MESH_AXES})


@pytest.fixture(scope="module")
def one_device():
    with jax.enable_x64(True):
        cfg = tiny(n_layers=2)
        params, tokens = init(cfg, dtype=jnp.float64), random_tokens(cfg, (8, 8))
        return cfg, params, tokens, jax.device_get(jax.jit(loss_of(cfg))(params, tokens))


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_a_sharded_model_equals_the_one_device_model(shape, one_device):
    cfg, params, tokens, ((loss, load), grads) = one_device
    with jax.enable_x64(True):
        mesh = mesh_of(shape)
        with jax.set_mesh(mesh):
            (got, got_load), got_grads = jax.device_get(jax.jit(loss_of(cfg))(*place(mesh, cfg, params, tokens)))
    assert abs(got - loss) < 1e-12
    np.testing.assert_array_equal(got_load, load)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), got_grads, grads)


def test_experts_move_by_one_gather_and_one_scatter_a_layer():
    """The exchange's own collectives, in the forward of one MoE layer: tokens, weights and choices gathered, sums scattered."""
    cfg = tiny(n_layers=1, n_dense_layers=0, mtp_depth=0)
    mesh = mesh_of(dict(expert=8))
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(lambda: init(cfg))
        params = jax.tree.map(lambda names, leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype,
                              sharding=sharding.sharding(mesh, names, leaf.shape)), transformer.axes(cfg), shapes,
                              is_leaf=lambda x: isinstance(x, tuple))
        tokens = jax.ShapeDtypeStruct((8, 8), jnp.int32, sharding=jax.NamedSharding(mesh, sharding.spec(("batch",))))
        run = jax.jit(lambda p, t: transformer.apply(p, t, cfg, run=RUN)[0].hidden)
        text = run.lower(params, tokens).compile().as_text()
    found = re.findall(r"= (\S+?)\[([\d,]*)\]\S* (all-gather|reduce-scatter|all-to-all|all-reduce)\(", text)
    gathers = sorted(f"{dtype}[{size}]" for dtype, size, kind in found if kind == "all-gather")
    # 64 tokens of width 32, their 2 weights and their 2 choices; nothing else moves
    assert gathers == ["f32[64,2]", "f32[64,32]", "s32[64,2]"], found
    assert [f"{dtype}[{size}]" for dtype, size, kind in found if kind == "reduce-scatter"] == ["f32[8,32]"], found
    assert not [kind for _, _, kind in found if kind in ("all-to-all", "all-reduce")], found


def test_parameters_are_split_as_the_table_says():
    mesh = mesh_of(dict(expert=2, fsdp=2, tensor=2))
    up = sharding.sharding(mesh, ("layers", "expert", "pair", "expert_ffn", "embed"), (2, 8, 2, 20, 32))
    assert up.shard_shape((2, 8, 2, 20, 32)) == (2, 4, 2, 10, 16)
    odd = sharding.sharding(mesh, ("embed",), (31,))  # what does not divide is copied
    assert odd.shard_shape((31,)) == (31,)
