"""Gate, node limits, balance, dropless dispatch, EPLB: against the paper's numbers and a float64 numpy oracle."""
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import forward, init, random_tokens, tiny

from model import block_matmul, expert_parallel, moe
from model.activation import swiglu
from model.config import Execution
from model.tape import LayerTape
from pallas_kernels.gate.reference import balance_sums, ranks


def gate_config(**edits):
    return tiny(**{f"ffn__moe__{k}": v for k, v in edits.items()})


def balance_loss(s_BTE, valid_BT, m):
    return moe.balance_of(*balance_sums(s_BTE, valid_BT, m.rule), valid_BT, m)


def numpy_gate(logits, bias, cfg):
    """Eq. 13-16 row by row, in float64."""
    m, chosen = cfg.moe, []
    s = 1 / (1 + np.exp(-logits)) if m.gate.score == "sigmoid" else np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    biased = s + (0 if bias is None else bias)
    for t in range(len(s)):
        score = biased[t].copy()
        if m.groups:
            by_group = score.reshape(m.groups.n_expert_groups, -1)
            value = by_group.max(1) if m.groups.score == "max" else np.sort(by_group, 1)[:, -2:].sum(1)
            keep = np.argsort(-value, kind="stable")[:m.groups.n_limited_groups]
            score = np.where(np.isin(np.arange(len(score)) // by_group.shape[1], keep), score, -np.inf)
        chosen.append(np.argsort(-score, kind="stable")[:m.n_activated_experts])
    chosen = np.array(chosen)
    weights = np.take_along_axis(s, chosen, 1)
    if m.gate.weights == "normalised":
        weights = weights / weights.sum(1, keepdims=True)
    return weights * m.route_scale, chosen


def test_the_gate_of_the_paper_by_hand():
    cfg = gate_config()
    logits = jnp.array([[2, -1, 0.5, 0.4, -2, 3, 0, 0.1]], jnp.float32)
    weights, experts = moe.gate(logits, jnp.array([0, 0, 0.3, 0.2, 0, -0.5, 0, 0], jnp.float32), cfg)
    assert experts.tolist() == [[2, 0]]  # expert 5 has the highest affinity; bias and node limit exclude it
    np.testing.assert_allclose(weights, [[1.035185, 1.464815]], atol=1e-6)


def test_ranks_are_the_order_of_top_k_also_among_equals_and_infinities(rng):
    x = rng.integers(-2, 3, (50, 3, 9)).astype(np.float32)
    x[x == -2] = -np.inf
    order = np.asarray(jax.lax.top_k(jnp.array(x), 9)[1])
    places = np.take_along_axis(np.asarray(ranks(jnp.array(x))), order, -1)
    np.testing.assert_array_equal(places, np.broadcast_to(np.arange(9), x.shape))


def test_swiglus_own_gradient_is_that_of_its_formula(rng):
    with jax.enable_x64(True):
        gate_up, g = jnp.array(rng.normal(size=(5, 3, 14))), jnp.array(rng.normal(size=(5, 3, 7)))
        plain = jax.vjp(lambda x: x[..., :7] / (1 + jnp.exp(-x[..., :7])) * x[..., 7:], gate_up)
        ours = jax.vjp(swiglu, gate_up)
        np.testing.assert_allclose(ours[0], plain[0], rtol=1e-13)
        np.testing.assert_allclose(ours[1](g)[0], plain[1](g)[0], rtol=1e-12)


@pytest.mark.parametrize("n, n_experts, align", [(1, 1, 1), (7, 3, 1), (130, 5, 32), (1000, 4, 128)])
def test_rows_go_where_a_stable_sort_by_expert_puts_them(n, n_experts, align, rng):
    experts = rng.integers(0, n_experts + 1, n).astype(np.int32)  # n_experts: of no group
    position, source, sizes = block_matmul.sort_into_groups(jnp.array(experts), n_experts, align)
    counts = np.bincount(experts, minlength=n_experts + 1)[:n_experts]
    np.testing.assert_array_equal(sizes, -(-counts // align) * align)
    want, starts = np.full(len(source), n), np.cumsum(sizes) - sizes
    for e in range(n_experts):
        want[starts[e]:starts[e] + counts[e]] = np.flatnonzero(experts == e)
    np.testing.assert_array_equal(source, want)
    np.testing.assert_array_equal(np.asarray(source)[np.asarray(position)[experts < n_experts]], np.flatnonzero(experts < n_experts))
    assert (np.asarray(position)[experts == n_experts] == len(source)).all()


@pytest.mark.parametrize("edits", [
    dict(), dict(gate__kind="softmax"), dict(groups__kind="none"), dict(n_activated_experts=4),
    dict(gate__kind="softmax", groups__limited__score="max", route_scale=16.0)], ids=str)
def test_gate_equals_the_oracle(edits, rng):
    cfg = gate_config(**edits)
    logits, bias = rng.normal(size=(200, 8)) * 2, rng.normal(size=8) * 0.3
    with jax.enable_x64(True):
        weights, experts = jax.jit(lambda x, b: moe.gate(x, b, cfg))(jnp.array(logits), jnp.array(bias, jnp.float32))
    want_weights, want_experts = numpy_gate(logits, bias.astype(np.float32), cfg)
    np.testing.assert_array_equal(experts, want_experts)
    np.testing.assert_allclose(weights, want_weights, rtol=1e-12)
    if cfg.moe.groups:
        groups_used = [len(set(row // 2)) for row in np.asarray(experts)]
        assert max(groups_used) <= cfg.moe.groups.n_limited_groups
    assert all(len(set(row)) == cfg.moe.n_activated_experts for row in np.asarray(experts).tolist())


def test_dropped_groups_stay_dropped_where_biased_scores_are_negative(rng):
    cfg = gate_config()
    bias = np.full(8, -3.0)  # every biased score is negative: masking with 0 would let dropped experts win
    logits = rng.normal(size=(64, 8))
    _, experts = moe.gate(jnp.array(logits, jnp.float32), jnp.array(bias, jnp.float32), cfg)
    np.testing.assert_array_equal(experts, numpy_gate(logits, bias, cfg)[1])


def test_the_gates_gradient_flows_through_the_unbiased_scores_alone():
    cfg = gate_config()
    logits = jnp.linspace(-1, 1, 8, dtype=jnp.float32)[None]
    d_bias = jax.grad(lambda b: jnp.sum(moe.gate(logits, b, cfg)[0] ** 2))(jnp.zeros(8, jnp.float32))
    d_logits = jax.grad(lambda x: jnp.sum(moe.gate(x, None, cfg)[0] ** 2))(logits)
    chosen = moe.gate(logits, None, cfg)[1][0].tolist()
    assert not np.any(d_bias) and [i for i in range(8) if d_logits[0, i] != 0] == sorted(chosen)


def test_sequence_wise_balance_loss_of_the_paper_by_hand():
    cfg = gate_config(n_routed_experts=4, groups__kind="none")
    s = jnp.array([[0.9, 0.5, 0.1, 0.2], [0.8, 0.3, 0.6, 0.1], [0.7, 0.6, 0.2, 0.3], [0.2, 0.9, 0.4, 0.8]], jnp.float32)
    valid = jnp.ones((1, 4), bool)
    np.testing.assert_allclose(balance_loss(s[None], valid, cfg.moe) / cfg.moe.balance.alpha, 1.158781, rtol=1e-6)
    # padding does not count, and the loss of two sequences is the sum of theirs
    padded = jnp.concatenate([s, s[:2] * 0.3])[None]
    mask = jnp.array([[True] * 4 + [False] * 2])
    np.testing.assert_allclose(balance_loss(padded, mask, cfg.moe), balance_loss(s[None], valid, cfg.moe), rtol=1e-6)
    two, both = jnp.stack([s, s[::-1] ** 2]), jnp.ones((2, 4), bool)
    parts = sum(balance_loss(two[i:i + 1], valid, cfg.moe) for i in range(2))
    np.testing.assert_allclose(balance_loss(two, both, cfg.moe), parts, rtol=1e-6)
    uniform = jnp.full((1, 8, 4), 0.5, jnp.float32) + 0.1 * jnp.roll(jnp.eye(4, dtype=jnp.float32), 1, 1)[None].repeat(2, 1)
    uniform = uniform + 0.1 * jnp.roll(jnp.eye(4, dtype=jnp.float32), 2, 1)[None].repeat(2, 1)
    np.testing.assert_allclose(balance_loss(uniform, jnp.ones((1, 8), bool), cfg.moe) / cfg.moe.balance.alpha, 1, rtol=1e-6)


def test_batch_scope_sees_all_tokens_at_once(rng):
    cfg = gate_config(balance__kind="batch_aux")
    s, valid = jnp.array(rng.random((3, 5, 8)), jnp.float32), jnp.ones((3, 5), bool)
    flat = balance_loss(s.reshape(1, 15, 8), jnp.ones((1, 15), bool), cfg.moe)
    np.testing.assert_allclose(balance_loss(s, valid, cfg.moe), 3 * flat, rtol=1e-6)
    assert not cfg.has_bias and gate_config(balance__kind="none").moe.balance.alpha == 0


def test_the_sign_rule_moves_every_bias_towards_balance():
    load = jnp.array([[4, 0, 2, 2]], jnp.float32)
    np.testing.assert_allclose(moe.update_bias(jnp.zeros((1, 4), jnp.float32), load, 1e-3), [[-1e-3, 1e-3, 0, 0]])
    np.testing.assert_allclose(moe.max_violation(load), [1.0])


def numpy_moe(x, p, weights, experts, cfg):
    """Shared and routed experts, token by token, in float64."""
    def ffn(v, gate_up, down):
        gate, up = gate_up @ v
        return down @ (gate / (1 + np.exp(-gate)) * up)

    out = np.stack([ffn(v, p["shared_gate_up"], p["shared_down"]) for v in x])
    for t, v in enumerate(x):
        for w, e in zip(weights[t], experts[t], strict=True):
            out[t] += w * ffn(v, p["gate_up"][e], p["down"][e])
    return out


@pytest.mark.parametrize("kind", ["block", pytest.param("ragged", marks=pytest.mark.slow), "masked"])
def test_every_implementation_of_the_experts_equals_the_oracle(kind, rng):
    with jax.enable_x64(True):
        cfg = tiny()
        params = jax.tree.map(lambda leaf: leaf[0].astype(jnp.float64), init(cfg)["moe"]["moe"])
        x, stream = (jnp.array(rng.normal(size=(2, 9, 32))) for _ in range(2))
        bias = jnp.array(rng.normal(size=8) * 0.1)
        layer = moe.MoEFFN(cfg, Execution(experts=kind))
        run = jax.jit(lambda p, x: layer.apply({"params": p}, stream, x, bias, jnp.ones((2, 9), bool), LayerTape()))
        out, routing = run(params, x)
        p, flat = jax.tree.map(np.asarray, params), np.asarray(x).reshape(18, 32)
        weights, experts = numpy_gate(flat @ p["gate"].T, np.asarray(bias), cfg)
        np.testing.assert_array_equal(np.asarray(routing.experts).reshape(18, -1), experts)
        np.testing.assert_allclose(np.asarray(out - stream).reshape(18, 32), numpy_moe(flat, p, weights, experts, cfg), atol=1e-12)
        np.testing.assert_array_equal(routing.load, np.bincount(experts.reshape(-1), minlength=8))


@pytest.mark.parametrize("n_shared", [0, 1])
def test_gradients_of_tokens_meet_in_dispatch_and_are_those_of_every_expert_on_every_token(n_shared, rng):
    with jax.enable_x64(True):
        cfg = gate_config(n_shared_experts=n_shared, balance__kind="aux_loss", balance__aux_loss__alpha=0.1)
        params = jax.tree.map(lambda leaf: leaf[0].astype(jnp.float64), init(cfg)["moe"]["moe"])
        stream, x, g = (jnp.array(rng.normal(size=(2, 9, 32))) for _ in range(3))

        def gradient(kind):
            def loss(params, stream, x):
                layer = moe.MoEFFN(cfg, Execution(experts=kind))
                out, routing = layer.apply({"params": params}, stream, x, None, jnp.ones((2, 9), bool), LayerTape())
                return jnp.sum(out * g) + routing.balance

            return jax.grad(loss, (0, 1, 2))

        ours, plain = (jax.make_jaxpr(gradient(kind))(params, stream, x) for kind in ("block", "masked"))
        added = [re.findall(r":f64\[(?:18|2,9),32\] = add_any\b", str(jaxpr)) for jaxpr in (ours, plain)]
        assert not added[0] and len(added[1]) > n_shared, "gradients are added outside of the sums of rows"
        got, want = (jax.jit(gradient(kind))(params, stream, x) for kind in ("block", "masked"))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), got, want)


def test_all_tokens_to_one_expert_and_all_experts_equal_dense_computations(rng):
    x = jnp.array(rng.normal(size=(1, 40, 32)), jnp.float32)
    for edits, bias in ((dict(n_activated_experts=1, groups__kind="none"), jnp.zeros(8, jnp.float32).at[5].set(100.0)),
                        (dict(n_activated_experts=8, groups__kind="none"), None)):
        cfg = gate_config(**edits)
        params = jax.tree.map(lambda leaf: leaf[0], init(cfg)["moe"]["moe"])
        layer = moe.MoEFFN(cfg, Execution(experts="block"))
        out, routing = jax.jit(lambda p, x: layer.apply({"params": p}, 0 * x, x, bias, jnp.ones((1, 40), bool), LayerTape()))(params, x)  # noqa: B023
        p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
        weights, experts = numpy_gate(np.asarray(x[0], np.float64) @ p["gate"].T, None if bias is None else np.asarray(bias), cfg)
        np.testing.assert_allclose(out[0], numpy_moe(np.asarray(x[0], np.float64), p, weights, experts, cfg), atol=1e-4)
        assert routing.load[5] == 40


@pytest.mark.parametrize("align", [1, 8])
def test_dispatch_pads_each_group_and_combine_undoes_it(align, rng):
    experts = jnp.array(np.stack([rng.permutation(6)[:3] for _ in range(11)]), jnp.int32).at[:, 0].set(4)
    x = jnp.array(rng.normal(size=(11, 5)), jnp.float32)
    route, sizes = expert_parallel.plan(experts, 6, align)
    rows, = expert_parallel.dispatch(x, route)
    assert np.all(np.asarray(sizes) % align == 0)
    starts = np.cumsum(sizes) - sizes
    for e in range(6):
        held = sorted(route.source[starts[e]:starts[e] + sizes[e]].tolist())
        assert [s for s in held if s < 33] == [i for i in range(33) if experts.reshape(-1)[i] == e]
    weights = jnp.full((11, 3), 1 / 3, jnp.float32)
    np.testing.assert_allclose(expert_parallel.combine(rows, weights, route), x, atol=1e-6)
    # the hand-written gradients are those of the plain gathers
    flat = jnp.minimum(route.source, 32) // 3

    def plain(x, w):
        rows = jnp.where(route.source[:, None] < 33, x[flat], 0) ** 2
        return jnp.sum(jnp.sin(jnp.einsum("MKD,MK->MD", rows[route.position], w)))

    def ours(x, w):
        return jnp.sum(jnp.sin(expert_parallel.combine(expert_parallel.dispatch(x, route)[0] ** 2, w, route)))

    w = jnp.array(rng.random((11, 3)), jnp.float32)
    for got, want in zip(jax.grad(ours, (0, 1))(x, w), jax.grad(plain, (0, 1))(x, w), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("sizes", [(5, 0, 3, 9), (0, 0, 0, 17), (4, 4, 4, 4), (1, 0, 0, 0)], ids=str)
def test_block_products_equal_ragged_ones_for_any_groups(sizes, rng):
    group_sizes, n_rows = jnp.array(sizes, jnp.int32), 20
    rows, w = jnp.array(rng.normal(size=(n_rows, 6)), jnp.float32), jnp.array(rng.normal(size=(4, 7, 6)), jnp.float32)
    dy = jnp.array(rng.normal(size=(n_rows, 7)), jnp.float32)
    ours, oracle = block_matmul.KINDS["block"], block_matmul.KINDS["ragged"]
    np.testing.assert_allclose(ours.product(rows, w, group_sizes, 1), oracle.product(rows, w, group_sizes, 1), atol=1e-5)
    np.testing.assert_allclose(ours.input_gradient(dy, w, group_sizes, 1), oracle.input_gradient(dy, w, group_sizes, 1), atol=1e-5)
    ends = np.cumsum(sizes)
    want = np.stack([np.asarray(dy)[e - s:e].T @ np.asarray(rows)[e - s:e] for s, e in zip(sizes, ends, strict=True)])
    np.testing.assert_allclose(ours.weight_gradient(rows, dy, group_sizes, 1), want, atol=1e-5)


def test_cost_follows_the_rows_and_not_the_number_of_experts():
    # every block of rows is one matmul, so padded rows are the cost, whatever the routing
    def rows(n_experts):
        return block_matmul.padded_rows(16_384, n_experts, expert_parallel.row_alignment(16_384, n_experts))

    assert rows(64) / rows(8) < 1.1
    cfg = tiny(mtp_depth=0, n_layers=1, n_dense_layers=0)
    text = jax.jit(lambda p, t: forward(p, t, cfg, run=Execution(experts="block"))).lower(
        jax.eval_shape(lambda: init(cfg)), jax.ShapeDtypeStruct((2, 64), jnp.int32)).compile().as_text()
    align = expert_parallel.row_alignment(256, 8)
    assert f"f32[{align},40]" in text and "f32[8,256," not in text  # products of one block each, none of all experts on all rows


def test_rebalance_experts_gives_the_published_example():
    load = [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]
    physical, logical, count = expert_parallel.rebalance_experts(load, 16, 4, 2, 8)
    assert physical.tolist() == [[5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1], [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]]
    assert [np.flatnonzero(c == 2).tolist() for c in count] == [[1, 4, 5, 10], [1, 5, 6, 8]]
    for layer in range(2):
        for expert in range(12):
            places = [p for p in logical[layer, expert] if p >= 0]
            assert len(places) == count[layer, expert] and all(physical[layer, p] == expert for p in places)
    global_policy, _, _ = expert_parallel.rebalance_experts(load, 16, 3, 2, 8)
    assert global_policy[0].tolist() == [10, 6, 10, 7, 0, 2, 11, 4, 5, 9, 5, 4, 8, 3, 1, 1]
    with pytest.raises(ValueError, match="n_replicas"):
        expert_parallel.rebalance_experts(load, 8, 4, 2, 8)


def test_a_wrong_gate_makes_other_logits():
    """The oracle tests bite: bias, groups and scale each matter to the model's output."""
    cfg = tiny()
    params, tokens = init(cfg), random_tokens(cfg, (2, 8))
    bias = jnp.zeros((3, 8), jnp.float32).at[:, 3].set(5.0)
    plain, biased = forward(params, tokens, cfg)[0].logits, forward(params, tokens, cfg, router_bias=bias)[0].logits
    free = forward(params, tokens, tiny(ffn__moe__groups__kind="none"))[0].logits
    assert np.abs(plain - biased).max() > 1e-3 and np.abs(plain - free).max() > 1e-3
