"""Hugging Face directories: exact round trips, FP8 blocks, sharded loading, bad files, whole-or-nothing writing, memory."""
import json
import logging
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from ml_collections import ConfigDict

from configs import deepseek_v3
from model import config as model_config
from model import hf, hf_config, placement, precision, sharding
from model import safetensors_stream as stream
from model.errors import UserError
from train import checkpoint, convert

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "hf"


def contents(directory):
    """{name: (dtype, shape, bytes)} of a directory."""
    return {name: (t.dtype, t.shape, stream.rows(t, 0, t.shape[0]).tobytes()) for name, t in stream.scan(directory).items()}


def equal(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and np.array_equal(np.asarray(x), np.asarray(y)) for x, y in pairs)


@pytest.fixture(scope="module")
def small():
    """A V3 of ours with MTP: (cfg, params f32, router_bias)."""
    cfg = tiny_model.tiny(n_layers=2)
    return cfg, tiny_model.init(cfg), jnp.asarray(np.random.default_rng(0).normal(size=(2, 8)), jnp.float32)


@pytest.mark.parametrize("name", ["v3", "v3_moonlight", "v3_fp8"])
def test_stored_weights_come_back_bit_for_bit(name, tmp_path):
    cfg, params, bias = hf.load(FIXTURES / name, "stored")
    hf.save(tmp_path / "out", cfg, params, bias, shard_bytes=100_000)
    assert contents(tmp_path / "out") == contents(FIXTURES / name)
    assert hf.read_config(tmp_path / "out") == hf.read_config(FIXTURES / name)
    assert (tmp_path / "out" / stream.INDEX).exists()


@pytest.mark.parametrize("preset", [name for name in deepseek_v3.PRESETS if name != "tiny"])
def test_config_json_of_each_preset_comes_back(preset):
    config = deepseek_v3.get_config(preset).model
    config.rope.scaling.kind = "yarn"
    cfg = model_config.parse(config)
    written = json.loads(json.dumps(hf_config.write(cfg, "bfloat16", fp8=True)))
    assert model_config.parse(hf_config.read(written, "config.json", cfg.mtp_depth)) == cfg


def test_names_and_sizes_are_those_of_the_published_v3():
    """684,531,386,000 numbers: the model, MTP, its copies of embedding and head, and the block scales."""
    cfg = model_config.parse(deepseek_v3.get_config("671b").model)
    slots = [slot for leaf in hf._slots(cfg).values() for slot in leaf]
    scales = sum(-(-s.shape[0] // 128) * -(-s.shape[1] // 128) for s in slots if s.fp8)
    biases = len(hf._bias_names(cfg)) * 256
    assert sum(int(np.prod(s.shape)) for s in slots) + scales + biases + 2 * 129280 * 7168 == 684_531_386_000
    names = {slot.name: slot for slot in slots}
    assert names["model.layers.61.eh_proj.weight"].shape == (7168, 14336) and not names["model.layers.61.eh_proj.weight"].fp8
    assert names["model.layers.60.mlp.experts.255.up_proj.weight"].lead == (57, 255, 1)


def test_both_spellings_of_rope_and_of_no_query_compression_read_alike():
    old = json.loads((FIXTURES / "v2" / "config.json").read_text()) | dict(q_lora_rank=0)
    new = {k: v for k, v in old.items() if k not in ("rope_scaling", "rope_theta")} | dict(q_lora_rank=None)
    new["rope_parameters"] = dict(old["rope_scaling"], rope_theta=old["rope_theta"], rope_type="yarn")
    assert hf_config.read(old, "c", 0) == hf_config.read(new, "c", 0)
    assert hf_config.read(old, "c", 0)["rope"]["scaling"]["kind"] == "yarn"
    plain = hf_config.read({k: v for k, v in old.items() if k != "rope_scaling"}, "c", 0)
    assert plain["rope"] == dict(theta=10000.0, scaling=dict(kind="none", none={}))


def test_fp8_export_is_within_half_a_step_of_the_weights_and_leaves_the_rest(small, tmp_path):
    cfg, params, bias = small
    hf.save(tmp_path / "fp8", cfg, params, bias, "fp8_block", dtype="bfloat16")
    _, stored, stored_bias = hf.load(tmp_path / "fp8", "stored")
    _, loaded, _ = hf.load(tmp_path / "fp8", "float32")
    assert equal(stored_bias, bias)
    flat, quantised = hf._flat(loaded), hf._flat(stored)
    for path, leaf in hf._flat(params).items():
        if precision.is_weight(quantised[path]):
            w = np.asarray(leaf, np.float64)
            step = np.maximum(np.abs(w) * 2.0 ** -4, np.abs(w).max() / 448 * 2.0 ** -10) * 1.001
            assert (np.abs(np.asarray(flat[path], np.float64) - w) <= step).all(), path
            assert path.split("/")[-1] in precision.MATMULS and "/" in path
        else:
            assert path in ("embedding", "head", "norm") or path.endswith(("norm", "gate", "proj")), path
            assert np.array_equal(flat[path], leaf.astype(jnp.bfloat16).astype(jnp.float32)), path
    hf.save(tmp_path / "again", cfg, stored, bias)
    assert contents(tmp_path / "again") == contents(tmp_path / "fp8")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128] and config["num_nextn_predict_layers"] == 1


def test_block_scales_are_amax_over_448_at_partial_edges_too(rng):
    x = rng.normal(size=(130, 257)).astype(np.float32)
    x[:128, :128] = 0
    q, scale = (np.asarray(hf._quantize(x, part)) for part in (0, 1))
    assert scale.shape == (2, 3) and scale.dtype == np.float32
    assert scale[1, 2] == np.abs(x[128:, 256:]).max() / np.float32(448) and scale[0, 0] > 0
    assert not np.asarray(q[:128, :128], np.float32).any() and np.abs(np.asarray(q, np.float32)).max() == 448
    back = precision.dequantize(jnp.asarray(q), jnp.asarray(scale), jnp.float32)
    assert np.abs(np.asarray(back) - x).max() < np.abs(x).max() / 16


def test_sharded_loading_equals_plain_loading_and_saves_the_same_bytes(tmp_path):
    mesh = sharding.make_mesh(dict(pipe=1, node=1, expert=2, fsdp=1, tensor=2), jax.devices()[:4])
    cfg, plain, _ = hf.load(FIXTURES / "v3_fp8", "stored")
    _, placed, bias = hf.load(FIXTURES / "v3_fp8", "stored", mesh=mesh)
    experts = placed["moe"]["moe"]["gate_up"].low
    assert experts.sharding.shard_shape(experts.shape) == (1, 2, 2, 6, 136)
    assert equal(placed, plain)
    hf.save(tmp_path / "out", cfg, placed, bias)
    assert contents(tmp_path / "out") == contents(FIXTURES / "v3_fp8")


def test_pieces_go_to_the_devices_whose_window_they_meet_and_come_back(rng, tmp_path, monkeypatch):
    """Both ways, a few rows a piece, FP8 blocks cut by rows and columns between devices."""
    mesh = sharding.make_mesh(dict(pipe=1, node=1, expert=2, fsdp=2, tensor=2))
    x = rng.normal(size=(2, 2, 200, 300)).astype(np.float32)
    quantised = {lead: [np.asarray(hf._quantize(x[lead], part)) for part in (0, 1)] for lead in np.ndindex(2, 2)}
    arrays = {f"{part}{lead}": pair[part] for lead, pair in quantised.items() for part in (0, 1)} | {"a": np.zeros(3, hf.FP8)}
    stream.write(tmp_path / "x", [stream.Output(n, a.dtype, a.shape, lambda a=a: [a]) for n, a in arrays.items()], {}, shard_bytes=1 << 30)
    tensors = stream.scan(tmp_path / "x")
    assert all(t.start % t.dtype.itemsize == 0 for t in tensors.values()), "readers map tensors in place"
    monkeypatch.setattr(stream, "PIECE_BYTES", 70 * 300)
    axes, sources = ("layers", "expert", "ffn", "embed"), [(lead, tensors[f"0{lead}"]) for lead in quantised]
    array = placement.fill(sources, [tensors[f"1{lead}"] for lead in quantised], x.shape, np.dtype(np.float32), mesh, axes, id)
    assert array.sharding.shard_shape(x.shape) == (2, 1, 100, 150)
    for lead, (q, scale) in quantised.items():
        exact = np.asarray(precision.dequantize(jnp.asarray(q), jnp.asarray(scale), jnp.float32))
        assert np.array_equal(array[lead], exact)
        assert np.array_equal(np.concatenate(list(placement.pieces(array, lead, (200, 300)))), exact)


def edit_tensors(change):
    """A corruption that rewrites the one file of a directory with its tensors changed."""
    def corrupt(directory):
        tensors = {name: stream.rows(t, 0, t.shape[0]) for name, t in stream.scan(directory).items()}
        change(tensors)
        outputs = [stream.Output(name, x.dtype, x.shape, lambda x=x: [x]) for name, x in tensors.items()]
        stream._write_file(directory / stream.SINGLE, outputs, lambda output: None)

    return corrupt


def edit_config(**changes):
    def corrupt(directory):
        config = json.loads((directory / "config.json").read_text()) | changes
        (directory / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))

    return corrupt


def edit_header(old, new):
    def corrupt(directory):
        data = (directory / stream.SINGLE).read_bytes()
        assert old in data and len(old) == len(new)
        (directory / stream.SINGLE).write_bytes(data.replace(old, new, 1))

    return corrupt


def cut(n):
    def corrupt(directory):
        data = (directory / stream.SINGLE).read_bytes()
        (directory / stream.SINGLE).write_bytes(data[:n])

    return corrupt


def split(directory):
    """The one file as two with an index."""
    tensors = {name: stream.rows(t, 0, t.shape[0]) for name, t in stream.scan(directory).items()}
    outputs = [stream.Output(name, x.dtype, x.shape, lambda x=x: [x]) for name, x in tensors.items()]
    stream.write(directory / "parts", outputs, {}, shard_bytes=60_000)
    (directory / stream.SINGLE).unlink()
    for file in (directory / "parts").iterdir():
        file.rename(directory / file.name)
    return json.loads((directory / stream.INDEX).read_text())["weight_map"]


def lose_a_file(directory):
    (directory / sorted(split(directory).values())[0]).unlink()


def misplace(directory):
    places = split(directory)
    places[DOWN] = next(file for file in places.values() if file != places[DOWN])
    (directory / stream.INDEX).write_text(json.dumps(dict(weight_map=places)))


DOWN, UP = "model.layers.1.mlp.experts.3.down_proj.weight", "model.layers.1.mlp.experts.3.up_proj.weight"
Q = "model.layers.0.self_attn.q_a_proj.weight"
BAD = {
    "missing": (edit_tensors(lambda t: t.pop(DOWN)), DOWN),
    "extra": (edit_tensors(lambda t: t.update({"model.layers.1.mlp.experts.8.up_proj.weight": t[UP]})), "experts.8.up_proj"),
    "misshaped": (edit_tensors(lambda t: t.update({DOWN: t[DOWN][:, 1:]})), DOWN),
    "transposed": (edit_tensors(lambda t: t.update({UP: np.ascontiguousarray(t[UP].T)})), UP),
    "fp8 without scales": (edit_tensors(lambda t: t.update({Q: t[Q].astype(hf.FP8)})), f"{Q}_scale_inv"),
    "scales of another shape": (edit_tensors(lambda t: t.update({
        Q: t[Q].astype(hf.FP8), f"{Q}_scale_inv": np.ones((2, 1), np.float32)})), f"{Q}_scale_inv"),
    "scales of another type": (edit_tensors(lambda t: t.update({
        Q: t[Q].astype(hf.FP8), f"{Q}_scale_inv": np.ones((1, 1), np.float16)})), f"{Q}_scale_inv"),
    "scales without fp8": (edit_tensors(lambda t: t.update({f"{Q}_scale_inv": np.ones((1, 1), np.float32)})), f"{Q}_scale_inv"),
    "a layer too many": (edit_tensors(lambda t: t.update({"model.layers.3.input_layernorm.weight": np.ones(40, np.float32)})),
                         "model.layers.3."),
    "truncated": (cut(-1), "truncated"),
    "half a header": (cut(200), "corrupt header"),
    "empty": (cut(0), "corrupt header"),
    "header is no JSON": (edit_header(b'{"__metadata__"', b'["__metadata__"'), "corrupt header"),
    "unknown type": (edit_header(b'"dtype":"BF16"', b'"dtype":"I640"'), "I640"),
    "bytes and shape disagree": (edit_header(b'"shape":[56,40]', b'"shape":[57,40]'), "corrupt header"),
    "file lost": (lose_a_file, "model-00001-of-"),
    "index misplaces": (misplace, DOWN),
    "no tensors": (lambda directory: (directory / stream.SINGLE).unlink(), stream.INDEX),
    "no config": (lambda directory: (directory / "config.json").unlink(), "config.json"),
    "config is no JSON": (lambda directory: (directory / "config.json").write_text("{"), "config.json"),
    "model type": (edit_config(model_type="llama"), "model_type"),
    "a size absent": (edit_config(kv_lora_rank="absent"), "kv_lora_rank"),
    "a size of the wrong type": (edit_config(hidden_size="40"), "hidden_size"),
    "a size that disagrees": (edit_config(intermediate_size=53), "mlp.down_proj"),
    "impossible groups": (edit_config(n_group=3), "n_expert_groups"),
    "rope of another kind": (edit_config(rope_scaling=dict(type="linear", factor=2)), "rope_type"),
    "biases": (edit_config(attention_bias=True), "attention_bias"),
    "blocks of another size": (edit_config(quantization_config=dict(quant_method="fp8", weight_block_size=[64, 64])), "weight_block_size"),
    "another quantisation": (edit_config(quantization_config=dict(quant_method="awq")), "quant_method"),
    "top-k of another kind": (edit_config(topk_method="noaux_tc"), "topk_method"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_directory_is_one_line_that_names_the_fault(case, tmp_path):
    corrupt, named = BAD[case]
    for file in ("config.json", stream.SINGLE):
        shutil.copy(FIXTURES / "v2" / file, tmp_path / file)
    corrupt(tmp_path)
    with pytest.raises(UserError) as error:
        hf.load(tmp_path, "float32")
    assert named in str(error.value) and "\n" not in str(error.value), error.value


def test_copies_in_an_mtp_layer_that_differ_are_one_warning(small, tmp_path, caplog):
    hf.save(tmp_path / "out", *small)
    with caplog.at_level(logging.WARNING):
        hf.load(tmp_path / "out")
        assert not caplog.records
        edit_tensors(lambda t: t["model.layers.2.shared_head.head.weight"].__setitem__((0, 0), 7))(tmp_path / "out")
        _, params, _ = hf.load(tmp_path / "out")
    assert [record.getMessage().split()[0] for record in caplog.records] == ["model.layers.2.shared_head.head.weight"]
    assert equal(params, small[1])


def test_a_target_is_written_whole_or_not_at_all(small, tmp_path):
    def stop(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hf.save(tmp_path / "out", *small, progress=stop)
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    hf.save(tmp_path / "out", *small)
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match="something there already"):
        hf.save(tmp_path / "out", *small)
    assert contents(tmp_path / "out") == before and [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("edits, named", [
    (dict(attention__kind="gqa"), "attention"), (dict(ffn__moe__groups__limited__score="max"), "score"),
    (dict(ffn__moe__gate__kind="softmax", ffn__moe__groups__kind="none"), "softmax"),
])
def test_what_transformers_cannot_run_equally_is_not_exported(edits, named, tmp_path):
    with pytest.raises(UserError, match=named):
        hf.save(tmp_path / "out", tiny_model.tiny(**edits), {}, None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name, dtype", [("v3_fp8", "stored"), ("v2", "float32")])
def test_the_jobs_import_and_export_a_directory(name, dtype, tmp_path):
    config = ConfigDict(deepseek_v3.get_config("tiny"))
    config.import_hf = dict(dir=str(FIXTURES / name), dtype=dtype)
    config.export_hf = dict(dir=str(tmp_path / "out"), quantize="none", dtype="stored" if dtype == "stored" else "bfloat16")
    config.mesh.update(dict(fsdp=1))
    convert.import_hf(config, str(tmp_path / "run"))
    config.init_from.path = str(tmp_path / "run" / "checkpoints")
    cfg, params, _ = checkpoint.load_params(config.init_from.path)
    _, expected, _ = hf.load(FIXTURES / name, dtype)
    assert equal(params, expected)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"]["d_model"] == cfg.d_model
    with pytest.raises(UserError, match="checkpoints"):
        convert.import_hf(config, str(tmp_path / "run"))
    convert.export_hf(config, str(tmp_path / "run"))
    assert contents(tmp_path / "out") == contents(FIXTURES / name)


MEMORY = """
import os, resource, sys, threading, time
import jax, numpy as np
sys.path.insert(0, {root!r})
from model import hf, transformer
hf.load({warm!r}, "stored")

def resident(key):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(key))

cfg = hf.config.parse(hf.read_config({big!r}))
hf._slots(cfg)
open("/proc/self/clear_refs", "w").write("5")  # peak restarts here
before = resident("VmRSS")
_, params, _ = hf.load({big!r}, "stored")
jax.block_until_ready(params)
held = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
print("RESULT", before, resident("VmHWM"), held)
"""


@pytest.mark.slow
def test_loading_two_gigabytes_peaks_below_the_arrays_and_1_2_of_the_largest_tensor(tmp_path):
    """500 MB of embedding, 500 MB of head and 1.1 GB of experts."""
    config = tiny_model.tiny_config(n_layers=3, d_model=2048, d_ff=4096, vocab_size=122_100, mtp_depth=0)
    config.ffn.moe.update(dict(n_routed_experts=16, d_expert=2816))
    cfg = model_config.parse(config)
    piece = np.random.default_rng(0).normal(size=(1 << 20)).astype(jnp.bfloat16)

    def rows(shape):
        for start, stop in stream.ranges(shape, 2):
            yield np.resize(piece, (stop - start, *shape[1:]))

    outputs = [stream.Output(slot.name, piece.dtype, slot.shape, lambda slot=slot: rows(slot.shape))
               for slots in hf._slots(cfg).values() for slot in slots]
    outputs += [stream.Output(name, np.dtype(np.float32), (16,), lambda: [np.zeros(16, np.float32)]) for name in hf._bias_names(cfg)]
    total, largest = sum(o.nbytes for o in outputs), max(o.nbytes for o in outputs)
    assert total >= 2 << 30 and largest >= 500_000_000
    stream.write(tmp_path / "big", outputs, {"config.json": hf_config.write(cfg, "bfloat16", fp8=False)}, shard_bytes=1 << 30)
    script = MEMORY.format(root=str(pathlib.Path(__file__).parent.parent), warm=str(FIXTURES / "v3"), big=str(tmp_path / "big"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    before, peak, held = map(int, done.stdout.split("RESULT")[1].split())
    print(f"files {total:,} held {held:,} peak above start {peak - before:,} = held + {(peak - before - held) / largest:.3f} x largest")
    assert held >= 2 << 30 and peak - before < held + 1.2 * largest
