"""Scaling: traces are read as they should be, the equality table on virtual devices, and the step lowers for two GPUs."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import tiny, tiny_config

from configs import deepseek_v3
from model import config as model_config
from model import expert_parallel, precision
from model.errors import UserError
from model.tape import LayerTape
from pallas_kernels import target
from train import profile, scaling


def event(name: str, operation: str, begin_us: float, us: float, ids: dict) -> str:
    name, operation = (ids.setdefault(text, len(ids) + 1) for text in (name, operation))
    return (f"events {{ metadata_id: {name} offset_ps: {int(begin_us * 1e6)} duration_ps: {int(us * 1e6)} "
            f"stats {{ metadata_id: 1 ref_value: {operation} }} }}")


def trace(*lines: tuple[str, list]):
    """A trace of one GPU: lines of (name, [(kernel, HLO operation, begin, us)])."""
    ids: dict[str, int] = {"hlo_op": 1}
    text = "".join(f'lines {{ name: "{name}" timestamp_ns: 1000 {" ".join(event(*e, ids) for e in events)} }}' for name, events in lines)
    kernels = "".join(f'event_metadata {{ key: {i} value {{ id: {i} name: "{name}" }} }}' for name, i in ids.items())
    stats = "".join(f'stat_metadata {{ key: {i} value {{ id: {i} name: "{name}" }} }}' for name, i in ids.items())
    host = 'planes { name: "/host:CPU" lines { name: "python" events { metadata_id: 1 duration_ps: 9 } } }'
    return jax.profiler.ProfileData.from_text_proto(f'{host} planes {{ name: "/device:GPU:0" {text} {kernels} {stats} }}')


def test_exposed_communication_is_what_no_computing_covers():
    found = list(profile.devices(trace(
        ("Stream #13(Compute)", [("nvjet", "dot.3", 0, 40), ("loop", "all-gather_fusion.1", 50, 10), ("nvjet", "dot.4", 90, 10)]),
        ("Stream #20", [("ncclDevKernel_AllGather_RING_LL(args)", "all-gather-start.1", 30, 40)]),  # 10 + 10 us are covered
        ("Stream #21", [("memcpy", "collective-permute.2", 75, 5)]),
        ("XLA Ops", [("dot.3", "dot.3", 0, 1000)]))))
    assert len(found) == 1
    got = profile.shares(*found[0])
    # exposed: 40-50, 60-70 and 75-80; computing: 60 of 100
    assert got == pytest.approx(dict(computing=0.6, hidden=0.2, exposed=0.25, idle=0.15))


def test_kernels_of_a_kind_add_up():
    found = profile.kernels(trace(
        ("Stream #13(Compute)", [("loop_add_fusion_1", "x", 0, 1500), ("loop_convert_fusion", "y", 2000, 500),
                                 ("fp8_matmul_mosaic_gpu_kernel", "z", 9, 3000)]),
        ("XLA Ops", [("loop_add_fusion_1", "x", 0, 9000)])))
    assert found == {"fp8_matmul_mosaic_gpu_kernel": (pytest.approx(3.0), 1), "loop": (pytest.approx(2.0), 2)}


def test_shares_add_up_on_random_spans(rng):
    spans = [[(a, a + width) for a, width in zip(rng.uniform(0, 100, 30), rng.uniform(0, 5, 30), strict=True)] for _ in range(2)]
    got = profile.shares(*spans)
    assert got["computing"] + got["exposed"] + got["idle"] == pytest.approx(1)
    grid = np.linspace(0, 105, 200_001)
    on = [np.any([(a <= grid) & (grid < b) for a, b in each], axis=0) for each in spans]
    whole = max(b for each in spans for _, b in each) - min(a for each in spans for a, _ in each)
    assert np.sum(on[1] & ~on[0]) * (grid[1] - grid[0]) / whole == pytest.approx(got["exposed"], abs=1e-3)


def test_a_trace_without_a_gpu_gives_no_shares(tmp_path):
    assert profile.of(lambda: jnp.ones(3) + 1, tmp_path / "kept.pb") == {} and (tmp_path / "kept.pb").stat().st_size


def test_collectives_are_counted_by_kind_and_way():
    text = """  %ag = (f32[2], f32[4]) all-gather-start(%x), dimensions={0}
  %agd = f32[4] all-gather-done(%ag)
  %ar = f32[] all-reduce(%agd), to_apply=%add
  %a2a = f32[4] all-to-all(%agd)
  %ar2 = f32[] all-reduce(%a2a), to_apply=%add"""
    assert scaling.collectives(text) == {"all-gather-start": 1, "all-reduce": 2, "all-to-all": 1}


@pytest.mark.parametrize(("leaf", "value", "message"), [
    ("meshes", ("fsdp2",), "scaling.meshes: found 'fsdp2', allowed: strings such as"),
    ("meshes", ("data=2",), "scaling.meshes: found 'data', allowed: pipe, node"),
    ("parts", ("speed",), "scaling.parts: found 'speed', allowed: equality, throughput, exchange"),
])
def test_a_bad_leaf_is_one_line(leaf, value, message):
    config = deepseek_v3.get_config("tiny")
    config.scaling[leaf] = value
    with pytest.raises(UserError, match=message):
        scaling.parse(config)


def test_experts_with_our_kernels_lower_for_two_gpus_forwards_and_backwards(monkeypatch):
    """Inside the exchange's shard_map, the kernels' results must vary over the mesh as their operands do."""
    monkeypatch.setattr(target, "is_hopper", lambda: True)
    cfg = tiny(ffn__moe__n_routed_experts=4, ffn__moe__groups__kind="none")
    run = model_config.Execution(experts="kernel")
    mesh = scaling.mesh_of("expert=2,fsdp=4")

    def loss(x, up, down, weights, experts):
        def run_experts(rows, *rest):
            *_, sizes, align, _, up, down, _ = rest
            hidden = precision.grouped_linear(rows, sizes, up, run, "moe/gate_up", align=align)
            return precision.grouped_linear(hidden[:, :128], sizes, down, run, "moe/down", align=align)

        out, _ = expert_parallel.apply(run_experts, (lambda _: (weights, None),), (), x, experts, up, down, cfg, run, LayerTape())
        return jnp.sum(out.astype(jnp.float32))

    bf16 = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((64, 128), (4, 2, 128, 128), (4, 128, 128))]
    choice = [jax.ShapeDtypeStruct((64, 2), dtype) for dtype in (jnp.float32, jnp.int32)]
    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*bf16, *choice).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu") >= 3


@pytest.mark.slow
def test_the_job_finds_meshes_equal_to_one_device(tmp_path, capsys):
    config = deepseek_v3.get_config("tiny")
    config.model = tiny_config(n_layers=2, n_dense_layers=1)
    config.run.scan_unroll = 1
    config.speed.update(dict(batch_size=1, seq_len=8, repeats=1))
    config.scaling.meshes = ("expert=2,fsdp=-1", "tensor=2,fsdp=-1")
    config.scaling.equality.update(dict(precisions=("fp32",), batch_size=8, seq_len=8))
    config.scaling.exchange.update(dict(rows=(16,), widths=(32,), repeats=1))
    result = scaling.scaling(config, str(tmp_path))
    assert [r["mesh"] for r in result["equality"]] == [*config.scaling.meshes, scaling.REORDERED]
    assert all(r["flips"] == 0 for r in result["equality"])
    assert result["throughput"][0]["efficiency"] == 1 and result["throughput"][1]["n_devices"] == 8
    assert len(result["exchange"]) == 5 and "exchange over expert=8" in capsys.readouterr().out
