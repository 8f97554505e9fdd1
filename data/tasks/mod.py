"""mod: Horner's rule, the digits as coefficients: r_1 = d_1 mod m, r_i = (base r_{i-1} + d_i) mod m.

base mod m is neither 0 nor 1 (1 would make it a digit sum, as base 6 mod 5 does), and base and m share no factor (else
the first digits fall out of the result).
"""
import math

import numpy as np

from data.tasks import lookup


def rule(digits: int = 6, states: int | None = None, base: int = 2, modulus: int = 5) -> lookup.Rule:
    """ValueError for a pair that degenerates."""
    if not 2 <= modulus <= 10 or base % modulus in (0, 1) or math.gcd(base, modulus) != 1:
        raise ValueError(f"data.tasks.modulus: {modulus} with base {base}; allowed: 2 to 10, base mod modulus neither "
                         "0 nor 1, no common factor")  # fmt: skip
    r, d = np.arange(states or max(digits, modulus))[:, None], np.arange(digits)
    return lookup.Rule("mod", ("mod", "取余"), d % modulus, (base * r + d) % modulus)


def generate(rng, difficulty: int):
    return lookup.generate((rule(),), rng, difficulty)


verify = lookup.verify
