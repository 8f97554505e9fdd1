"""Rows between tokens and experts on the CPU: the reference against numpy, what padding and NaN do, and the model's gradients."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import expert_parallel
from pallas_kernels.rows import gather, gather_sum, weighted_backward
from pallas_kernels.rows.kernel import FLIGHT, SEGMENT, Job, unfit

M, K, E, D = 24, 3, 6, 20


@pytest.fixture(scope="module")
def routed():
    """(experts, Route, rows P, token of each row); expert 6 is one of no group here."""
    experts = np.argsort(np.random.default_rng(1).random((M, E + 1)), axis=1)[:, :K].astype(np.int32)
    route, _ = jax.jit(expert_parallel.plan, static_argnums=(1, 2))(experts, E, 8)
    return experts, route, route.source.shape[0], route.source // K


def rows_of(x, index):
    """Rows of float64 x at index, zeros where it is out of range."""
    padded = np.vstack([np.asarray(x, np.float64), np.zeros((1, x.shape[1]))])
    return padded[np.where((index >= 0) & (index < len(x)), index, len(x))]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reference_is_numpy_in_float64(rng, dtype):
    x, rows, g = (jnp.asarray(rng.standard_normal(s), dtype) for s in ((M, D), (40, D), (M, D)))
    source, position = (jnp.asarray(rng.integers(-5, n + 5, s), jnp.int32) for n, s in ((M, (40,)), (40, (M, K))))
    weights, of_row = jnp.asarray(rng.standard_normal((M, K)), jnp.float32), jnp.asarray(rng.standard_normal(40), jnp.float32)
    close = dict(rtol=8e-3 if dtype == "bfloat16" else 1e-5, atol=1e-5)

    def same(got, want, dtype=dtype):
        assert got.dtype == dtype
        np.testing.assert_allclose(np.asarray(got, np.float64), want, **close)

    np.testing.assert_array_equal(np.asarray(gather(x, source), np.float64), rows_of(x, source))
    picked = rows_of(rows, position)
    same(gather_sum(rows, position), picked.sum(1))
    same(gather_sum(rows, position, weights), (picked * np.asarray(weights)[..., None]).sum(1))
    beside = tuple(jnp.asarray(rng.standard_normal((M, D)), dtype) for _ in range(2))
    for n in (1, 2):
        added = sum(np.asarray(a, np.float64) for a in beside[:n])
        same(gather_sum(rows, position, addends=beside[:n]), picked.sum(1) + added)
        same(gather_sum(rows, position, weights, beside[:n]), (picked * np.asarray(weights)[..., None]).sum(1) + added)
    d_rows, dots = weighted_backward(g, rows, source, of_row)
    same(d_rows, rows_of(g, source) * np.asarray(of_row)[:, None])
    same(dots, (rows_of(g, source) * np.asarray(rows, np.float64)).sum(1), "float32")


@pytest.mark.parametrize("weighted", [False, True])
def test_addends_join_before_the_one_rounding(weighted):
    """1 + 2^-8 + 2^-8 is a bfloat16 step above 1, and each part of it alone rounds to 1."""
    one, small = jnp.ones((1, D), jnp.bfloat16), jnp.full((1, D), 2.0**-8, jnp.bfloat16)
    weights = jnp.ones((1, 1), jnp.float32) if weighted else None
    total = gather_sum(small, jnp.zeros((1, 1), jnp.int32), weights, (one, small))
    np.testing.assert_array_equal(total, jnp.full((1, D), 1 + 2.0**-7, jnp.bfloat16))


def test_a_token_comes_back_once_for_each_of_its_groups(rng, routed):
    experts, route, _, token = routed
    x = jnp.asarray(rng.standard_normal((M, D)), jnp.float32)
    rows = gather(x, token)
    np.testing.assert_array_equal(rows[np.asarray(token) == M], 0)
    times = np.sum(experts < E, axis=1)[:, None]
    np.testing.assert_allclose(gather_sum(rows, route.position), np.asarray(x) * times, rtol=1e-6)


def test_nothing_but_what_an_index_names_is_looked_at(rng, routed):
    _, route, P, token = routed
    x = jnp.asarray(rng.standard_normal((M, D)), jnp.float32)
    padding = np.asarray(token) == M
    rows = gather(x, token).at[padding].set(jnp.nan)
    weights = jnp.ones(P).at[padding].set(jnp.nan)
    assert jnp.isfinite(gather_sum(rows, route.position)).all()
    for position in (None, route.position):
        d_rows, dots = weighted_backward(x, rows, token, weights, position)
        assert jnp.isfinite(d_rows).all() and jnp.isfinite(dots).all() and not d_rows[padding].any()
    nothing = jnp.full((2, 3), P, jnp.int32).at[0].set(-1)
    assert not gather_sum(jnp.full((P, D), jnp.nan), nothing, jnp.ones((2, 3))).any()
    assert not gather(jnp.full((M, D), 7, jnp.uint8), jnp.array([-1, M, 2**31 - 1], jnp.int32)).any()


def test_dots_come_by_row_or_by_choice(rng, routed):
    _, route, P, token = routed
    g, rows = (jnp.asarray(rng.standard_normal((n, D)), jnp.float32) for n in (M, P))
    by_row, by_choice = (weighted_backward(g, rows, token, jnp.ones(P), p)[1] for p in (None, route.position))
    np.testing.assert_allclose(by_choice, np.append(by_row, 0)[np.asarray(route.position)], rtol=1e-5, atol=1e-6)


def test_gradients_of_dispatch_and_combine_are_those_of_a_plain_formula(rng, routed):
    experts, route, *_ = routed
    with jax.enable_x64(True):
        x, scale, weights = (rng.standard_normal(s) for s in ((M, D), (E + 1, D), (M, K)))
        scale[E] = 0.0
        row_scale = scale[np.append(experts, E)[np.asarray(route.source)]]

        def ours(x, weights, stream):
            rows, a, b = expert_parallel.dispatch(x, route, 2)
            return jnp.sum(jnp.cos(expert_parallel.combine(jnp.sin(rows) * row_scale, weights * a[:, :1], route, (b ** 2, stream))))

        def plain(x, weights, stream):
            return jnp.sum(jnp.cos(jnp.einsum("md,mkd,mk->md", jnp.sin(x), scale[experts], weights * x[:, :1]) + x ** 2 + stream))

        stream = rng.standard_normal((M, D))
        got, want = (jax.jit(jax.grad(f, (0, 1, 2)))(x, weights, stream) for f in (ours, plain))
        for g, w in zip(got, want, strict=True):
            np.testing.assert_allclose(g, w, rtol=1e-12, atol=1e-12)


def test_wrong_operands_raise():
    x, source = jnp.zeros((4, 8)), jnp.zeros(3, jnp.int32)
    for run in (lambda: gather(x, source.astype(jnp.uint32)), lambda: gather(x[0], source),
                lambda: gather_sum(x, source), lambda: gather_sum(x, source[None], jnp.ones(3)),
                lambda: gather_sum(x, source[None], addends=(x,)), lambda: gather_sum(x, source[None], addends=(x[:1],) * 3),
                lambda: gather_sum(x, source[None], addends=(x[:1].astype(jnp.bfloat16),)),
                lambda: weighted_backward(x, x, source, jnp.ones(3)), lambda: weighted_backward(x, x[:3], source, source)):
        with pytest.raises(ValueError, match="must be"):
            run()
    assert "16" in unfit(Job("gather", 3, 4, 12, "uint8")) and "float64" in unfit(Job("gather", 3, 4, 12, "float64"))
    assert "float64" in unfit(Job("gather_sum", 3, 4, 16, "float32", 2, "float64"))


@pytest.mark.parametrize("op", ["gather", "gather_sum", "weighted_backward"])
def test_every_byte_of_every_row_has_a_warp_with_few_loads_under_way(op):
    for d in (8, 128, 136, 1000, 1024, 7168):
        job = Job(op, 1001, 8192, d, "bfloat16", 4)
        assert job.segments * SEGMENT >= job.row_bytes > (job.segments - 1) * SEGMENT
        assert job.tasks * job.rows >= job.written * job.segments and job.tasks % job.segments == 0
        assert 1 <= job.rows * (2 if op == "weighted_backward" else 1) <= FLIGHT
