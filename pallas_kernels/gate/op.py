"""The gate of a MoE layer after its logits, and its gradient (V3 §2.1.2, eq. 13-16 with node-limited routing; sums for eq. 17-20).

| function | what | kernels |
|---|---|---|
| `route` | s of the logits; K experts by s + bias in the kept groups; their weights; load, hits, shares of a sequence | one, and a sum |
| `route_backward` | d_logits from the gradients of weights and shares | one |

No VJP: `model/moe.py` has it.

The kernel takes float32 logits whose experts divide over the lanes of a warp (`kernel.Job.lanes`). Others, and no tokens, take the
reference. The choice is exact, given the scores: order, ties, groups, infinities and NaN as `reference.choose` has them. The scores
themselves may differ in their last bits from XLA's, so may a choice between experts closer than that. Weights and gradients: float32,
the order of a few additions. Counts are exact; of a token with NaN scores the hits are any (its shares are NaN). The same bits each time.
"""
import jax
import jax.numpy as jnp

from pallas_kernels.gate import kernel, reference
from pallas_kernels.gate.reference import Rule
from pallas_kernels.target import choose


def _job(backward: bool, logits: jax.Array, rule: Rule) -> kernel.Job:
    """Raises ValueError on other than floats [B, T, E], and on a rule that E experts cannot follow."""
    if logits.ndim != 3 or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(f"logits {logits.dtype}{logits.shape}: must be floats [B, T, E]")
    E = logits.shape[-1]
    if E % rule.n_groups or not 1 <= rule.n_chosen <= E // rule.n_groups * rule.n_kept:
        raise ValueError(f"{rule} of {E} experts: must be equal groups, and no more chosen than in those kept")
    return kernel.Job(backward, *logits.shape, rule)


def _check(logits: jax.Array, **others: tuple) -> None:
    """Raises ValueError where an array (array, shape, kind of dtype) is not as told."""
    for name, (x, shape, kind) in others.items():
        if x.shape != shape or not jnp.issubdtype(x.dtype, kind):
            raise ValueError(f"{name} {x.dtype}{x.shape}: must be {kind.__name__}{shape}, for logits {logits.shape}")


def takes_kernel(logits: jax.Array, rule: Rule, implementation: str = "auto") -> bool:
    """Whether these logits [B, T, E] go to the kernel, in both directions."""
    return choose("gate", implementation, kernel.unfit(_job(False, logits, rule), logits.dtype.name)) == "kernel"


def route(
    logits: jax.Array, bias: jax.Array | None, valid: jax.Array, rule: Rule, *, implementation: str = "auto"
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """logits [B, T, E], bias of floats [E] or None, valid bool [B, T] -> (experts i32 [B, T, K], the best first; weights [B, T, K];
    sums [B, 3, E]), both float32 (float64 for float64). The sums are those over a sequence's valid tokens of: being chosen (load), being of
    the top K of the unbiased scores (hits), s / sum of s (shares). Raises ValueError on other shapes and dtypes."""
    job, (B, T, E) = _job(False, logits, rule), logits.shape
    _check(logits, valid=(valid, (B, T), jnp.bool_), **({} if bias is None else dict(bias=(bias, (E,), jnp.floating))))
    if not takes_kernel(logits, rule, implementation):
        return reference.route(logits, bias, valid, rule)
    experts, weights, partials = kernel.run(job, logits, valid.astype(jnp.int32), *(() if bias is None else (bias.astype(jnp.float32),)))
    return experts, weights, jnp.sum(partials, axis=1)


def route_backward(
    logits: jax.Array, experts: jax.Array, valid: jax.Array, d_weights: jax.Array, d_shares: jax.Array, rule: Rule, *,
    implementation: str = "auto"
) -> jax.Array:
    """logits, valid and the experts chosen, as `route` has them; gradients of the weights [B, T, K] and of the shares [B, E], in their
    dtype -> d_logits [B, T, E] in that dtype. Raises ValueError on other shapes and dtypes."""
    job, (B, T, E), wide = _job(True, logits, rule), logits.shape, jnp.float64 if logits.dtype == jnp.float64 else jnp.float32
    of_tokens = (B, T, rule.n_chosen)
    _check(logits, valid=(valid, (B, T), jnp.bool_), experts=(experts, of_tokens, jnp.integer), d_weights=(d_weights, of_tokens, wide),
           d_shares=(d_shares, (B, E), wide))
    if not takes_kernel(logits, rule, implementation):
        return reference.route_backward(logits, experts, valid, d_weights, d_shares, rule)
    return kernel.run(job, logits, valid.astype(jnp.int32), experts.astype(jnp.int32), d_weights, d_shares)[0]
