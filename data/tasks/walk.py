"""walk: a walk on D places between walls: r_1 = d_1; a digit of the lower half steps down, of the upper half up.

Digit d steps by d - D // 2, or one more from the middle on (D = 6: -3 -2 -1 +1 +2 +3), and the walls hold it inside.
"""
import numpy as np

from data.tasks import lookup


def rule(digits: int = 6, states: int | None = None) -> lookup.Rule:
    r, d = np.arange(states or digits)[:, None], np.arange(digits)
    step = d - digits // 2 + (d >= digits // 2)
    return lookup.Rule("walk", ("walk", "行走"), d, np.clip(r + step, 0, digits - 1))


def generate(rng, difficulty: int):
    return lookup.generate((rule(),), rng, difficulty)


verify = lookup.verify
