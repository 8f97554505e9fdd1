"""Linears differentiated with what follows them: under FP8 their gradient's operands are those of the plain way."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import precision
from model.after_linear import KeysValues, Rotated, SwiGLU
from model.config import Execution
from model.rope import NoScaling, Rope
from model.tape import LayerTape, Tape
from pallas_kernels import quantize

B, T, H, WIDTH = 2, 64, 2, 192
RUN = Execution(precision=precision.Precision("fp8_block"))


def normal(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.bfloat16)


def prepared(rng, *shape):
    master = jnp.asarray(rng.normal(size=shape) / 14, jnp.float32)
    return master, precision.prepare({"gate_up" if len(shape) == 3 else "q_up": master}, RUN).popitem()[1]


def error(got, want):
    got, want = (np.asarray(a, np.float64) for a in (got, want))
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def both_ways(after, x, weight, operands, gradient_of):
    """(outputs, (dx, dW, gradients of the operands)) by the fused rule, and with a tape, which takes the linear apart."""
    master, copy = weight

    def run(tape):
        def f(x, master, *operands):
            return precision.linear_then(after, x, copy._replace(master=master), RUN, "site", tape, *operands)
        out, pull = jax.vjp(f, x, master, *operands)
        return out, pull(gradient_of(out))

    return run(None), run(LayerTape(Tape()))


@pytest.mark.parametrize("nope, rope", [(128, 64), (24, 16)])
def test_queries_and_their_gradients_are_bit_for_bit_those_of_a_linear_and_a_rotation(nope, rope, rng):
    cos, sin = Rope(10000.0, NoScaling()).rotation(jnp.arange(T)[None], rope)
    x, weight = normal(rng, B, T, WIDTH), prepared(rng, H * (nope + rope), WIDTH)
    fused, apart = both_ways(Rotated(H), x, weight, (cos, sin), lambda q: normal(np.random.default_rng(1), *q.shape))
    assert fused[0].shape == (B, T, H, nope + rope)
    np.testing.assert_array_equal(fused[0], apart[0])
    for got, want in zip(fused[1][:2], apart[1][:2], strict=True):
        np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))


@pytest.mark.parametrize("nope, value, rope", [(128, 128, 64), (24, 32, 16)])
def test_keys_and_values_and_their_gradients_are_bit_for_bit_those_of_a_linear_cut_and_joined(nope, value, rope, rng):
    x, weight, k_rope = normal(rng, B, T, WIDTH), prepared(rng, H * (nope + value), WIDTH), normal(rng, B, T, rope)
    fused, apart = both_ways(KeysValues(H, nope), x, weight, (k_rope,),
                             lambda out: tuple(normal(np.random.default_rng(i), *a.shape) for i, a in enumerate(out)))
    for got, want in zip(fused[0], apart[0], strict=True):
        np.testing.assert_array_equal(got, want)
    for got, want in zip(fused[1][:2], apart[1][:2], strict=True):
        np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))
    assert error(fused[1][2], apart[1][2]) < 4e-3  # one rounding instead of one a head


def test_the_gradient_of_gate_and_up_is_never_written_in_bf16(rng):
    """dx and dW are the products of the float32 gradient's own tiles."""
    x, d_hidden, (w, copy) = normal(rng, 128, 256), normal(rng, 128, 128), prepared(rng, 2, 128, 256)
    (gate_up, _), pull = jax.vjp(lambda x, w: precision.linear_then(SwiGLU(), x, copy._replace(master=w), RUN, "ffn/gate_up"), x, w)
    dx, dw = pull((jnp.full_like(gate_up, jnp.nan), d_hidden))  # nothing reads a gradient of the first
    gate, up = np.split(np.asarray(gate_up, np.float64), 2, axis=1)
    s, d = 1 / (1 + np.exp(-gate)), np.asarray(d_hidden, np.float64)
    exact = jnp.asarray(np.concatenate([d * up * (s + gate * s * (1 - s)), d * gate * s], axis=1), jnp.float32)
    rows, columns = (np.asarray(quantize.dequantize_tiles(*quantize.quantize_tiles(exact, tile), tile), np.float64)
                     for tile in ((1, 128), (128, 1)))
    blocks = np.asarray(precision.dequantize(copy.low, copy.scale, jnp.float32), np.float64)
    cached = quantize.dequantize_tiles(*quantize.requantize_tiles(*quantize.quantize_tiles(x)), (128, 1))
    assert error(dx, rows @ blocks) < 4e-3  # bfloat16, and values that round otherwise from a last bit
    assert error(dw.reshape(256, 256), columns.T @ np.asarray(cached, np.float64)) < 2e-3
