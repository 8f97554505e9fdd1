"""The fast kernels lower for CUDA without a GPU, and their plain Pallas versions run in GPU interpret mode."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import ShapeDtypeStruct as S

from pallas_kernels import fp8_matmul, grouped_fp8_matmul, grouped_matmul, quantize, target
from pallas_kernels.cross_entropy import log_probability_backward, log_sum_exp
from pallas_kernels.fp8_matmul import tuned
from pallas_kernels.gate import reference as gating
from pallas_kernels.gate import route, route_backward
from pallas_kernels.grouped_matmul import table, tiles
from pallas_kernels.latent_norm import latent_norm, latent_norm_backward
from pallas_kernels.norm import rms_norm, rms_norm_backward
from pallas_kernels.rows import gather, gather_sum, weighted_backward
from tests.test_kernels_gate import GATES

E4M3, F32, BF16, I32 = jnp.float8_e4m3fn, jnp.float32, jnp.bfloat16, jnp.int32


@pytest.fixture
def hopper(monkeypatch):
    """Lets `implementation='kernel'` be traced here: lowering needs no card."""
    monkeypatch.setattr(target, "is_hopper", lambda: True)


def rows(m, k):
    return S((m, k), E4M3), S((m, -(-k // 128)), F32)


def blocks(*shape):
    return S(shape, E4M3), S((*shape[:-2], *(-(-n // 128) for n in shape[-2:])), F32)


def columns(m, k):
    return S((m, k), E4M3), S((-(-m // 128), k), F32)


def latent_gradients(m, cuts, dtype):
    return tuple(S((m, d), dtype) for d in cuts[:-1]), S((m, cuts[-1]), dtype)


dense = functools.partial(fp8_matmul.matmul, implementation="kernel")
KERNELS = {
    "dense, tall tiles": (dense, (*rows(4096, 7168), *blocks(4096, 7168))),
    "dense, wide tiles": (dense, (*rows(4096, 1536), *blocks(24576, 1536))),
    "dense, 64 rows": (dense, (*rows(64, 7168), *blocks(2112, 7168))),
    "dense, 128 rows": (dense, (*rows(128, 7168), *blocks(4096, 7168))),
    "dense, ragged": (dense, (*rows(129, 130), *blocks(1000, 130))),
    "dense, never promoted": (functools.partial(dense, promotion=4096), (*rows(256, 4096), *blocks(256, 4096))),
    "dense gradient": (lambda *a: fp8_matmul.weight_gradient(*a[:4], accumulate=a[4], implementation="kernel"),
                       (*columns(4096, 2112), *columns(4096, 7168), S((2112, 7168), F32))),
    "fp8 grouped": (functools.partial(grouped_fp8_matmul.grouped_matmul, implementation="kernel"),
                    (*rows(1024, 2048), *blocks(4, 512, 2048), S((4,), I32))),
    "fp8 masked": (functools.partial(grouped_fp8_matmul.masked_matmul, implementation="kernel"),
                   (S((4, 256, 512), E4M3), S((4, 256, 4), F32), *blocks(4, 512, 512), S((4,), I32))),
    "fp8 grouped gradient": (functools.partial(grouped_fp8_matmul.weight_gradient, implementation="kernel"),
                             (*columns(1024, 512), *columns(1024, 640), S((4,), I32))),
    "fp8 grouped gradient in place": (
        lambda *a: grouped_fp8_matmul.weight_gradient(*a[:5], accumulate=a[5], implementation="kernel"),
        (*columns(1024, 512), *columns(1024, 640), S((4,), I32), S((4, 512, 640), F32))),
    "bf16 grouped": (functools.partial(grouped_matmul.matmul, implementation="kernel"),
                     (S((1024, 512), BF16), S((4, 640, 512), BF16), S((4,), I32))),
    "bf16 grouped, long reduction": (functools.partial(grouped_matmul.matmul, implementation="kernel"),
                                     (S((1024, 2048), BF16), S((4, 640, 2048), BF16), S((4,), I32))),
    "bf16 grouped gate and up": (functools.partial(grouped_matmul.matmul_swiglu, implementation="kernel"),
                                 (S((1024, 512), BF16), S((4, 2, 320, 512), BF16), S((4,), I32))),
    "bf16 grouped gate and up, long reduction": (functools.partial(grouped_matmul.matmul_swiglu, implementation="kernel"),
                                                 (S((1024, 2048), BF16), S((4, 2, 320, 2048), BF16), S((4,), I32))),
    "bf16 grouped dgrad": (functools.partial(grouped_matmul.dgrad, implementation="kernel"),
                           (S((1024, 640), BF16), S((4, 640, 512), BF16), S((4,), I32))),
    "bf16 grouped gradient": (lambda *a: grouped_matmul.weight_gradient(*a[:3], accumulate=a[3], implementation="kernel"),
                              (S((1024, 640), BF16), S((1024, 512), BF16), S((4,), I32), S((4, 640, 512), F32))),
    "bf16 grouped gradient, long groups": (functools.partial(grouped_matmul.weight_gradient, implementation="kernel"),
                                           (S((16384, 640), BF16), S((16384, 512), BF16), S((4,), I32))),
    "tile table, rows": (lambda sizes: table.row_tiles(sizes, 67584, 16, 128), (S((32,), I32),)),
    "tile table, many groups": (lambda sizes: table.row_tiles(sizes, 65536, 56, 192, align=4), (S((257,), I32),)),
    "tile table, masked": (lambda counts: table.masked_tiles(counts, 512, 16, 256, 4), (S((4,), I32),)),
    "tile table, gradient": (lambda sizes: table.gradient_tiles(sizes, 1000, 128, 64), (S((32,), I32),)),
    "quantise both": (functools.partial(quantize.quantize_both, implementation="kernel"), (S((256, 2112), BF16),)),
    "quantise weight": (functools.partial(quantize.quantize_weight, implementation="kernel"), (S((2, 64, 128), F32),)),
    "quantise e5m6": (functools.partial(quantize.quantize_tiles, format="e5m6", power_of_two=True,
                                        implementation="kernel"), (S((100, 576), BF16),)),
    "requantise": (functools.partial(quantize.requantize_tiles, implementation="kernel"), rows(256, 576)),
    "requantise, batched": (functools.partial(quantize.requantize_tiles, implementation="kernel"),
                            (S((2, 144, 384), jnp.float16), S((2, 144, 3), F32))),
    "swiglu": (functools.partial(quantize.swiglu_quantize, tile=(128, 1), implementation="kernel"), rows(256, 1024)),
    **{f"swiglu {tile[0]}x{tile[1]}{', weighted' * weighted}": (
           lambda h, *w, tile=tile: quantize.swiglu_quantize(h, None, tile, False, *w, implementation="kernel"),
           (S((272, 1040), BF16), *[S((272,), F32)] * weighted)) for tile in ((1, 128), (128, 1)) for weighted in (False, True)},
    "swiglu from FP8, weighted": (lambda q, s, w: quantize.swiglu_quantize(q, s, (128, 1), False, w, implementation="kernel"),
                                  (*rows(256, 1024), S((256,), F32))),
    **{f"swiglu gradient{', weighted' * weighted}": (
           functools.partial(quantize.swiglu_gradient, implementation="kernel"),
           (S((272, 512), BF16), S((272, 1024), BF16), *[S((272,), F32)] * weighted)) for weighted in (False, True)},
    "quantise heads": (lambda k, v: quantize.quantize_heads((k, v), (128, 128), implementation="kernel"),
                       (S((272, 4, 192), BF16), S((272, 4, 128), BF16))),
    "quantise rotated": (functools.partial(quantize.quantize_rotated_back, implementation="kernel"),
                         (S((272, 4, 192), BF16), *[S((272, 32), F32)] * 2)),
    "rows, gather": (functools.partial(gather, implementation="kernel"), (S((4096, 1024), BF16), S((20480,), I32))),
    "rows, gather bytes": (functools.partial(gather, implementation="kernel"), (S((300, 7168), jnp.uint8), S((900,), I32))),
    "rows, sum of 4": (functools.partial(gather_sum, implementation="kernel"),
                       (S((20480, 1024), BF16), S((4096, 4), I32), S((4096, 4), F32))),
    "rows, plain sum of 8": (functools.partial(gather_sum, implementation="kernel"), (S((900, 136), F32), S((100, 8), I32))),
    "rows, sum of 4 and 2": (lambda *a: gather_sum(*a[:3], a[3:], implementation="kernel"),
                             (S((20480, 1024), BF16), S((4096, 4), I32), S((4096, 4), F32), *[S((4096, 1024), BF16)] * 2)),
    "rows, plain sum of 8 and 1": (lambda *a: gather_sum(*a[:2], addends=a[2:], implementation="kernel"),
                                   (S((900, 136), F32), S((100, 8), I32), S((100, 136), F32))),
    "rows, sum of 8 and 2": (lambda *a: gather_sum(*a[:3], a[3:], implementation="kernel"),
                             (S((20480, 7168), BF16), S((2560, 8), I32), S((2560, 8), F32), *[S((2560, 7168), BF16)] * 2)),
    "rows, weighted backward": (functools.partial(weighted_backward, implementation="kernel"),
                                (S((4096, 7168), BF16), S((20480, 7168), BF16), S((20480,), I32), S((20480,), F32))),
    "norm": (lambda x, s, delta: rms_norm(x, s, 1e-6, delta, implementation="kernel"),
             (S((16384, 1024), BF16), S((1024,), F32), S((16384, 1024), BF16))),
    "norm, narrow": (functools.partial(rms_norm, eps=1e-6, implementation="kernel"), (S((1003, 136), F32), S((136,), F32))),
    "norm, backward": (lambda x, s, g, d: rms_norm_backward(x, s, g, d, 1e-6, implementation="kernel"),
                       (S((16384, 1024), BF16), S((1024,), F32), *[S((16384, 1024), BF16)] * 2)),
    "norm, wide backward": (lambda x, s, g, d: rms_norm_backward(x, s, g, d, 1e-6, implementation="kernel"),
                            (S((4096, 7168), BF16), S((7168,), F32), *[S((4096, 7168), BF16)] * 2)),
    **{f"latent norm{way}, {name}": (
           functools.partial(op, eps=1e-6, implementation="kernel"),
           (S((m, sum(cuts)), dtype), tuple(S((d,), F32) for d in cuts[:-1]), *gradients(m, cuts, dtype)))
       for way, op, gradients in (("", latent_norm, lambda m, cuts, dtype: ()), (" backward", latent_norm_backward, latent_gradients))
       for name, m, cuts, dtype in (("700m", 16384, (512, 256, 32), BF16), ("V3", 16384, (1536, 512, 64), BF16),
                                    ("V3 in float32", 4096, (1536, 512, 64), F32), ("V2-Lite", 4096, (512, 64), BF16))},
    **{f"cross entropy, {name}": (functools.partial(op, implementation="kernel"), (S((*rows, v), dtype), *(S(rows, t) for t in of_rows)))
       for op, of_rows, way in ((log_sum_exp, (), "log Z"), (log_probability_backward, (I32, F32, F32), "backward"))
       for name, rows, v, dtype in ((way, (8, 2048), 32768, BF16), (f"{way}, ragged", (4096,), 129280, BF16),
                                    (f"{way}, narrow", (7,), 8, BF16), (f"{way}, float32", (4096,), 8192, F32))},
    **{f"gate, {name}": (functools.partial(route, rule=rule, implementation="kernel"),
                         (S((8, 2048, n), F32), S((n,), F32), S((8, 2048), jnp.bool_))) for name, (n, rule) in GATES.items()},
    **{f"gate, backward, {name}": (functools.partial(route_backward, rule=rule, implementation="kernel"),
                                   (S((8, 2048, n), F32), S((8, 2048, rule.n_chosen), I32), S((8, 2048), jnp.bool_),
                                    S((8, 2048, rule.n_chosen), F32), S((8, n), F32))) for name, (n, rule) in GATES.items()},
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernel_lowers_for_cuda(hopper, name):
    run, shapes = KERNELS[name]
    text = jax.jit(run).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu") >= 1
    in_place = name in ("dense gradient", "fp8 grouped gradient in place", "bf16 grouped gradient")
    assert ("output_operand_alias<" in text) == (in_place or name.startswith("cross entropy, backward"))


@pytest.mark.parametrize("b_tile", [(128, 128), (1, 128)])
def test_plain_fp8_kernel_agrees_with_the_reference(rng, b_tile):
    x, w = (jnp.asarray(rng.standard_normal(s), F32) for s in ((70, 200), (100, 200)))
    operands = (*quantize.quantize_tiles(x), *quantize.quantize_tiles(w, b_tile))
    got, want = (fp8_matmul.matmul(*operands, out_dtype=F32, implementation=i) for i in ("interpret", "reference"))
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_plain_grouped_fp8_kernel_agrees_with_the_reference(rng):
    x, w = (jnp.asarray(rng.standard_normal(s), F32) for s in ((60, 200), (3, 100, 200)))
    operands = (*quantize.quantize_tiles(x), *quantize.quantize_tiles(w, (128, 128)), jnp.array([20, 0, 33], I32))
    got, want = (grouped_fp8_matmul.grouped_matmul(*operands, out_dtype=F32, implementation=i)
                 for i in ("interpret", "reference"))
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.slow
def test_grouped_bf16_kernel_agrees_with_the_reference_in_interpret_mode(rng):
    bf16 = lambda *shape: jnp.asarray(rng.standard_normal(shape), BF16)  # noqa: E731
    some, whole = jnp.array([130, 0, 67], I32), jnp.array([128, 0, 256], I32)
    w = bf16(3, 72, 100)
    for f, operands in ((grouped_matmul.matmul, (bf16(300, 100), w, some)), (grouped_matmul.dgrad, (bf16(300, 72), w, some)),
                        (grouped_matmul.weight_gradient, (bf16(384, 72), bf16(384, 100), whole))):
        got, want = (np.asarray(f(*operands, implementation=i), np.float32) for i in ("interpret", "reference"))
        np.testing.assert_allclose(got, want, atol=1e-4, rtol=8e-3)


@pytest.mark.slow
@pytest.mark.parametrize("f, m, sizes", [(64, 300, (130, 0, 67)), (128, 150, (1, 0, 128)), (192, 80, (0, 0, 0))])
def test_grouped_kernel_with_swiglu_is_that_of_float64_in_interpret_mode(rng, f, m, sizes):
    rows, w = (jnp.asarray(rng.standard_normal(s), BF16) for s in ((m, 100), (3, 2, f, 100)))
    gate_up, hidden = grouped_matmul.matmul_swiglu(rows, w, jnp.array(sizes, I32), implementation="interpret")
    rows, w, gate_up, hidden = (np.asarray(x, np.float64) for x in (rows, w, gate_up, hidden))
    group = np.repeat(np.arange(3), sizes)
    want = np.zeros((m, 2 * f))
    want[:len(group)] = np.einsum("mk,mfk->mf", rows[:len(group)], w.reshape(3, 2 * f, 100)[group])
    np.testing.assert_allclose(gate_up, want, rtol=2.0**-8, atol=1e-5)
    gate, up = np.split(gate_up, 2, axis=1)
    np.testing.assert_allclose(hidden, gate / (1 + np.exp(-gate)) * up, rtol=2.0**-8, atol=1e-30)


@pytest.mark.parametrize("align", [1, 4])
@pytest.mark.parametrize("tile_m", [192, 256])
def test_row_tiles_cover_every_row_once_with_its_group(rng, tile_m, align):
    n_groups, n_rows = 4, 1500
    table_of = jax.jit(lambda sizes: tiles.row_tiles(sizes, n_rows, 7, tile_m, align))
    for _ in range(20):
        sizes = rng.integers(0, 370, n_groups) * rng.integers(0, 2, n_groups)
        count, columns = table_of(jnp.asarray(sizes, I32))
        group = np.full(n_rows, -2)
        for a, d, end, skip, g, first, k_blocks in np.asarray(columns).T[: int(count[0])]:
            assert a == d and a % align == 0 and first == 0 and 0 < end <= tile_m and skip < align
            assert (group[d + skip:d + end] == -2).all(), "a row in two tiles"
            group[d + skip:d + end] = g if k_blocks else -1
        want = np.append(np.repeat(np.arange(n_groups), sizes), np.full(n_rows - sizes.sum(), -1))
        np.testing.assert_array_equal(group, want)


def test_masked_tiles_mark_the_rows_past_each_count():
    count, columns = tiles.masked_tiles(jnp.array([3, 0, 300], I32), 300, 2, 192, 4)
    live = np.zeros(900, int)
    for _, d, end, skip, g, _, k_blocks in np.asarray(columns).T[: int(count[0])]:
        live[d + skip:d + end] += np.where(k_blocks > 0, 10 + g, 1)
    np.testing.assert_array_equal(live, np.repeat([10, 1, 1, 12], [3, 297, 300, 300]))


def test_every_size_of_a_dense_product_finds_a_block_shape():
    for m in (1, 64, 65, 128, 129, 512, 4096, 65536):
        for n, k in ((1, 1), (576, 7168), (2112, 7168), (7168, 16384), (129280, 7168)):
            t = tuned.pick(m, n, k)
            assert t.tile_m >= min(m, 128)
            stage = (t.tile_m + t.tile_n) * 128 + t.tile_m * 4
            for itemsize in (2, 4):
                chunk = min(t.tile_n, 128 // itemsize)
                staged = t.wgs * min(t.buffers, t.tile_n // chunk) * 64 * chunk * itemsize
                assert t.stages * stage + staged < 226 * 1024, "more SMEM than a block has"


def test_a_named_path_that_cannot_run_raises(monkeypatch):
    operands = (jnp.zeros((4, 128), E4M3), jnp.ones((4, 1)), jnp.zeros((8, 128), E4M3), jnp.ones((1, 1)))
    with pytest.raises(ValueError, match="needs a Hopper GPU, the backend is 'cpu'"):
        fp8_matmul.matmul(*operands, implementation="kernel")
    with pytest.raises(ValueError, match="no plain Pallas version"):
        quantize.quantize_tiles(jnp.ones((4, 128)), implementation="interpret")
    monkeypatch.setattr(target, "is_hopper", lambda: True)
    narrow = jnp.zeros((8, 64), BF16), jnp.zeros((2, 2, 40, 64), BF16), jnp.zeros(2, I32)
    with pytest.raises(ValueError, match="cannot run: F=40: must be a multiple of 64"):
        grouped_matmul.matmul_swiglu(*narrow, implementation="kernel")
    with pytest.raises(ValueError, match="cannot run: 5 rows: must be a multiple of 16"):
        quantize.quantize_tiles(jnp.ones((5, 128)), (128, 1), implementation="kernel")


def test_a_width_that_no_tile_halves_takes_the_product_alone(hopper):
    for f, fused in ((40, False), (64, True)):
        shapes = S((256, 64), BF16), S((2, 2, f, 64), BF16), S((2,), I32)
        text = jax.jit(grouped_matmul.matmul_swiglu).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("mosaic_gpu_v2") == 2 and ("stablehlo.exponential" in text) != fused  # the tile table and the product


def test_kernels_lower_inside_shard_map_and_vmap(hopper):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec, whole = jax.sharding.PartitionSpec("x"), jax.sharding.PartitionSpec()

    def layer(x, w, w_scale, sizes, dy, total):
        y = fp8_matmul.matmul(*quantize.quantize_tiles(x), w, w_scale)
        y = gather(y, weighted_backward(y, y, jnp.arange(y.shape[0]), sizes.astype(F32).repeat(y.shape[0]))[1].astype(I32))
        log_z = log_sum_exp(y)
        y = log_probability_backward(y, y[:, 0].astype(I32), log_z, log_z)
        logits, valid, rule = y[None].astype(F32), jnp.ones((1, y.shape[0]), bool), gating.Rule(4, "softmax", "raw", 1.0)
        experts, weights, sums = route(logits, jnp.zeros(y.shape[1]), valid, rule)
        y = route_backward(logits, experts, valid, weights, sums[:, 2], rule)[0].astype(BF16)
        return y, grouped_matmul.weight_gradient(dy, x, sizes, accumulate=total[0])[None]

    run = jax.shard_map(layer, mesh=mesh, in_specs=(spec, whole, whole, whole, spec, spec), out_specs=(spec, spec))
    shapes = (S((512, 256), BF16), *blocks(384, 256), S((1,), I32), S((512, 384), BF16), S((2, 1, 384, 256), F32))
    assert "mosaic_gpu" in jax.jit(run).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    rows_of_many = jax.jit(jax.vmap(quantize.quantize_tiles)).trace(S((3, 256, 256), BF16))
    assert "mosaic_gpu" in rows_of_many.lower(lowering_platforms=("cuda",)).as_text()
    norms_of_many = jax.jit(jax.vmap(lambda x, s: rms_norm(x, s, 1e-6))).trace(S((3, 256, 256), BF16), S((3, 256), F32))
    assert "mosaic_gpu" in norms_of_many.lower(lowering_platforms=("cuda",)).as_text()
    latents_of_many = jax.jit(jax.vmap(lambda y, s: latent_norm(y, (s,), 1e-6))).trace(S((3, 256, 256), BF16), S((3, 128), F32))
    assert "mosaic_gpu" in latents_of_many.lower(lowering_platforms=("cuda",)).as_text()
    log_z_of_many = jax.jit(jax.vmap(log_sum_exp)).trace(S((3, 256, 256), BF16))
    assert "mosaic_gpu" in log_z_of_many.lower(lowering_platforms=("cuda",)).as_text()
    tables_of_many = jax.jit(jax.vmap(lambda sizes: table.gradient_tiles(sizes, 256, 128, 64))).trace(S((3, 8), I32))
    assert "mosaic_gpu" in tables_of_many.lower(lowering_platforms=("cuda",)).as_text()
    sums_of_many = jax.jit(jax.vmap(gather_sum)).trace(S((3, 256, 256), BF16), S((3, 64, 4), I32), S((3, 64, 4), F32))
    assert "mosaic_gpu" in sums_of_many.lower(lowering_platforms=("cuda",)).as_text()
