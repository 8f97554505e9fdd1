"""Hugging Face directories of deepseek_v3 and deepseek_v2 <-> (ModelConfig, params, router_bias).

Ours stacks: layers [L, ...], experts [L, E, ...], gate_proj and up_proj [.., 2, F, D]; theirs names each matrix. MTP module k is
their layer n_layers + k, with copies of the embedding and the head, which are checked and dropped (V3 README_WEIGHTS). FP8 weights
are E4M3 with a float32 `weight_scale_inv` a 128 x 128 block, edge blocks partial: w = q * scale.
Tensors pass one piece at a time into arrays placed beforehand, updated in place: the host holds pieces, never a stack.
"""
from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from model import config, hf_config, transformer
from model import safetensors_stream as stream
from model.config import ModelConfig
from model.errors import UserError, choice, require
from model.precision import is_weight

FP8 = np.dtype(jnp.float8_e4m3fn)
FP8_MAX = 448.0
DTYPES = {"stored": None, "float32": np.dtype(np.float32), "bfloat16": np.dtype(jnp.bfloat16)}
QUANTIZE = (None, "fp8_block")

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
COPIES = {"embed_tokens.weight": "embedding", "shared_head.head.weight": "head"}
BIAS = "mlp.gate.e_score_correction_bias"


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
    """config.model's subtree for a directory; its mtp_depth is 0 where config.json announces MTP that the files do not hold."""
    return _read_config(Path(directory), stream.scan(directory))


def load(directory: str | os.PathLike, dtype: Any = "float32", *, mesh: Mesh | None = None,
         progress: Callable[[int, int], None] = lambda done, total: None) -> tuple[ModelConfig, Any, Any]:
    """(ModelConfig, params, router_bias f32 [n_moe + J, E] or None) of a directory with config.json and safetensors.

    dtype: 'float32' or 'bfloat16' (FP8 dequantised), or 'stored': each as it lies, FP8 matmul weights as Weight(None, q, scale),
    which run and save bit-exactly but do not train. mesh: arrays are sharded by their logical axes; default: the default device.
    progress(done, total) counts bytes. Raises UserError, one line that names the tensor or key.
    """
    target = DTYPES[choice(dtype if isinstance(dtype, str) else np.dtype(dtype).name, DTYPES, "dtype")]
    directory, tensors = Path(directory), stream.scan(directory)
    path = str(directory / "config.json")
    try:
        cfg = config.parse(_read_config(directory, tensors))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    leaves = _slots(cfg)
    if OUTER_NAMES["head"] not in tensors and _json(directory).get("tie_word_embeddings"):
        tensors[OUTER_NAMES["head"]] = tensors[OUTER_NAMES["embedding"]]
    _check(cfg, leaves, tensors)

    logical, params, done = _flat(transformer.axes(cfg)), {}, 0
    total = sum(tensors[slot.name].nbytes for slots in leaves.values() for slot in slots)
    for leaf, slots in leaves.items():
        params[leaf] = _load_leaf(slots, tensors, target, mesh, logical[leaf])
        done += sum(tensors[slot.name].nbytes for slot in slots)
        progress(done, total)
    bias = [stream.rows(tensors[name], 0, cfg.moe.n_routed_experts) for name in _bias_names(cfg)]
    return cfg, _nest(params), jnp.asarray(np.stack(bias), jnp.float32) if bias else None


def save(directory: str | os.PathLike, cfg: ModelConfig, params: Any, router_bias: Any, quantize: str | None = None, *,
         dtype: str = "stored", shard_bytes: int = 4 << 30, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
    """Writes config.json and safetensors that transformers and `load` read: whole or not at all, into a new or empty directory.

    quantize 'fp8_block': matmul weights of the blocks as E4M3 with scale = amax/448 a 128 x 128 block; a Weight that is FP8 already is
    written as it is. dtype: of everything else ('stored': as the arrays are; FP8 weights then stay FP8). Raises UserError.
    """
    choice(quantize, QUANTIZE, "quantize")
    target = DTYPES[choice(dtype, DTYPES, "dtype")]
    flat, outputs = _flat(params, is_leaf=is_weight), []
    for path, slots in _slots(cfg).items():
        require(path in flat, f"params.{path}", "nothing", "the leaves that the model's config describes")
        array = flat[path].low if is_weight(flat[path]) and flat[path].master is None else getattr(flat[path], "master", flat[path])
        require(array.shape[len(slots[0].lead):] == slots[0].shape, f"params.{path}", array.shape, f"[..., {slots[0].shape}]")
        for slot in slots:
            outputs += _outputs(slot, flat[path], quantize, target)
    shared = {slot.path: slot for slot in (_slots(cfg)[leaf][0] for leaf in COPIES.values())}
    for k in range(cfg.mtp_depth):
        for name, leaf in COPIES.items():
            copy = shared[leaf]._replace(name=f"model.layers.{cfg.n_layers + k}.{name}")
            outputs += _outputs(copy, flat[leaf], None, target)
    for row, name in enumerate(_bias_names(cfg, every=True)):
        value = np.zeros(cfg.moe.n_routed_experts, np.float32) if router_bias is None else np.asarray(router_bias[row], np.float32)
        outputs.append(stream.Output(name, value.dtype, value.shape, lambda value=value: [value]))

    outputs.sort(key=lambda output: _order(output.name))
    total, done = sum(output.nbytes for output in outputs), itertools.accumulate
    counter = [0]

    def on_tensor(output):
        counter[0] += output.nbytes
        progress(counter[0], total)

    wide = next(output.dtype for output in outputs if output.name == OUTER_NAMES["embedding"])
    content = hf_config.write(cfg, wide.name, fp8=any(output.dtype == FP8 for output in outputs))
    stream.write(directory, outputs, {"config.json": content}, shard_bytes=shard_bytes, on_tensor=on_tensor)
