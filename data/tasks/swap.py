"""swap: D cups in a ring, one hides a ball: r_1 = d_1 is its place, each later digit d swaps cups d and d + 1 mod D."""
import numpy as np

from data.tasks import lookup


def rule(digits: int = 6, states: int | None = None) -> lookup.Rule:
    r, d = np.arange(states or digits)[:, None], np.arange(digits)
    up = (d + 1) % digits
    return lookup.Rule("swap", ("swap", "交换"), d, np.where(r == d, up, np.where(r == up, d, r)))


def generate(rng, difficulty: int):
    return lookup.generate((rule(),), rng, difficulty)


verify = lookup.verify
