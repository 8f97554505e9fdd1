"""FP8 against BF16 training, same seeds and data: does it train as well, and which part of the recipe matters?

Stands for: V3 §3.3 and App. B.1 (relative error of the smoothed loss under 0.25 % at 16B and 230B), App. B.2 (128x128 blocks for
activation gradients diverged at 16B), §3.3.2 (accumulation in the tensor core: near 2 % of error at K = 4096).
Cost: (names + 2) x seeds runs of 1,000 steps of 16 x 1024 bytes, each about a minute of one H100 after the first of its kind.
Expect: figures in LOG.md and docs/kernels.md.
Run: python main.py --config=configs/fp8.py --workdir=runs/fp8             (671M parameters, the machine's own Python library)
     python main.py --config=configs/fp8.py:tiny --workdir=runs/fp8_tiny   (the tiny preset, 450 steps of 64 x 128, eight seeds)
     python main.py --config=configs/fp8.py:fp8_block@deepseek_v3:700m     (one run)
     python main.py --config=configs/fp8.py:base --workdir=runs/fp8_start && python main.py --config=configs/fp8.py:settled \
       --workdir=runs/fp8_settled                                           (every run goes on from one model of 1,000 steps)
Differs from the paper: 671M parameters and 16M tokens instead of 16B and 1.3T. So small a run is in its steep part, where two runs that
differ by rounding alone part by percents: `rounding` beside the FP8 kinds shows by how much. Both sizes therefore train at a calm rate on
a batch of 16,384 or 8,192 bytes; and `settled` leaves the steep part out: 400 steps from one BF16 model, where runs stay together.
"""
from __future__ import annotations

from ml_collections import ConfigDict

from configs import ablate, ablations

DEFAULT_BASE = "deepseek_v3:700m"


def get_config(arg: str = "") -> ConfigDict:
    """The table ('', 'tiny' or 'settled'), or one of its runs, NAME or NAME@BASE."""
    if arg not in ("", "tiny", "settled"):
        return ablations.edited(arg, ABLATIONS, "configs/fp8.py", DEFAULT_BASE)
    config = ablate.get_config()
    config.ablate.update(dict(file="configs/fp8.py", base=DEFAULT_BASE, names=tuple(k for k in ABLATIONS if k != "base"), seeds=12,
                              metrics=("log_main_loss", "bits_per_byte"), margin=0.0025))
    if arg == "tiny":
        config.ablate.update(dict(base="deepseek_v3:tiny", seeds=8))
    if arg == "settled":
        config.ablate.edits = (*config.ablate.edits, "init_from.path=runs/fp8_start", "pretrain.steps=400", "pretrain.lr.v3.peak=0.0001",
                               "pretrain.lr.v3.final=0.00001", "pretrain.lr.v3.tail=0.000005", "pretrain.lr.v3.warmup_steps=50")
    return config


def base(config):
    """Bfloat16, the weights' masters and the moments as in the FP8 runs.

    Source: none
    Published: none
    Predicted: none
    """
    config.run.precision.kind = "bf16"
    if config.model.n_layers < 6:  # tiny
        config.pretrain.batch_size = 64
        config.pretrain.lr.v3.update(dict(peak=1e-3, final=1e-4, tail=3e-5))
        return
    config.mesh.fsdp = 1
    config.data.update(dict(max_bytes=16_000_000))
    config.pretrain.update(dict(steps=1000, batch_size=16, n_micro=1, seq_len=1024))
    config.pretrain.ramp.kind = "none"
    config.pretrain.lr.v3.update(dict(peak=2e-4, final=2e-5, tail=7e-6, warmup_steps=100))
    config.pretrain.eval.max_bytes = 200_000
    config.checkpoint.every = 0


def rounding(config):
    """Attention by XLA where cuDNN runs it: the base with other roundings, no better or worse; what rounding alone does to so short a run.

    Source: none
    Published: none
    Predicted: log_main_loss same
    """
    base(config)
    config.run.attention.kind = "xla"


def fp8_block(config):
    """V3's recipe, 1x128 tiles and 128x128 blocks with promotion, trains like BF16.

    Source: V3 App. B.1
    Published: relative error of the smoothed loss under 0.25 %
    Predicted: log_main_loss same
    """
    base(config)
    config.run.precision.kind = "fp8_block"


def fp8_tensor(config):
    """One scale a tensor instead of tiles: an outlier costs its whole tensor resolution.

    Source: V3 §3.3.2
    Published: none
    Predicted: log_main_loss up
    """
    base(config)
    config.run.precision.kind = "fp8_tensor"


def fp8_delayed(config):
    """One scale a tensor from the amax of past steps (Transformer Engine's delayed scaling) instead of online ones.

    Source: V3 §3.3.2 (in words)
    Published: none
    Predicted: log_main_loss up
    """
    base(config)
    config.run.precision.kind = "fp8_delayed"


def fp8_block_grad(config):
    """128x128 blocks for activation gradients too.

    Source: V3 App. B.2 (16B, 300B tokens)
    Published: diverged
    Predicted: log_main_loss up
    """
    base(config)
    config.run.precision.kind = "fp8_block_grad"


def fp8_no_promotion(config):
    """Partial sums stay in the tensor core's accumulator (with one scale a tensor, which alone allows it).

    Source: V3 §3.3.2
    Published: relative error near 2 % of a product at K = 4096
    Predicted: log_main_loss up
    """
    base(config)
    config.run.precision.kind = "fp8_no_promotion"


ABLATIONS = {f.__name__: f for f in (base, rounding, fp8_block, fp8_tensor, fp8_delayed, fp8_block_grad, fp8_no_promotion)}
