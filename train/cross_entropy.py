"""Log-probabilities of tokens under logits, with a gradient written in one pass over them (that of log_softmax and a gather makes three
arrays of their size in float32); by our kernel on Hopper, which reads the logits once each way."""
import jax
import jax.numpy as jnp

from model.dtypes import at_least_f32
from model.sharding import by_rows, row_shards, shards
from pallas_kernels import cross_entropy


def token_logp(logits, tokens):
    """log p of tokens [B, T] from logits [B, T, V], in float32 at least: entry t belongs to the prediction OF tokens[:, t]; 0 at t = 0."""
    logp = log_probability(logits, jnp.roll(tokens, -1, axis=1))  # the last row's is cut: as long rows as the logits', no padded copies
    return jnp.pad(logp[:, :-1], ((0, 0), (1, 0)))


@jax.custom_vjp
def log_probability(logits, targets):
    """log softmax(logits [B, T, V]) at targets i32 [B, T] -> [B, T], in float32 at least."""
    return _forward(logits, targets)[0]


def _forward(logits, targets):
    log_z = _by_shards(cross_entropy.log_sum_exp, logits)
    at_target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return at_target.astype(at_least_f32(logits.dtype)) - log_z, (logits, targets, log_z)


def _backward(residuals, g):
    return _by_shards(cross_entropy.log_probability_backward, *residuals, g), None


log_probability.defvjp(_forward, _backward)


def _by_shards(op, logits, *of_rows):
    """The op by each data shard on its own where the kernel takes whole rows of theirs; else in jnp, which XLA splits as the logits are."""
    whole = logits.shape[0] % row_shards() == 0 and shards("vocab") == 1
    if whole and cross_entropy.takes_kernel(logits):
        return by_rows(op, logits, *of_rows)
    return op(logits, *of_rows, implementation="reference")
