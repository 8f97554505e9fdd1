"""Job `plan`: what a run would need on each device of any mesh, by formula and without the devices; and, if asked, its step compiled.

State is counted leaf by leaf from the shapes and the one table of layouts (exact); activations by the formula of `kept_bytes`: what
the backward needs a token and layer, each tensor once, a lower bound (autodiff keeps up to twice as much: tests/test_plan.py). Under
a pipeline the heaviest stage counts, with as many micro-batches in flight as 1F1B keeps in the first stage. V3 §3.1: 2,048 GPUs as
PP 16, EP 64 over 8 nodes, ZeRO-1 DP.

`plan.program` compiles the real step with its real shardings and prints seconds, collectives and the compiler's memory analysis:
kind `here` for this machine's devices, kind `mock` for device 0 of `plan.n_devices` GPUs, on ONE GPU, with JAX's mock topology: every
GPU counts as a host of its own, collectives move nothing and take no time, values mean nothing; computing runs as it would.
"""
from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType

from model import config as model_config
from model import precision, sharding, transformer
from model.errors import freeze, freeze_kind, require
from train import optimizer as optimizers
from train import state as states
from train.metrics import prepare_workdir, table
from train.pretrain import loss_of
from train.scaling import collectives, random_batch
from train.step import compile_step, make_train_step

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Program:
    """Compile the step, and run it `steps` times (0: not at all)."""

    steps: int

    def __post_init__(self):
        require(self.steps >= 0, "steps", self.steps, "0 or more")


PROGRAMS = {"none": lambda config, path: None, "here": Program, "mock": Program}


@dataclasses.dataclass(frozen=True)
class Plan:
    """n_devices of memory_gib each; a micro-batch is `rows` rows of seq_len tokens on a device."""

    n_devices: int
    rows: int
    seq_len: int
    memory_gib: float
    program: Program | None

    def __post_init__(self):
        for name in ("n_devices", "rows", "seq_len"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "a positive integer")


def plan(config, workdir: str) -> dict:
    """The job; prints its tables and writes plan.json."""
    kind = config.plan.program.kind
    spec = freeze(Plan, config.plan, "plan", program=freeze_kind(PROGRAMS, config.plan.program, "plan.program"))
    if kind == "mock":
        mock(spec.n_devices)
    path = pathlib.Path(prepare_workdir(workdir, config))
    cfg, run, optimizer = model_config.parse(config.model), model_config.parse_run(config.run), optimizers.parse(config.optimizer)
    sizes = mesh_sizes(config.mesh, len(jax.devices()) if kind == "here" else spec.n_devices)
    count, flops = cfg.num_params(), cfg.flops_per_token(spec.seq_len)
    need = needs(cfg, run, optimizer, sizes, spec.rows, spec.seq_len)
    on_device = sum(v for k, v in need.items() if "host" not in k)
    shards = math.prod(sizes[axis] for axis in sharding.DATA_AXES)
    result = dict(mesh=sizes, params=count, flops_per_token=flops, tokens_a_micro_batch=shards * spec.rows * spec.seq_len,
                  gib={k: v / GIB for k, v in need.items()}, total_gib=on_device / GIB)
    print(f"{count['total'] / 1e9:.2f}B parameters, {count['activated'] / 1e9:.2f}B activated; {flops['training'] / 1e9:.1f} GFLOP a token")
    title = ", ".join(f"{k}={n}" for k, n in sizes.items() if n > 1) or "one device"
    print(table(f"a device of {title}; {run.precision.kind}, remat {run.remat}, {spec.rows} x {spec.seq_len} tokens a device",
                ("what", "GiB"), [*((k, f"{v / GIB:.2f}") for k, v in need.items()),
                                  ("on the device", f"{on_device / GIB:.2f} of {spec.memory_gib:g}")]))
    if spec.program is not None:
        result["program"] = compile_and_run(config, spec, cfg, run, optimizer)
        print(table(f"the step of device 0, compiled ({kind})", ("what", "found"), result["program"].items()))
    (path / "plan.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def mock(n_devices: int) -> None:
    """Makes JAX take this GPU for device 0 of n_devices. Before JAX touches a device."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_shard_autotuning=false"  # else it waits for the others
    jax.config.update("jax_mock_gpu_topology", f"1x{n_devices}x1")
    found = len(jax.devices())
    require(found == n_devices, "plan.program.kind", "mock", f"a machine with a GPU ({found} devices of {jax.default_backend()} here)")


def mesh_sizes(config, n_devices: int) -> dict[str, int]:
    """The sizes of config.mesh over n_devices, -1 filled in; no devices needed. Raises UserError."""
    sizes = {axis: config[axis] for axis in sharding.MESH_AXES}
    fixed = math.prod(n for n in sizes.values() if n != -1)
    free = [axis for axis, n in sizes.items() if n == -1]
    require(len(free) <= 1 and fixed >= 1, "mesh", sizes, "positive sizes, at most one of -1")
    if free and n_devices % fixed == 0:
        sizes[free[0]] = n_devices // fixed
    require(math.prod(sizes.values()) == n_devices, "mesh", sizes, f"a product of {n_devices} devices")
    return sizes


def needs(cfg, run, optimizer, sizes: dict[str, int], rows: int, seq_len: int) -> dict[str, float]:
    """Bytes on one device (of the heaviest pipeline stage), by what for."""
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    bare = optimizer._replace(ema=None)
    state = jax.eval_shape(lambda: states.create(jax.random.key(0), cfg, bare))
    layout = states.shardings(mesh, cfg, state, optimizer.layout)
    copies = jax.eval_shape(lambda params: precision.prepare(params, run), state.params)
    stages = split_layers(cfg, sizes["pipe"])

    def total(tree, places) -> float:
        """The bytes of the heaviest stage; a leaf below 'dense' or 'moe' is a stack of layers, the others stand at the ends."""
        by_part: dict[str, float] = {}
        for (path, leaf), place in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(places), strict=True):
            keys = [key.key for key in path if hasattr(key, "key")]
            part = next((key for key in keys if key in ("dense", "moe", "embedding", "head", "norm", "mtp")), "norm")
            size = math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            by_part[part] = by_part.get(part, 0) + size
        each = {"dense": by_part.pop("dense", 0) / max(cfg.n_dense_layers, 1), "moe": by_part.pop("moe", 0) / max(cfg.n_moe_layers, 1)}
        last = len(stages) - 1
        return max(sum(n * each[k] for k, n in stage.items()) + (by_part.get("embedding", 0) if i == 0 else 0)
                   + (sum(v for k, v in by_part.items() if k != "embedding") if i == last else 0) for i, stage in enumerate(stages))

    masters = total(state.params, layout.params)
    low = low_copies(copies, layout.params if optimizer.layout.in_use is None else places_in_use(mesh, cfg, state, optimizer))
    tokens, flight = rows * seq_len, sizes["pipe"]
    kept = kept_bytes(cfg, run, math.prod(sizes[axis] for axis in ("node", "expert")), sizes["tensor"], tokens)
    layers = max(sum(n * kept[k] for k, n in stage.items()) for stage in stages)
    width = {"as_stored": 4, "fp32": 4}.get(run.precision.kind, 2)
    out = {
        "masters (float32)": masters,
        "gradients (float32)": masters,
        "moments": total(state.opt_state, layout.opt_state),
        "low-precision copies": total(*low) if low[0] else 0,
        "kept for the backward": tokens * layers * flight,
        "one layer recomputed": 0 if run.remat == "none" else tokens * max(kept["dense_whole"], kept["moe_whole"]),
        "logits and loss": tokens * cfg.vocab_size / sizes["tensor"] * (width + 8) * (1 + cfg.mtp_depth),
    }
    return out | ({} if optimizer.ema is None else {"EMA, in host memory": masters})


def places_in_use(mesh, cfg, state, optimizer):
    """The layout of the parameters as a step uses them."""
    return jax.tree.map(lambda names, leaf: optimizer.layout.in_use(mesh, names, leaf.shape), transformer.axes(cfg), state.params,
                        is_leaf=lambda x: isinstance(x, tuple))


def low_copies(copies, places) -> tuple[dict, dict]:
    """(copies of the weights, as arrays of the masters' shapes and as many bytes, their places): what `prepare` adds."""
    tree, where = {}, {}
    for (path, leaf), place in zip(jax.tree_util.tree_leaves_with_path(copies, is_leaf=precision.is_weight), jax.tree.leaves(places),
                                   strict=True):
        if precision.is_weight(leaf):
            name = "/".join(str(key.key) for key in path)
            part = path[0].key
            for i, copy in enumerate(x for x in (leaf.low, leaf.transposed) if x is not None):
                tree.setdefault(part, {})[f"{name}/{i}"] = jax.ShapeDtypeStruct(leaf.master.shape, copy.dtype)
                where.setdefault(part, {})[f"{name}/{i}"] = place
    return tree, where


def split_layers(cfg, n_stages: int) -> list[dict[str, int]]:
    """How many dense and MoE layers each pipeline stage has: even, the first stages one more."""
    require(n_stages <= cfg.n_layers, "mesh.pipe", n_stages, f"at most n_layers={cfg.n_layers}")
    kinds = ["dense"] * cfg.n_dense_layers + ["moe"] * cfg.n_moe_layers
    parts = np.array_split(kinds, n_stages)
    return [{k: int(np.sum(part == k)) for k in ("dense", "moe")} for part in parts]


def kept_bytes(cfg, run, n_shards: int, n_tensor: int, n_tokens: int) -> dict[str, float]:
    """Bytes a token that a layer keeps for its backward: dense, moe (by run.remat), and dense_whole, moe_whole (nothing recomputed).

    Attention is the fused one (q, k, v, its output, a log-sum a head). The MoE rows are the static worst case
    of the one-hop exchange: a device makes room for every choice of the n_shards shards it gathers from.
    """
    a = 4 if run.precision.dtype in (None, jnp.float32) else 2
    fp8 = run.precision.recipe is not None
    kept = 1 + 4 / 128 if fp8 else a  # the input of a matmul
    D, att = cfg.d_model, cfg.attention
    heads = att.n_heads / n_tensor
    if hasattr(att, "kv_lora_rank"):
        C, Q, wide = att.kv_lora_rank, att.q_lora_rank, att.qk_head_dim
        attention = kept * D * (2 if fp8 else 1) + (a + kept) * Q + a * (C + att.qk_rope_head_dim) + (a + kept) * C
        attention += heads * (2 * a * (wide + att.v_head_dim) + 4 + (2 if fp8 else a) * att.v_head_dim)
    else:
        attention = kept * D + a * att.head_dim * (3 * heads + 2 * att.n_kv_heads) + 4 * heads
    attention += a * D  # the residual stream at the norm

    def swiglu(width: float, rows: float = 1.0) -> float:
        return rows * (2 * a + kept) * width

    whole = dict(dense_whole=attention + a * D + kept * D + swiglu(cfg.d_ff / n_tensor), moe_whole=0.0)
    if cfg.moe is not None:
        m = cfg.moe
        rows = n_shards * m.n_activated_experts + m.n_routed_experts / n_shards * 128 / n_tokens
        gathered = n_shards * D * a if n_shards > 1 else 0
        routed = rows * (kept + a) * D + swiglu(m.d_expert / n_tensor, rows) + gathered
        shared = kept * D + swiglu(m.n_shared_experts * m.d_expert / n_tensor) if m.n_shared_experts else 0
        whole["moe_whole"] = attention + a * D + 4 * 3 * m.n_routed_experts + routed + shared
    if run.remat == "none":
        return whole | dict(dense=whole["dense_whole"], moe=whole["moe_whole"])
    names = a * getattr(att, "kv_lora_rank", 0) if "c_kv" in run.remat_save else 0
    return whole | dict(dense=a * D + names, moe=a * D + names)


def compile_and_run(config, spec: Plan, cfg, run, optimizer) -> dict:
    """The step of this process's devices on the mesh: seconds, collectives, memory by analysis, and its time if it is run."""
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(lambda: states.create(jax.random.key(0), cfg, optimizer))
        layout = states.shardings(mesh, cfg, shapes, optimizer.layout)
        state = jax.tree.map(lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, layout)
        replicated = jax.NamedSharding(mesh, jax.P())
        columns = jax.NamedSharding(mesh, jax.P(None, *sharding.spec(("batch",))))
        n_rows = spec.rows * math.prod(mesh.shape[axis] for axis in sharding.DATA_AXES)
        some = random_batch(cfg.vocab_size, min(n_rows, 8), spec.seq_len)
        batch = {k: jax.ShapeDtypeStruct((1, n_rows, spec.seq_len), some[k].dtype, sharding=columns) for k in ("tokens", "weight")}
        batch["knobs"] = {k: jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated) for k in some["knobs"]}
        key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=replicated)
        step = compile_step(make_train_step(cfg, run, optimizer, loss_of(cfg.mtp_depth)), mesh, layout).jitted
        began = time.perf_counter()
        lowered = step.lower(state, batch, key)
        lowered_s = time.perf_counter() - began
        compiled = lowered.compile()
        memory = compiled.memory_analysis()
        result = {
            "device": jax.devices()[0].device_kind, "devices in the mesh": mesh.size, "trace and lower, s": round(lowered_s, 1),
            "compile, s": round(time.perf_counter() - began - lowered_s, 1),
            "arguments, GiB": round(memory.argument_size_in_bytes / GIB, 3),
            "temporary, GiB": round(memory.temp_size_in_bytes / GIB, 3)} | collectives(compiled.as_text())
        print(result, flush=True)
    if spec.program.steps:  # outside of the mesh: an array made under it would lie on all devices, most of which are not here
        state = jax.tree.map(lambda s: fill(s, lambda shape: jnp.zeros(shape, s.dtype)), state)._replace(params=jax.tree.map(
            lambda s: fill(s, lambda shape: cfg.init_std * jax.random.normal(jax.random.key(0), shape, s.dtype)), state.params))
        batch = dict(
            tokens=fill(batch["tokens"], lambda shape: jax.random.randint(jax.random.key(1), shape, 0, cfg.vocab_size, jnp.int32)),
            weight=fill(batch["weight"], lambda shape: jnp.ones(shape, jnp.float32)),
            knobs={k: fill(s, lambda shape, k=k: jnp.asarray(some["knobs"][k])) for k, s in batch["knobs"].items()})
        key, times = fill(key, lambda shape: jax.random.key(0)), []
        for _ in range(spec.program.steps + 1):
            began = time.perf_counter()
            state, metrics = compiled(state, batch, key)
            jax.block_until_ready((state, metrics))
            times.append(time.perf_counter() - began)
        result["a step, ms"] = round(1e3 * statistics.median(times[1:]), 1)
    return result


def fill(like: jax.ShapeDtypeStruct, make: Callable) -> jax.Array:
    """An array of this shape and sharding whose shard on each of this process's devices is make(its shape)."""
    shard = make(like.sharding.shard_shape(like.shape))
    shards = [jax.device_put(shard, device) for device in sorted(like.sharding.addressable_devices, key=lambda d: d.id)]
    return jax.make_array_from_single_device_arrays(like.shape, like.sharding, shards)
