"""GRPO alone, on any checkpoint that answers the miniature's problems (R1 §2.2; DeepSeekMath 2402.03300).

Stands for: R1-Zero's stage by itself, from a base of the recipe. Cost: 24 steps of 512 answers, under a minute on two idle CPU cores.
Expect: accuracy and length against steps as in the recipe (docs/recipe.md); another base, another curve.
Run: python main.py --config=configs/rl.py --config.init_from.path=runs/latest/checkpoints/gate --workdir=runs/rl
     ... --config.rl.loss.kind=dr_grpo --config.rl.advantage.kind=group_mean        (2503.20783)
     ... --config.rl.loss.kind=dapo --config.rl.clip_high=0.28 --config.rl.rewards.soft_overlong=1.0     (2503.14476)
     ... --config.rl.clip_low=10 --config.rl.clip_high=10                           (R1's own clip; its KL is the default)
Tiny: it is tiny.
Differs from the paper: answers of 13 tokens at most, rewards by rule on problems by rule.
"""
from ml_collections import ConfigDict

from configs import r1


def get_config(arg: str = "") -> ConfigDict:
    """The recipe's r1_zero as a job of its own, config.rl; ARG names another RL stage of configs/r1.py (rl, final, small_rl)."""
    config = r1.get_config("tiny")
    name = arg or "r1_zero"
    if name not in config or config[name].get("job") != "rl":
        raise ValueError(f"configs/rl.py: found {arg!r}, allowed: r1_zero, rl, final, small_rl")
    return alone(config, name, "rl")


def alone(config: ConfigDict, stage: str, job: str) -> ConfigDict:
    """One stage of the recipe as a job: its subtree moves to config[job], its model edits are made."""
    sub = config[stage].to_dict()
    for name in ("recipe", "base", "gate", "r1_zero", "cold_start", "rl", "rejection", "sft", "final", "small_base", "traces",
                 "small_distil", "small_rl"):
        del config[name]
    for edit in sub.pop("edits"):
        *path, leaf = edit.partition("=")[0].split(".")
        word, node = edit.partition("=")[2], config
        for part in path:
            node = node[part]
        node[leaf] = type(node[leaf])(word)
    sub.pop("init_from")
    sub.pop("job")
    config[job] = sub
    config.job = job
    return config
