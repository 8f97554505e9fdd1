"""relay: two trained rules taking turns (r_1 and r_3 by the first word's rule, r_2 and r_4 by the second's).

Never trained on: seen operations under seen symbols in an unseen order. `chance` is what its accuracy is compared with.
"""
import numpy as np

from data.tasks import lookup, mod, swap
from data.tasks import sum as sum_task


def pairs(rules: tuple[lookup.Rule, ...]) -> list[tuple[lookup.Rule, lookup.Rule]]:
    """Ordered pairs of different rules."""
    return [(a, b) for a in rules for b in rules if a is not b]


def generate(rng, difficulty: int):
    both = pairs((sum_task.rule(), mod.rule(), swap.rule()))
    return lookup.generate(both[rng.integers(len(both))], rng, difficulty, family="relay")


def chance(problems: list) -> dict[str, float]:
    """Accuracies without the skill: `constant` answers the commonest result, `first` and `second` apply one rule
    throughout.
    """
    answers = np.array([p.meta["steps"][-1] for p in problems])
    first, second = np.mean(np.array([p.meta["single"] for p in problems]) == answers[:, None], axis=0)
    return dict(constant=float(np.bincount(answers).max() / len(answers)), first=float(first), second=float(second))


verify = lookup.verify
