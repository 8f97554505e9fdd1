"""What a model costs to run and to compile (slow: -m slow -s prints the figures)."""
import time

import jax
import jax.numpy as jnp
import pytest
from tiny_model import init, tiny

from model import transformer
from model.config import Execution


def step_of(cfg, run):
    def loss(params, tokens):
        return jnp.mean(jax.nn.logsumexp(transformer.apply(params, tokens, cfg, run=run)[0].logits, axis=-1))

    return jax.jit(jax.grad(loss))


@pytest.mark.slow
def test_sixty_four_experts_cost_what_eight_do():
    cost, seconds = {}, {}
    tokens = jnp.zeros((16, 256), jnp.int32) + jnp.arange(256, dtype=jnp.int32)[None] % 61
    for n in (8, 64):
        cfg = tiny(ffn__moe__n_routed_experts=n, ffn__moe__n_activated_experts=4, ffn__moe__groups__kind="none", mtp_depth=0, n_layers=2,
                   n_dense_layers=1, d_model=128, ffn__moe__d_expert=128)
        params, step = init(cfg), step_of(cfg, Execution(experts="block", scan_unroll=2))
        cost[n] = step.lower(params, tokens).compile().cost_analysis()["flops"]
        jax.block_until_ready(step(params, tokens))
        times = []
        for _ in range(5):
            began = time.perf_counter()
            jax.block_until_ready(step(params, tokens))
            times.append(time.perf_counter() - began)
        seconds[n] = min(times)
    print(f"64 experts over 8, 16,384 routed rows: FLOPs {cost[64] / cost[8]:.2f}, wall time {seconds[64] / seconds[8]:.2f}")
    assert cost[64] / cost[8] < 1.3


@pytest.mark.slow
def test_depth_does_not_cost_compile_time():
    seconds, cache = {}, jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        for n in 2 * (4, 32):  # twice: the first warms up
            cfg = tiny(n_layers=n, n_dense_layers=1, mtp_depth=0)
            shapes = jax.eval_shape(lambda cfg=cfg: init(cfg))
            jax.clear_caches()
            began = time.process_time()
            step_of(cfg, Execution()).lower(shapes, jax.ShapeDtypeStruct((4, 32), jnp.int32)).compile()
            seconds[n] = min(seconds.get(n, 1e9), time.process_time() - began)
    finally:
        jax.config.update("jax_compilation_cache_dir", cache)
    print("trace + compile, processor seconds:", {n: round(t, 2) for n, t in seconds.items()})
    assert seconds[32] / seconds[4] < 1.1  # with one dense layer: of loops of two turns XLA makes less
