"""SwiGLU: silu(gate) * up (Shazeer 2002.05202)."""
import jax
import jax.numpy as jnp


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
