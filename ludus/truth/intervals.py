"""Confidence intervals of shares and means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

_Z = 1.959963984540054  # two-sided 95% of a normal


def wilson(share: float, n: float) -> tuple[float, float]:
    """Wilson's (1927) 95% score interval of a share seen in `n` independent trials."""
    centre = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n * n))
    return (max(0.0, centre - half), min(1.0, centre + half))


def share_interval(count: int, n: int) -> dict[str, Any]:
    """{"rate", "ci95", "n"} of `count` out of `n`, by Wilson; without any, a rate of None."""
    if not n:
        return {"rate": None, "ci95": [0.0, 1.0], "n": 0}
    return {"rate": count / n, "ci95": list(wilson(count / n, n)), "n": n}


def pair_interval(pairs: Sequence[float]) -> tuple[float, float]:
    """95% interval of the mean of independent `pairs`, each the mean score of one deal's two matches.

    Wilson's interval, with the number of pairs replaced by the number of coin flips that would vary as
    much: n m (1 - m) / s^2 for mean m and variance s^2. Plain Wilson over matches would ignore draws and
    that the two matches of a pair share their deal; a normal interval has width 0 when all pairs agree.
    ([0, 1] without any pair.)
    """
    n = len(pairs)
    if not n:
        return (0.0, 1.0)
    mean = fmean(pairs)
    variance = sum((p - mean) ** 2 for p in pairs) / max(1, n - 1)
    binomial = mean * (1 - mean)
    # Pairs that all score the same say that the variance is small, but n pairs cannot say how small.
    ratio = max(variance / binomial, 1 / n) if binomial > 1e-12 and n > 1 else 1.0
    return wilson(mean, n / ratio)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """95% normal interval of the mean of independent `values`; of width 0 for a single one."""
    n = len(values)
    mean = fmean(values)
    half = _Z * stdev(values, mean) / math.sqrt(n) if n > 1 else 0.0
    return (mean - half, mean + half)
