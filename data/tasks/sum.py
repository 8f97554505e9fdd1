"""sum: the running sum modulo the number of digits D. r_1 = d_1, r_i = (r_{i-1} + d_i) mod D."""
import numpy as np

from data.tasks import lookup


def rule(digits: int = 6, states: int | None = None) -> lookup.Rule:
    """`digits` symbols 0..D-1; defined for `states` (default D) states, so that another rule's result can go in."""
    r, d = np.arange(states or digits)[:, None], np.arange(digits)
    return lookup.Rule("sum", ("sum", "求和"), d, (r + d) % digits)


def generate(rng, difficulty: int):
    return lookup.generate((rule(),), rng, difficulty)


verify = lookup.verify
