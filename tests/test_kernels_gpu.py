"""On one Hopper GPU: every kernel against float64, V3's shapes, bitwise repeats, promotion, layouts in the compiled HLO.

DEEPSEEK_JAX_TEST_GPU=1 python -m pytest -m gpu tests/test_kernels_gpu.py
"""
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import fp8_matmul, grouped_fp8_matmul, grouped_matmul, quantize
from pallas_kernels.cross_entropy import log_probability_backward, log_sum_exp
from pallas_kernels.gate import reference as gating
from pallas_kernels.gate import route, route_backward
from pallas_kernels.grouped_matmul import table, tiles
from pallas_kernels.latent_norm import latent_norm, latent_norm_backward
from pallas_kernels.norm import rms_norm, rms_norm_backward
from pallas_kernels.quantize import reference
from pallas_kernels.rows import gather, gather_sum, weighted_backward
from tests.test_kernels_fp8_matmul import accumulation_errors
from tests.test_kernels_gate import GATES

pytestmark = pytest.mark.gpu

# (N, K) of q_down + kv_down, q_up, kv_up, output, dense gate/up shard, expert down; and their dgrads
V3 = ((2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048))
kernel = functools.partial(jax.jit, static_argnames=("out_dtype", "promotion"))
quantise = jax.jit(reference.quantize_tiles, static_argnums=(1, 2, 3))


def random(seed, *shape, outliers=False):
    x = jax.random.normal(jax.random.key(seed), shape, jnp.float32)
    if outliers:
        hot = jax.random.bernoulli(jax.random.key(seed + 1), 1e-5, shape)
        x = jnp.where(hot, x * 1e4, x).at[..., 0, :].multiply(1e3).at[..., 1, :].set(0.0)
    return x


def errors(got, left, right, contract=((1,), (1,))):
    """(relative norm error, 1 - 2xy/(xx + yy)) against the float64 product."""
    with jax.enable_x64(True):
        @jax.jit
        def both(got, left, right):
            want = jax.lax.dot_general(left.astype(jnp.float64), right.astype(jnp.float64), (contract, ((), ())))
            x = got.astype(jnp.float64)
            return (jnp.linalg.norm(x - want) / jnp.linalg.norm(want),
                    1 - 2 * jnp.sum(x * want) / jnp.sum(x * x + want * want))
        return tuple(float(e) for e in both(got, left, right))


def check(run, left, right, dequantised, contract=((1,), (1,)), tolerance=3e-3):
    got = run()
    assert bool(jnp.all(jnp.isfinite(got)))
    assert bool(jnp.array_equal(got, run())), "not the same bits twice"
    assert errors(got, *dequantised, contract)[0] < tolerance
    assert errors(got, left, right, contract)[1] < 1e-3


def same(got, want, tolerance=0.0):
    """Bit for bit, or but for a share of the elements (where the fused activation rounds otherwise)."""
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape and g.dtype == w.dtype
        g, w = (np.asarray(v.astype(jnp.float32)) for v in (g, w))
        unlike = (g != w) & ~(np.isnan(g) & np.isnan(w))
        assert unlike.mean() <= tolerance, (unlike.sum(), np.argwhere(unlike)[:3], g[unlike][:3], w[unlike][:3])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("shape", [(4096, 7168), (4096, 2112), (1, 576), (130, 200), (2, 144, 384)])
def test_quantisation_is_the_reference_bit_for_bit(shape, power_of_two, dtype):
    x = random(0, *shape, outliers=shape[-2] > 1).astype(dtype)
    x = x.at[..., -1, 3].set(jnp.nan) if shape[-2] == 130 else x
    for tile, format_ in (((1, 128), "e4m3"), ((1, 128), "e5m6"), ((128, 128), "e4m3"), ((128, 1), "e4m3")):
        if tile == (128, 1) and shape[-2] % 16:
            continue
        got = jax.jit(functools.partial(quantize.quantize_tiles, implementation="kernel"), static_argnums=(1, 2, 3))
        same(got(x, tile, format_, power_of_two), quantise(x, tile, format_, power_of_two))
    if shape[-2] % 16 == 0:
        (rows, columns) = quantize.quantize_both(x, power_of_two, implementation="kernel")
        same((*rows, *columns), (*quantise(x, (1, 128), "e4m3", power_of_two),
                                 *quantise(x, (128, 1), "e4m3", power_of_two)))
        q, copy, scale = quantize.quantize_weight(x, power_of_two, implementation="kernel")
        want = quantise(x, (128, 128), "e4m3", power_of_two)
        same((q, copy, scale), (want[0], want[0].mT, want[1]))


def test_fused_forms_are_their_parts():
    h = random(0, 4096, 4096).astype(jnp.bfloat16)
    for tile in ((1, 128), (128, 1)):
        want = jax.jit(functools.partial(quantize.swiglu_quantize, tile=tile, implementation="reference"))
        got = jax.jit(functools.partial(quantize.swiglu_quantize, tile=tile, implementation="kernel"))
        q, scale = got(h)
        np.testing.assert_allclose(scale, want(h)[1], rtol=1e-5)
        same((q,), want(h)[:1], 1e-3)
        cached = quantise(h, (1, 128), "e4m3", False)
        np.testing.assert_allclose(got(*cached)[1], want(*cached)[1], rtol=1e-5)
        same(got(*cached)[:1], want(*cached)[:1], 1e-3)
    for format_, power in (("e4m3", False), ("e5m6", True)):
        cached = quantise(h, (1, 128), format_, power)
        for tile in ((128, 1), (1, 128)):
            got, want = (jax.jit(functools.partial(quantize.requantize_tiles, tile=tile, implementation=i))(*cached)
                         for i in ("kernel", "reference"))
            same(got, want)


@pytest.mark.parametrize("shape", [(2, 144, 384), (272, 1040), (4096, 4096)])
def test_weighted_rows_of_a_fused_swiglu_are_the_reference(shape):
    h, weights = random(0, *shape).astype(jnp.bfloat16), random(1, *shape[:-1]).at[..., 3].set(0)
    cached = quantise(h, (1, 128), "e4m3", False)
    for source in (h,), cached:
        if len(source) == 2 and shape[-1] % 256:
            continue
        for tile in ((1, 128), (128, 1)):
            got, again, want = (jax.jit(functools.partial(quantize.swiglu_quantize, tile=tile, weights=weights, implementation=i))(*source)
                                for i in ("kernel", "kernel", "reference"))
            same(got, again)
            np.testing.assert_allclose(got[1], want[1], rtol=1e-5)
            same(got[:1], want[:1], 1e-3)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(3, 144, 128), (272, 512), (4096, 2048), (16, 384)])
def test_gradient_of_a_swiglu_is_the_reference_within_a_step_and_the_same_bits_twice(shape, weighted):
    d, h = random(0, *shape).astype(jnp.bfloat16), (4 * random(1, *shape[:-1], 2 * shape[-1])).astype(jnp.bfloat16)
    d, h = d.at[..., 1, :].set(0), h.at[..., 2, 5].set(-200).at[..., 3, 5].set(200)
    weights = random(2, *shape[:-1]).at[..., 4].set(0) if weighted else None
    got, again, want = (jax.jit(functools.partial(quantize.swiglu_gradient, implementation=i))(d, h, weights)
                        for i in ("kernel", "kernel", "reference"))
    same(jax.tree.leaves(got), jax.tree.leaves(again))
    for tile, (q, scale), (want_q, want_scale) in zip(((1, 128), (128, 1)), got, want, strict=False):
        np.testing.assert_allclose(scale, want_scale, rtol=1e-5)
        same((q,), (want_q,), 1e-3)
        back, want_back = (quantize.dequantize_tiles(*pair, tile) for pair in ((q, scale), (want_q, want_scale)))
        step = jnp.maximum(jnp.abs(want_back) / 8, reference.spread(want_scale, tile, q.shape[-2:]) * 2.0**-9)
        assert bool((jnp.abs(back - want_back) <= 1.001 * step).all())
    assert (got[2] is None) != weighted
    if weighted:
        assert float(jnp.linalg.norm(got[2] - want[2]) / jnp.linalg.norm(want[2])) < 1e-5


@pytest.mark.parametrize("shape", [(2, 144, 384), (3, 16, 48), (2064, 576), (16, 56), (4096, 7168)])
def test_cached_tiles_are_turned_bit_for_bit_at_any_size_and_beside_other_batches(shape):
    for format_, power in (("e4m3", False), ("e5m6", True)):
        cached = quantise(random(0, *shape, outliers=True).at[..., -1, 3].set(jnp.nan), (1, 128), format_, power)
        got, want = (jax.jit(functools.partial(quantize.requantize_tiles, implementation=i))(*cached)
                     for i in ("kernel", "reference"))
        same(got, want)


def test_no_transpose_is_left_between_quantisation_and_products():
    @jax.jit
    def linear(x, dy, w, w_copy, w_scale):
        a, b = quantize.quantize_tiles(x), quantize.quantize_both(dy)
        columns = quantize.requantize_tiles(*a)
        return (fp8_matmul.matmul(*a, w, w_scale), fp8_matmul.matmul(*b[0], w_copy, w_scale.T),
                fp8_matmul.weight_gradient(*b[1], *columns))

    x, dy, w = random(0, 512, 1024), random(2, 512, 768), random(4, 768, 1024)
    operands = quantize.quantize_weight(w)
    text = linear.lower(x, dy, *operands).compile().as_text()
    copies = re.findall(r"(\w+)\[([\d,]+)\]\S* (?:transpose|fusion)\(", text)
    # nothing is left but the block scales of the weight, 6 x 8
    assert text.count("custom_call_target") == 6 and all(shape in ("8,6", "6,8") for _, shape in copies), copies


def rows_and_blocks(x, w):
    a, b = quantise(x, (1, 128), "e4m3", False), quantise(w, (128, 128), "e4m3", False)
    return (*a, *b), (quantize.dequantize_tiles(*a), quantize.dequantize_tiles(*b, (128, 128)))


@pytest.mark.parametrize("m", [1, 64, 128, 4096])
@pytest.mark.parametrize("n, k", V3 + ((7168, 2112), (1536, 24576), (512, 32768)))
def test_dense_forward_and_dgrad_at_v3_shapes(m, n, k):
    x, w = random(0, m, k), random(2, n, k)
    operands, dequantised = rows_and_blocks(x, w)
    run = jax.jit(functools.partial(fp8_matmul.matmul, implementation="kernel"))
    check(lambda: run(*operands), x, w, dequantised)


@pytest.mark.parametrize("m, n, k", [(1, 1, 1), (3, 5, 7), (65, 200, 300), (129, 1000, 130), (4096, 24, 8), (7, 4, 5000)])
@pytest.mark.parametrize("b_tile", [(128, 128), (1, 128)])
def test_dense_at_any_size_with_outliers(m, n, k, b_tile):
    x, w = random(0, m, k, outliers=m > 4), random(2, n, k)
    a, b = quantise(x, (1, 128), "e4m3", False), quantise(w, b_tile, "e4m3", False)
    for dtype, tolerance in ((jnp.float32, 1e-3), (jnp.bfloat16, 4e-3)):
        got = fp8_matmul.matmul(*a, *b, out_dtype=dtype, implementation="kernel")
        assert got.shape == (m, n)
        assert errors(got, quantize.dequantize_tiles(*a), quantize.dequantize_tiles(*b, b_tile))[0] < tolerance


@pytest.mark.parametrize("n, k", V3)
def test_dense_weight_gradient_adds_to_what_is_there(n, k):
    dy, x = random(0, 4096, n), random(2, 4096, k)
    dy_q, x_q = (quantise(v, (128, 1), "e4m3", False) for v in (dy, x))
    dequantised = [quantize.dequantize_tiles(*q, (128, 1)) for q in (dy_q, x_q)]
    run = jax.jit(functools.partial(fp8_matmul.weight_gradient, implementation="kernel"))
    check(lambda: run(*dy_q, *x_q), dy, x, dequantised, ((0,), (0,)), 3e-4)
    got = run(*dy_q, *x_q, accumulate=jnp.ones((n, k)))
    assert float(jnp.abs(got - 1 - run(*dy_q, *x_q)).max()) < 1e-2


def test_without_promotion_the_error_at_k_4096_is_that_of_14_bits():
    run = functools.partial(fp8_matmul.matmul, out_dtype=jnp.float32, implementation="kernel")
    promoted, kept = accumulation_errors(run, np.random.default_rng(0), 1024)
    print("max error / rms: promoted", promoted, "never promoted", kept)
    assert 0.003 < kept < 0.04 and promoted < kept / 5


def test_non_finite_values_reach_their_row_only():
    x = random(0, 256, 512).at[3, 7].set(jnp.nan).at[200, 300].set(jnp.inf)
    operands, _ = rows_and_blocks(x, random(2, 384, 512))
    finite = jnp.isfinite(fp8_matmul.matmul(*operands, implementation="kernel")).all(1)
    assert sorted(int(i) for i in jnp.flatnonzero(~finite)) == [3, 200]


SIZES = ((8192, (2048, 0, 1920, 128, 3968)), (1024, (1, 300, 0, 77, 130)), (2048, (2048, 0)), (512, (0, 0, 0)))


def groups(sizes, m):
    starts = np.cumsum(sizes) - np.array(sizes)
    return [(g, slice(int(s), int(s) + n)) for g, (s, n) in enumerate(zip(starts, sizes, strict=True)) if n]


@pytest.mark.parametrize("m, sizes", SIZES)
@pytest.mark.parametrize("n, k", [(4096, 7168), (7168, 2048), (1000, 328)])
def test_grouped_fp8_and_bf16_of_each_group_and_zeros_after(m, sizes, n, k):
    x, w = random(0, m, k), random(2, len(sizes), n, k)
    operands, (x_, w_) = rows_and_blocks(x, w)
    sizes_ = jnp.array(sizes, jnp.int32)
    run = jax.jit(functools.partial(grouped_fp8_matmul.grouped_matmul, implementation="kernel"))
    got = run(*operands, sizes_)
    bf16 = jax.jit(functools.partial(grouped_matmul.matmul, implementation="kernel"))
    x16, w16 = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    got16 = bf16(x16, w16, sizes_)
    dgrad = jax.jit(functools.partial(grouped_matmul.dgrad, implementation="kernel"))
    back16 = dgrad(got16, w16, sizes_)
    assert bool(jnp.array_equal(got, run(*operands, sizes_))) and bool(jnp.array_equal(got16, bf16(x16, w16, sizes_)))
    for g, rows in groups(sizes, m):
        assert errors(got[rows], x_[rows], w_[g])[0] < 3e-3
        assert errors(got16[rows], x16[rows], w16[g])[0] < 3e-3
        assert errors(back16[rows], got16[rows], w16[g], ((1,), (0,)))[0] < 3e-3
    for out in (got, got16, back16):
        assert not bool(out[sum(sizes):].any())


@pytest.mark.parametrize("m, sizes", SIZES)
@pytest.mark.parametrize("f, k", [(512, 1024), (64, 72), (320, 1000), (192, 2048), (100, 512)])
def test_grouped_product_with_swiglu_in_its_epilogue_is_the_product_then_swiglu(m, sizes, f, k):
    """Both tunings, an odd number of tiles, and a width that the fused kernel does not take."""
    x, w = random(0, m, k).astype(jnp.bfloat16), random(2, len(sizes), 2, f, k).astype(jnp.bfloat16)
    sizes_, plain = jnp.array(sizes, jnp.int32), w.reshape(len(sizes), 2 * f, k)
    run = jax.jit(grouped_matmul.matmul_swiglu if f % 64 else functools.partial(grouped_matmul.matmul_swiglu, implementation="kernel"))
    gate_up, hidden = run(x, w, sizes_)
    for got, again in zip((gate_up, hidden), run(x, w, sizes_), strict=True):
        assert bool(jnp.array_equal(got, again)) and not bool(got[sum(sizes):].any())
    assert bool(jnp.array_equal(gate_up, grouped_matmul.matmul(x, plain, sizes_, implementation="kernel")))
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=1)
    want = jax.nn.silu(gate) * up
    error = jnp.abs(hidden.astype(jnp.float32) - want)
    assert hidden.dtype == jnp.bfloat16 and bool((error <= 2.0**-8 * jnp.abs(want) + 1e-30).all())
    for g, rows in groups(sizes, m):
        assert errors(gate_up[rows], x[rows], plain[g])[0] < 3e-3


def test_masked_rows():
    counts = jnp.array([64, 0, 256, 100], jnp.int32)
    x, w = random(0, 4, 256, 512), random(2, 4, 384, 512)
    operands, (x_, w_) = rows_and_blocks(x, w)
    got = grouped_fp8_matmul.masked_matmul(*operands, counts, implementation="kernel")
    for g, n in enumerate([64, 0, 256, 100]):
        assert not n or errors(got[g, :n], x_[g, :n], w_[g])[0] < 3e-3
        assert not bool(got[g, n:].any())


@pytest.mark.parametrize("n, k", [(4096, 7168), (7168, 2048), (1000, 328)])
def test_grouped_weight_gradients(n, k):
    dy, x = random(0, 2048, n), random(2, 2048, k)
    dy_q, x_q = (quantise(v, (128, 1), "e4m3", False) for v in (dy, x))
    dy_, x_ = (quantize.dequantize_tiles(*q, (128, 1)) for q in (dy_q, x_q))
    dy16, x16 = dy.astype(jnp.bfloat16), x.astype(jnp.bfloat16)
    fp8 = jax.jit(functools.partial(grouped_fp8_matmul.weight_gradient, implementation="kernel"))
    bf16 = jax.jit(functools.partial(grouped_matmul.weight_gradient, implementation="kernel"))
    for run, operands, left, right, block in ((fp8, (*dy_q, *x_q), dy_, x_, 128), (bf16, (dy16, x16), dy16, x16, 64)):
        sizes = (8 * block, 0, 3 * block, block)
        sizes_ = jnp.array(sizes, jnp.int32)
        got = run(*operands, sizes_)
        assert bool(jnp.array_equal(got, run(*operands, sizes_))) and not bool(got[1].any())
        for g, rows in groups(sizes, 2048):
            assert errors(got[g], left[rows], right[rows], ((0,), (0,)))[0] < 3e-4
        more = run(*operands, sizes_, accumulate=jnp.ones_like(got))
        assert float(jnp.abs(more - 1 - got).max()) < 1e-2
        uneven = run(*operands, jnp.array([1000, 0, 400, 128], jnp.int32))
        assert bool(jnp.isnan(uneven[jnp.array([0, 2, 3])]).all())


def sizes_of_groups(rng, n_groups, n_rows):
    """Even, ragged, empty, all in one, of whole blocks, of a row each; some leave rows over, others are too many."""
    ragged = rng.multinomial(n_rows, rng.dirichlet(np.full(n_groups, 0.2)))
    few = rng.integers(0, 2, n_groups)
    yield from (ragged, ragged // 2 * few, ragged * 2, np.zeros(n_groups), np.ones(n_groups), np.full(n_groups, n_rows))
    yield from (rng.integers(0, 6, n_groups), rng.integers(0, n_rows // n_groups // 32 + 2, n_groups) * 64)
    yield n_rows * (np.arange(n_groups) == rng.integers(n_groups))


@pytest.mark.parametrize("n_groups", [1, 2, 4, 31, 32, 33, 64, 128, 257, 512])
def test_tile_tables_are_those_made_in_jnp_bit_for_bit(n_groups):
    """Also past the last tile."""
    rng = np.random.default_rng(n_groups)
    jobs = [("row_tiles", (n, 7, tile_m, align)) for n, align in ((1, 4), (1500, 1), (65536, 4)) for tile_m in (128, 192, 256)]
    jobs += [("masked_tiles", (n, 7, tile_m, 4)) for n, tile_m in ((64, 128), (300, 192), (512, 256))]
    jobs += [("gradient_tiles", shape) for shape in ((7, 128, 64), (1000, 192, 128), (1024, 256, 64))]
    for name, arguments in jobs:
        ours, plain = (jax.jit(functools.partial(lambda f, a, sizes: f(sizes, *a), getattr(of, name), arguments)) for of in (table, tiles))
        for sizes in sizes_of_groups(rng, n_groups, arguments[0] + 5):
            sizes = jnp.asarray(sizes, jnp.int32)
            for got, want in zip(jax.tree.leaves(ours(sizes)), jax.tree.leaves(plain(sizes)), strict=True):
                assert got.shape == want.shape and got.dtype == want.dtype
                np.testing.assert_array_equal(got.view(jnp.int32), want.view(jnp.int32), f"{name} {arguments} {sizes}")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "uint8"])
@pytest.mark.parametrize("d", [16, 128, 1024, 7168, 1040])
def test_rows_are_moved_and_added_as_the_reference_has_it(d, dtype):
    """Indices out of range on both sides; what is not named is NaN."""
    M, P, K = 300, 1111, 5
    source = jax.random.randint(jax.random.key(0), (P,), -20, M + 20, jnp.int32)
    x = (random(1, M, d) * 50).astype(dtype)
    if dtype == "uint8":
        got = gather(x, source, implementation="kernel")
        assert bool(jnp.array_equal(got, gather(x, source, implementation="reference")))
        return
    position = jax.random.randint(jax.random.key(3), (M, K), -20, P + 20, jnp.int32)
    named = jnp.zeros(P, bool).at[jnp.where(position < 0, P, position)].set(True, mode="drop")
    rows = jnp.where(named[:, None], random(2, P, d), jnp.nan).astype(dtype)
    weights, of_row = random(4, M, K), random(5, P)
    source = jnp.where(named, source, -1)
    beside = tuple(random(seed, M, d).astype(dtype) for seed in (6, 7))
    sums = [(gather_sum, (rows, position, w, beside[:n])) for w in (None, weights) for n in range(3)]
    for run, operands in ((gather, (x, source)), *sums, (weighted_backward, (x, rows, source, of_row))):
        kernel_, plain = (jax.jit(functools.partial(run, implementation=i)) for i in ("kernel", "reference"))
        for got, again, want in zip(*(jax.tree.leaves(f(*operands)) for f in (kernel_, kernel_, plain)), strict=True):
            assert got.dtype == want.dtype and bool(jnp.isfinite(got).all()) and bool(jnp.array_equal(got, again)), run.__name__
            error = jnp.linalg.norm((got - want).astype(jnp.float32)) / jnp.linalg.norm(want.astype(jnp.float32))
            assert float(error) <= (0 if run is gather else dict(bfloat16=3e-3, float16=4e-4, float32=1e-6)[dtype]), run.__name__


@pytest.mark.parametrize("m, d", [(1003, d) for d in (8, 136, 256, 512, 1024, 1536, 7168, 8192)] + [(1, 1024), (16384, 1024), (4096, 7168)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_norm_and_its_gradients_are_the_reference_and_the_same_bits_twice(m, d, dtype):
    x, delta, g, d_total = (random(seed, m, d).astype(dtype) for seed in range(1, 5))
    scale = 1 + random(5, d) / 2
    x = x.at[m // 2 or m].set(0).at[m - 1].multiply(1e3)  # no row of zeros where it were the only one
    for run, operands in ((rms_norm, (x, scale, 1e-6)), (rms_norm, (x, scale, 1e-6, delta)),
                          (rms_norm_backward, (x, scale, g, None, 1e-6)), (rms_norm_backward, (x, scale, g, d_total, 1e-6))):
        kernel_, plain = (jax.jit(functools.partial(run, implementation=i), static_argnums=4 if run is rms_norm_backward else 2)
                          for i in ("kernel", "reference"))
        for got, again, want in zip(kernel_(*operands), kernel_(*operands), plain(*operands), strict=True):
            assert got.dtype == want.dtype and bool(jnp.isfinite(got).all()) and bool(jnp.array_equal(got, again)), run.__name__
            error = jnp.linalg.norm((got - want).astype(jnp.float32)) / jnp.linalg.norm(want.astype(jnp.float32))
            assert float(error) <= (2e-6 if got.dtype == jnp.float32 else 3e-3), run.__name__
    same(rms_norm(x, scale, 1e-6, delta, implementation="kernel")[:1], (x + delta,))


def test_nan_stays_in_its_row_of_a_norm():
    x, g = (random(seed, 1003, 1536).astype(jnp.bfloat16) for seed in (1, 2))
    x, scale = x.at[7, 30].set(jnp.nan), jnp.ones(1536)
    outs = rms_norm(x, scale, 1e-6, implementation="kernel")[1], rms_norm_backward(x, scale, g, g, 1e-6, implementation="kernel")[0]
    for out in outs:
        assert jnp.flatnonzero(~jnp.isfinite(out).all(1)).tolist() == [7] and bool(jnp.isnan(out[7]).all())


@functools.partial(jax.jit, static_argnames="implementation")
def latents_and_gradients(y, scales, gs, g_rest, implementation):
    normed = latent_norm(y, scales, 1e-6, implementation=implementation)
    return normed, latent_norm_backward(y, scales, gs, g_rest, 1e-6, implementation=implementation)


@pytest.mark.parametrize("m", [1, 7, 4096, 16384])
@pytest.mark.parametrize("cuts", [(512, 256, 32), (1536, 512, 64), (64, 32, 16), (512, 64), (72, 264, 8)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_norms_of_latents_and_their_gradients_are_those_of_float64_and_the_same_bits_twice(m, cuts, dtype):
    y, *gs, g_rest = (random(seed, m, d).astype(dtype) for seed, d in enumerate((sum(cuts), *cuts)))
    y, scales = y.at[m // 2 or m].set(0).at[m - 1].multiply(1e2), tuple(1 + random(d, d) / 2 for d in cuts[:-1])
    got, again = (latents_and_gradients(y, scales, tuple(gs), g_rest, "kernel") for _ in range(2))
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda x: x.astype(jnp.float64), (y, scales, tuple(gs), g_rest))
        want = jax.tree.leaves(latents_and_gradients(*exact, "reference"))
        for x, twice, w in zip(jax.tree.leaves(got), jax.tree.leaves(again), want, strict=True):
            assert x.dtype == (jnp.float32 if x.ndim == 1 else dtype) and bool(jnp.isfinite(x).all()) and bool(jnp.array_equal(x, twice))
            error, size = jnp.linalg.norm(x.astype(jnp.float64) - w, axis=-1), jnp.linalg.norm(w, axis=-1)  # of each row
            assert bool((error <= (2e-6 if x.dtype == jnp.float32 else 4e-3) * size).all())  # half a step of bfloat16 is 3.9e-3
    assert bool(jnp.array_equal(got[1][0][:, -cuts[-1]:], g_rest))


def test_nan_in_a_latent_stays_in_its_row_and_cut():
    y, scales = random(1, 1003, 800).astype(jnp.bfloat16).at[7, 600].set(jnp.nan), (jnp.ones(512), jnp.ones(256))
    q, kv, rest = (jnp.ones((1003, d), jnp.bfloat16) for d in (512, 256, 32))
    c_q, c_kv = latent_norm(y, scales, 1e-6, implementation="kernel")
    d_y, (of_q, of_kv) = latent_norm_backward(y, scales, (q, kv), rest, 1e-6, implementation="kernel")
    bad = jnp.zeros((1003, 800), bool).at[7, 512:768].set(True)
    assert bool(jnp.array_equal(jnp.isnan(jnp.concatenate([c_q, c_kv, rest], axis=1)), bad)) and bool(jnp.array_equal(jnp.isnan(d_y), bad))
    assert bool(jnp.isfinite(of_q).all()) and bool(jnp.isnan(of_kv).all())


@functools.partial(jax.jit, static_argnames="implementation")
def log_z_and_gradient(logits, targets, g, implementation):
    log_z = log_sum_exp(logits, implementation=implementation)
    return log_z, log_probability_backward(logits, targets, log_z, g, implementation=implementation)


@pytest.mark.parametrize("m", [1, 7, 4096])
@pytest.mark.parametrize("v", [8, 8000, 32768, 129280])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_cross_entropy_and_its_gradient_are_those_of_float64_and_the_same_bits_twice(m, v, dtype):
    logits, g = (4 * random(1, m, v)).astype(dtype), random(2, m).at[m // 2 or m].set(0)  # no zero where it were the only one
    targets = jax.random.randint(jax.random.key(3), (m,), 0, v, jnp.int32).at[0].set(0).at[m - 1].set(v - 1)
    log_z, got = log_z_and_gradient(logits, targets, g, "kernel")
    for x, again in zip((log_z, got), log_z_and_gradient(logits, targets, g, "kernel"), strict=True):
        assert bool(jnp.array_equal(x, again)), "not the same bits twice"
    assert log_z.dtype == jnp.float32 and got.dtype == dtype and got.shape == logits.shape and (m == 1 or not bool(got[m // 2].any()))
    some = jnp.unique(jnp.concatenate([jnp.arange(m - 1, -1, -max(1, m // 64)), jnp.array([0, m // 2])]))  # float64 of all is too much
    logits, targets, g, log_z, got = (x[some] for x in (logits, targets, g, log_z, got))
    rounding = {"bfloat16": 2**-8, "float16": 2**-10, "float32": 4e-6}[dtype]
    with jax.enable_x64(True):
        exact = logits.astype(jnp.float64)
        want, p = jax.nn.logsumexp(exact, axis=-1), jax.nn.softmax(exact, axis=-1)
        np.testing.assert_allclose(log_z, want, rtol=1e-6, atol=1e-6)
        is_target = jnp.arange(v, dtype=jnp.int32)[None] == targets[:, None]
        want = g.astype(jnp.float64)[:, None] * (is_target.astype(jnp.float64) - p)
        error = jnp.abs(got.astype(jnp.float64) - want) - rounding * jnp.abs(want)
        assert float(error.max()) < 1e-6
    want = log_z_and_gradient(logits, targets, g, "reference")
    assert float(jnp.linalg.norm((got - want[1]).astype(jnp.float32)) / jnp.linalg.norm(want[1].astype(jnp.float32))) < 3e-3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("v", [8, 1032, 32768])
def test_infinite_huge_and_missing_logits_of_a_cross_entropy_are_as_the_reference_has_them(v, dtype):
    huge = float(jnp.finfo(dtype).max)
    edges = (-jnp.inf, jnp.inf, jnp.nan, huge, -huge)
    rows = [random(i, v).at[at].set(x) for i, x in enumerate(edges) for at in (0, v - 1)] + [jnp.full(v, x) for x in edges]
    rows += [jnp.where(jnp.arange(v) == v - 1, x, -jnp.inf) for x in (3.0, jnp.inf, jnp.nan, -huge)]
    logits = jnp.stack(rows).astype(dtype)
    m = len(rows)
    for targets in (jnp.zeros(m, jnp.int32), jnp.full(m, v - 1, jnp.int32), jnp.full(m, v, jnp.int32), jnp.full(m, -1, jnp.int32)):
        for g in (jnp.ones(m), jnp.zeros(m)):
            for got, want in zip(*(log_z_and_gradient(logits, targets, g, i) for i in ("kernel", "reference")), strict=True):
                got, want = (np.asarray(x, np.float32) for x in (got, want))
                np.testing.assert_allclose(got, want, rtol=2**-7 if got.ndim > 1 else 1e-6, atol=1e-6)


def kernel_scores(logits, valid, rule):
    """The scores that the kernel chooses by, bit for bit: raw weights, with a bias that makes it choose 8 experts after the other."""
    raw, s = gating.Rule(8, rule.score, "raw", 1.0), jnp.zeros_like(logits)
    for first in range(0, logits.shape[-1], 8):
        bias = jnp.zeros(logits.shape[-1]).at[first:first + 8].set(4.0)
        experts, weights, _ = route(logits, bias, valid, raw, implementation="kernel")
        s = jnp.put_along_axis(s, experts, weights, axis=-1, inplace=False)
    return s


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("b, t", [(8, 2048), (3, 77), (5, 1)])
@pytest.mark.parametrize("kind", ["random", "tied", "equal"])
def test_the_gate_chooses_as_the_reference_from_the_same_scores_and_the_same_bits_twice(name, b, t, kind):
    n, rule = GATES[name]
    logits = dict(random=2 * random(1, b, t, n), tied=jnp.round(random(2, b, t, n)), equal=jnp.full((b, t, n), 0.5))[kind]
    valid = jax.random.bernoulli(jax.random.key(3), 0.8, (b, t))
    s = kernel_scores(logits, valid, rule)
    np.testing.assert_allclose(s, gating.scores(logits, rule), rtol=1e-6)
    for bias in (None, random(4, n) / 4, jnp.round(random(5, n)) / 8 - 1):
        out = [route(logits, bias, valid, rule, implementation="kernel") for _ in range(2)]
        same(*out)
        experts, weights, sums = out[0]
        same((experts,), (jax.jit(gating.choose, static_argnums=2)(s, bias, rule),))
        _, want_weights, want_sums = jax.jit(gating.route, static_argnums=3)(logits, bias, valid, rule, experts)
        np.testing.assert_allclose(weights, want_weights, rtol=2e-6)
        same((sums[:, 0], sums[:, 1]), (want_sums[:, 0], jax.jit(gating.balance_sums, static_argnums=2)(s, valid, rule)[0]))
        np.testing.assert_allclose(sums[:, 2], want_sums[:, 2], rtol=2e-6, atol=1e-6)
        d_weights, d_shares = random(6, *weights.shape), random(7, b, n)
        got, again, want = (route_backward(logits, experts, valid, d_weights, d_shares, rule, implementation=i)
                            for i in ("kernel", "kernel", "reference"))
        same((got,), (again,))
        assert float(jnp.abs(got - want).max()) <= 4e-6 * float(jnp.abs(want).max())


@pytest.mark.parametrize("name", [n for n in GATES if n != "v2_lite"])
def test_a_gate_takes_nan_and_infinities_as_the_reference_does(name):
    n, rule = GATES[name]
    rule = gating.Rule(rule.n_chosen, "sigmoid", rule.weights, rule.scale, rule.n_groups, rule.n_kept, rule.group_score)
    odd = jax.random.randint(jax.random.key(1), (2, 500, n), 0, 40)
    logits = jnp.where(odd < 3, jnp.array([jnp.nan, jnp.inf, -jnp.inf])[jnp.minimum(odd, 2)], jnp.round(random(2, 2, 500, n)))
    valid = jnp.ones((2, 500), bool)
    for bias in (None, jnp.zeros(n).at[3].set(-jnp.inf).at[5].set(jnp.inf), jnp.zeros(n).at[n - 2].set(jnp.nan)):
        got, want = (route(logits, bias, valid, rule, implementation=i) for i in ("kernel", "reference"))
        same((got[0], got[2][:, 0]), (want[0], want[2][:, 0]))
