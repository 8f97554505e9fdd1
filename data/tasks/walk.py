"""walk: a walk on D places between walls: r_1 = d_1, a digit of the lower half steps down, of the upper half up.

Steps of one: with longer ones the walls make the last two digits give the result away two times in three (one: 0.42).
"""
import numpy as np

from data.tasks import lookup


def rule(digits: int = 6, states: int | None = None) -> lookup.Rule:
    r, d = np.arange(states or digits)[:, None], np.arange(digits)
    return lookup.Rule("walk", ("walk", "行走"), d, np.clip(r + np.where(d < digits // 2, -1, 1), 0, digits - 1))


def generate(rng, difficulty: int):
    return lookup.generate((rule(),), rng, difficulty)


verify = lookup.verify
