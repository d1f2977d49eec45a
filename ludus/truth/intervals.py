"""Confidence intervals of shares and means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from statistics import variance as variance_of
from typing import Any

Z95 = 1.959963984540054  # two-sided 95% of a normal


def wilson(share: float, n: float) -> tuple[float, float]:
    """Wilson's (1927) 95% score interval of a share seen in `n` independent trials."""
    centre = (share + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n * n))
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


def strata_interval(strata: Sequence[Sequence[float]]) -> tuple[float, float]:
    """95% interval of the mean of the strata's means, each weighing the same; values in [0, 1].

    Wilson's as in `pair_interval`, with the variance s^2 of the mean added up from within the strata (a
    stratum of one value lends the variance of a coin). One stratum gives `pair_interval`.
    ([0, 1] without any value.)
    """
    strata = [values for values in strata if values]
    n = sum(map(len, strata))
    if not n:
        return (0.0, 1.0)
    mean = fmean(fmean(values) for values in strata)
    binomial = mean * (1 - mean)
    if binomial <= 1e-12:
        return wilson(mean, n)
    variance = 0.0
    for values in strata:
        within = variance_of(values) if len(values) > 1 else binomial
        variance += within / len(values)
    variance /= len(strata) ** 2
    # As above: n values that agree cannot say how small their variance is.
    return wilson(mean, min(binomial / variance, n * n) if variance > 0 else n * n)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """95% normal interval of the mean of independent `values`; of width 0 for a single one."""
    n = len(values)
    mean = fmean(values)
    half = Z95 * stdev(values, mean) / math.sqrt(n) if n > 1 else 0.0
    return (mean - half, mean + half)
