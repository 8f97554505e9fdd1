"""Linears differentiated with what follows them: under FP8 their gradient's operands are those of the plain way."""
import jax
import jax.numpy as jnp
import numpy as np

from model import precision
from model.after_linear import SwiGLU
from model.config import Execution
from pallas_kernels import quantize

RUN = Execution(precision=precision.Precision("fp8_block"))


def normal(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.bfloat16)


def prepared(rng, *shape):
    master = jnp.asarray(rng.normal(size=shape) / 14, jnp.float32)
    return master, precision.prepare({"gate_up" if len(shape) == 3 else "q_up": master}, RUN).popitem()[1]


def error(got, want):
    got, want = (np.asarray(a, np.float64) for a in (got, want))
    return np.linalg.norm(got - want) / np.linalg.norm(want)


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
