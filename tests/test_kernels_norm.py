"""RMSNorm of the residual stream on the CPU: the reference against float64, its gradients, and the model's path to the kernel."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import norm as model_norm
from model import sharding
from pallas_kernels.norm import kernel, rms_norm, rms_norm_backward

M, D, EPS = 12, 40, 1e-6
CLOSE = {"float64": 1e-12, "float32": 2e-6, "bfloat16": 2**-8}  # of the largest value: the rounding of the output


def close(got, want, dtype):
    assert got.dtype == dtype
    want = np.asarray(want, np.float64)
    np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=CLOSE[str(dtype)] * np.abs(want).max(), rtol=0)


def plain(x, scale):
    return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + EPS) * scale[None]


def arrays(rng, dtype, n, *shape):
    return [jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(n)]


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("added", [True, False])
def test_forward_and_backward_are_those_of_a_plain_float64_norm(rng, dtype, added):
    with jax.enable_x64(True):
        x, delta, g, d_total = arrays(rng, dtype, 4, M, D)
        x, g = x.at[3].set(0), g.at[5].multiply(100)
        wide = jnp.float64 if dtype == "float64" else jnp.float32
        scale = jnp.asarray(rng.standard_normal(D), wide)
        total, normed = rms_norm(x, scale, EPS, delta if added else None)
        np.testing.assert_array_equal(total, x + delta if added else x)
        exact = [v.astype(jnp.float64) for v in (total, scale, g, d_total)]
        close(normed, plain(*exact[:2]), dtype)
        dx, d_scale = rms_norm_backward(total, scale, g, d_total if added else None, EPS)
        want, want_scale = jax.vjp(plain, *exact[:2])[1](exact[2])
        close(dx, want + exact[3] if added else want, dtype)
        close(d_scale, want_scale, "float64" if dtype == "float64" else "float32")


def test_a_row_of_zeros_is_zero_and_nan_stays_in_its_row(rng):
    x, g = arrays(rng, "bfloat16", 2, M, D)
    x, scale = x.at[2, 7].set(jnp.nan).at[4].set(0), jnp.ones(D)
    _, normed = rms_norm(x, scale, EPS)
    dx, _ = rms_norm_backward(x, scale, g, g, EPS)
    for out in (normed, dx):
        np.testing.assert_array_equal(np.isfinite(np.asarray(out, np.float32)).all(1), np.arange(M) != 2)
    assert not normed[4].any()
    empty = rms_norm_backward(x[:0], scale, g[:0], None, EPS)
    assert empty[0].shape == (0, D) and not empty[1].any()


def test_wrong_operands_raise_one_line():
    x, scale = jnp.zeros((4, 8)), jnp.zeros(8)
    for run in (lambda: rms_norm(x[0], scale, EPS), lambda: rms_norm(x, scale[:4], EPS), lambda: rms_norm(x, scale, EPS, x[:2]),
                lambda: rms_norm(x.astype(jnp.int32), scale, EPS), lambda: rms_norm(x, scale, EPS, x.astype(jnp.bfloat16)),
                lambda: rms_norm_backward(x, scale, x[:, :4], None, EPS), lambda: rms_norm_backward(x, scale, x, x[:2], EPS)):
        with pytest.raises(ValueError, match="must be") as error:
            run()
        assert "\n" not in str(error.value)
    for dtype, d, scale in (("float64", 16, "float64"), ("bfloat16", 12, "float32"), ("bfloat16", 16392, "float32"),
                            ("float32", 8, "bfloat16"), ("float32", 0, "float32")):
        assert kernel.unfit(kernel.Job(False, 4, d, dtype, EPS, True), scale)


@pytest.mark.parametrize("dtype", kernel.DTYPES)
def test_every_byte_of_every_row_has_a_lane_and_all_turns_fit_into_shared_memory(dtype):
    for d in (8, 256, 512, 1000, 1024, 1032, 1536, 4104, 7168, 8192):
        for backward, added in ((False, False), (False, True), (True, False), (True, True)):
            job = kernel.Job(backward, 1003, d, dtype, EPS, added)
            assert not kernel.unfit(job, "float32")
            assert kernel.WARPS % job.team == 0 and d <= job.columns and (job.rows == 1 or job.team == 1)
            assert 1 <= job.rows * job.pieces <= kernel.PIECES and 2 <= job.stages
            assert job.steps * job.rows * (kernel.WARPS // job.team) >= job.M > (job.steps - 1) * job.rows * (kernel.WARPS // job.team)
            assert kernel.COPIES * kernel.PIECES * kernel.THREADS * 16 + 4 * job.columns < 226 * 1024


def two_norms(x, delta, scales):
    x, first = model_norm.add_rms_norm(x, None, scales[0], EPS)
    total, second = model_norm.add_rms_norm(x, jnp.sin(first) + delta, scales[1], EPS)
    return jnp.sum(jnp.cos(total) * second)


def losses_and_gradients(rng, monkeypatch, dtype, loss=two_norms, batch=8):
    """Of two norms of a residual stream: by the custom VJP that a Hopper card takes (with the reference in the kernel's place), in the
    plain form; and how often the kernel's backward would have been called."""
    x, delta = arrays(rng, dtype, 2, batch, 3, D)
    scales = jnp.asarray(rng.standard_normal((2, D)), dtype)
    want, calls = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(x, delta, scales), []
    monkeypatch.setattr(model_norm.norm, "takes_kernel", lambda x, scale: True)
    monkeypatch.setattr(model_norm.norm, "rms_norm_backward", lambda *a: calls.append(a[0].shape) or rms_norm_backward(*a))
    got = jax.jit(lambda *a: jax.value_and_grad(loss, (0, 1, 2))(*a))(x, delta, scales)
    return jax.tree.leaves(got), jax.tree.leaves(want), calls


def test_the_models_path_to_the_kernel_is_the_plain_one(rng, monkeypatch):
    with jax.enable_x64(True):
        got, want, calls = losses_and_gradients(rng, monkeypatch, "float64")
        assert calls == [(24, D)] * 2
        for g, w in zip(got, want, strict=True):
            close(g, w, "float64")


@pytest.mark.parametrize("batch, rows", [(8, [(6, D)] * 2), (6, [])])  # 6 sequences do not divide over 4 shards: the plain form
def test_each_data_shard_norms_its_rows_and_gradients_of_scales_are_added(rng, monkeypatch, batch, rows):
    with jax.set_mesh(sharding.make_mesh(dict(pipe=1, node=1, expert=2, fsdp=2, tensor=2))):
        got, want, calls = losses_and_gradients(rng, monkeypatch, "float32", batch=batch)
    assert calls == rows
    for g, w in zip(got, want, strict=True):
        close(g, w, "float32")


def test_inside_a_shard_map_of_somebody_else_rows_are_local(rng, monkeypatch):
    mesh = sharding.make_mesh(dict(pipe=1, node=1, expert=1, fsdp=8, tensor=1))

    def loss(x, delta, scales):
        rows = jax.P(sharding.DATA_AXES)
        total = lambda *a: jax.lax.psum(two_norms(*a), sharding.DATA_AXES)  # noqa: E731
        return jax.shard_map(total, mesh=mesh, in_specs=(rows, rows, jax.P()), out_specs=jax.P())(x, delta, scales)

    got, want, calls = losses_and_gradients(rng, monkeypatch, "float32", loss)
    assert calls == [(3, D)] * 2
    for g, w in zip(got, want, strict=True):
        close(g, w, "float32")
