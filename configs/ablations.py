"""Ablations of the pretraining model: each name is one small edit of a config, its docstring the lab note.

Run one:  python main.py --config=configs/ablations.py:NAME            on configs/deepseek_v3.py:tiny
          python main.py --config=configs/ablations.py:NAME@BASE       on another, e.g. mqa@deepseek_v3:700m
A table:  python main.py --config=configs/ablate.py                    several names over paired seeds (train/ablate.py)

A docstring is a claim, then lines that `train/ablate.py` prints and judges by: `Source:` where the claim stands, `Published:` its
number, `Predicted:` metric and sign of edit minus base, one or more of METRIC up|down|same joined by ';'. "Ours" as a source says
that no paper predicts it. The papers' runs are 1e4 to 1e6 times longer: a miss here refutes nothing there.
"""
from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping

from ml_collections import ConfigDict

DEFAULT_BASE = "deepseek_v3:tiny"


def get_config(arg: str = "") -> ConfigDict:
    """The config of NAME, or of NAME@BASE with BASE = a file of configs/, or FILE:ARG; NAME `base` edits nothing."""
    return edited(arg, ABLATIONS, "configs/ablations.py", DEFAULT_BASE)


def edited(arg: str, edits: Mapping[str, Callable[[ConfigDict], None]], file: str, default_base: str) -> ConfigDict:
    """NAME@BASE of a file of edits: the config of BASE with the edit NAME done to it. Raises ValueError for a name or base unknown."""
    name, _, where = arg.partition("@")
    if name not in edits:
        raise ValueError(f"{file}: found {name!r}, allowed: {', '.join(edits)}, each with @BASE or without")
    module_name, _, base_arg = (where or default_base).partition(":")
    try:
        module = importlib.import_module(f"configs.{module_name}")
    except ModuleNotFoundError:
        raise ValueError(f"{file}: found base {module_name!r}, allowed: a file of configs/, such as {default_base}") from None
    config = module.get_config(base_arg) if base_arg else module.get_config()
    edits[name](config)
    return config


def base(config):
    """The base itself.

    Source: none
    Published: none
    Predicted: none
    """


def mha(config):
    """Multi-head attention instead of MLA: MLA is at least as good, at a seventh of the cache.

    Source: V2 Table 9 (2.4B active, 1.33T tokens)
    Published: BBH 37.9 against MLA's 39.0, MMLU 48.7 against 50.0; C-Eval the other way, 51.6 against 50.9
    Predicted: bits_per_byte up
    """
    config.model.attention.kind = "mha"


def gqa(config):
    """Grouped-query attention instead of MLA: weaker than MHA, which is weaker than MLA.

    Source: V2 Table 8 (7B dense), with Table 9
    Published: MMLU 41.2 for GQA of 8 groups against MHA's 45.2
    Predicted: bits_per_byte up
    """
    config.model.attention.kind = "gqa"


def mqa(config):
    """Multi-query attention instead of MLA: the weakest of the four.

    Source: V2 Table 8 (7B dense), with Table 9
    Published: MMLU 37.9 against MHA's 45.2
    Predicted: bits_per_byte up
    """
    config.model.attention.kind = "mqa"


def gated_attention(config):
    """A sigmoid gate on every channel of MLA's heads: sparse, non-linear heads make a better model, at one more matrix a layer.

    Source: Gated attention 2505.06708 abstract (15B MoE and 1.7B dense, up to 3.5T tokens; on plain attention, not MLA)
    Published: consistently better, in words
    Predicted: bits_per_byte down
    """
    config.model.attention.kind = "gated"


def no_query_compression(config):
    """Queries straight from x, as in V2-Lite: compressing them saves activation memory, and is not there for quality.

    Source: V2 §2.1.2, App. B
    Published: none
    Predicted: bits_per_byte same
    """
    config.model.attention.mla.q_lora_rank = 0


def no_mtp(config):
    """Without multi-token prediction: benchmarks gain from MTP, bits per byte do not.

    Source: V3 Table 4 (15.7B, 1.33T tokens; 228.7B, 540B)
    Published: Pile bits per byte 0.729 with and without (small), 0.657 with against 0.658 (large)
    Predicted: bits_per_byte same
    """
    config.model.mtp_depth = 0


def mtp2(config):
    """A second MTP module behind the first; V3 trains one.

    Source: Ours, after V3 §2.2
    Published: none
    Predicted: bits_per_byte same
    """
    config.model.mtp_depth = 2


def aux_loss(config):
    """The sequence-wise balance loss alone, no bias: it balances less and its gradient disturbs the model.

    Source: V3 Table 5; 2408.15664 (1B, 100B tokens)
    Published: Pile bits per byte 0.727 against 0.724 (small); perplexity 9.56 against 9.50, MaxVio 0.72 against 0.04
    Predicted: bits_per_byte up; max_violation up
    """
    config.model.ffn.moe.balance.kind = "aux_loss"


def batch_aux(config):
    """The balance loss over the whole batch instead of each sequence: as good as the bias, since the scope is what counts.

    Source: V3 §4.5.3 (1B and 3B)
    Published: validation loss 2.253 against 2.253 (1B), 2.080 against 2.080 (3B); sequence-wise 2.258 and 2.085
    Predicted: bits_per_byte same
    """
    config.model.ffn.moe.balance.kind = "batch_aux"


def no_balance(config):
    """Nothing balances the experts: routing collapses towards few of them.

    Source: V3 §2.1.2, 2408.15664 (in words)
    Published: none
    Predicted: max_violation up
    """
    config.model.ffn.moe.balance.kind = "none"


def slow_bias(config):
    """A tenth of the bias rate: balance is reached more slowly, the model is about as good.

    Source: 2408.15664 Fig. 4 (1B)
    Published: perplexity 9.51 at 1e-4 against 9.50 at 1e-3
    Predicted: bits_per_byte same; max_violation up
    """
    config.pretrain.bias_rate.first = 0.1 * config.pretrain.bias_rate.first


def softmax_gate(config):
    """Softmax affinities, still normalised over the chosen: the sigmoid gate was found better.

    Source: 2408.15664, its softmax runs in App. C
    Published: none beside each other
    Predicted: bits_per_byte up
    """
    gate = config.model.ffn.moe.gate
    gate.kind = "softmax"
    gate.softmax.weights = gate.sigmoid.weights


def no_groups(config):
    """Every expert may be chosen: limiting a token to few nodes is for the network, and costs nothing.

    Source: V3 §3.2.2 (at most 4 nodes a token)
    Published: none
    Predicted: bits_per_byte same
    """
    config.model.ffn.moe.groups.kind = "none"


def no_shared(config):
    """No shared expert, its width given to one more routed one: common knowledge has no home of its own.

    Source: DeepSeekMoE 2401.06066 (shared expert isolation)
    Published: none from equal training
    Predicted: bits_per_byte up
    """
    moe = config.model.ffn.moe
    moe.n_activated_experts += moe.n_shared_experts
    moe.n_shared_experts = 0


def fine(config):
    """Every expert cut in two, twice as many chosen, at equal FLOPs and parameters: more combinations, better experts.

    Source: DeepSeekMoE 2401.06066 (fine-grained expert segmentation)
    Published: none in bits per byte
    Predicted: bits_per_byte down
    """
    moe = config.model.ffn.moe
    moe.d_expert //= 2
    for name in ("n_routed_experts", "n_activated_experts", "n_shared_experts"):
        moe[name] *= 2


def coarse(config):
    """Few wide experts, the best two of them and none shared (GShard's shape), at equal active and about equal total width.

    Source: DeepSeekMoE 2401.06066 (its GShard baseline)
    Published: none in bits per byte
    Predicted: bits_per_byte up
    """
    moe = config.model.ffn.moe
    total = (moe.n_routed_experts + moe.n_shared_experts) * moe.d_expert
    moe.d_expert = (moe.n_activated_experts + moe.n_shared_experts) * moe.d_expert // 2
    moe.update(dict(n_routed_experts=round(total / moe.d_expert), n_activated_experts=2, n_shared_experts=0))
    moe.groups.kind = "none"


def dense(config):
    """Dense layers of the same active width: the experts' further parameters are worth something at equal FLOPs.

    Source: DeepSeekMoE 2401.06066 (abstract)
    Published: 16B of experts match LLaMA2 7B, which is dense, with about 40 % of its compute
    Predicted: bits_per_byte up
    """
    m, moe = config.model, config.model.ffn.moe
    width = (moe.n_activated_experts + moe.n_shared_experts) * moe.d_expert
    m.d_ff = (m.n_dense_layers * m.d_ff + (m.n_layers - m.n_dense_layers) * width) // m.n_layers
    m.ffn.kind = "dense"


def muon(config):
    """Muon for the matrices: orthogonalised momentum needs about half the compute.

    Source: Moonlight 2502.16982 (abstract)
    Published: about twice the computational efficiency of AdamW
    Predicted: bits_per_byte down
    """
    config.optimizer.kind = "muon"


def no_fim(config):
    """No fill-in-the-middle: rearranging a tenth of the documents does not hurt next-token prediction.

    Source: V3 §4.1
    Published: none
    Predicted: bits_per_byte same
    """
    config.data.fim.rate = 0.0


def isolate(config):
    """Attention stays inside each document; V3 packs documents without such a mask.

    Source: Ours, after V3 §4.1
    Published: none
    Predicted: bits_per_byte same
    """
    config.data.packing.kind = "isolate"


def constant_lr(config):
    """The peak learning rate to the end: the decay is where the last of the loss goes.

    Source: Ours, after V3 §4.2
    Published: none
    Predicted: bits_per_byte up
    """
    lr = config.pretrain.lr
    lr.constant.update(dict(peak=lr[lr.kind].peak, warmup_steps=lr[lr.kind].warmup_steps))
    lr.kind = "constant"


def no_weight_decay(config):
    """Weight decay 0 instead of 0.1: over so few steps it hardly acts.

    Source: Ours, after V3 §4.2
    Published: none
    Predicted: bits_per_byte same
    """
    config.optimizer.weight_decay = 0.0


ABLATIONS: dict[str, Callable[[ConfigDict], None]] = {f.__name__: f for f in (
    base, mha, gqa, mqa, gated_attention, no_query_compression, no_mtp, mtp2, aux_loss, batch_aux, no_balance, slow_bias, softmax_gate,
    no_groups, no_shared, fine, coarse, dense, muon, no_fim, isolate, constant_lr, no_weight_decay)}
