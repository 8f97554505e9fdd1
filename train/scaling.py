"""Job `scaling`: the same step on several devices. Parts, by `scaling.parts`, each a table and a key of scaling.json:

equality: config.model at `equality.n_layers` layers, trained on one device and on each mesh of `scaling.meshes`, same rows, same
tokens: the largest relative difference of loss and gradient norm over the steps, the relative distance of the parameters after the
last, the (token, expert) choices that differ at the first. The steps are a training's first: new rows each, the rate warming up.
Beside the meshes stands one device with its rows in another order: what rounding alone does. Float32 products are exact ones there
('highest', no TF32).
throughput: config.model as it stands; `speed.batch_size` rows A DEVICE. Efficiency = tokens/s over n times those of one device; the
shares of a step (train/profile.py); memory as the compiler counts it; collectives of the compiled program.
exchange: dispatch and combine of one MoE layer with experts that do nothing, and the bare collectives of equal bytes. A GB/s is
of bytes that leave one device.
"""
from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import json
import pathlib
import re
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from model import config as model_config
from model import expert_parallel, sharding
from model.errors import choice, freeze, require
from model.tape import LayerTape
from train import optimizer as optimizers
from train import profile
from train import state as states
from train.metrics import prepare_workdir, table
from train.pretrain import loss_of
from train.speed import Speed
from train.step import compile_step, make_train_step

# (steps, largest relative difference of loss, of the gradient norm, of the parameters); None: shown, not held to anything
REORDERED = "one, rows reversed"
TOLERANCES = {"fp32": (3, 1e-5, 1e-5, 1e-5), "bf16": (20, 5e-3, 1e-2, None), "fp8_block": (20, 5e-3, 5e-2, None)}


@dataclasses.dataclass(frozen=True)
class Equality:
    """The model's widths at n_layers layers; rows of seq_len tokens, batch_size over all devices; kinds of run.precision."""

    precisions: tuple
    n_layers: int
    batch_size: int
    seq_len: int

    def __post_init__(self):
        for kind in self.precisions:
            choice(kind, TOLERANCES, "precisions")


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Tokens a device times their width, in bf16, sent round `repeats` times."""

    rows: tuple
    widths: tuple
    repeats: int


@dataclasses.dataclass(frozen=True)
class Scaling:
    """parts: of PARTS. meshes: 'fsdp=-1', 'expert=2,fsdp=-1', ..., as in config.mesh. trace: steps of the profile (0: none)."""

    parts: tuple
    meshes: tuple
    trace: int
    equality: Equality
    exchange: Exchange

    def __post_init__(self):
        for part in self.parts:
            choice(part, PARTS, "parts")
        for text in self.meshes:
            require(isinstance(text, str) and re.fullmatch(r"(\w+=-?\d+)(,\w+=-?\d+)*", text), "meshes", text,
                    "strings such as 'expert=2,fsdp=-1'")
            for axis in re.findall(r"(\w+)=", text):
                choice(axis, sharding.MESH_AXES, "meshes")


class Program(NamedTuple):
    """A compiled training step: start() -> a fresh state; run(state, batch) -> (state, metrics)."""

    start: Callable
    batch: dict
    run: Callable
    compiled: Any
    compile_s: float


def scaling(config, workdir: str) -> dict:
    """The job; prints the tables of its parts and writes scaling.json. Raises UserError if a part finds what it must not."""
    path = pathlib.Path(prepare_workdir(workdir, config))
    spec = parse(config)
    device = jax.devices()[0]
    result = dict(device=device.device_kind, n_devices=len(jax.devices()), jax=jax.__version__)
    print(f"{result['n_devices']} x {device.device_kind} ({device.platform}), jax {jax.__version__}")
    failed = []
    for part in spec.parts:
        result[part], text, wrong = PARTS[part](config, spec, path)
        failed += wrong
        print(text, flush=True)
        (path / "scaling.json").write_text(json.dumps(result, indent=1) + "\n")  # what a limit of time cuts off stays
    require(not failed, "scaling", "; ".join(failed), "equality within the tolerances")
    return result


def parse(config) -> Scaling:
    """Freezes config.scaling."""
    sub = config.scaling
    return freeze(Scaling, sub, "scaling", equality=freeze(Equality, sub.equality, "scaling.equality"),
                  exchange=freeze(Exchange, sub.exchange, "scaling.exchange"))


def mesh_of(text: str):
    """The mesh of 'expert=2,fsdp=-1' over this machine's devices; '' is one device alone."""
    sizes = dict.fromkeys(sharding.MESH_AXES, 1) | {axis: int(n) for axis, n in re.findall(r"(\w+)=(-?\d+)", text)}
    return sharding.make_mesh(sizes, jax.devices() if text else jax.devices()[:1])


def program(cfg, run, optimizer, mesh, batch: dict, seed: int) -> Program:
    """The step compiled for a mesh, nothing run yet: the same weights on every mesh. Call it under the mesh."""
    key = jax.random.key(seed)
    create = lambda key: states.create(key, cfg, optimizer)  # noqa: E731
    shapes = jax.eval_shape(create, key)
    layout = states.shardings(mesh, cfg, shapes, optimizer.layout)
    shapes = jax.tree.map(lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, layout)
    columns = jax.NamedSharding(mesh, jax.P(None, *sharding.spec(("batch",))))
    placed = {k: jax.device_put(v, jax.NamedSharding(mesh, jax.P()) if k == "knobs" else columns) for k, v in batch.items()}
    step = compile_step(make_train_step(cfg, run, optimizer, loss_of(cfg.mtp_depth)), mesh, layout)
    fresh = jax.jit(create, out_shardings=layout).lower(key).compile()
    began = time.perf_counter()
    compiled = step.jitted.lower(shapes, placed, key).compile()
    return Program(lambda: fresh(key), placed, lambda state, batch: compiled(state, batch, key), compiled, time.perf_counter() - began)


def random_batch(vocab_size: int, n_rows: int, seq_len: int, seed: int = 0, skew: float = 1.0, lr: float = 1e-4) -> dict:
    """One micro-batch of random tokens [1, n_rows, seq_len], its weights, and the knobs of a step. skew above 1: low ids are frequent."""
    tokens = (vocab_size * np.random.default_rng(seed).random((1, n_rows, seq_len)) ** skew).astype(np.int32)
    weight = np.ones(tokens.shape, np.float32)
    weight[..., 0] = 0
    knobs = dict(lr=lr, clip=1.0, mtp_weight=0.3, bias_rate=1e-3)
    return dict(tokens=tokens, weight=weight, knobs={k: np.float32(v) for k, v in knobs.items()})


def equality(config, spec: Scaling, path: pathlib.Path) -> tuple[list[dict], str, list[str]]:
    """The table of equality: (rows, text, what is out of tolerance)."""
    e, rows, wrong = spec.equality, [], []
    model = dict(config.model.to_dict(), n_layers=e.n_layers)
    model["n_dense_layers"] = min(model["n_dense_layers"], e.n_layers - 1)
    cfg, optimizer = model_config.parse(model), optimizers.parse(config.optimizer)
    batch = random_batch(cfg.vocab_size, e.batch_size, e.seq_len)
    runs = {kind: dataclasses.replace(model_config.parse_run(config.run), precision=model_config.precision.Precision(kind))
            for kind in e.precisions}

    def compiled(kind: str, text: str) -> Program:
        mesh = mesh_of(text)
        with jax.set_mesh(mesh), jax.default_matmul_precision("highest" if kind == "fp32" else "default"):
            return program(cfg, runs[kind], optimizer, mesh, batch, config.seed)

    with concurrent.futures.ThreadPoolExecutor() as pool:  # compiling is most of the time here; programs run one by one
        programs = {(kind, text): pool.submit(compiled, kind, text) for kind in e.precisions for text in ("", *spec.meshes)}
    for kind in e.precisions:
        n_steps, *limits = TOLERANCES[kind]
        seen = [random_batch(cfg.vocab_size, e.batch_size, e.seq_len, step, skew=4.0, lr=1e-4 * (step + 1) / n_steps)
                for step in range(n_steps)]
        alone = programs.pop((kind, "")).result()
        one, turned = trajectory(alone, seen), trajectory(alone, [b | {k: b[k][:, ::-1] for k in ("tokens", "weight")} for b in seen])
        del alone
        others = {text: trajectory(programs.pop((kind, text)).result(), seen) for text in spec.meshes}
        for text, other in (others | {REORDERED: turned}).items():
            found = dict(
                loss=largest(other["loss"], one["loss"]), grad_norm=largest(other["grad_norm"], one["grad_norm"]),
                params=np.sqrt(sum(np.sum((a - b) ** 2) for a, b in zip(other["params"], one["params"], strict=True))
                               / sum(np.sum(b ** 2) for b in one["params"])),
                flips=None if one["load"] is None else float(np.abs(other["load"] - one["load"]).sum() / 2))
            rows.append(dict(precision=kind, mesh=text, steps=n_steps, **found))
            wrong += [f"{kind} on {text}: {name} differs by {found[name]:.1e}, allowed {limit:g}"
                      for name, limit in zip(("loss", "grad_norm", "params"), limits, strict=True)
                      if text != REORDERED and limit is not None and not found[name] <= limit]
    title = f"against one device, {e.batch_size} x {e.seq_len} tokens, {e.n_layers} layers (largest relative difference over the steps)"
    columns = ("precision", "mesh", "steps", "loss", "gradient norm", "parameters after", "choices that differ at step 1")
    text = table(title, columns, [(*(r[k] for k in ("precision", "mesh", "steps")),
                                   *(f"{r[k]:.1e}" for k in ("loss", "grad_norm", "params")), r["flips"]) for r in rows])
    return [{k: float(v) if isinstance(v, np.floating) else v for k, v in r.items()} for r in rows], text, wrong


def trajectory(made: Program, batches: list[dict]) -> dict:
    """What a step on each of the batches gave: loss and grad_norm of each, load of the first, the parameters after the last (float64)."""
    state, seen = made.start(), []
    for batch in batches:
        state, metrics = made.run(state, jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), batch, made.batch))
        seen.append(jax.device_get(metrics))
    params = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(jax.device_get(state.params))]
    return dict(loss=[m["loss"] for m in seen], grad_norm=[m["grad_norm"] for m in seen], load=seen[0].get("moe/load"), params=params)


def largest(found: list, wanted: list) -> float:
    """The largest relative difference of two series; infinite where one is not finite."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    return float(np.max(np.nan_to_num(np.abs(found - wanted) / np.abs(wanted), nan=np.inf)))


def throughput(config, spec: Scaling, path: pathlib.Path) -> tuple[list[dict], str, list[str]]:
    """The table of speeds by mesh, one device first."""
    size = freeze(Speed, config.speed, "speed")
    cfg, run, optimizer = model_config.parse(config.model), model_config.parse_run(config.run), optimizers.parse(config.optimizer)
    rows = []
    for text in ("", *spec.meshes):
        mesh = mesh_of(text)
        n_rows = size.batch_size * mesh.size
        with jax.set_mesh(mesh):
            made = program(cfg, run, optimizer, mesh, random_batch(cfg.vocab_size, n_rows, size.seq_len), config.seed)
            state, times = made.start(), []
            for n in (3, *[size.repeats] * 5):  # sent off one after the other, as the training loop does; the first three warm up
                began = time.perf_counter()
                for _ in range(n):
                    state, metrics = made.run(state, made.batch)
                jax.block_until_ready((state, metrics))
                times.append((time.perf_counter() - began) / n)
            require(bool(np.isfinite(metrics["loss"])), f"scaling on {text or 'one device'}", "a loss that is not finite", "finite numbers")
            kept = path / f"{re.sub('[^a-z0-9]+', '-', text or 'one')}.xplane.pb"
            shares = profile.of(functools.partial(steps, made, state, spec.trace), kept) if spec.trace else {}
            del state
        per_s = n_rows * size.seq_len / statistics.median(times[1:])
        memory = made.compiled.memory_analysis()
        rows.append(dict(
            mesh=text or "one device", n_devices=mesh.size, tokens_per_s=per_s, step_ms=1e3 * statistics.median(times[1:]),
            efficiency=per_s / mesh.size / (rows[0]["tokens_per_s"] if rows else per_s / mesh.size), shares=shares,
            gib=(memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**30, compile_s=made.compile_s,
            collectives=collectives(made.compiled.as_text())))
        print(f"  {rows[-1]}", flush=True)
        del made
    title = f"{run.precision.kind}, {size.batch_size} x {size.seq_len} tokens a device"
    columns = ("mesh", "tokens/s", "efficiency", "ms a step", "computing", "hidden comm.", "exposed comm.", "idle", "GiB", "compile s")
    percent = lambda shares, name: f"{100 * shares[name]:.1f} %" if shares else "-"  # noqa: E731
    text = table(title, columns, [(r["mesh"], f"{r['tokens_per_s']:,.0f}", f"{100 * r['efficiency']:.1f} %", f"{r['step_ms']:.1f}",
                                   *(percent(r["shares"], k) for k in ("computing", "hidden", "exposed", "idle")), f"{r['gib']:.1f}",
                                   f"{r['compile_s']:.0f}") for r in rows])
    return rows, text, []


def steps(made: Program, state, n: int):
    """n steps, sent off one after the other."""
    for _ in range(n):
        state, metrics = made.run(state, made.batch)
    return metrics


def collectives(text: str) -> dict[str, int]:
    """How often each collective stands in a compiled program; '-start' where it is asynchronous (a loop's body counts once)."""
    found = re.findall(r" ((?:ragged-)?all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute)(-start)?\(", text)
    names = [kind + start for kind, start in found]
    return {name: names.count(name) for name in sorted(set(names))}


def exchange(config, spec: Scaling, path: pathlib.Path) -> tuple[list[dict], str, list[str]]:
    """Dispatch and combine over the expert axis of all devices, beside bare collectives."""
    e, mesh, rows = spec.exchange, mesh_of("expert=-1"), []
    n, cfg, run = mesh.size, model_config.parse(config.model), model_config.parse_run(config.run)
    if n == 1 or cfg.moe is None or cfg.moe.n_routed_experts % n:
        return [], "exchange: needs several devices, and routed experts that divide over them", []
    E, K = cfg.moe.n_routed_experts, cfg.moe.n_activated_experts
    split = jax.P("expert")

    def on_each(body):
        return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=split, out_specs=split))

    ring = [(i, (i + 1) % n) for i in range(n)]
    permute = on_each(lambda x: jax.lax.ppermute(x, "expert", ring))
    all_to_all = on_each(lambda x: jax.lax.all_to_all(x, "expert", 0, 0, tiled=True))
    gather = on_each(lambda x: jax.lax.all_gather(x, "expert", tiled=True))
    scatter = on_each(lambda x: jax.lax.psum_scatter(x, "expert", tiled=True))

    @jax.jit
    def whole(x, weights, experts, up, down):
        weigh = lambda _: (weights, None)  # noqa: E731
        return expert_parallel.apply(lambda rows, *_: rows, (weigh,), (), x, experts, up, down, cfg, run, LayerTape())[0]

    for width in e.widths:
        for m in e.rows:
            def array(*shape, dtype=jnp.bfloat16):
                return jax.device_put(jnp.ones((n * shape[0], *shape[1:]), dtype), jax.NamedSharding(mesh, split))

            x, sent = array(m, width), (n - 1) * m * width * 2
            chosen = np.random.default_rng(0).random((n * m, E)).argsort(axis=1)[:, :K].astype(np.int32)
            chosen = jax.device_put(chosen, jax.NamedSharding(mesh, split))
            weights, nothing = array(m, K, dtype=jnp.float32) / K, array(E // n, 1, 1)
            with jax.set_mesh(mesh):
                cases = {
                    "bare ppermute": (permute, (array((n - 1) * m, width),), sent),
                    "all_to_all of equal bytes": (all_to_all, (array(n * m, width),), sent),
                    "all_gather (of dispatch)": (gather, (x,), sent),
                    "psum_scatter (of combine)": (scatter, (array(n * m, width),), sent),
                    "dispatch + combine": (whole, (x, weights, chosen, nothing, nothing), 2 * sent),
                }
                for name, (function, arguments, size) in cases.items():
                    seconds = timed(function, arguments, e.repeats)
                    rows.append(dict(what=name, rows=m, width=width, mib=size / 2**20, us=1e6 * seconds, gb_per_s=size / seconds / 1e9))
    text = table(f"exchange over expert={n}, bf16, {E} experts, {K} a token (bytes that leave a device)",
                 ("what", "tokens a device", "width", "MiB", "us", "GB/s"),
                 [(r["what"], r["rows"], r["width"], f"{r['mib']:.0f}", f"{r['us']:.0f}", f"{r['gb_per_s']:.1f}") for r in rows])
    return rows, text, []


def timed(function: Callable, arguments: tuple, repeats: int) -> float:
    """Seconds a call, of calls sent off one after the other; the best of three turns."""
    jax.block_until_ready(function(*arguments))
    turns = []
    for _ in range(3):
        began = time.perf_counter()
        for _ in range(repeats):
            out = function(*arguments)
        jax.block_until_ready(out)
        turns.append((time.perf_counter() - began) / repeats)
    return min(turns)


PARTS = {"equality": equality, "throughput": throughput, "exchange": exchange}
