"""Tile quantisation: the definition in numpy, its edge cases, the fused forms against their parts."""
import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from model.rope import rotate_tail
from pallas_kernels import quantize
from pallas_kernels.quantize import kernel, reference, tuned, walk

TILES = ((1, 128), (128, 1), (128, 128))


def random_of(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape).astype(jnp.bfloat16)


def same_bytes(got, want):
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert g.shape == w.shape and g.dtype == w.dtype
        np.testing.assert_array_equal(*(np.ascontiguousarray(x).view(np.uint8) for x in (g, w)))


def numpy_quantize(x, tile, power_of_two=False):
    """The definition, tile by tile, in float32 numpy."""
    rows, cols = (-(-n // t) for n, t in zip(x.shape, tile, strict=True))
    q, scale = np.zeros(x.shape, ml_dtypes.float8_e4m3fn), np.zeros((rows, cols), np.float32)
    for i in range(rows):
        for j in range(cols):
            at = np.s_[i * tile[0]:(i + 1) * tile[0], j * tile[1]:(j + 1) * tile[1]]
            s = np.float32(np.abs(x[at]).max()) / np.float32(448)
            s = np.float32(2.0 ** np.ceil(np.log2(s))) if power_of_two and s else s
            s = np.maximum(s, np.finfo(np.float32).tiny)
            scale[i, j] = s
            q[at] = np.clip(x[at] * (np.float32(1) / s), -448, 448).astype(ml_dtypes.float8_e4m3fn)
    return q, scale


def adversarial(rng, rows, cols):
    """Outliers of 1e4, zeros, subnormals, one hot row."""
    x = rng.standard_normal((rows, cols)).astype(np.float32)
    x[rng.integers(rows, size=8), rng.integers(cols, size=8)] *= 1e4
    x[rows // 2] *= 1e3
    x[rows // 3, :] = 0
    x[rows - 1, :128] = 1e-40
    return x


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("power_of_two", [False, True])
def test_tiles_follow_the_definition_bit_for_bit_inside_and_outside_jit(rng, tile, power_of_two):
    x = adversarial(rng, 130, 200)
    x[x == np.float32(1e-40)] = 0  # XLA on the CPU flushes subnormals
    want_q, want_scale = numpy_quantize(x, tile, power_of_two)
    for f in (quantize.quantize_tiles, jax.jit(quantize.quantize_tiles, static_argnums=(1, 2, 3))):
        q, scale = f(x, tile, "e4m3", power_of_two)
        np.testing.assert_array_equal(np.asarray(scale), want_scale)
        np.testing.assert_array_equal(np.asarray(q).astype(np.float32), want_q.astype(np.float32))


def test_published_row():
    x = np.array([[0.5, -1, 0.003, 0.7, 1e-5, 0.25, -0.333, 0.9]], np.float32)
    q, scale = quantize.quantize_tiles(x)
    np.testing.assert_array_equal(np.asarray(q, np.float32)[0], [224, -448, 1.375, 320, 0.00390625, 112, -144, 416])
    q, scale = quantize.quantize_tiles(x, power_of_two=True)
    assert float(scale[0, 0]) == 2.0**-8
    np.testing.assert_array_equal(np.asarray(q, np.float32)[0], [128, -256, 0.75, 176, 0.001953125, 64, -88, 224])


@pytest.mark.parametrize("tile", TILES)
def test_zero_tile_gives_zeros_and_a_finite_scale_and_non_finite_values_stay_in_their_tile(rng, tile):
    x = rng.standard_normal((256, 256)).astype(np.float32)
    x[:128, :128] = 0
    x[200, 200] = np.nan
    x[130, 20] = np.inf
    q, scale = quantize.quantize_tiles(x, tile)
    back = np.asarray(quantize.dequantize_tiles(q, scale, tile))
    assert np.isfinite(np.asarray(scale)[0, 0]) and not back[:128, :128].any()
    bad = ~np.isfinite(back)
    for row, col in ((200, 200), (130, 20)):
        assert bad[row, col]
        top, left = row // tile[0] * tile[0], col // tile[1] * tile[1]
        bad[top:top + tile[0], left:left + tile[1]] = False
    assert not bad.any()


def test_blocks_of_a_weight_commute_with_transposition(rng):
    w = rng.standard_normal((3, 130, 260)).astype(np.float32)
    q, scale = quantize.quantize_tiles(w, (128, 128))
    q_t, scale_t = quantize.quantize_tiles(w.swapaxes(1, 2), (128, 128))
    np.testing.assert_array_equal(np.asarray(q_t, np.float32), np.asarray(q.mT, np.float32))
    np.testing.assert_array_equal(scale_t, scale.mT)


def test_e5m6_keeps_six_bits_and_moves_between_tiles_without_a_second_error_of_scale(rng):
    x = adversarial(rng, 128, 256)
    q, scale = quantize.quantize_tiles(x, (1, 128), "e5m6", power_of_two=True)
    assert q.dtype == jnp.float16
    assert not (np.asarray(q).view(np.uint16) & 0xF).any(), "four low bits of the float16 mantissa stay zero"
    assert (np.log2(np.asarray(scale)) % 1 == 0).all()
    back = np.asarray(quantize.dequantize_tiles(q, scale))
    big = np.abs(x) > 1e-6 * np.abs(x).max(1, keepdims=True)
    assert (np.abs(back - x)[big] <= 2.0**-7 * np.abs(x)[big]).all()
    # the powers of two drop out: E4M3 columns of the cached copy are the columns of its values
    direct = quantize.quantize_tiles(back, (128, 1), "e4m3", True)
    for got, want in zip(quantize.requantize_tiles(q, scale, (128, 1), True), direct, strict=True):
        np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))


def test_both_is_rows_and_columns(rng):
    x = adversarial(rng, 130, 140)
    for got, tile in zip(quantize.quantize_both(x), TILES, strict=False):
        for g, w in zip(got, quantize.quantize_tiles(x, tile), strict=True):
            np.testing.assert_array_equal(np.asarray(g, np.float32), np.asarray(w, np.float32))


def test_fused_swiglu_is_swiglu_then_quantisation_from_bf16_and_from_cached_fp8(rng):
    h = jnp.asarray(rng.standard_normal((64, 512)), jnp.bfloat16)
    q, scale = quantize.swiglu_quantize(h)
    x = np.asarray(h, np.float64)
    want = x[:, :256] / (1 + np.exp(-x[:, :256])) * x[:, 256:]
    back = np.asarray(quantize.dequantize_tiles(q, scale))
    assert np.linalg.norm(back - want) < 0.04 * np.linalg.norm(want)
    cached, cached_scale = quantize.quantize_tiles(h)
    h8 = quantize.dequantize_tiles(cached, cached_scale)
    want = quantize.swiglu_quantize(h8, tile=(128, 1))
    for got, w in zip(quantize.swiglu_quantize(cached, cached_scale, tile=(128, 1)), want, strict=True):
        np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(w, np.float32))


@pytest.mark.parametrize("tile", TILES[:2])
def test_weighted_rows_of_a_fused_swiglu_are_those_of_float64(rng, tile):
    h, weights = jnp.asarray(rng.standard_normal((2, 96, 512)), jnp.bfloat16), jnp.asarray(rng.random((2, 96)), jnp.float32)
    x = np.asarray(h, np.float64)
    want = x[..., :256] / (1 + np.exp(-x[..., :256])) * x[..., 256:] * np.asarray(weights, np.float64)[..., None]
    back = np.asarray(quantize.dequantize_tiles(*quantize.swiglu_quantize(h, tile=tile, weights=weights), tile))
    assert np.linalg.norm(back - want) < 0.04 * np.linalg.norm(want)
    ones = quantize.swiglu_quantize(h, tile=tile, weights=jnp.ones((2, 96)))
    for got, w in zip(ones, quantize.swiglu_quantize(h, tile=tile), strict=True):
        np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(w, np.float32))
    cached = quantize.quantize_tiles(h)
    want = quantize.swiglu_quantize(quantize.dequantize_tiles(*cached), tile=tile, weights=weights)
    for got, w in zip(quantize.swiglu_quantize(*cached, tile=tile, weights=weights), want, strict=True):
        np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(w, np.float32))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(130, 72), (2, 64, 128)])
def test_gradient_of_a_swiglu_is_that_of_float64_by_formula_and_by_autodiff(rng, shape, weighted):
    *lead, f = shape
    d, h = (jnp.asarray(rng.standard_normal((*lead, n)), jnp.bfloat16) for n in (f, 2 * f))
    weights = jnp.asarray(rng.standard_normal(lead), jnp.float32) if weighted else None
    rows, columns, d_weights = quantize.swiglu_gradient(d, h, weights)
    d64, gate, up = (np.asarray(x, np.float64) for x in (d, *jnp.split(h, 2, axis=-1)))
    w64 = np.asarray(weights if weighted else np.ones(lead), np.float64)
    s = 1 / (1 + np.exp(-gate))
    want = np.concatenate([d64 * w64[..., None] * up * (s + gate * s * (1 - s)), d64 * w64[..., None] * gate * s], axis=-1)
    want_weights = (d64 * gate * s * up).sum(-1)
    with jax.enable_x64(True):
        def hidden(h, w):
            gate, up = jnp.split(h, 2, axis=-1)
            return jnp.sum(jnp.asarray(d64) * w[..., None] * jax.nn.silu(gate) * up)
        by_autodiff = jax.grad(hidden, (0, 1))(jnp.asarray(np.concatenate([gate, up], axis=-1)), jnp.asarray(w64))
    for mine, theirs in zip((want, want_weights), by_autodiff, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-9, atol=1e-12)
    for tile, (q, scale) in (((1, 128), rows), ((128, 1), columns)):
        back = np.asarray(quantize.dequantize_tiles(q, scale, tile))
        # half a step of three bits of mantissa, or of the tile's smallest numbers
        assert (np.abs(back - want) <= np.abs(want) * 2.0**-4 * 1.001 + reference.spread(scale, tile, want.shape[-2:]) * 2.0**-10).all()
    assert (d_weights is None) != weighted
    if weighted:
        np.testing.assert_allclose(d_weights, want_weights, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("m, h, channels, widths", [
    ((40,), 3, (24, 16), (16, 16)), ((2, 144), 2, (192, 128), (128, 128)), ((7,), 1, (8, 8), (3, 8))])
def test_heads_cut_from_two_arrays_are_quantised_as_if_joined(rng, m, h, channels, widths):
    parts = tuple(jnp.asarray(rng.standard_normal((*m, h, n)), jnp.bfloat16) for n in channels)
    joined = np.concatenate([np.asarray(p)[..., :n] for p, n in zip(parts, widths, strict=True)], axis=-1).reshape(*m, -1)
    same_bytes(quantize.quantize_heads(parts, widths), quantize.quantize_both(joined))
    with pytest.raises(ValueError, match="must be"):
        quantize.quantize_heads(parts, (widths[0], channels[1] + 1))


def turned_back(x, cos, sin):
    """The gradient of the model's rotation, [M, H, C] -> [M, H * C]."""
    back = jax.vjp(lambda x: rotate_tail(x, (cos[None], sin[None])), jnp.zeros_like(x[None]))[1](x[None])[0]
    return back.reshape(x.shape[0], -1)


def angles(m, rotated):
    of_pairs = jnp.arange(m, dtype=jnp.float32)[:, None] * 100.0 ** -jnp.linspace(0, 1, rotated // 2)[None]
    return jnp.cos(of_pairs), jnp.sin(of_pairs)


@pytest.mark.parametrize("m, h, channels, rotated", [(40, 3, 24, 8), (144, 2, 192, 64), (7, 1, 6, 6)])
def test_heads_rotated_back_are_quantised_as_in_two_steps(rng, m, h, channels, rotated):
    x, (cos, sin) = jnp.asarray(rng.standard_normal((m, h, channels)), jnp.bfloat16), angles(m, rotated)
    same_bytes(quantize.quantize_rotated_back(x, cos, sin), quantize.quantize_both(turned_back(x, cos, sin)))
    want, (c, s) = np.asarray(x, np.float64), (np.asarray(v, np.float64)[:, None] for v in (cos, sin))
    even, odd = want[..., channels - rotated::2].copy(), want[..., channels - rotated + 1::2].copy()
    want[..., channels - rotated::2], want[..., channels - rotated + 1::2] = even * c + odd * s, odd * c - even * s
    got = np.asarray(reference.rotate_back(x, cos, sin), np.float64)
    np.testing.assert_allclose(got, want.reshape(m, -1), rtol=2.0**-8, atol=1e-6)
    batched = quantize.quantize_rotated_back(*(jnp.stack([v, v]) for v in (x, cos, sin)))
    same_bytes(jax.tree.map(lambda v: v[1], batched), quantize.quantize_rotated_back(x, cos, sin))
    with pytest.raises(ValueError, match="must be float32"):
        quantize.quantize_rotated_back(x, cos[1:], sin)


def test_only_cached_columns_in_rows_of_16_bytes_are_read_ahead_and_fit_the_memory_of_a_block():
    def job(k, **what):
        return kernel.Job(1, 4096, k, **(dict(source="float8_e4m3fn", scaled=True, columns=True) | what))

    assert tuned.pick(job(7168)).stages and tuned.pick(job(48)).stages and not tuned.pick(job(56)).stages
    assert not tuned.pick(job(7168, scaled=False, source="bfloat16")).stages
    assert not tuned.pick(job(7168, columns=False, rows="e4m3")).stages
    assert not tuned.pick(job(7168, form="swiglu", source="float16")).stages
    for source, bytes_, form in (("float8_e4m3fn", 1, "plain"), ("float8_e4m3fn", 1, "swiglu"), ("float16", 2, "plain")):
        j = job(7168, source=source, form=form)
        t = tuned.pick(j)
        assert t.tiles * (16384 + 512 + t.stages * (1 + (form == "swiglu")) * (16384 * bytes_ + 512)) < 226 * 1024
        assert kernel.grid(j, t) == 132 and kernel.grid(job(128), tuned.pick(job(128))) == 16


class Ints:
    """The arithmetic of an `Emit` on numbers."""

    div, rem, mul, less = (lambda self, a, n, f=f: f(a, n) for f in (operator.floordiv, operator.mod, operator.mul, operator.lt))
    add, either = (lambda self, *terms: sum(terms)), (lambda self, condition, a, b: a if condition else b)


@pytest.mark.parametrize("n_rows", [0, 1, 4, 8, 16, -1, 1000])
@pytest.mark.parametrize("batch, m_tiles, k_tiles, halves", [(1, 33, 6, 1), (3, 16, 5, 1), (2, 10, 8, 2), (1, 1, 2, 2)])
def test_a_walk_meets_every_tile_once_in_bands_of_rows(n_rows, batch, m_tiles, k_tiles, halves):
    tiles = [walk.place(Ints(), block, m_tiles, k_tiles, n_rows, halves) for block in range(batch * m_tiles * k_tiles)]
    height = m_tiles if n_rows < 0 else max(n_rows, 1)
    of_half = k_tiles // halves
    assert sorted(tiles) == [(b, m, k) for b in range(batch) for m in range(m_tiles) for k in range(k_tiles)]
    assert tiles == sorted(tiles, key=lambda t: (t[0], t[1] // height, t[2] % of_half, t[1], t[2]))


@pytest.mark.gpu
@pytest.mark.parametrize("n_rows", [1, 4, 8, 16, -1])
def test_every_walk_writes_the_same_bits(n_rows):
    x, h, weights = random_of(0, 2, 2064, 1280), random_of(1, 2, 2064, 2560), random_of(2, 2, 2064).astype(jnp.float32)
    cached, scale = quantize.quantize_tiles(x, implementation="reference")
    both = dict(rows="e4m3", columns=True)
    for job, operands in ((kernel.Job(2, 2064, 1280, "bfloat16", **both), (x,)),
                          (kernel.Job(2, 2064, 1280, "float8_e4m3fn", scaled=True, columns=True), (cached, scale.mT)),
                          (kernel.Job(2, 2064, 2560, "bfloat16", "swiglu_gradient", weighted=True, **both), (x, h, weights))):
        tuning = tuned.pick(job)
        got, want = (kernel.quantize(job, dataclasses.replace(tuning, walk=n), *operands) for n in (n_rows, 0))
        same_bytes(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("m, h", [((2, 144), 3), ((4096,), 16), ((16,), 1)])
def test_heads_are_quantised_by_the_kernel_as_by_the_reference_bit_for_bit(m, h):
    parts = random_of(0, *m, h, 192).at[..., 128:].set(jnp.nan), random_of(1, *m, h, 128).at[..., 3, :, 7].set(0)
    got, want = (jax.jit(functools.partial(quantize.quantize_heads, widths=(128, 128), implementation=i))(parts)
                 for i in ("kernel", "reference"))
    same_bytes(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("m, h, channels, rotated", [(144, 3, 24, 8), (4096, 16, 192, 64), (272, 4, 160, 32), (16, 1, 8, 8)])
def test_heads_are_rotated_back_by_the_kernel_as_in_two_steps_bit_for_bit(m, h, channels, rotated):
    x, (cos, sin) = random_of(0, m, h, channels).at[3, :, 5].set(0), angles(m, rotated)
    got, want = (jax.jit(functools.partial(quantize.quantize_rotated_back, implementation=i))(x, cos, sin) for i in ("kernel", "reference"))
    same_bytes(got, want)
    apart = jax.jit(turned_back)(x, cos, sin)
    same_bytes(got, jax.jit(functools.partial(quantize.quantize_both, implementation="kernel"))(apart))


@pytest.mark.parametrize("arguments, message", [
    (dict(tile=(2, 128)), "tile=.2, 128.: must be one of"),
    (dict(format="e5m2"), "format='e5m2': must be one of"),
    (dict(implementation="kernel"), "cannot run"),
    (dict(implementation="fast"), "implementation='fast': must be one of"),
])
def test_what_cannot_be_done_is_said(arguments, message):
    with pytest.raises(ValueError, match=message):
        quantize.quantize_tiles(jnp.ones((4, 128)), **arguments)
