"""Intervals and tests for a few paired seeds, exact where exactness is cheap; no bootstrap (it is too narrow below n = 20).

Student-t interval of a mean: m +- t(n-1, 0.975) s / sqrt(n). Sign-flip test: under the null each paired difference is as likely
negative, so p = share of the 2^n sign patterns whose |mean| is at least the one seen. Wilson interval of a rate k / n: the rates
not refused by the normal test at that rate (Wilson, Probable Inference, JASA 1927).
"""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy.special import ndtri, stdtrit

MOST_FLIPPED = 44  # two halves of 2^22 sums: 64 MB


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean with its interval: n values, low and high None for n < 2 (one value tells nothing of its spread)."""

    n: int
    mean: float
    low: float | None
    high: float | None

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and (self.low > 0 or self.high < 0)


def t_interval(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """The mean of independent values with its Student-t interval. Raises ValueError on no value, or one that is not finite."""
    x = _finite(values)
    n, mean = len(x), float(np.mean(x))
    if n < 2:
        return Estimate(n, mean, None, None)
    half = float(stdtrit(n - 1, 0.5 + confidence / 2)) * float(np.std(x, ddof=1)) / math.sqrt(n)
    return Estimate(n, mean, mean - half, mean + half)


def paired_difference(new: Sequence[float], old: Sequence[float], confidence: float = 0.95) -> Estimate:
    """new - old, pair by pair, with the t interval of the mean difference."""
    if len(new) != len(old):
        raise ValueError(f"paired_difference: found {len(new)} and {len(old)} values, allowed: as many of each")
    return t_interval(_finite(new) - _finite(old), confidence)


def sign_flip_p(differences: Sequence[float]) -> float:
    """Two-sided exact p of the mean of paired differences; with n pairs never below 2^(1-n). Raises ValueError above 44 pairs.

    All patterns are counted, by pairing the sums of two halves: 2^(n/2) numbers instead of 2^n.
    """
    x = _finite(differences)
    if len(x) > MOST_FLIPPED:
        raise ValueError(f"sign_flip_p: found {len(x)} pairs, allowed: at most {MOST_FLIPPED}")
    first, second = _signed_sums(x[:len(x) // 2]), np.sort(_signed_sums(x[len(x) // 2:]))
    seen = abs(x.sum()) - 1e-9 * np.abs(x).sum()  # sums of the same numbers in another order differ in the last digits
    if seen <= 0:
        return 1.0
    above = len(second) - np.searchsorted(second, seen - first, side="left")
    below = np.searchsorted(second, -seen - first, side="right")
    return float((above.sum() + below.sum()) / 2.0 ** len(x))


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The interval of a rate of successes in n independent trials; (0, 1) for no trial. Raises ValueError if not 0 <= k <= n."""
    if not 0 <= successes <= n:
        raise ValueError(f"wilson: found {successes} of {n}, allowed: 0 <= successes <= n")
    if n == 0:
        return 0.0, 1.0
    z2, rate = float(ndtri(0.5 + confidence / 2)) ** 2, successes / n
    centre = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (rate * (1 - rate) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == n else centre + half)


def _signed_sums(x: np.ndarray) -> np.ndarray:
    sums = np.zeros(1)
    for value in x:
        sums = np.concatenate([sums - value, sums + value])
    return sums


def _finite(values: Sequence[float]) -> np.ndarray:
    x = np.asarray(values, np.float64).reshape(-1)
    if not len(x) or not np.isfinite(x).all():
        raise ValueError(f"statistics: found {x.tolist()}, allowed: at least one value, all finite")
    return x
