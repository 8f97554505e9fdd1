"""Grouped products, bf16 and FP8: ragged sizes known only on the device, against a loop over the groups in float64."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import grouped_fp8_matmul, grouped_matmul, quantize
from tests.test_kernels_fp8_matmul import dequantised, difference, norm_error

# (rows, sizes): even, empty groups, one row, a tail of no group, all in one group
SIZES = ((64, (16, 16, 32)), (70, (0, 33, 0, 37, 0)), (20, (1, 0, 12)), (40, (40, 0)), (9, (0, 0, 0)))


def loop(rows, w, sizes):
    out, start = np.zeros((rows.shape[0], w.shape[1])), 0
    for g, size in enumerate(sizes):
        out[start:start + size] = rows[start:start + size] @ w[g].T
        start += size
    return out


def loop_weight_gradient(dy, x, sizes):
    ends = np.cumsum(sizes)
    return np.stack([dy[e - s:e].T @ x[e - s:e] for s, e in zip(sizes, ends, strict=True)])


@pytest.mark.parametrize("m, sizes", SIZES)
def test_bf16_forward_dgrad_and_weight_gradient_are_those_of_each_group(rng, m, sizes):
    sizes_ = jnp.asarray(sizes, jnp.int32)
    rows, w = (rng.standard_normal(s).astype(np.float32) for s in ((m, 24), (len(sizes), 40, 24)))
    want = loop(rows, w, sizes)
    np.testing.assert_allclose(jax.jit(grouped_matmul.matmul)(rows, w, sizes_), want, atol=1e-4)
    dy = rng.standard_normal((m, 40)).astype(np.float32)
    want = loop(dy, w.swapaxes(1, 2), sizes)
    np.testing.assert_allclose(grouped_matmul.dgrad(dy, w, sizes_), want, atol=1e-4)
    before = jnp.ones((len(sizes), 40, 24))
    want = loop_weight_gradient(dy, rows, sizes)
    np.testing.assert_allclose(grouped_matmul.weight_gradient(dy, rows, sizes_), want, atol=1e-4)
    np.testing.assert_allclose(grouped_matmul.weight_gradient(dy, rows, sizes_, accumulate=before), want + 1, atol=1e-4)


@pytest.mark.parametrize("f", [20, 64])
@pytest.mark.parametrize("m, sizes", SIZES)
def test_gate_and_up_with_their_swiglu_are_those_of_each_group(rng, m, sizes, f):
    rows, w = (rng.standard_normal(s).astype(np.float32) for s in ((m, 24), (len(sizes), 2, f, 24)))
    gate_up, hidden = jax.jit(grouped_matmul.matmul_swiglu)(rows, w, jnp.asarray(sizes, jnp.int32))
    want = loop(np.float64(rows), w.reshape(len(sizes), 2 * f, 24), sizes)
    np.testing.assert_allclose(gate_up, want, atol=1e-4)
    np.testing.assert_allclose(hidden, want[:, :f] / (1 + np.exp(-want[:, :f])) * want[:, f:], atol=1e-3)


def test_bf16_products_are_summed_in_float32(rng):
    rows, w = (jnp.asarray(rng.standard_normal(s), jnp.bfloat16) for s in ((64, 512), (2, 32, 512)))
    out = grouped_matmul.matmul(rows, w, jnp.array([40, 24], jnp.int32))
    assert out.dtype == jnp.bfloat16
    assert norm_error(out, loop(np.asarray(rows, np.float64), np.asarray(w, np.float64), (40, 24))) < 3e-3


@pytest.mark.parametrize("m, sizes", SIZES)
def test_fp8_grouped_and_masked_are_those_of_each_group(rng, m, sizes):
    G, sizes_ = len(sizes), jnp.asarray(sizes, jnp.int32)
    x, w = (rng.standard_normal(s).astype(np.float32) for s in ((m, 200), (G, 136, 200)))
    (a, sa), (b, sb) = quantize.quantize_tiles(x), quantize.quantize_tiles(w, (128, 128))
    want = loop(dequantised(a, sa, (1, 128)), dequantised(b, sb, (128, 128)), sizes)
    got = jax.jit(grouped_fp8_matmul.grouped_matmul)(a, sa, b, sb, sizes_)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=0.15, rtol=4e-3)
    if sum(sizes):
        assert norm_error(got, want) < 3e-3 and difference(got, loop(x, w, sizes)) < 1.5e-3
    q, scale = (jnp.tile(v[None], (G, 1, 1)) for v in (a, sa))
    got = np.asarray(grouped_fp8_matmul.masked_matmul(q, scale, b, sb, sizes_, out_dtype=jnp.float32))
    full = np.einsum("mk,gnk->gmn", dequantised(a, sa, (1, 128)), dequantised(b, sb, (128, 128)))
    for g, size in enumerate(sizes):
        np.testing.assert_allclose(got[g, :size], full[g, :size], atol=1e-3)
        assert not got[g, size:].any()


def test_fp8_weight_gradient_of_groups_of_whole_tiles_and_an_empty_one(rng):
    sizes = (128, 0, 256)
    dy, x = rng.standard_normal((512, 24)).astype(np.float32), rng.standard_normal((512, 40)).astype(np.float32)
    (dy_q, dy_s), (x_q, x_s) = (quantize.quantize_tiles(v, (128, 1)) for v in (dy, x))
    want = loop_weight_gradient(dequantised(dy_q, dy_s, (128, 1)), dequantised(x_q, x_s, (128, 1)), sizes)
    run = lambda **kw: grouped_fp8_matmul.weight_gradient(  # noqa: E731
        dy_q, dy_s, x_q, x_s, jnp.asarray(sizes, jnp.int32), **kw)
    got = run()
    assert norm_error(got, want) < 1e-6 and not got[1].any()
    assert difference(got, loop_weight_gradient(dy, x, sizes)) < 1e-3
    assert norm_error(run(accumulate=jnp.ones((3, 24, 40))), want + 1) < 1e-6


def test_sizes_of_another_type_are_refused():
    rows, w = jnp.ones((8, 4)), jnp.ones((2, 4, 4))
    for sizes in (jnp.ones(2), jnp.ones(3, jnp.int32)):
        with pytest.raises(ValueError, match="group_sizes"):
            grouped_matmul.matmul(rows, w, sizes)
    with pytest.raises(ValueError, match=r"w_pair \(2, 4, 4\): must be"):
        grouped_matmul.matmul_swiglu(rows, w, jnp.ones(2, jnp.int32))
    with pytest.raises(ValueError, match="must be one float dtype"):
        grouped_matmul.matmul(rows, w.astype(jnp.bfloat16), jnp.ones(2, jnp.int32))
