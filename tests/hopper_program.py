"""What XLA makes of a training step for one H100, on a machine without a GPU: every kernel of the program and the bytes it moves.

  uv sync --extra cuda && uv run python -m tests.hopper_program configs/deepseek_v3.py:700m [run.precision.kind=fp8_block ...]

The CUDA plugin compiles for a described card; the model takes the paths it takes on a Hopper GPU. Two things differ from a card's own
program: matmuls are not autotuned (Triton's stand where cuBLAS's often win) and a large sort is XLA's own instead of CUB's.
A process of its own: the plugin and the pretence last as long as it does.
"""
import collections
import math
import os
import re
import sys

os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # there is no driver to ask

import jax
import numpy as np
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental import topologies

H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES } core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84942979072 device_address_bits: 64
  name: "NVIDIA H100 80GB HBM3" device_vendor: "NVIDIA Corporation" platform_version: "Compute Capability 9.0a"
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.11.0"
}
platform_name: "CUDA" device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 11 patch: 0 }
"""
BYTES = dict(pred=1, s8=1, u8=1, f8e4m3fn=1, s16=2, u16=2, f16=2, bf16=2, s32=4, u32=4, f32=4, s64=8, u64=8, f64=8)
NO_KERNEL = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "after-all", "partition-id"}


def pretend() -> list:
    """The described card's device. From here on the model believes that it runs there."""
    from model import precision
    from pallas_kernels import target

    devices = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=H100).devices
    jax.default_backend = lambda: "gpu"
    target.is_hopper = precision.is_hopper = lambda: True
    fused_attention_stablehlo.check_cudnn_version = lambda: 91100
    fused_attention_stablehlo.is_cuda_compute_capability_equal = lambda capability: capability == "9.0"
    fused_attention_stablehlo.check_compute_capability = lambda capability: True
    return devices


def compiled_step(config, device):
    """The training step of config.model for config.speed's batch, compiled for the device."""
    from model import config as model_config
    from model import sharding
    from train import optimizer as optimizers
    from train import state as states
    from train.pretrain import loss_of
    from train.scaling import random_batch
    from train.step import compile_step, make_train_step

    cfg, run, optimizer = model_config.parse(config.model), model_config.parse_run(config.run), optimizers.parse(config.optimizer)
    mesh = sharding.make_mesh(dict.fromkeys(sharding.MESH_AXES, 1), [device])
    everywhere = jax.NamedSharding(mesh, jax.P())

    def placed(shape, place=everywhere):
        return jax.ShapeDtypeStruct(np.shape(shape), shape.dtype, sharding=place)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        key = jax.eval_shape(lambda: jax.random.key(0))
        shapes = jax.eval_shape(lambda key: states.create(key, cfg, optimizer, run), key)
        layout = states.shardings(mesh, cfg, shapes, optimizer.layout)
        batch = jax.tree.map(placed, random_batch(cfg.vocab_size, config.speed.batch_size, config.speed.seq_len))
        step = compile_step(make_train_step(cfg, run, optimizer, loss_of(cfg.mtp_depth)), mesh, layout).jitted
        return step.trace(jax.tree.map(placed, shapes, layout), batch, placed(key)).lower(lowering_platforms=("cuda",)).compile()


def size(shape: str) -> int:
    """Bytes of an HLO shape or tuple of shapes."""
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", shape)
    return sum(BYTES.get(dtype, 0) * math.prod(int(n) for n in dims.split(",") if n) for dtype, dims in arrays)


def kernels(hlo: str) -> list[tuple[str, str, str, int]]:
    """(kind, shape, operation of the model, bytes read and written) of every kernel of the entry computation, in order. A slice's or a
    gather's operand counts whole."""
    entry, shapes, found = hlo[hlo.index("\nENTRY "):], {}, []
    for name, shape, op, rest in re.findall(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$", entry, re.MULTILINE):
        shapes[name] = shape
        if op in NO_KERNEL:
            continue
        moved = size(shape) + sum(size(shapes.get(operand, "")) for operand in re.findall(r"%([\w.\-]+)", rest.split("), ")[0]))
        called = re.search(r'custom_call_target="([^"]*)"', rest)
        operation = re.search(r'op_name="([^"]*)"', rest)
        kind = re.sub(r"[\d_.]+$", "", name) if op == "fusion" else called[1] if called else op
        found.append((kind, re.sub(r"\{[^}]*\}", "", shape), re.sub(r"jit\(step\)/", "", operation[1] if operation else ""), moved))
    return found


def main(name: str, *edits: str) -> None:
    """Prints the kernels of a step, alike ones together, the most bytes first."""
    import main as project
    from train.ablate import apply_edits

    config = project.load_config(name)
    apply_edits(config, edits, "edits")
    device = pretend()[0]
    compiled = compiled_step(config, device)
    found, memory = kernels(compiled.as_text()), compiled.memory_analysis()
    count, moved = collections.Counter(), collections.Counter()
    for kind, shape, operation, n_bytes in found:
        count[kind, shape[:70], operation[-90:]] += 1
        moved[kind, shape[:70], operation[-90:]] += n_bytes
    fused = sum(n_bytes for kind, *_, n_bytes in found if kind.endswith("fusion") and "gemm" not in kind and "slice" not in kind)
    print(f"{len(found)} kernels; {fused / 1e9:.1f} GB by fusions; arguments {memory.argument_size_in_bytes / 2**30:.2f} GiB, "
          f"temporary {memory.temp_size_in_bytes / 2**30:.2f} GiB")
    for row, n_bytes in moved.most_common(60):
        print(f"{count[row]:5d} x {n_bytes / count[row] / 1e6:9.2f} MB  {row[0][:34]:34} {row[1]:70} {row[2]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
