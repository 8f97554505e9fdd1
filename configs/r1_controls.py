"""Controls of R1-Zero: which reward makes answers longer? (R1 §2.2.4; 2503.20783 on length bias.) Edits for the job `ablate`.

Stands for: the claim that length grows because worked answers are right more often, and not because of the format reward or the update.
Run: python main.py --config=configs/r1.py --config.recipe.stages="('base','gate')" --config.seed=S --workdir=runs/bases/seed-S
     python main.py --config=configs/r1_controls.py --workdir=runs/controls    (4 seeds, each from its own base)
One: python main.py --config=configs/r1_controls.py:format_only@rl --config.init_from.path=runs/bases/seed-0 --workdir=runs/format_only
Cost: a cell is 24 steps, under a minute on two idle cores. Expect: figures in LOG.md; on seed 1 (2026-11-24) the worked share went from
0.18 to 1.00 (accuracy_only), 0.02 (format_only), 0.40 (random_reward: a drift, worked answers no better), 0.00 (length_penalty: even
the tags go), 1.00 (no_balance).
"""
from __future__ import annotations

from collections.abc import Callable

from ml_collections import ConfigDict

from configs import ablate, rl


def get_config(arg: str = "") -> ConfigDict:
    """Without an argument the job `ablate` over every control; NAME@rl is one of them as a job of its own."""
    if not arg:
        config = ablate.get_config()
        config.ablate.update(dict(
            file="configs/r1_controls.py", base="rl", names=tuple(n for n in ABLATIONS if n != "base"), seeds=4,
            edits=("init_from.path=runs/bases/seed-{seed}/checkpoints/gate",), checkpoints="drop",
            metrics=("worked_change", "tagged_right_change", "length_change", "pass_at_1_change", "max_violation")))
        return config
    name, _, base_name = arg.partition("@")
    if name not in ABLATIONS or base_name not in ("", "rl"):
        raise ValueError(f"configs/r1_controls.py: found {arg!r}, allowed: {', '.join(ABLATIONS)}, each with @rl or without")
    config = rl.get_config()
    ABLATIONS[name](config)
    return config


def base(config):
    """R1-Zero itself: accuracy and format.

    Source: none
    Published: none
    Predicted: none
    """


def accuracy_only(config):
    """Accuracy alone: worked answers take over all the same.

    Source: R1 §2.2 (in words); ours
    Published: none
    Predicted: worked_change same
    """
    config.rl.rewards.format = 0.0


def format_only(config):
    """Format alone: tags are learnt, working is not.

    Source: ours, after 2503.20783
    Published: none
    Predicted: worked_change down; tagged_right_change down
    """
    config.rl.rewards.accuracy = 0.0


def random_reward(config):
    """A fair coin for every answer: nothing is learnt.

    Source: ours
    Published: none
    Predicted: worked_change down; tagged_right_change down
    """
    config.rl.rewards.update(dict(accuracy=0.0, format=0.0, random=1.0))


def length_penalty(config):
    """Accuracy and format less twice the length's share of the limit: guessing pays more than working, and answers stay short.

    Source: ours
    Published: none
    Predicted: length_change down
    """
    config.rl.rewards.length_penalty = 2.0


def no_balance(config):
    """The base's router bias is dropped and nothing balances the experts during RL.

    Source: V3 §2.1.2 (in words)
    Published: none
    Predicted: worked_change same
    """
    config.model.ffn.moe.balance.kind = "none"


ABLATIONS: dict[str, Callable[[ConfigDict], None]] = {f.__name__: f for f in (
    base, accuracy_only, format_only, random_reward, length_penalty, no_balance)}
