"""Standard errors, intervals and paired tests, as parts of the record.

Items are the independent draws. Intervals are 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from tamba.report import Paired, Score

Z = 1.959963984540054
"""Quantile of the normal distribution that leaves 2.5 % above it."""


def wilson(successes: float, n: int, z: float = Z) -> tuple[float, float]:
    """The score interval of a share (Wilson 1927), which stays inside [0, 1] for small `n`.

    Raises:
        ValueError: no trials, or more successes than trials.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes in {n} trials")
    share = successes / n
    scale = 1 + z * z / n
    centre = (share + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At none and all the bound is exact; rounding would leave it a bit inside.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return low, high


def mean_score(values: Sequence[float]) -> Score:
    """The mean of values of equal weight; Wilson's interval where all of them are 0 or 1.

    The standard error is that of lm-eval: sample deviation over the root of `n`.
    """
    n = len(values)
    mean = math.fsum(values) / n
    spread = math.fsum((v - mean) ** 2 for v in values)
    error = math.sqrt(spread / (n - 1) / n) if n > 1 else None
    if all(v in (0, 1) for v in values):
        low, high = wilson(math.fsum(values), n)
        return Score(value=mean, n=n, error=error, low=low, high=high)
    return _around(mean, n, error)


def ratio_score(pairs: Sequence[tuple[float, float]]) -> Score:
    """Sum of the first over sum of the second, e.g. nats over tokens, window by window.

    Standard error of a ratio of sums (Cochran 1977, section 6.4).
    """
    n = len(pairs)
    total = math.fsum(weight for _, weight in pairs)
    mean = math.fsum(value for value, _ in pairs) / total
    if n < 2:
        return Score(value=mean, n=n)
    spread = math.fsum((value - mean * weight) ** 2 for value, weight in pairs)
    return _around(mean, n, math.sqrt(spread * n / (n - 1)) / total)


def exponential(score: Score) -> Score:
    """The same of ``exp``: the interval is mapped, the error by d exp(x) = exp(x) dx."""
    value = math.exp(score.value)
    return Score(
        value=value,
        n=score.n,
        error=None if score.error is None else value * score.error,
        low=None if score.low is None else math.exp(score.low),
        high=None if score.high is None else math.exp(score.high),
    )


def mcnemar(first_only: int, second_only: int) -> float:
    """Two-sided exact p-value that two models are equally often right (McNemar 1947).

    Args:
        first_only: items that the first model alone has right.
        second_only: items that the second alone has right.
    """
    n, fewer = first_only + second_only, min(first_only, second_only)
    if n == 0:
        return 1.0
    # Logarithms: binomial coefficients of thousands do not fit in a float.
    tail = math.fsum(
        math.exp(math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2))
        for k in range(fewer + 1)
    )
    return min(1.0, 2 * tail)


def paired_bootstrap(
    differences: Sequence[float],
    weights: Sequence[float] | None = None,
    *,
    draws: int = 10_000,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % percentile interval of a mean of differences, items drawn anew (Efron and Tibshirani
    1993, ch. 13).

    Args:
        weights: differences are sums over so much each (tokens of a window), and the mean is their
            sum over that of the weights; equal weights of 1 if None.
    """
    values = np.asarray(differences, dtype=np.float64)
    sizes = np.ones_like(values) if weights is None else np.asarray(weights, dtype=np.float64)
    generator = np.random.default_rng(seed)
    means = np.empty(draws)
    step = max(1, 4_000_000 // max(1, len(values)))
    for first in range(0, draws, step):
        size = (min(step, draws - first), len(values))
        picked = generator.integers(0, len(values), size=size)
        means[first : first + step] = values[picked].sum(axis=1) / sizes[picked].sum(axis=1)
    low, high = (float(x) for x in np.quantile(means, [0.025, 0.975]))
    return low, high


_ALL_SIGNS = 13
"""Items up to which every way of swapping the two models is gone through."""


def permutation(differences: Sequence[float], *, draws: int = 10_000, seed: int = 0) -> float:
    """Two-sided p-value that two models are alike on each item (Fisher's randomization test).

    Were they alike, each difference could as well have the other sign; `p` is the share of such
    swaps whose sum is as far from 0. All swaps are counted where items are few, so that `n` items
    give ``2 / 2**n`` at least; else `draws` random ones, with the observed one among them
    (Noreen 1989).
    """
    values = np.asarray(differences, dtype=np.float64)
    n = len(values)
    # Sums of the same numbers in another order differ in the last digits.
    seen = abs(math.fsum(values)) - 1e-12 * float(np.abs(values).sum())
    if n <= _ALL_SIGNS:
        signs = 1.0 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
        return float((np.abs(signs @ values) >= seen).mean())
    generator = np.random.default_rng(seed)
    far = 0
    step = max(1, 4_000_000 // n)
    for first in range(0, draws, step):
        flips = generator.integers(0, 2, size=(min(step, draws - first), n), dtype=np.int8)
        far += int((np.abs((1.0 - 2.0 * flips) @ values) >= seen).sum())
    return (far + 1) / (draws + 1)


def pair(
    student: Mapping[str, Mapping[str, float]],
    teacher: Mapping[str, Mapping[str, float]],
    metrics: Sequence[str],
) -> dict[str, Paired]:
    """Student minus teacher on the items that both have, a test for each metric.

    Right-or-wrong metrics get McNemar's test, others the permutation test; intervals are those of
    the paired bootstrap.
    """
    found = {}
    for metric in metrics:
        both = [
            (values[metric], teacher[name][metric])
            for name, values in student.items()
            if metric in values and metric in teacher.get(name, {})
        ]
        if len(both) < 2:
            continue
        differences = [s - t for s, t in both]
        low, high = paired_bootstrap(differences)
        binary = all(x in (0, 1) for couple in both for x in couple)
        wins, losses = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
        found[metric] = Paired(
            difference=math.fsum(differences) / len(differences),
            n=len(both),
            low=low,
            high=high,
            p=mcnemar(wins, losses) if binary else permutation(differences),
            test="mcnemar" if binary else "permutation",
            student_higher=wins,
            teacher_higher=losses,
        )
    return found


def _around(mean: float, n: int, error: float | None) -> Score:
    if error is None:
        return Score(value=mean, n=n)
    return Score(value=mean, n=n, error=error, low=mean - Z * error, high=mean + Z * error)
