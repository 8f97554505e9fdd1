"""Cross entropy on the CPU: the reference against float64, the loss's gradient, and the loss's path to the kernel."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import sharding
from pallas_kernels.cross_entropy import kernel, log_probability_backward, log_sum_exp
from train import cross_entropy as losses

B, T, V = 8, 3, 40
CLOSE = {"float64": 1e-12, "float32": 2e-6, "bfloat16": 2**-8, "float16": 2**-11}  # relative: the rounding of the output
WIDE = {"float64": "float64"}  # of results that are not rounded to the logits' dtype; else float32


def arrays(rng, dtype, *shape):
    """(logits, targets, g): targets at both ends, a row that counts nothing."""
    logits, targets, g = rng.standard_normal((*shape, V)) * 4, rng.integers(0, V, shape), rng.standard_normal(shape)
    targets.flat[:2], g.flat[2] = (0, V - 1), 0
    return jnp.asarray(logits, dtype), jnp.asarray(targets, jnp.int32), jnp.asarray(g, WIDE.get(dtype, "float32"))


def plain(logits, targets):
    return jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]


@pytest.mark.parametrize("dtype", CLOSE)
def test_log_z_and_gradient_are_those_of_log_softmax_in_float64(rng, dtype):
    with jax.enable_x64(True):
        logits, targets, g = arrays(rng, dtype, 12)
        exact, wide = np.asarray(logits, np.float64), WIDE.get(dtype, "float32")
        log_z = log_sum_exp(logits)
        assert log_z.dtype == wide
        np.testing.assert_allclose(log_z, np.log(np.exp(exact).sum(-1)), rtol=CLOSE[wide])
        got = log_probability_backward(logits, targets, log_z, g)
        want = jax.vjp(lambda x: plain(x, targets), jnp.asarray(exact))[1](g.astype(jnp.float64))[0]
        assert got.dtype == dtype and not got[2].any()
        np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=CLOSE[dtype], atol=1e-14 if dtype == "float64" else 1e-6)


def test_infinite_huge_and_missing_logits_are_those_of_logsumexp_and_stay_in_their_row():
    huge = jnp.finfo(jnp.float32).max
    rows = jnp.stack([jnp.zeros(V).at[3].set(x) for x in (-jnp.inf, jnp.inf, jnp.nan, huge, -huge)]
                     + [jnp.full(V, x) for x in (-jnp.inf, huge, -huge)])
    log_z = log_sum_exp(rows)
    np.testing.assert_allclose(log_z, [np.log(V - 1), np.inf, np.nan, huge, np.log(V - 1), -np.inf, huge, -huge], rtol=1e-6)
    got = log_probability_backward(rows, jnp.full(len(rows), 3), log_z, jnp.ones(len(rows)))
    np.testing.assert_array_equal(np.isfinite(got).all(1), [True, False, False, True, True, False, True, True])
    outside = log_probability_backward(rows[:1], jnp.array([V]), log_z[:1], jnp.ones(1))
    assert not (outside > 0).any()


def test_wrong_operands_raise_one_line_and_what_does_not_fit_the_kernel_is_said():
    logits, rows = jnp.zeros((4, 8)), jnp.zeros(4)
    targets = jnp.zeros(4, jnp.int32)
    backward = functools.partial(log_probability_backward, logits)
    for run in (lambda: log_sum_exp(logits[:, :0]), lambda: log_sum_exp(logits.astype(jnp.int32)), lambda: backward(rows, rows, rows),
                lambda: backward(targets[:2], rows, rows), lambda: backward(targets, rows.astype(jnp.bfloat16), rows)):
        with pytest.raises(ValueError, match="must be") as error:
            run()
        assert "\n" not in str(error.value)
    for dtype, m, v in (("float64", 4, 16), ("bfloat16", 4, 12), ("float32", 4, 6), ("bfloat16", 0, 16)):
        assert kernel.unfit(kernel.Job(False, m, v, dtype))
    assert log_sum_exp(logits[:0]).shape == (0,)


@pytest.mark.parametrize("dtype", kernel.DTYPES)
def test_every_row_has_a_warp_every_byte_a_lane_and_all_turns_fit_into_shared_memory(dtype):
    for m in (1, 7, 131, 4096, 16384):
        for v in (8, 1000, 32768, 129280):
            job = kernel.Job(False, m, v, dtype)
            assert not kernel.unfit(job) and 1 <= job.pieces <= kernel.PIECES
            assert job.turns * job.pieces * kernel.SEGMENT >= job.row_bytes > (job.turns - 1) * job.pieces * kernel.SEGMENT
            assert job.rounds * kernel.WARPS * job.grid >= m > (job.rounds - 1) * kernel.WARPS * job.grid
            assert kernel.STAGES * job.pieces * kernel.THREADS * 16 < 226 * 1024


def test_token_logp_belongs_to_the_prediction_of_each_token(rng):
    logits, tokens = rng.normal(size=(3, 5, 7)), rng.integers(0, 7, (3, 5)).astype(np.int32)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = np.zeros((3, 5))
    for b in range(3):
        for t in range(1, 5):
            expected[b, t] = logp[b, t - 1, tokens[b, t]]
    np.testing.assert_allclose(losses.token_logp(jnp.asarray(logits, jnp.float32), tokens), expected, atol=1e-5)
    low = losses.token_logp(jnp.asarray(logits, jnp.bfloat16), tokens)
    assert low.dtype == jnp.float32
    np.testing.assert_allclose(low, expected, atol=0.05)


def losses_and_gradients(rng, monkeypatch, mesh, batch=B):
    """Of a weighted log-probability by the path that a Hopper card takes (with the reference in the kernel's place) and in the plain form;
    and the shapes that the kernel would have been called with."""
    logits, targets, g = arrays(rng, "float32", batch, T)
    want = jax.value_and_grad(lambda x: jnp.sum(g * plain(x, targets)))(logits)
    calls = []

    def seen(op):
        def run(logits, *of_rows, **how):
            if not how:  # named the reference
                calls.append(logits.shape)
            return op(logits, *of_rows, **how)
        return run

    monkeypatch.setattr(losses.cross_entropy, "takes_kernel", lambda logits: True)
    for name, op in (("log_sum_exp", log_sum_exp), ("log_probability_backward", log_probability_backward)):
        monkeypatch.setattr(losses.cross_entropy, name, seen(op))
    with jax.set_mesh(mesh):
        got = jax.jit(jax.value_and_grad(lambda x, t, g: jnp.sum(g * losses.log_probability(x, t))))(logits, targets, g)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    return calls


SHAPE = dict(pipe=1, node=1, expert=2, fsdp=2, tensor=1)


@pytest.mark.parametrize("batch, shape, rows", [
    (8, SHAPE, 2), (6, SHAPE, 0),  # 6 sequences do not divide over 4 shards: the plain form
    (8, SHAPE | dict(tensor=2), 0),  # nor are the vocabulary's shards whole rows
    (6, dict.fromkeys(SHAPE, 1), 6)])
def test_each_data_shard_takes_its_rows_to_the_kernel_if_they_are_whole(rng, monkeypatch, batch, shape, rows):
    calls = losses_and_gradients(rng, monkeypatch, sharding.make_mesh(shape, jax.devices()[:int(np.prod(list(shape.values())))]), batch)
    assert calls == ([(rows, T, V)] * 2 if rows else [])


def test_inside_a_shard_map_of_somebody_else_rows_are_local(rng, monkeypatch):
    mesh = sharding.make_mesh(dict(pipe=1, node=1, expert=1, fsdp=8, tensor=1))
    logits, targets, g = arrays(rng, "float32", B, T)
    rows, want = jax.P(sharding.DATA_AXES), jax.grad(lambda x: jnp.sum(g * plain(x, targets)))(logits)
    monkeypatch.setattr(losses.cross_entropy, "takes_kernel", lambda logits: True)

    def loss(logits, targets, g):
        def local(logits, targets, g):
            return jax.lax.psum(jnp.sum(g * losses.log_probability(logits, targets)), sharding.DATA_AXES)

        return jax.shard_map(local, mesh=mesh, in_specs=(rows, rows, rows), out_specs=jax.P())(logits, targets, g)

    np.testing.assert_allclose(jax.jit(jax.grad(loss))(logits, targets, g), want, atol=1e-5)
