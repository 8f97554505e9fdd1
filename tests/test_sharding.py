"""The mesh and its table: where parameters lie, and the collectives of the expert exchange, counted (steps: test_sharding_step.py)."""
import re

import jax
import jax.numpy as jnp
from tiny_model import init, tiny

from model import sharding, transformer
from model.config import Execution

MESHES = [
    dict(node=2, expert=2, fsdp=2), dict(expert=4, tensor=2), dict(fsdp=8), dict(expert=8), dict(expert=2, fsdp=4), dict(tensor=2, fsdp=4),
    dict(tensor=8), dict(node=4, expert=2), dict(node=2, expert=2, tensor=2), dict(node=2, fsdp=2, tensor=2)]
RUN = Execution(experts="block")


def mesh_of(shape):
    return sharding.make_mesh({axis: shape.get(axis, 1) for axis in sharding.MESH_AXES})


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
