"""SFT alone: your own examples, or readable traces made by rule (R1 §2.3.1; V3 §5.1).

Stands for: the cold start by itself. Cost: 12 updates, seconds. Expect: the loss on completions falls; figures in docs/recipe.md.
Run: python main.py --config=configs/sft.py --config.init_from.path=runs/latest/checkpoints/gate --workdir=runs/sft
     ... --config.sft.source.kind=file --config.sft.source.file.path=mine.jsonl    ({"messages": ...} or {"prompt", "completion"} a line)
     a chat model of bytes: --config.tokenizer.kind=bytes, with a base that was trained on bytes
Tiny: it is tiny.
Differs from the paper: a few hundred examples of a few tokens.
"""
from ml_collections import ConfigDict

from configs import r1, rl


def get_config(arg: str = "") -> ConfigDict:
    """The recipe's cold start as a job of its own, config.sft."""
    if arg:
        raise ValueError(f"configs/sft.py: found {arg!r}, allowed: nothing")
    return rl.alone(r1.get_config("tiny"), "cold_start", "sft")
