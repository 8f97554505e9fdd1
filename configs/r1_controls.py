"""Controls of R1-Zero: which reward makes answers longer? (R1 §2.2.4; 2503.20783 on length bias.) Edits for the job `ablate`.

Stands for: the claim that length grows because worked answers are right more often, and not because of the format reward or the update.
The base arm is the pretrained model before any RL, so that an arm's difference is what its RL changed; margin is the bar of 'same'.
Run: python main.py --config=configs/r1.py --config.recipe.stages="('base','gate')" --config.seed=S --workdir=runs/bases/seed-S
         (S = 0 to 15: eight seeds, and eight of the A/A arm)
     python main.py --config=configs/r1_controls.py --workdir=runs/controls    (once, or as often as there are cores to spare)
One: python main.py --config=configs/r1_controls.py:format_only@rl --config.init_from.path=runs/bases/seed-0 --workdir=runs/format_only
Cost: a cell is 24 steps, under a minute on two idle cores. Expect: the table in docs/recipe.md.
"""
from __future__ import annotations

from collections.abc import Callable

from ml_collections import ConfigDict

from configs import ablate, ablations


def get_config(arg: str = "") -> ConfigDict:
    """Without an argument the job `ablate` over every control; NAME@rl is one of them as a job of its own."""
    if arg:
        return ablations.edited(arg, ABLATIONS, "configs/r1_controls.py", "rl")
    config = ablate.get_config()
    config.ablate.update(dict(
        file="configs/r1_controls.py", base="rl", names=tuple(n for n in ABLATIONS if n != "base"), seeds=8, margin=0.05,
        checkpoints="drop",
        edits=("init_from.path=runs/bases/seed-{seed}/checkpoints/gate", "rl.eval.every=8", "rl.eval.problems=2048",
               "evaluation.problems=2048", "evaluation.cons_problems=0", "evaluation.transfer=()"),
        metrics=("evaluation/worked", "evaluation/tagged_right", "evaluation/pass_at_1", "evaluation/length", "evaluation/consistency")))
    return config


def base(config):
    """Before any RL: one step at a learning rate of 0.

    Source: none
    Published: none
    Predicted: none
    """
    config.rl.steps = 1
    config.rl.lr.linear.update(dict(peak=0.0, final=0.0))


def r1_zero(config):
    """R1-Zero itself, accuracy and format: accuracy rises, and length with it.

    Source: R1 §2.2, fig. 2 and 3
    Published: AIME 2024 pass@1 15.6 % to 77.9 %
    Predicted: evaluation/worked up; evaluation/tagged_right up; evaluation/pass_at_1 up; evaluation/length up; evaluation/consistency down
    """


def accuracy_only(config):
    """Accuracy alone: worked answers take over all the same.

    Source: R1 §2.2 (in words); ours
    Published: none
    Predicted: evaluation/worked up; evaluation/tagged_right up; evaluation/length up
    """
    config.rl.rewards.format = 0.0


def format_only(config):
    """Format alone: tags are learnt, working is not.

    Source: ours, after 2503.20783
    Published: none
    Predicted: evaluation/worked down; evaluation/tagged_right down
    """
    config.rl.rewards.accuracy = 0.0


def random_reward(config):
    """A fair coin for every answer: nothing is learnt.

    Source: ours, after 2506.10947 (where a random reward did help one family of models)
    Published: none
    Predicted: evaluation/worked same; evaluation/tagged_right down
    """
    config.rl.rewards.update(dict(accuracy=0.0, format=0.0, random=1.0))


def length_penalty(config):
    """Accuracy and format less twice the length's share of the limit: guessing pays more than working, and answers stay short.

    Source: ours
    Published: none
    Predicted: evaluation/worked down; evaluation/length down
    """
    config.rl.rewards.length_penalty = 2.0


def no_balance(config):
    """The base's router bias is dropped and nothing balances the experts during RL.

    Source: V3 §2.1.2 (in words)
    Published: none
    Predicted: evaluation/worked up; evaluation/tagged_right up; evaluation/length up
    """
    config.model.ffn.moe.balance.kind = "none"


ABLATIONS: dict[str, Callable[[ConfigDict], None]] = {f.__name__: f for f in (
    base, r1_zero, accuracy_only, format_only, random_reward, length_penalty, no_balance)}
