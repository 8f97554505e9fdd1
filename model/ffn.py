"""SwiGLU, the feed-forward network of dense layers and of every expert: FFN(x) = W2 (silu(W1 x) * W3 x).

W1 and W3 read the same input and are one parameter gate_up [2, F, D].
"""
import jax
import jax.numpy as jnp

from model import precision
from model.sharding import normal, param


@jax.custom_vjp
def swiglu(gate_up, hidden=None):
    """silu(gate) * up for gate_up [..., 2F] -> [..., F]; hidden where a kernel made it already: the gradient is gate_up's all the same."""
    if hidden is not None:
        return hidden
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return jax.nn.silu(gate) * up


def _backward(gate_up, g):
    """One pass: without the barrier XLA takes the concatenation into the products that read it, and makes the two halves apart."""
    _, pull = jax.vjp(lambda gate, up: jax.nn.silu(gate) * up, *jnp.split(gate_up, 2, axis=-1))
    return jax.lax.optimization_barrier(jnp.concatenate(pull(g), axis=-1)), None


swiglu.defvjp(lambda gate_up, hidden: (swiglu(gate_up, hidden), gate_up), _backward)


def dense_ffn(module, x_BTD, width: int, scope: str, tape, prefix: str = ""):
    """SwiGLU of this width, its parameters in `module` under prefix: x [B, T, D] -> [B, T, D]."""
    D, init = x_BTD.shape[-1], normal(module.cfg.init_std)
    w_up = param(module, f"{prefix}gate_up", (2, width, D), ("pair", "ffn", "embed"), init)
    w_down = param(module, f"{prefix}down", (D, width), ("embed", "ffn"), init)
    gate_up = precision.linear(x_BTD, w_up, module.run, f"{scope}gate_up", tape)
    return precision.linear(swiglu(gate_up), w_down, module.run, f"{scope}down", tape, gate_up=gate_up)
