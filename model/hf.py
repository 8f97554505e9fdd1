"""Hugging Face directories of deepseek_v3 and deepseek_v2 <-> (ModelConfig, params, router_bias).

Ours stacks: layers [L, ...], experts [L, E, ...], gate_proj and up_proj [.., 2, F, D]; theirs names each matrix. MTP module k is
their layer n_layers + k, with copies of the embedding and the head, which are checked and dropped (V3 README_WEIGHTS). FP8 weights
are E4M3 with a float32 `weight_scale_inv` a 128 x 128 block, edge blocks partial: w = q * scale.
Tensors pass one piece at a time into arrays placed beforehand, updated in place: the host holds pieces, never a stack.
"""
from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from model import config, hf_config, transformer
from model import safetensors_stream as stream
from model.config import ModelConfig
from model.errors import UserError, choice, require
from model.placement import fill, pieces, take
from model.precision import MATMULS, Weight, dequantize, is_weight
from model.safetensors_stream import Output, Tensor
from pallas_kernels.quantize.op import quantize_tiles

FP8 = np.dtype(jnp.float8_e4m3fn)
DTYPES = {"stored": None, "float32": np.dtype(np.float32), "bfloat16": np.dtype(jnp.bfloat16)}
QUANTIZE = (None, "fp8_block")
Progress = Callable[[int, int], None]  # (bytes done, bytes in all)

# Our leaf below a block -> their names below a layer; {e} counts experts, {p} is gate or up, in the order of our leading axes.
BLOCK_NAMES = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention/q": "self_attn.q_proj",
    "attention/q_down": "self_attn.q_a_proj",
    "attention/q_norm": "self_attn.q_a_layernorm",
    "attention/q_up": "self_attn.q_b_proj",
    "attention/kv_down": "self_attn.kv_a_proj_with_mqa",
    "attention/kv_norm": "self_attn.kv_a_layernorm",
    "attention/kv_up": "self_attn.kv_b_proj",
    "attention/out": "self_attn.o_proj",
    "gate_up": "mlp.{p}_proj",
    "down": "mlp.down_proj",
    "moe/gate": "mlp.gate",
    "moe/gate_up": "mlp.experts.{e}.{p}_proj",
    "moe/down": "mlp.experts.{e}.down_proj",
    "moe/shared_gate_up": "mlp.shared_experts.{p}_proj",
    "moe/shared_down": "mlp.shared_experts.down_proj",
}
MTP_NAMES = {"enorm": "enorm", "hnorm": "hnorm", "norm": "shared_head.norm", "proj": "eh_proj"}
OUTER_NAMES = {"embedding": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}
COPIES = {"embed_tokens.weight": "embedding", "shared_head.head.weight": "head"}  # of every MTP layer


class Slot(NamedTuple):
    """One of their tensors: its name, our leaf's path, and where in the leaf it lies."""

    name: str
    path: str
    lead: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def fp8(self) -> bool:
        """Whether the published FP8 checkpoints quantise it: the matmuls inside blocks, the gate apart."""
        return len(self.shape) == 2 and "/" in self.path and not self.path.endswith(("moe/gate", "mtp/proj"))


def read_config(directory: str | os.PathLike) -> dict[str, Any]:
    """config.model's subtree for a directory; mtp_depth is 0 where config.json announces MTP that the files do not hold."""
    return _read_config(Path(directory), stream.scan(directory))


def load(directory: str | os.PathLike, dtype: Any = "float32", *, mesh: Mesh | None = None,
         progress: Progress | None = None) -> tuple[ModelConfig, Any, Any]:
    """(ModelConfig, params, router_bias f32 [n_moe + J, E] or None) of a directory with config.json and safetensors.

    dtype: 'float32' or 'bfloat16' (FP8 dequantised), or 'stored': each as it lies, FP8 matmul weights as Weight(None, q, scale),
    which run and save bit-exactly but do not train. mesh: arrays are sharded by their logical axes; default: the default device.
    Raises UserError, one line that names the tensor or key.
    """
    target = DTYPES[choice(dtype if isinstance(dtype, str) else np.dtype(dtype).name, DTYPES, "dtype")]
    directory, tensors = Path(directory), stream.scan(directory)
    try:
        cfg = config.parse(_read_config(directory, tensors))
    except UserError as error:
        file = directory / "config.json"
        raise error if str(file) in str(error) else UserError(f"{file}: {error}") from None
    if OUTER_NAMES["head"] not in tensors and OUTER_NAMES["embedding"] in tensors and _json(directory).get("tie_word_embeddings"):
        tensors[OUTER_NAMES["head"]] = tensors[OUTER_NAMES["embedding"]]
    leaves = _slots(cfg)
    _check(cfg, leaves, tensors)

    axes, params = {} if mesh is None else _flat(transformer.axes(cfg)), {}
    total, done = sum(tensors[slot.name].nbytes for slots in leaves.values() for slot in slots), 0
    for path, slots in leaves.items():
        def tick(tensor):
            nonlocal done
            done += tensor.nbytes
            if progress:
                progress(done, total)

        params[path] = _load_leaf(slots, tensors, target, mesh, axes.get(path), tick)
    bias = [stream.rows(tensors[name], 0, cfg.moe.n_routed_experts).astype(np.float32) for name in _bias_names(cfg)]
    return cfg, _nest(params), jnp.asarray(np.stack(bias)) if bias else None


def save(directory: str | os.PathLike, cfg: ModelConfig, params: Any, router_bias: Any, quantize: str | None = None, *,
         dtype: str = "stored", shard_bytes: int = 4 << 30, progress: Progress | None = None) -> None:
    """Writes config.json and safetensors, which transformers and `load` read: whole or not at all, into a new or empty directory.

    quantize 'fp8_block': matmul weights of the blocks as E4M3 with scale = amax/448 a 128 x 128 block; a Weight that is FP8 already is
    written as it is. dtype: of all the rest ('stored': as the arrays are; FP8 weights then stay FP8). Raises UserError.
    """
    choice(quantize, QUANTIZE, "quantize")
    target = DTYPES[choice(dtype, DTYPES, "dtype")]
    hf_config.write(cfg, dtype, fp8=False)  # refuses what Hugging Face has no words for, before any byte is read
    flat, leaves, outputs = _flat(params), _slots(cfg), []
    for path, slots in leaves.items():
        require(path in flat, f"params.{path}", "nothing", "the leaves that the config describes")
        leaf = _stored(flat[path])
        found = leaf.low.shape if is_weight(leaf) else leaf.shape
        expected = _leaf_shape(slots)
        require(found == expected, f"params.{path}", found, f"shape {expected}")
        outputs += [output for slot in slots for output in _outputs(slot, leaf, quantize, target)]
    for k in range(cfg.mtp_depth):
        for name, path in COPIES.items():
            copy = leaves[path][0]._replace(name=f"model.layers.{cfg.n_layers + k}.{name}")
            outputs += _outputs(copy, _stored(flat[path]), None, target)
    for row, name in enumerate(_bias_names(cfg)):
        value = np.zeros(cfg.moe.n_routed_experts, np.float32) if router_bias is None else np.asarray(router_bias[row], np.float32)
        outputs.append(Output(name, value.dtype, value.shape, lambda value=value: [value]))

    outputs.sort(key=lambda output: _layer(output.name, cfg.n_layers + cfg.mtp_depth))
    total, done = sum(output.nbytes for output in outputs), 0

    def tick(output):
        nonlocal done
        done += output.nbytes
        if progress:
            progress(done, total)

    wide = next(output.dtype for output in outputs if output.name == OUTER_NAMES["embedding"])
    content = hf_config.write(cfg, wide.name, fp8=any(output.dtype == FP8 for output in outputs))
    stream.write(directory, outputs, {"config.json": content}, shard_bytes=shard_bytes, on_tensor=tick)


def _json(directory: Path) -> dict[str, Any]:
    file = directory / "config.json"
    try:
        return dict(json.loads(file.read_text()))
    except FileNotFoundError:
        raise UserError(f"{file}: missing, allowed: a directory with config.json and safetensors") from None
    except (ValueError, TypeError):
        raise UserError(f"{file}: found no JSON object") from None


def _read_config(directory: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    hf = _json(directory)
    layers = {int(name.split(".")[2]) for name in tensors if name.startswith("model.layers.") and name.split(".")[2].isdigit()}
    held = len([i for i in layers if i >= hf.get("num_hidden_layers", 0)])
    announced = hf.get("num_nextn_predict_layers", hf.get("num_mtp_layers", held))
    if announced and not held:
        logging.getLogger(__name__).info("%s announces %s MTP layers, the files hold none", directory, announced)
    return hf_config.read(hf, str(directory / "config.json"), announced if held else 0)


@functools.lru_cache(maxsize=4)
def _slots(cfg: ModelConfig) -> dict[str, list[Slot]]:
    """Our leaves by path, each with the tensors it is made of, in the order of its leading axes."""
    shapes = _flat(jax.eval_shape(functools.partial(transformer.init, cfg=cfg), jax.random.key(0)))
    first, leaves = dict(dense=0, moe=cfg.n_dense_layers, mtp=cfg.n_layers), {}
    for path, leaf in shapes.items():
        stack, _, rest = path.partition("/")
        if not rest:
            leaves[path] = [Slot(OUTER_NAMES[path], path, (), leaf.shape)]
            continue
        name = MTP_NAMES.get(rest) if stack == "mtp" else None
        name = name or BLOCK_NAMES[rest.removeprefix("block/")]
        marks = [mark for mark in ("e", "p") if f"{{{mark}}}" in name]
        n = 1 + len(marks)
        leaves[path] = []
        for lead in np.ndindex(leaf.shape[:n]):
            fill = {mark: i if mark == "e" else ("gate", "up")[i] for mark, i in zip(marks, lead[1:], strict=True)}
            layer = f"model.layers.{first[stack] + lead[0]}"
            leaves[path].append(Slot(f"{layer}.{name.format(**fill)}.weight", path, lead, leaf.shape[n:]))
    return leaves


def _leaf_shape(slots: list[Slot]) -> tuple[int, ...]:
    return (*(i + 1 for i in slots[-1].lead), *slots[0].shape)


def _bias_names(cfg: ModelConfig) -> list[str]:
    """The correction biases in the order of router_bias: every sigmoid gate has one in a deepseek_v3."""
    if cfg.moe is None or cfg.moe.gate.score != "sigmoid":
        return []
    layers = range(cfg.n_dense_layers, cfg.n_layers + cfg.mtp_depth)
    return [f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in layers]


def _layer(name: str, end: int) -> int:
    """Where a tensor stands in the order of files: embedding, layers, final norm and head."""
    parts = name.split(".")
    return int(parts[2]) if parts[1] == "layers" else -1 if name == OUTER_NAMES["embedding"] else end


def _check(cfg: ModelConfig, leaves: dict[str, list[Slot]], tensors: dict[str, Tensor]) -> None:
    """Every tensor present, of its shape and type, and none besides; a copy in an MTP layer that differs is a warning."""
    expected = {slot.name: slot.shape for slots in leaves.values() for slot in slots}
    expected |= {name: (cfg.moe.n_routed_experts,) for name in _bias_names(cfg)}
    for name, shape in list(expected.items()):
        _expect(tensors, name, shape)
        if tensors[name].dtype == FP8:
            require(len(shape) == 2, name, f"dtype {FP8}", "a float type")
            expected[f"{name}_scale_inv"] = scale_shape = tuple(-(-n // 128) for n in shape)
            scale = _expect(tensors, f"{name}_scale_inv", scale_shape)
            require(scale.dtype == np.float32, scale.name, f"dtype {scale.dtype}", "float32")
    for k in range(cfg.mtp_depth):
        for copy, path in COPIES.items():
            name, shared = f"model.layers.{cfg.n_layers + k}.{copy}", OUTER_NAMES[path]
            if name in tensors:
                expected[name] = ()
                if not stream.same_bytes(tensors[name], tensors[shared]):
                    logging.getLogger(__name__).warning("%s differs from %s, which is used in its place", name, shared)
    for name, tensor in tensors.items():
        if name not in expected and tensor.nbytes and not name.endswith("rotary_emb.inv_freq"):
            raise UserError(f"{name}: an extra tensor in {tensor.file.name}, which no part of the model in config.json reads")


def _expect(tensors: dict[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    require(name in tensors, name, "no such tensor", f"one of shape {list(shape)}")
    require(tensors[name].shape == shape, name, f"shape {list(tensors[name].shape)}", f"{list(shape)}, as config.json says")
    return tensors[name]


def _load_leaf(slots, tensors, target, mesh, axes, tick):
    """One of our leaves from its tensors: an array of dtype target, or as stored."""
    sources = [(slot.lead, tensors[slot.name]) for slot in slots]
    scales = [(lead, tensors[f"{t.name}_scale_inv"]) if t.dtype == FP8 else (lead, None) for lead, t in sources]
    shape, stored = _leaf_shape(slots), sources[0][1].dtype
    if target is not None or stored != FP8:
        for _, tensor in sources:
            require(target is not None or tensor.dtype == stored, tensor.name, f"dtype {tensor.dtype}",
                    f"{stored}, as {slots[0].name} has, for dtype 'stored'; or load as float32 or bfloat16")
        return fill(sources, [scale for _, scale in scales], shape, target or stored, mesh, axes, tick)
    require(slots[0].path.split("/")[-1] in MATMULS, slots[0].name, f"dtype {FP8}", "a float type for dtype 'stored'")
    for (_, tensor), (_, scale) in zip(sources, scales, strict=True):
        require(scale is not None, tensor.name, f"dtype {tensor.dtype}", f"{FP8}, as {slots[0].name} has, for dtype 'stored'")
    none = [None] * len(sources)
    q = fill(sources, none, shape, FP8, mesh, axes, tick)
    scale_shape = (*shape[:-2], *scales[0][1].shape)
    axes = axes and (*axes[:-2], None, None)
    return Weight(None, q, fill(scales, none, scale_shape, np.dtype(np.float32), mesh, axes, lambda tensor: None))


def _stored(leaf):
    """What a leaf is saved from: the FP8 Weight, the master of another Weight, or the array."""
    return leaf if not is_weight(leaf) else leaf if leaf.master is None else leaf.master


def _outputs(slot: Slot, leaf, quantize: str | None, target) -> list[Output]:
    """What is written for one tensor: itself, and its scales if it is FP8."""
    shape, blocks = slot.shape, tuple(-(-n // 128) for n in slot.shape)
    scale_name = f"{slot.name}_scale_inv"
    if is_weight(leaf) and (quantize or target is None):
        return [Output(slot.name, FP8, shape, lambda: pieces(leaf.low, slot.lead, shape)),
                Output(scale_name, np.dtype(np.float32), blocks, lambda: pieces(leaf.scale, slot.lead, blocks))]
    if is_weight(leaf):
        def dequantized():
            for (q, (a, b)) in zip(pieces(leaf.low, slot.lead, shape, 128), stream.ranges(shape, 1, 128), strict=True):
                yield np.asarray(dequantize(q, take(leaf.scale, slot.lead, a // 128, -(-b // 128), blocks), target))

        return [Output(slot.name, target, shape, dequantized)]
    if quantize and slot.fp8:
        def quantized(part):
            return (np.asarray(_quantize(x, part)) for x in pieces(leaf, slot.lead, shape, 128))

        return [Output(slot.name, FP8, shape, lambda: quantized(0)),
                Output(scale_name, np.dtype(np.float32), blocks, lambda: quantized(1))]
    dtype = target or np.dtype(leaf.dtype)
    require(dtype in stream.NAMES, f"params.{slot.path}", dtype.name, ", ".join(d.name for d in stream.NAMES))
    return [Output(slot.name, dtype, shape, lambda: (x.astype(dtype, copy=False) for x in pieces(leaf, slot.lead, shape)))]


@functools.partial(jax.jit, static_argnums=1)
def _quantize(x, part: int):
    """q (part 0) or scale (part 1) of rows [N, K] that start at a block's edge."""
    return quantize_tiles(x, (128, 128))[part]


def _flat(tree) -> dict[str, Any]:
    """Leaves by path 'moe/attention/q'; tuples (a Weight, logical axes) are leaves."""
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, tuple))[0]
    return {"/".join(str(key.key) for key in path): leaf for path, leaf in leaves}


def _nest(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        functools.reduce(lambda node, key: node.setdefault(key, {}), parents, tree)[last] = leaf
    return tree
