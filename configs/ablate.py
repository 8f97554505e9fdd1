"""Ablations of the tiny DeepSeek-V3 over paired seeds: which claims of the papers show at 1 M parameters?

Stands for: V2 Tables 8 and 9 (attention), V3 Tables 4 and 5 (MTP, balance), DeepSeekMoE (segmentation, shared experts).
Cost: (names + 2) x seeds runs; a run of the tiny preset is about 2 minutes on two CPU cores, 9 names x 8 seeds thus about 3 hours.
Expect: not measured here; figures in LOG.md.
Run: python main.py --config=configs/ablate.py --workdir=runs/ablate
     python main.py --config=configs/ablate.py --config.ablate.names="('mqa','no_mtp')" --config.ablate.seeds=3
GPU:  python main.py --config=configs/ablate.py:gpu --workdir=runs/ablate    (bf16; a cell is launches, so start several processes a card)
Tiny: python main.py --config=configs/ablate.py:smoke --workdir=runs/smoke   (two names, two seeds, a few steps: it shows the form)
Differs from the paper: everything is 1e4 to 1e6 times smaller, so a miss refutes nothing; bytes instead of a BPE.

Resume: the same command skips finished cells. --config.stop_after_s=3600 stops after an hour, the table so far written.
Many cores: start it once a core, on the same workdir; each process takes the next free cell (a step is as cheap in CPU time on one core
as on two):  for i in $(seq 0 $(($(nproc) - 1))); do taskset -c $i python main.py --config=configs/ablate.py --workdir=runs/ablate & done
"""
from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """The table of nine claims; `gpu`, the same on a card; `smoke`, a small one of two."""
    if arg not in ("", "gpu", "smoke"):
        raise ValueError(f"configs/ablate.py: found {arg!r}, allowed: gpu, smoke, or nothing")
    config = ConfigDict(dict(
        job="ablate",
        seed=0,  # the first; the A/A arm uses the `seeds` after the last
        ablate=dict(
            file="configs/ablations.py",
            base="deepseek_v3:tiny",
            names=("mha", "mqa", "no_mtp", "aux_loss", "no_balance", "no_shared", "fine", "muon", "gated_attention"),
            seeds=8,
            edits=("pretrain.eval.every=0", "pretrain.sample.prompts=()"),  # 'path=value' for every cell
            metrics=("bits_per_byte", "max_violation"),  # also bits_per_byte/DOMAIN, main_loss, tokens_per_s
            margin=0.02,  # 'same' is as predicted when the whole interval lies within
            checkpoints="drop",  # of finished cells; or keep
        ),
        stop_after_s=0.0,
        resume="same",
        report=dict(runs=()),
    ))
    if arg == "gpu":
        config.ablate.edits = (*config.ablate.edits, "run.precision.kind=bf16", "run.attention.kind=xla", "mesh.fsdp=1")
    if arg == "smoke":
        config.ablate.update(dict(names=("mqa", "no_mtp"), seeds=2, edits=(
            *config.ablate.edits, "pretrain.steps=30", "pretrain.batch_size=4", "pretrain.seq_len=64", "pretrain.eval.max_bytes=4000",
            "data.max_bytes=400000")))
    return config
