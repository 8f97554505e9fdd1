"""Job `speed`: tokens a second of training and of generation for a model and a machine, model FLOPs utilisation, memory, time by part.

Random tokens and weights; times are medians after a warm-up. Training: five turns of `repeats` steps sent off one after the other, as the
training loop does; the rest: repeats, each ended by a wait for the result. MFU = tokens/s times the
formula's FLOPs a token (causal, MTP included) over `peak_tflops`; 0 leaves it out. The parts are timed one by one as jitted
gradients of the model's own functions, so that their sum may differ from the whole.
"""
from __future__ import annotations

import dataclasses
import json
import pathlib
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from model import block, precision, sharding, transformer
from model import config as model_config
from model.errors import freeze, require
from model.tape import LayerTape
from train import optimizer as optimizers
from train import profile, sampler
from train import state as states
from train.cross_entropy import token_logp
from train.metrics import prepare_workdir, table
from train.pretrain import loss_of
from train.step import compile_step, make_train_step


@dataclasses.dataclass(frozen=True)
class Speed:
    """config.speed: the batch, the repeats, the generation (gen_batch 0: none), the peak for MFU, whether parts are timed (0, 1), how many
    steps are traced for the table of kernels (0: none; a GPU's)."""

    batch_size: int
    seq_len: int
    repeats: int
    gen_batch: int
    gen_prompt: int
    gen_new: int
    peak_tflops: float
    parts: int
    trace: int

    def __post_init__(self):
        for name in ("batch_size", "seq_len", "repeats"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "a positive integer")


def speed(config, workdir: str) -> dict:
    """The job; prints one JSON line and a table of parts, and writes both as speed.json."""
    path = prepare_workdir(workdir, config)
    spec, cfg, run = freeze(Speed, config.speed, "speed"), model_config.parse(config.model), model_config.parse_run(config.run)
    optimizer, mesh = optimizers.parse(config.optimizer), sharding.make_mesh(config.mesh)
    key, device = jax.random.key(config.seed), jax.devices()[0]
    with jax.set_mesh(mesh):
        layout = states.shardings(mesh, cfg, jax.eval_shape(lambda k: states.create(k, cfg, optimizer, run), key), optimizer.layout)
        state = jax.jit(lambda k: states.create(k, cfg, optimizer, run), out_shardings=layout)(key)
        parts = time_parts(state, cfg, run, optimizer, spec) if spec.parts else {}
        tokens_per_s, first, state = time_training(state, cfg, run, optimizer, mesh, layout, spec, path / "step.xplane.pb")
        result = dict(device=device.device_kind, n_devices=mesh.size, params=cfg.num_params()["total"], precision=run.precision.kind,
                      train_tokens_per_s=round(tokens_per_s, 1), first_step_s=round(first, 2))
        if spec.peak_tflops:
            flops = cfg.flops_per_token(spec.seq_len)
            per_token = flops["training"] + flops["mtp_training"]
            result["mfu"] = round(tokens_per_s * per_token / (mesh.size * spec.peak_tflops * 1e12), 4)
        memory = device.memory_stats() or {}
        if "peak_bytes_in_use" in memory:
            result["peak_gib"] = round(memory["peak_bytes_in_use"] / 2**30, 2)
        if spec.gen_batch:
            result["generate_tokens_per_s"] = round(time_generation(state.params, state.router_bias, cfg, run, spec), 1)
    (pathlib.Path(path) / "speed.json").write_text(json.dumps(result | {"parts_ms": parts}, indent=1) + "\n")
    if parts:
        print(table("time by part, ms a step", ("part", "ms"), parts.items()))
    print(json.dumps(result))
    return result


def time_training(state, cfg, run, optimizer, mesh, layout, spec: Speed, trace: pathlib.Path):
    """(tokens/s, seconds of the first step, state): the whole step as a training job runs it."""
    rng = np.random.default_rng(0)
    weight = np.ones((1, spec.batch_size, spec.seq_len), np.float32)
    weight[..., 0] = 0
    batch = dict(tokens=rng.integers(0, cfg.vocab_size, weight.shape, np.int32), weight=weight,
                 knobs={k: np.float32(v) for k, v in dict(lr=1e-4, clip=1.0, mtp_weight=0.3, bias_rate=1e-3).items()})
    step = compile_step(make_train_step(cfg, run, optimizer, loss_of(cfg.mtp_depth)), mesh, layout)
    times = []
    for n in (1, 2, *[spec.repeats] * 5):  # the first step compiles, two more warm up
        began = time.perf_counter()
        for _ in range(n):
            state, metrics = step(state, batch, jax.random.key(0))
        jax.block_until_ready((state, metrics))
        times.append((time.perf_counter() - began) / n)
    require(bool(np.isfinite(metrics["loss"])), "speed", "a loss that is not finite", "finite numbers")
    if spec.trace:
        state = traced(step, state, batch, spec.trace, trace)
    return spec.batch_size * spec.seq_len / statistics.median(times[2:]), times[0], state


def traced(step, state, batch, n: int, kept: pathlib.Path):
    """Prints milliseconds a step by kind of kernel, from a trace of n steps that stays in `kept`; the state after them."""
    def steps():
        nonlocal state
        for _ in range(n):
            state, metrics = step(state, batch, jax.random.key(0))
        return metrics

    profile.take(steps, kept)
    rows = [(kind, f"{ms / n:.2f}", round(launches / n)) for kind, (ms, launches) in profile.kernels(profile.read(kept)).items()]
    print(table("time by kernel, a step", ("kernel", "ms", "launches"), rows[:16]))
    return state


def time_generation(params, router_bias, cfg, run, spec: Speed) -> float:
    """Generated tokens/s of a whole rollout, prefill included, greedy, without a stop."""
    prompts = jnp.ones((spec.gen_batch, spec.gen_prompt), jnp.int32)
    lengths = jnp.full(spec.gen_batch, spec.gen_prompt, jnp.int32)
    ids = jnp.stack([jnp.arange(spec.gen_batch), jnp.zeros(spec.gen_batch, jnp.int32)], axis=1).astype(jnp.int32)

    def once() -> float:
        began = time.perf_counter()
        out = sampler.generate(params, router_bias, prompts, lengths, ids, 0, 0, cfg, run, max_new=spec.gen_new, temperature=0.0,
                               top_p=1.0, stop_ids=())
        jax.block_until_ready(out.tokens)
        return time.perf_counter() - began

    once()
    return spec.gen_batch * spec.gen_new / statistics.median(once() for _ in range(max(3, spec.repeats // 3)))


def time_parts(state, cfg, run, optimizer, spec: Speed) -> dict[str, float]:
    """Milliseconds a step of each part: forward and backward of a block's parts times its layers, head and loss, optimizer."""
    prepared = precision.prepare(state.params, run)
    dtype = run.precision.dtype or jnp.float32
    x = jax.random.normal(jax.random.key(1), (spec.batch_size, spec.seq_len, cfg.d_model), dtype)
    layout, valid = transformer.layout_of(*x.shape[:2], dict(positions=None, segment_ids=None), cfg, dtype)
    parts: dict[str, float] = {}

    def add(name: str, function: Callable, params, n: int) -> None:
        def gradient(params, x):
            return jax.grad(lambda p, x: jnp.sum(jnp.sin(function(precision.with_masters(params, p), x).astype(jnp.float32))),
                            argnums=(0, 1))(masters(params), x)

        parts[name] = n * milliseconds(jax.jit(gradient), spec.repeats, params, x)

    def masters(params):
        return jax.tree.map(lambda w: w.master if precision.is_weight(w) else w, params, is_leaf=precision.is_weight)

    def first(stack):
        return jax.tree.map(lambda leaf: leaf[0], prepared[stack])

    attention = cfg.attention.module(cfg, run)
    stack = "moe" if "moe" in prepared else "dense"
    add("attention", lambda p, x: attention.apply({"params": p}, x, layout, None, LayerTape())[0], first(stack)["attention"], cfg.n_layers)
    if "dense" in prepared:
        dense = block.Block(cfg.dense(), run)
        add("dense blocks, whole", lambda p, x: dense.apply({"params": p}, x, layout, None, valid, None, LayerTape())[0], first("dense"),
            cfg.n_dense_layers)
    if "moe" in prepared:
        experts = block.MoEFFN(cfg, run)
        add("experts (gate, dispatch, routed, shared, combine)",
            lambda p, x: experts.apply({"params": p}, x, x, None, valid, LayerTape())[0], first("moe")["moe"], cfg.n_moe_layers)
    tokens = jnp.zeros(x.shape[:2], jnp.int32)

    def head_loss(outer, x):
        return token_logp(transformer.head(outer, x), tokens)

    add("head and loss", head_loss, {"head": state.params["head"]}, 1)
    grads = jax.tree.map(jnp.ones_like, state.params)
    update = jax.jit(lambda g, o, p: optimizer.update(g, o, p, jnp.float32(1e-4), jnp.float32(1.0)))
    parts["optimizer"] = milliseconds(update, spec.repeats, grads, state.opt_state, state.params)
    return parts


def milliseconds(function: Callable, repeats: int, *args) -> float:
    """The median time of a jitted call."""
    jax.block_until_ready(function(*args))
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times)
