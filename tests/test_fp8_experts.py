"""What passes between the products of an FP8 feed-forward network: weighted hidden rows, and gradients that stay FP8 (V3 §3.3.3)."""
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import expert_parallel, moe, precision, sharding
from model.config import Execution
from model.tape import LayerTape, Tape
from pallas_kernels import quantize, target

E, TOKENS, CHOSEN, D, F = 4, 96, 2, 256, 128
RUN = Execution(precision=precision.Precision("fp8_block"))
CFG = types.SimpleNamespace(moe=types.SimpleNamespace(n_routed_experts=E, d_expert=F))


def prepare(masters):
    return tuple(precision.prepare({name: w}, RUN)[name] for name, w in zip(("gate_up", "down"), masters, strict=True))


def layer(x, weights, masters, prepared, experts, tape):
    """The routed experts alone, with their shared step in FP8."""
    w = [copy._replace(master=master) for copy, master in zip(prepared, masters, strict=True)]
    local = functools.partial(moe.run_experts, RUN)
    return expert_parallel.apply(local, (lambda x: (weights, None),), (), x, experts, *w, CFG, RUN, tape)[0]


def exact(x, weights, masters, experts):
    """The same in the dtype it is given, every expert on every token."""
    up, down = masters
    gate, up = jnp.einsum("MD,EPFD->PMEF", x, up)
    every = jnp.einsum("MEF,EDF->MED", gate * jax.nn.sigmoid(gate) * up, down)
    return jnp.einsum("MKD,MK->MD", jnp.take_along_axis(every, experts[..., None], axis=1), weights)


def backward_of(function, dy):
    """jitted (operands) -> (y, gradients of the operands) at dy."""
    def run(*operands):
        y, pull = jax.vjp(function, *operands)
        return y, pull(dy)
    return jax.jit(run)


def error(got, want):
    got, want = (np.asarray(a, np.float64) for a in (got, want))
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.fixture
def batch(rng):
    x, dy = (jnp.asarray(rng.normal(size=(TOKENS, D)), jnp.bfloat16) for _ in range(2))
    weights = jnp.asarray(rng.uniform(0.05, 1, size=(TOKENS, CHOSEN)), jnp.float32)
    experts = jnp.asarray(np.stack([rng.permutation(E - 1)[:CHOSEN] for _ in range(TOKENS)]), jnp.int32)  # the last one has no token
    masters = jnp.asarray(rng.normal(size=(E, 2, F, D)) / 16, jnp.float32), jnp.asarray(rng.normal(size=(E, D, F)) / 11, jnp.float32)
    return x, weights, masters, experts, dy


def test_an_expert_layer_and_its_gradients_are_as_near_to_float64_as_with_bf16_between_the_products(batch):
    x, weights, masters, experts, dy = batch
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64)), (x, weights, masters))
        y, pull = jax.vjp(lambda *a: exact(*a, experts), *wide)
        want = jax.tree.leaves((y, pull(jnp.asarray(np.asarray(dy, np.float64)))))
        want = [np.asarray(a) for a in want]
    got, apart = ([error(g, w) for g, w in zip(
        jax.tree.leaves(backward_of(lambda x, p, m: layer(x, p, m, prepare(masters), experts, LayerTape(tape)), dy)(x, weights, masters)),
        want, strict=True)] for tape in (None, Tape()))
    for name, fused, plain in zip(("y", "dx", "d_weights", "d_gate_up", "d_down"), got, apart, strict=True):
        assert fused < 0.08 and fused < 1.25 * plain, (name, fused, plain)


def test_down_reads_the_bytes_that_its_gradient_was_dispatched_as(batch):
    """dW = dy^T x of the dispatched tokens, re-quantised in 128x1 tiles by powers of two, and the weighted SwiGLU as it was cached."""
    x, weights, masters, experts, dy = batch
    _, (_, _, (_, dw)) = backward_of(lambda x, p, m: layer(x, p, m, prepare(masters), experts, LayerTape()), dy)(x, weights, masters)
    route, sizes = expert_parallel.plan(experts, E, 128)
    w_up, _ = prepare(masters)
    tokens = precision.quantize_tokens(x, w_up, RUN, "moe/gate_up")
    rows, rows_scale = expert_parallel.dispatch_quantized(*expert_parallel._as_bytes(*tokens), route)
    gate_up = precision.grouped_linear(jnp.zeros((rows.shape[0], D), jnp.bfloat16), sizes, w_up, RUN, "moe/gate_up",
                                       quantized=(rows, rows_scale))
    hidden = quantize.swiglu_quantize(gate_up, weights=expert_parallel.row_weights(weights, route))
    g = quantize.quantize_tiles(dy, power_of_two=True)
    g = expert_parallel.dispatch_quantized(*expert_parallel._as_bytes(*g), route)
    left = quantize.dequantize_tiles(*quantize.requantize_tiles(*g, (128, 1), power_of_two=True), (128, 1))
    right = quantize.dequantize_tiles(*quantize.requantize_tiles(*hidden, (128, 1)), (128, 1))
    starts = np.cumsum(sizes) - np.asarray(sizes)
    for e in range(E):
        own = slice(int(starts[e]), int(starts[e] + sizes[e]))
        want = np.asarray(left[own], np.float64).T @ np.asarray(right[own], np.float64)
        np.testing.assert_allclose(dw[e], want, atol=1e-5 * max(np.abs(want).max(), 1))


@pytest.mark.parametrize("mesh", [dict(expert=2, fsdp=2), dict(node=2, expert=2)], ids=str)
def test_on_a_mesh_tokens_and_their_gradients_travel_as_bytes(mesh, batch):
    x, weights, masters, experts, dy = batch
    step = backward_of(lambda x, p, m: layer(x, p, m, prepare(masters), experts, LayerTape()), dy)
    want = jax.tree.leaves(step(x, weights, masters))
    with jax.set_mesh(sharding.make_mesh(dict(dict.fromkeys(sharding.MESH_AXES, 1), **mesh))):
        rows = jax.NamedSharding(jax.sharding.get_mesh(), sharding.spec(("rows",)))
        split = backward_of(lambda x, p, m: layer(x, p, m, prepare(masters), experts, LayerTape()), jax.device_put(dy, rows))
        operands = jax.device_put(x, rows), jax.device_put(weights, rows), masters
        got, text = jax.tree.leaves(split(*operands)), split.lower(*operands).compile().as_text()
    gathered = [line for line in text.splitlines() if " all-gather(" in line or "all-gather-start(" in line]
    assert sum("u8[" in line for line in gathered) == 2, gathered
    assert not any(f"bf16[{TOKENS // 2},{D}]" in line or f"bf16[{TOKENS},{D}]" in line for line in gathered), gathered
    for name, g, w in zip(("y", "dx", "d_weights", "d_gate_up", "d_down"), got, want, strict=True):
        assert error(g, w) < (6e-3 if name in ("y", "dx") else 6e-2), (name, error(g, w))


def test_on_a_mesh_of_hopper_gpus_the_kernels_vary_as_their_operands_do(monkeypatch, batch):
    monkeypatch.setattr(target, "is_hopper", lambda: True)
    x, weights, masters, experts, dy = batch
    step = backward_of(lambda x, p, m: layer(x, p, m, prepare(masters), experts, LayerTape()), dy)
    for mesh in (dict(expert=2, fsdp=2), dict(fsdp=4)):
        with jax.set_mesh(sharding.make_mesh(dict(dict.fromkeys(sharding.MESH_AXES, 1), **mesh))):
            text = step.trace(x, weights, masters).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("mosaic_gpu") >= 12
