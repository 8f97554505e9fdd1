"""Every op once at a small ragged size against its reference, one line each: `python -m pallas_kernels.selfcheck`.

On a Hopper GPU that is our kernels, short enough to run under compute-sanitizer; elsewhere the reference against itself.
"""
import functools
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from pallas_kernels import fp8_matmul, grouped_fp8_matmul, grouped_matmul, quantize
from pallas_kernels.cross_entropy import log_probability_backward, log_sum_exp
from pallas_kernels.gate import route, route_backward
from pallas_kernels.gate.reference import Rule
from pallas_kernels.latent_norm import latent_norm, latent_norm_backward
from pallas_kernels.norm import rms_norm, rms_norm_backward
from pallas_kernels.rows import gather, gather_sum, weighted_backward
from pallas_kernels.target import is_hopper

TOLERANCE = 4e-3  # relative norm: bf16's rounding; of quantised values a bit of the fused activation's exponential


def _cases() -> Iterator[tuple]:
    """(name, op, operands, keyword arguments)."""
    x, w, h = (jax.random.normal(jax.random.key(i), s).astype(jnp.bfloat16)
               for i, s in enumerate(((400, 384), (4, 272, 384), (400, 272))))
    tiles = functools.partial(quantize.quantize_tiles, implementation="reference")
    rows, blocks = tiles(x), tiles(w, (128, 128))
    x_columns, h_columns = (tiles(v[:384], (128, 1)) for v in (x, h))
    block = blocks[0][0], blocks[1][0]
    some, whole = jnp.array([130, 0, 67, 190], jnp.int32), jnp.array([128, 0, 256, 0], jnp.int32)
    room = [v.reshape(4, 100, -1) for v in rows]
    dense, total = jnp.ones((272, 384)), jnp.ones((4, 272, 384))
    yield "quantise, 1x128", quantize.quantize_tiles, (x,), {}
    yield "quantise, 1x128 and 128x1", quantize.quantize_both, (x,), {}
    yield "quantise, 128x128 and transpose", quantize.quantize_weight, (w,), {}
    yield "quantise, E5M6", quantize.quantize_tiles, (x,), dict(format="e5m6", power_of_two=True)
    yield "quantise, 1x128 to 128x1", quantize.requantize_tiles, rows, {}
    yield "SwiGLU and 1x128", quantize.swiglu_quantize, (x[:, :256],), {}
    yield "SwiGLU from FP8 and 128x1", quantize.swiglu_quantize, (rows[0][:, :256], rows[1][:, :2]), dict(tile=(128, 1))
    yield "SwiGLU weighted and 128x1", quantize.swiglu_quantize, (x[:, :256],), dict(tile=(128, 1), weights=jnp.linspace(-1, 1, 400))
    yield "SwiGLU, backward", quantize.swiglu_gradient, (x[::-1, :128], x[:, :256], jnp.linspace(-1, 1, 400)), {}
    heads = w.reshape(272, 2, 768)[:, :, :192], w.reshape(272, 2, 768)[:, :, 192:320]
    yield "heads cut, 1x128 and 128x1", quantize.quantize_heads, (heads,), dict(widths=(128, 128))
    rotation = jnp.cos(jnp.ones((272, 32))), jnp.sin(jnp.ones((272, 32)))
    yield "heads rotated, 1x128 and 128x1", quantize.quantize_rotated_back, (heads[0], *rotation), {}
    yield "FP8 product", fp8_matmul.matmul, (*rows, *block), {}
    yield "FP8 product, 64 rows", fp8_matmul.matmul, (*(v[:64] for v in rows), *block), {}
    yield "FP8 weight gradient", fp8_matmul.weight_gradient, (*h_columns, *x_columns), dict(accumulate=dense)
    yield "FP8 grouped", grouped_fp8_matmul.grouped_matmul, (*rows, *blocks, some), {}
    yield "FP8 masked", grouped_fp8_matmul.masked_matmul, (*room, *blocks, jnp.array([100, 0, 3, 64], jnp.int32)), {}
    yield "FP8 grouped weight gradient", grouped_fp8_matmul.weight_gradient, (*h_columns, *x_columns, whole), dict(accumulate=total)
    yield "bf16 grouped", grouped_matmul.matmul, (x, w, some), {}
    yield "bf16 grouped and SwiGLU", grouped_matmul.matmul_swiglu, (x, w[:, :256].reshape(4, 2, 128, 384), some), {}
    yield "bf16 grouped dgrad", grouped_matmul.dgrad, (h, w, some), {}
    source = jnp.arange(500, dtype=jnp.int32) * 7 % 450 - 9  # some of no row
    position, weights = source.reshape(125, 4), jnp.linspace(-1, 1, 500)
    yield "rows gathered", gather, (x, source), {}
    yield "rows gathered and added", gather_sum, (x, position, weights.reshape(125, 4)), {}
    yield "rows gathered and added to two", gather_sum, (x, position, weights.reshape(125, 4), (x[:125], x[-125:])), {}
    yield "rows added, backward", weighted_backward, (x[::-1], jnp.tile(x, (2, 1))[:500], source, weights), {}
    yield "norm of a sum", rms_norm, (x, jnp.linspace(-1, 1, 384)), dict(eps=1e-6, delta=x[::-1])
    yield "norm, backward", rms_norm_backward, (x, jnp.linspace(-1, 1, 384), x[::-1], x[:, ::-1]), dict(eps=1e-6)
    scales = jnp.linspace(-1, 1, 264), jnp.linspace(2, 1, 96)
    yield "norm of latents", latent_norm, (x, scales), dict(eps=1e-6)
    yield "norm of latents, backward", latent_norm_backward, (x, scales, (x[:, 120:], x[::-1, :96]), x[::-1, :24]), dict(eps=1e-6)
    log_z, targets = log_sum_exp(x, implementation="reference"), source[:400] % 384
    yield "log Z", log_sum_exp, (x,), {}
    yield "log probability, backward", log_probability_backward, (x, targets, log_z, weights[:400]), {}
    logits, valid, rule = x.astype(jnp.float32).reshape(4, 100, 384), (source[:400] % 7 > 0).reshape(4, 100), Rule(
        8, "sigmoid", "normalised", 2.5, 8, 4, "top2_sum")
    experts, expert_weights, sums = route(logits, None, valid, rule, implementation="reference")
    yield "gate", route, (logits, jnp.full(384, 0.5), valid), dict(rule=rule)
    yield "gate, backward", route_backward, (logits, experts, valid, jnp.sin(expert_weights * 9), sums[:, 1] / 100), dict(rule=rule)
    yield "bf16 grouped weight gradient", grouped_matmul.weight_gradient, (h[:384], x[:384], whole), dict(accumulate=total)


def check() -> list[tuple[str, float]]:
    """(op, relative norm error against the reference) of every op, each printed as it is known."""
    flat = lambda out: jnp.concatenate([leaf.astype(jnp.float32).ravel() for leaf in jax.tree.leaves(out)])  # noqa: E731
    ours, errors = "kernel" if is_hopper() else "reference", []
    for name, op, operands, what in _cases():
        got, want = (flat(jax.jit(functools.partial(op, implementation=i, **what))(*operands)) for i in (ours, "reference"))
        errors.append((name, float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))))
        print(f"{name:32s} {errors[-1][1]:.1e}", flush=True)
    return errors


if __name__ == "__main__":
    sys.exit(any(not error < TOLERANCE for _, error in check()))
