"""The FP8 linear of the model: operands, residuals, policy by site, and the split backward."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import init, tiny

from model import expert_parallel, fp8_linear, precision, sharding
from model.activation import swiglu
from model.config import Execution
from model.tape import LayerTape, Tape
from pallas_kernels import quantize

M, N, K = 160, 136, 200


def run_of(kind):
    return Execution(precision=precision.Precision(kind))


def operands(rng, kind):
    x, w, dy = (jnp.array(rng.normal(size=shape), jnp.float32) for shape in ((M, K), (N, K), (M, N)))
    prepared = precision.prepare({"q": w}, run_of(kind))["q"]
    return x.astype(jnp.bfloat16), w, prepared, dy.astype(jnp.bfloat16)


def dequantized(x, tile):
    q, scale = quantize.quantize_tiles(x, tile)
    return np.asarray(quantize.dequantize_tiles(q, scale, tile), np.float64)


def error(got, want):
    got = np.asarray(got, np.float64)
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def backward(x, prepared, dy, run, site="ffn/down"):
    y, pull = jax.vjp(lambda x, master: precision.linear(x, prepared._replace(master=master), run, site), x, prepared.master)
    return (y, *pull(dy))


def test_the_three_products_read_the_operands_of_the_paper(rng):
    x, w, prepared, dy = operands(rng, "fp8_block")
    y, dx, dw = backward(x, prepared, dy, run_of("fp8_block"))
    x_rows, w_blocks = dequantized(x, (1, 128)), dequantized(w, (128, 128))
    assert error(y, x_rows @ w_blocks.T) < 3e-3 and y.dtype == jnp.bfloat16
    assert error(dx, dequantized(dy, (1, 128)) @ w_blocks) < 3e-3 and dx.dtype == jnp.bfloat16
    x_columns = dequantized(jnp.array(x_rows, jnp.float32), (128, 1))  # re-quantised from the cached tiles
    assert error(dw, dequantized(dy, (128, 1)).T @ x_columns) < 1e-5 and dw.dtype == jnp.float32
    # and all of it is near the product that nothing rounded
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
    assert 1 - 2 * np.sum(exact * np.asarray(y, np.float64)) / np.sum(exact ** 2 + np.asarray(y, np.float64) ** 2) < 1e-3


def test_the_input_after_attention_is_cached_wider(rng):
    x, _, prepared, dy = operands(rng, "fp8_block")
    cached, scale = fp8_linear.quantize_input(x, "mla/out", fp8_linear.RECIPES["fp8_block"])
    assert cached.dtype == jnp.float16 and np.all(np.log2(np.asarray(scale)) % 1 == 0)
    plain, scale = fp8_linear.quantize_input(x, "mla/q_up", fp8_linear.RECIPES["fp8_block"])
    assert plain.dtype == jnp.float8_e4m3fn and np.any(np.log2(np.asarray(scale)) % 1 != 0)
    travels, scale = fp8_linear.quantize_input(x, "moe/gate_up", fp8_linear.RECIPES["fp8_block"])
    assert travels.dtype == jnp.float8_e4m3fn and np.all(np.log2(np.asarray(scale)) % 1 == 0)
    exact = np.asarray(dy, np.float64).T @ np.asarray(x, np.float64)
    wide, narrow = (error(backward(x, prepared, dy, run_of("fp8_block"), site)[2], exact) for site in ("mla/out", "ffn/down"))
    assert wide < narrow  # E5M6 and power-of-two scales: re-tiling adds less


def test_the_residual_is_the_quantised_input(rng):
    x, _, prepared, _ = operands(rng, "fp8_block")
    _, pull = jax.vjp(lambda x: precision.linear(x, prepared, run_of("fp8_block"), "ffn/down"), x)
    kept = [(leaf.dtype, leaf.shape) for leaf in jax.tree.leaves(pull)]
    assert (jnp.float8_e4m3fn, (M, K)) in kept and (jnp.bfloat16, (M, K)) not in kept and (jnp.float32, (M, K)) not in kept


def test_experts_equal_dense_products_group_by_group(rng):
    run, sizes = run_of("fp8_block"), jnp.array([128, 0, 256], jnp.int32)
    rows, dy = (jnp.array(rng.normal(size=(512, n)), jnp.bfloat16) for n in (K, N))
    rows, dy = rows.at[384:].set(0), dy.at[384:].set(0)
    w = jnp.array(rng.normal(size=(3, N, K)), jnp.float32)
    prepared = precision.prepare({"down": w}, run)["down"]

    @jax.jit
    def experts(rows, w, dy):
        y, pull = jax.vjp(lambda r, m: precision.grouped_linear(r, sizes, prepared._replace(master=m), run, "moe/down", align=128), rows, w)
        return y, *pull(dy)

    y, dx, dw = experts(rows, w, dy)
    for g, (start, stop) in enumerate(((0, 128), (128, 128), (128, 384))):
        if start == stop:
            assert not np.any(dw[g])
            continue
        one = jax.tree.map(lambda leaf, g=g: leaf[g], prepared)
        want = backward(rows[start:stop], one, dy[start:stop], run, "moe/down")
        for got, part in zip((y[start:stop], dx[start:stop], dw[g]), want, strict=True):
            assert error(got, np.asarray(part, np.float64)) < 1e-6


@pytest.mark.parametrize("kind", ["fp8_block", "fp8_tensor", "fp8_block_grad", "bf16"])
def test_the_split_backward_is_the_whole_one_bit_for_bit(kind, rng):
    x, _, prepared, dy = operands(rng, kind)
    run = run_of(kind)
    _, _, whole = backward(x, prepared, dy, run)
    tape = LayerTape(Tape())
    precision.linear(x, prepared, run, "ffn/down", tape)
    part = precision.weight_gradient(tape.records["ffn/down"].input, dy, "ffn/down", run)
    np.testing.assert_array_equal(part, whole)


@pytest.mark.parametrize("kind, first", [
    ("bf16", 136), ("fp8_block", 128), ("fp8_block_grad", 128), ("fp8_block", 136), ("fp8_tensor", 128)])
def test_two_products_of_one_input_are_one_with_a_single_input_gradient_where_their_blocks_allow(kind, first, rng):
    run, n = run_of(kind), (first, 40)
    x, dys = jnp.array(rng.normal(size=(M, K)), jnp.bfloat16), [jnp.array(rng.normal(size=(M, rows)), jnp.bfloat16) for rows in n]
    masters = [jnp.array(rng.normal(size=(rows, K)), jnp.float32) for rows in n]
    prepared = [precision.prepare({"q": w}, run)["q"] for w in masters]

    assert precision.joins(prepared, run) == (first % 128 == 0 and kind != "fp8_tensor" or kind == "bf16")
    assert not precision.joins(masters, run) and not precision.joins(prepared, run, LayerTape(Tape()))
    if not precision.joins(prepared, run):
        return

    def joint(x, masters):
        return precision.joint_linear(x, [w._replace(master=m) for w, m in zip(prepared, masters, strict=True)], run, "a")

    joined, pull = jax.vjp(joint, x, masters)
    dx, dws = pull(jnp.concatenate(dys, axis=1))
    alone = [backward(x, w, dy, run, site) for w, dy, site in zip(prepared, dys, "ab", strict=True)]
    for y, dw, (want_y, _, want_dw) in zip(jnp.split(joined, [first], axis=1), dws, alone, strict=True):
        assert error(y, np.asarray(want_y, np.float64)) < 1e-3
        assert error(dw, np.asarray(want_dw, np.float64)) < 1e-6
    a, b = (np.asarray(one[1], np.float64) for one in alone)
    assert error(dx, a + b) < 4e-3  # the parts were rounded to bfloat16 before they were added here
    assert sum(eqn.primitive.name == "custom_vjp_call" for eqn in jax.make_jaxpr(joint)(x, masters).eqns) == 1


def test_gate_and_up_with_their_swiglu_have_the_gradients_and_the_tape_of_the_product_alone(rng, monkeypatch):
    """As on a Hopper GPU, with the kernels' references: the backward reads gate_up alone, and a replayed output drops the product."""
    monkeypatch.setattr(precision, "is_hopper", lambda: True)
    run, sizes, site = run_of("bf16"), jnp.array([64, 0, 40], jnp.int32), "moe/gate_up"
    rows, dy = (jnp.array(rng.normal(size=(128, n)), jnp.bfloat16) for n in (K, 24))
    w = jnp.array(rng.normal(size=(3, 2, 24, K)), jnp.float32)
    prepared = precision.prepare({"gate_up": w}, run)["gate_up"]

    def fused(*args):
        return precision.grouped_gate_up(*args, align=8)

    def apart(*args):
        gate_up = precision.grouped_linear(*args, align=8)
        return gate_up, swiglu(gate_up)

    def backward_of(form):
        def taped(rows, master, zeros):
            tape = LayerTape(Tape(zeros={site: zeros}))
            gate_up, hidden = form(rows, sizes, prepared._replace(master=master), run, site, tape)
            return hidden, (gate_up, tape.records[site])

        hidden, pull, (gate_up, record) = jax.vjp(taped, rows, w, jnp.zeros((128, 48), jnp.bfloat16), has_aux=True)
        return hidden, (gate_up, record, pull(dy))

    (hidden, same), (plain, wanted) = jax.jit(lambda: (backward_of(fused), backward_of(apart)))()
    assert error(hidden, np.asarray(plain, np.float64)) < 4e-3
    jax.tree.map(np.testing.assert_array_equal, same, wanted)
    _, record, (_, whole, d_gate_up) = same
    part = precision.weight_gradient(record.input, d_gate_up, site, run, record.group_sizes)
    np.testing.assert_array_equal(part.reshape(w.shape), whole)

    replayed = precision.grouped_gate_up(rows, sizes, prepared, run, site, LayerTape(Tape(outputs={site: record.output})), align=8)
    np.testing.assert_array_equal(replayed[1], swiglu(record.output))


def test_ablations_are_worse_where_the_paper_says(rng):
    """An outlier in one row hurts a per-tensor scale everywhere, a tile alone in its own tile."""
    x, w, _, dy = operands(rng, "bf16")
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
    x = x.at[3, 5].set(1e6)

    def rest(kind):
        y = precision.linear(x, precision.prepare({"q": w}, run_of(kind))["q"], run_of(kind), "ffn/down")
        return error(np.delete(np.asarray(y, np.float64), 3, 0), np.delete(exact, 3, 0))

    assert rest("fp8_block") < 0.05 < 0.3 < rest("fp8_tensor")


def test_what_stays_in_high_precision():
    cfg = tiny()
    prepared = precision.prepare(init(cfg), run_of("fp8_block"))
    for path, leaf in jax.tree_util.tree_leaves_with_path(prepared, is_leaf=precision.is_weight):
        names = [key.key for key in path]
        high = names[-1] in ("embedding", "head", "gate") or names[-1].endswith("norm")
        if high:
            assert not precision.is_weight(leaf) and leaf.dtype == jnp.float32, names
        elif names == ["mtp", "proj"]:
            assert leaf.low.dtype == jnp.bfloat16  # V3 names the linears inside blocks
        else:
            assert leaf.low.dtype == leaf.transposed.dtype == jnp.float8_e4m3fn and leaf.master.dtype == jnp.float32, names


def test_prepared_weights_keep_block_scales_of_the_paper(rng):
    w = jnp.array(rng.normal(size=(2, 3, 136, 200)), jnp.float32)
    weight = precision.prepare({"gate_up": w}, run_of("fp8_block"))["gate_up"]
    assert weight.low.shape == (2, 3 * 136, 200) and weight.scale.shape == (2, 4, 2)
    merged = np.asarray(w).reshape(2, 408, 200)
    blocks = functools.partial(np.pad, pad_width=((0, 0), (0, 104), (0, 56)))(np.abs(merged)).reshape(2, 4, 128, 2, 128).max((2, 4))
    np.testing.assert_allclose(weight.scale, blocks / 448, rtol=1e-6)


def test_tokens_dispatched_in_fp8_are_the_rows_quantised_after_dispatch(rng):
    x, experts = jnp.array(rng.normal(size=(48, K)), jnp.bfloat16), jnp.array(rng.integers(0, 3, (48, 2)), jnp.int32)
    route, _ = expert_parallel.plan(experts, 4, 128)  # one expert has no row
    want_q, want_scale = quantize.quantize_tiles(*expert_parallel.dispatch(x, route))
    q, scale = quantize.quantize_tiles(x)
    got_q, got_scale = expert_parallel.dispatch_quantized(jax.lax.bitcast_convert_type(q, jnp.uint8), scale, route)
    real = np.asarray(route.source) < experts.size
    np.testing.assert_array_equal(got_q.astype(jnp.float32), want_q.astype(jnp.float32))
    np.testing.assert_array_equal(np.asarray(got_scale)[real], np.asarray(want_scale)[real])


def test_swiglu_quantised_in_one_kernel_is_its_parts_and_keeps_its_gradient(rng):
    """The fused operand skips one rounding to bf16; the gradient reaches gate and up as it does without."""
    gate_up, w, prepared, dy = operands(rng, "fp8_block")
    gate_up = jnp.concatenate([gate_up, gate_up[::-1]], axis=-1)

    def of(fused):
        def f(h, master):
            w = prepared._replace(master=master)
            return precision.linear(swiglu(h), w, run_of("fp8_block"), "ffn/down", gate_up=h if fused else None)
        y, pull = jax.vjp(f, gate_up, w)
        return (y, *pull(dy))

    for fused, parts in zip(of(True), of(False), strict=True):
        assert error(fused, np.asarray(parts, np.float64)) < 0.05
    np.testing.assert_array_equal(of(True)[1], of(False)[1])


def test_every_data_shard_multiplies_its_own_rows(rng):
    """On a mesh the results are one device's, and the activations stay where they are: only weight gradients are summed."""
    run, mesh = run_of("fp8_block"), sharding.make_mesh(dict(pipe=1, node=1, expert=2, fsdp=2, tensor=1))
    x, dy = (jnp.array(rng.normal(size=(512, n)), jnp.bfloat16) for n in (K, N))
    prepared = precision.prepare({"q": jnp.array(rng.normal(size=(N, K)), jnp.float32)}, run)["q"]
    step = jax.jit(lambda x, w, dy: backward(x, w, dy, run, "mla/out"))
    y, dx, dw = step(x, prepared, dy)
    with jax.set_mesh(mesh):
        rows = jax.NamedSharding(mesh, sharding.spec(("rows",)))
        split = jax.device_put(x, rows), prepared, jax.device_put(dy, rows)
        got = step(*split)
        text = step.lower(*split).compile().as_text()
    np.testing.assert_array_equal(got[0], y)
    np.testing.assert_array_equal(got[1], dx)
    np.testing.assert_allclose(got[2], dw, atol=1e-4)
    assert "all-gather" not in text and text.count(" all-reduce(") == 1 and f"bf16[512,{N}]" not in text
