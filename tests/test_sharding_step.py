"""Whole steps on any mesh: loss, gradients, parameters after one and three steps equal those of one device; ZeRO-1 does too.

`pytest -m "slow or not slow" -s tests/test_sharding_step.py` prints the table, mesh by mesh.
"""
import math
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sharding import MESHES, mesh_of
from tiny_model import init, tiny

from configs import deepseek_v3
from model import sharding, transformer
from model.config import Execution
from model.precision import MATMULS, Precision
from train import optimizer as optimizers
from train import pretrain
from train import state as states
from train.step import compile_step, make_train_step

RUN = Execution(experts="block")
SMALL = dict(n_layers=1, n_dense_layers=0, mtp_depth=0)
FULL = dict(n_layers=2)  # a dense and an MoE layer, MTP
KNOBS = {k: np.float32(v) for k, v in dict(lr=1e-2, clip=1.0, mtp_weight=0.3, bias_rate=1e-3).items()}


def recording(kind: str, moments: str):
    """The optimizer of a sharding kind, with the step's gradients kept in its state."""
    config = deepseek_v3.get_config("tiny").optimizer
    config.adamw.moment_dtype, config.sharding.kind = moments, kind
    inner = optimizers.parse(config)

    def update(grads, opt_state, params, lr, clip):
        params, moments, norm = inner.update(grads, opt_state[0], params, lr, clip)
        return params, (moments, grads), norm

    return inner._replace(init=lambda params: (inner.init(params), jax.tree.map(jnp.zeros_like, params)), update=update)


def loss(output, microbatch, totals):
    """Pretraining's, with every layer's expert choices beside its metrics."""
    total, metrics = pretrain.loss_of(len(output.mtp_logits))(output, microbatch, totals)
    return total, metrics | dict(chosen=jnp.concatenate([output.experts, *(r.experts[None] for r in output.mtp_routing)]))


class Steps:
    """Three steps of a model: one device's are made when first asked for."""

    def __init__(self, model, n_micro=1):
        self.cfg, self.made = tiny(**model), {}
        self.start = jax.device_get(init(self.cfg))
        rng = np.random.default_rng(1)
        weight = rng.choice([0.25, 1.0], (n_micro, 8, 8))
        weight[..., 0] = 0
        self.batch = dict(tokens=rng.integers(0, self.cfg.vocab_size, weight.shape).astype(np.int32), weight=weight)

    def one_device(self, dtype, moments="parameter"):
        if (dtype, moments) not in self.made:
            self.made[dtype, moments] = self.run({}, dtype, "fsdp", moments)[0]
        return self.made[dtype, moments]

    def run(self, shape, dtype, kind, moments="parameter", run=RUN):
        """([(loss, chosen, gradients, parameters)] of three steps, the last state, the compiled step's text); shape {}: one device."""
        opt, params = recording(kind, moments), jax.tree.map(lambda p: p.astype(dtype), self.start)
        mesh = mesh_of(shape) if shape else sharding.make_mesh(dict.fromkeys(sharding.MESH_AXES, 1), jax.devices()[:1])
        with jax.enable_x64(dtype == np.float64), jax.set_mesh(mesh):
            like = jax.eval_shape(lambda p: states.from_params(p, states.init_router_bias(self.cfg), opt), params)
            layout = states.shardings(mesh, self.cfg, like, opt.layout)
            state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), like)._replace(params=params)
            state, key, out = jax.device_put(state, layout), jax.random.key(0), []
            rows = jax.NamedSharding(mesh, jax.P(None, *sharding.spec(("batch",))))
            batch = jax.device_put(dict(self.batch, weight=self.batch["weight"].astype(dtype)), rows) | dict(knobs=KNOBS)
            step = compile_step(make_train_step(self.cfg, run, opt, loss), mesh, layout).jitted.lower(state, batch, key).compile()
            for _ in range(3):
                state, metrics = step(state, batch, key)
                out.append(jax.device_get((metrics["loss"], metrics["chosen"], state.opt_state[1], state.params)))
        assert all(jax.tree.leaves(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, layout)))
        return out, state, step.as_text()


@pytest.fixture(scope="module")
def small():
    return Steps(SMALL, n_micro=2)


@pytest.fixture(scope="module")
def full():
    return Steps(FULL)


def apart(a, b):
    """The largest difference of two trees."""
    return max(float(np.max(np.abs(np.asarray(x, np.float64) - y))) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def check(name, want, got):
    losses, grads = ([apart(g[i], w[i]) for g, w in zip(got, want, strict=True)] for i in (0, 2))
    params = [apart(g[3], w[3]) for g, w in zip(got, want, strict=True)]
    print(f"\n{name} | loss {max(losses):.1e} | gradients {max(grads):.1e} | parameters after 1 {params[0]:.1e}, after 3 {params[2]:.1e}")
    assert max(losses) < 1e-10 and max(grads) < 1e-10 and max(params) < 1e-10
    assert flips(got, want) == [0, 0, 0]
    # and the steps did something
    assert apart(want[0][3], want[2][3]) > 1e-3 and apart(want[2][2], jax.tree.map(np.zeros_like, want[2][2])) > 1e-3


def flips(got, want):
    """How many tokens of a layer chose other experts, step by step (of micro-batches: their sum)."""
    return [int(np.any(np.sort(g[1]) != np.sort(w[1]), axis=-1).sum()) for g, w in zip(got, want, strict=True)]


def collectives(text):
    """{kind: (how many, bytes of their results)} of a compiled step; what stands in a loop counts once."""
    found = Counter()
    for result, kind in re.findall(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\(", text):
        found[kind, "n"] += 1
        found[kind, "bytes"] += sum(BYTES[dtype] * math.prod(map(int, dims.split(","))) if dims else BYTES[dtype]
                                    for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", result))
    return {kind: (found[kind, "n"], found[kind, "bytes"]) for kind, what in found if what == "n"}


BYTES = dict(f64=8, s64=8, f32=4, s32=4, bf16=2, pred=1)


def test_three_steps_of_a_small_model_on_a_mesh_equal_those_of_one_device(small):
    got, _, text = small.run(MESHES[0], np.float64, "fsdp")
    check("node 2 expert 2 fsdp 2, fsdp, small", small.one_device(np.float64), got)
    assert collectives(text) == {
        "all-gather": (27, 127040), "all-reduce": (7, 116152), "all-to-all": (2, 4096), "reduce-scatter": (3, 4224)}


def test_zero1_splits_masters_and_moments_over_all_data_and_gathers_weights_once_a_step(small):
    """ZeRO-1 on 2 nodes x 2 x 2, two micro-batches: three steps equal those of one device; a device holds an eighth of masters and
    moments; each weight is gathered once, outside the loop over micro-batches, and each gradient reduced once a micro-batch."""
    shape = MESHES[0]
    got, state, text = small.run(shape, np.float64, "zero1")
    check("node 2 expert 2 fsdp 2, zero1, small", small.one_device(np.float64), got)
    names = optimizers.path_names(state.params)
    for tree in (state.params, state.opt_state[0].mu, state.opt_state[0].nu):
        for name, leaf in zip(names, jax.tree.leaves(tree), strict=True):
            parts = 4 if name.endswith("q_norm") else 8  # its 12 entries do not divide by 8
            assert leaf.addressable_shards[0].data.nbytes * parts == leaf.nbytes, name
    by_table = states.shardings(mesh_of(shape), small.cfg, state)  # the default kind copies what is no expert over node and expert
    assert by_table.params["moe"]["attention"]["out"].shard_shape((1, 32, 20)) == (1, 16, 20)

    assert collectives(text) == {
        "all-gather": (23, 118496), "all-reduce": (8, 85208), "all-to-all": (1, 2048), "reduce-scatter": (3, 4224)}
    entry = text[text.index("\nENTRY"):]
    used = {name: tuple(n // 4 if axis == "expert" else n for n, axis in zip(leaf.shape, axes, strict=True)) for name, leaf, axes in zip(
        names, jax.tree.leaves(state.params), jax.tree.leaves(transformer.axes(small.cfg), is_leaf=lambda x: isinstance(x, tuple)),
        strict=True)}
    gathered = re.findall(r"= f64\[([\d,]*)\]\S* all-gather\(.*op_name=\"state.params([^\"]*)", text)
    assert len(gathered) == len(names) == len(re.findall(r"all-gather\(.*op_name=\"state.params", entry))
    assert sorted(shape for shape, _ in gathered) == sorted(",".join(map(str, shape)) for shape in used.values())
    results = re.findall(r"= (.*?) (?:all-reduce|reduce-scatter)\(", text)
    reduced = Counter(tuple(map(int, dims.split(","))) for result in results for dims in re.findall(r"f64\[([\d,]+)\]", result))
    for name, dims in used.items():  # the embedding's is a sum over tokens, made where its rows lie
        dims = tuple(n for n in dims if n > 1)
        found = sum(n for d, n in reduced.items() if math.prod(d) == math.prod(dims) or math.prod(d) == math.prod(dims) // 8)
        assert found or name == "embedding", (name, reduced)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp", "zero1"])
@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_three_steps_of_a_mesh_equal_those_of_one_device(shape, kind, full):
    name = f"{' '.join(f'{k} {v}' for k, v in shape.items())}, {kind}"
    check(f"{name}, float64", full.one_device(np.float64), full.run(shape, np.float64, kind)[0])
    want, got = full.one_device(np.float32), full.run(shape, np.float32, kind)[0]
    relative = [abs(float(g[0] / w[0]) - 1) for g, w in zip(got, want, strict=True)]
    print(f"{name}, float32 | loss {max(relative):.1e} relative | choices flipped by step {flips(got, want)} of {want[0][1][..., 0].size}")
    assert relative[0] < 1e-6 and (max(relative) < 1e-6 or any(flips(got, want)))
    want, got = full.one_device(np.float64, "bfloat16"), full.run(shape, np.float64, kind, "bfloat16")[0]
    rounded = apart(got[2][3], want[2][3])
    print(f"{name}, bf16 moments | parameters after 3 {rounded:.1e}")
    assert rounded < 1e-2 * apart(want[2][3], jax.tree.map(lambda p: p.astype(np.float64), full.start))


@pytest.mark.slow
def test_zero1_moves_the_low_precision_copies_and_not_the_masters(small):
    """In bf16 the weights of matmuls are gathered as their copies; the step is that of the default kind, whose gradients add up in an
    order of their own."""
    run = Execution(precision=Precision("bf16"), experts="block")
    (want, _, _), (got, state, text) = (small.run(MESHES[0], np.float32, kind, run=run) for kind in ("fsdp", "zero1"))
    assert abs(float(got[0][0] / want[0][0]) - 1) < 1e-3
    names = {name.split("/")[-1] for name in optimizers.path_names(state.params)}
    masters = {path.split("'")[-2] for path in re.findall(r"all-gather\(.*op_name=\"state.params([^\"]*?)\\*\"", text.replace("\\'", "'"))}
    assert masters == names - MATMULS
    # XLA's CPU backend moves bf16 as float32: what tells a copy is that the gather comes after the cast
    assert len(re.findall(r"all-gather\(.*op_name=\"jit\(step\)/sharding_constraint", text)) == len(names & MATMULS)


@pytest.mark.slow
def test_given_expert_choices_are_followed_on_a_mesh(small):
    """A rollout's choices in a batch's column `experts` (RL's replay): loss and gradients of a mesh equal those of one device."""
    chosen = np.stack([np.random.default_rng(i).permutation(8)[:2] for i in range(2 * 8 * 8)]).reshape(2, 8, 8, 1, 2).astype(np.int32)
    given = Steps(SMALL, n_micro=2)
    given.batch["experts"] = chosen
    want, got = given.one_device(np.float64), given.run(MESHES[0], np.float64, "fsdp")[0]
    check("node 2 expert 2 fsdp 2, given experts", want, got)
    np.testing.assert_array_equal(got[0][1][0], chosen[..., 0, :].sum(axis=0))
