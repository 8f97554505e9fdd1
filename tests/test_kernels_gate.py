"""The gate of a MoE layer on the CPU: the reference against numpy, its gradient, and the model's path to the kernel."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import tiny

from model import moe, sharding
from pallas_kernels.gate import kernel, reference, route, route_backward
from pallas_kernels.gate.reference import Rule

# experts and rule of the preset `700m`, V3, V2-Lite, V2, and of no power of two
GATES = {
    "700m": (32, Rule(4, "sigmoid", "normalised", 2.5, 4, 2, "top2_sum")),
    "v3": (256, Rule(8, "sigmoid", "normalised", 2.5, 8, 4, "top2_sum")),
    "v2_lite": (64, Rule(6, "softmax", "raw", 1.0)),
    "v2": (160, Rule(6, "softmax", "raw", 16.0, 8, 3, "max")),
    "odd": (96, Rule(16, "sigmoid", "raw", 1.0, 16, 16)),
}
SMALL = [Rule(3, "sigmoid", "normalised", 2.5, 4, 2, "top2_sum"), Rule(2, "softmax", "raw", 16.0, 3, 2, "max"),
         Rule(5, "softmax", "normalised", 1.0), Rule(12, "sigmoid", "raw", 1.0)]
B, T, E = 4, 5, 12


def by_hand(row, rule):
    """The K experts of one token's biased scores, none of them NaN."""
    if rule.limited:
        groups = row.reshape(rule.n_groups, -1)
        best = groups.max(1) if rule.group_score == "max" else np.sort(groups, 1)[:, -2:].sum(1, dtype=np.float32)
        kept = sorted(range(rule.n_groups), key=lambda g: (-best[g], g))[:rule.n_kept]
        row = np.where(np.isin(np.arange(row.size) // groups.shape[1], kept), row, -np.inf)
    return sorted(range(row.size), key=lambda i: (-row[i], i))[:rule.n_chosen]


@pytest.mark.parametrize("name", GATES)
def test_the_choice_is_the_best_of_the_kept_groups_in_order_also_among_equals_and_infinities(name, rng):
    n, rule = GATES[name]
    levels = rng.choice(np.array([-np.inf, -1.5, -0.25, 0, 0.25, 0.5], np.float32), (40, n))
    s = np.concatenate([levels, np.full((1, n), 0.5), np.full((1, n), -np.inf), rng.normal(size=(40, n))]).astype(np.float32)
    for bias in (None, rng.integers(-3, 3, n).astype(np.float32) / 8):
        got = reference.choose(jnp.array(s), None if bias is None else jnp.array(bias), rule)
        assert got.dtype == jnp.int32
        np.testing.assert_array_equal(got, [by_hand(row if bias is None else row + bias, rule) for row in s])


def test_nan_is_chosen_first_and_takes_no_others_place():
    s = jnp.array([[0.1, 0.9, jnp.nan, 0.8], [0.9, jnp.nan, 0.3, jnp.nan], [jnp.nan] * 4], jnp.float32)
    assert reference.choose(s, None, Rule(3, "sigmoid", "raw", 1.0)).tolist() == [[1, 3, 0], [0, 2, 3], [0, 3, 3]]
    limited = reference.choose(s, None, Rule(2, "sigmoid", "raw", 1.0, 2, 1, "top2_sum"))  # a group with NaN is kept beside one more
    assert limited.tolist() == [[1, 3], [0, 2], [0, 3]]


def operands(rng, dtype):
    logits = jnp.asarray(rng.normal(size=(B, T, E)) * 2, dtype)
    return logits, jnp.asarray(rng.normal(size=E) / 4, dtype), jnp.asarray(rng.random((B, T)) < 0.7)


@pytest.mark.parametrize("rule", SMALL, ids=str)
def test_weights_and_sums_are_their_formulas_and_the_gradient_that_of_autodiff(rng, rule):
    with jax.enable_x64(True):
        logits, bias, valid = operands(rng, "float64")
        experts, weights, sums = route(logits, bias, valid, rule)
        x = np.asarray(logits)
        s = 1 / (1 + np.exp(-x)) if rule.score == "sigmoid" else np.exp(x) / np.exp(x).sum(-1, keepdims=True)
        chosen = np.take_along_axis(s, np.asarray(experts), -1)
        divisor = chosen.sum(-1, keepdims=True) if rule.weights == "normalised" else 1
        np.testing.assert_allclose(weights, chosen / divisor * rule.scale, rtol=1e-12)
        for b in range(B):
            mine = np.asarray(valid[b])
            hits = np.argsort(-s[b], axis=-1)[:, :rule.n_chosen]
            for got, which in ((sums[b, 0], np.asarray(experts[b])), (sums[b, 1], hits)):
                np.testing.assert_array_equal(got, np.bincount(which[mine].ravel(), minlength=E))
            np.testing.assert_allclose(sums[b, 2], (s[b] / s[b].sum(-1, keepdims=True))[mine].sum(0), rtol=1e-12)
        g = jnp.asarray(rng.normal(size=weights.shape)), jnp.asarray(rng.normal(size=sums.shape))
        want, = jax.vjp(lambda x: reference.route(x, None, valid, rule, experts)[1:], logits)[1](g)
        np.testing.assert_allclose(route_backward(logits, experts, valid, g[0], g[1][:, 2], rule), want, rtol=1e-9, atol=1e-12)


def test_wrong_operands_raise_one_line():
    x, valid, bias, rule = jnp.zeros((2, 3, 8)), jnp.ones((2, 3), bool), jnp.zeros(8), Rule(2, "sigmoid", "raw", 1.0, 4, 2)
    experts, d_weights, d_shares = jnp.zeros((2, 3, 2), jnp.int32), jnp.zeros((2, 3, 2)), jnp.zeros((2, 8))
    for run in (lambda: route(x[0], bias, valid, rule), lambda: route(x.astype(jnp.int32), bias, valid, rule),
                lambda: route(x, bias[:4], valid, rule), lambda: route(x, bias, valid[:1], rule), lambda: route(x, bias, d_weights, rule),
                lambda: route(x, None, valid, Rule(5, "sigmoid", "raw", 1.0, 4, 2)), lambda: route(x[..., :6], None, valid, rule),
                lambda: route_backward(x, d_weights, valid, d_weights, d_shares, rule),
                lambda: route_backward(x, experts[..., :1], valid, d_weights, d_shares, rule),
                lambda: route_backward(x, experts, valid, d_weights, d_shares[:1], rule)):
        with pytest.raises(ValueError, match="must be") as error:
            run()
        assert "\n" not in str(error.value)
    three, many = Rule(2, "sigmoid", "raw", 1.0, 3, 2), Rule(17, "sigmoid", "raw", 1.0)
    for n, how, dtype in ((8, rule, "float64"), (12, three, "float32"), (1024, rule, "float32"), (32, many, "float32")):
        assert kernel.unfit(kernel.Job(False, 2, 3, n, how), dtype)
    assert kernel.unfit(kernel.Job(False, 2, 0, 8, SMALL[0]), "float32")


@pytest.mark.parametrize("name", GATES)
def test_every_token_has_its_lanes_and_no_lane_two_groups(name):
    n, rule = GATES[name]
    for t in (1, 31, 33, 1000, 2048):
        job = kernel.Job(False, 3, t, n, rule)
        assert not kernel.unfit(job, "float32")
        assert job.lanes * job.width == n and 32 % job.lanes == 0 and (n // job.groups) % job.width == 0
        assert job.blocks * job.turns * job.teams >= t > (job.blocks - 1) * job.turns * job.teams


def losses_and_gradients(rng, monkeypatch, loss, n_sequences=B):
    """Of a gate's loss: by the custom VJP that a Hopper card takes (with the reference in the kernel's place), in the plain form; and how
    often the kernel's backward would have been called."""
    rule = SMALL[0]
    logits = jnp.asarray(rng.normal(size=(n_sequences, T, E)), jnp.float32)
    bias, valid = jnp.asarray(rng.normal(size=E) / 4, jnp.float32), jnp.asarray(rng.random((n_sequences, T)) < 0.7)

    def run(logits, bias):
        return loss(logits, bias, valid, rule)

    want, calls = jax.jit(jax.value_and_grad(run, (0, 1)))(logits, bias), []
    monkeypatch.setattr(moe.gate_kernel, "takes_kernel", lambda logits, rule: True)
    monkeypatch.setattr(moe.gate_kernel, "route_backward", lambda *a, **k: calls.append(a[0].shape) or route_backward(*a, **k))
    got = jax.jit(lambda *a: jax.value_and_grad(run, (0, 1))(*a))(logits, bias)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=2e-5, atol=2e-6)
    return calls


def gate_loss(logits, bias, valid, rule):
    routed = moe.choose(jax.lax.stop_gradient(logits), bias, valid, rule)
    weights, sums = moe.weights_and_sums(logits, valid, routed, rule)
    return jnp.sum(jnp.sin(weights) * (1 + routed.experts.astype(jnp.float32))) + jnp.sum(sums[:, 0] * jnp.cos(sums[:, 2]) * sums[:, 1])


def test_the_models_path_to_the_kernel_is_the_plain_one(rng, monkeypatch):
    assert losses_and_gradients(rng, monkeypatch, gate_loss) == [(B, T, E)]


@pytest.mark.parametrize("n_sequences, calls", [(8, [(2, T, E)]), (6, [])])  # 6 sequences do not divide over 4 shards: the plain form
def test_each_data_shard_routes_its_sequences(rng, monkeypatch, n_sequences, calls):
    with jax.set_mesh(sharding.make_mesh(dict(pipe=1, node=1, expert=2, fsdp=2, tensor=2))):
        assert losses_and_gradients(rng, monkeypatch, gate_loss, n_sequences) == calls


def test_inside_a_shard_map_of_somebody_else_sequences_are_local(rng, monkeypatch):
    mesh = sharding.make_mesh(dict(pipe=1, node=1, expert=1, fsdp=8, tensor=1))

    def loss(logits, bias, valid, rule):
        rows = jax.P(sharding.DATA_AXES)
        total = lambda *a: jax.lax.psum(gate_loss(*a, rule), sharding.DATA_AXES)  # noqa: E731
        return jax.shard_map(total, mesh=mesh, in_specs=(rows, jax.P(), rows), out_specs=jax.P())(logits, bias, valid)

    assert losses_and_gradients(rng, monkeypatch, loss, 8) == [(1, T, E)]


def test_given_experts_are_weighted_and_counted_by_the_plain_form(rng, monkeypatch):
    monkeypatch.setattr(moe.gate_kernel, "takes_kernel", lambda logits, rule: True)
    logits, bias, valid = operands(rng, "float32")
    given = jnp.asarray(rng.permuted(np.tile(np.arange(E), (B, T, 1)), axis=-1)[..., :3], jnp.int32)
    routed = moe.choose(logits, bias, valid, SMALL[0], given)
    weights, sums = moe.weights_and_sums(logits, valid, routed, SMALL[0])
    assert routed.weights is None
    np.testing.assert_array_equal(routed.experts, given)
    np.testing.assert_allclose(jnp.sum(weights, -1), 2.5, rtol=1e-6)
    np.testing.assert_array_equal(sums[:, 0].sum(0), np.bincount(np.asarray(given)[np.asarray(valid)].ravel(), minlength=E))


def test_the_config_gives_the_rule():
    m = tiny().moe
    assert m.rule == Rule(2, "sigmoid", "normalised", m.route_scale, m.groups.n_expert_groups, m.groups.n_limited_groups, "top2_sum")
    assert tiny(ffn__moe__groups__kind="none", ffn__moe__gate__kind="softmax").moe.rule == Rule(2, "softmax", "raw", m.route_scale)
