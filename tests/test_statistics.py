"""Intervals and tests against their definitions, by root finding, exact fractions and counting."""

from __future__ import annotations

import itertools
import math
import random
from fractions import Fraction

import pytest
import torch

from tamba.evaluate import statistics
from tamba.evaluate.statistics import (
    exponential,
    mcnemar,
    mean_score,
    pair,
    paired_bootstrap,
    permutation,
    ratio_score,
    wilson,
)


def bounds_by_bisection(k: int, n: int) -> tuple[float, float]:
    """Shares p at which (k/n - p)² = z² p (1 - p) / n."""

    def excess(p: float) -> float:
        return (k / n - p) ** 2 - statistics.Z**2 * p * (1 - p) / n

    found = []
    for inside, outside in ((k / n, 0.0), (k / n, 1.0)):
        if excess(outside) <= 0:
            found.append(outside)
            continue
        for _ in range(200):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if excess(middle) <= 0 else (inside, middle)
        found.append(inside)
    return found[0], found[1]


@pytest.mark.parametrize(("k", "n"), [(0, 30), (15, 30), (30, 30), (1, 7), (299, 300)])
def test_wilson_solves_its_equation(k, n):
    assert wilson(k, n) == pytest.approx(bounds_by_bisection(k, n), abs=1e-9)


def test_figures_that_the_papers_sample_sizes_give():
    assert [round(100 * x) for x in wilson(15, 30)] == [33, 67]
    assert round(100 * wilson(30, 30)[0]) == 89
    assert [round(100 * x) for x in wilson(150, 300)] == [44, 56]
    for wrong in ((1, 0), (-1, 3), (4, 3)):
        with pytest.raises(ValueError, match="successes in"):
            wilson(*wrong)


def check_mean() -> None:
    values = [0.5, 2.0, 3.5, 3.0]
    got = mean_score(values)
    assert got.value == 2.25
    assert got.error == pytest.approx(float(torch.tensor(values).double().std()) / 2)


def test_mean_and_its_error(monkeypatch):
    check_mean()
    assert mean_score([1.0]).error is None
    assert mean_score([1, 0, 1]).low == wilson(2, 3)[0]
    monkeypatch.setattr(math, "fsum", lambda v: sum(list(v)[:-1]))
    with pytest.raises(AssertionError):
        check_mean()


def test_ratio_of_equal_weights_is_a_mean():
    values = [1.0, 2.5, 3.0, 7.25]
    got, want = ratio_score([(11 * v, 11) for v in values]), mean_score(values)
    assert (got.value, got.error) == pytest.approx((want.value, want.error))
    exp = exponential(got)
    assert exp.value == pytest.approx(math.exp(want.value))
    assert exp.high == pytest.approx(math.exp(want.value + statistics.Z * want.error))


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (5, 1), (12, 12), (40, 21)])
def test_mcnemar_is_the_binomial_tail(b, c):
    n, k = b + c, min(b, c)
    tail = sum(Fraction(math.comb(n, i), 2**n) for i in range(k + 1))
    assert mcnemar(b, c) == pytest.approx(float(min(Fraction(1), 2 * tail)), rel=1e-6)


def test_bootstrap_agrees_with_the_normal_approximation():
    rng = random.Random(0)
    values = [rng.gauss(0.1, 1.0) for _ in range(400)]
    want = mean_score(values)
    assert paired_bootstrap(values) == pytest.approx((want.low, want.high), abs=0.02)
    assert paired_bootstrap(values) == paired_bootstrap(values)
    weights = [rng.uniform(1, 9) for _ in values]
    want = ratio_score(list(zip(values, weights, strict=True)))
    assert paired_bootstrap(values, weights) == pytest.approx((want.low, want.high), abs=0.01)


def check_permutation(test):
    """By going through all swaps, with fractions; and by the normal law where items are many."""
    for values in ([3, 1, 2], [1, -1, 2, 5], [0, 0], [2, 2, 2, 2, 2, 2]):
        sums = [
            abs(sum(s * v for s, v in zip(signs, values, strict=True)))
            for signs in itertools.product((1, -1), repeat=len(values))
        ]
        want = Fraction(sum(s >= abs(sum(values)) for s in sums), len(sums))
        assert test([v / 10 for v in values]) == pytest.approx(float(want))
    rng = random.Random(0)
    values = [rng.gauss(0.1, 1.0) for _ in range(400)]
    want = mean_score(values)
    assert test(values) == pytest.approx(
        math.erfc(abs(want.value / want.error) / math.sqrt(2)), abs=0.02
    )
    assert test([1.0] * 400) == pytest.approx(1e-4, rel=0.01)


def test_permutation_by_all_swaps():
    check_permutation(permutation)
    # Few items of one sign are no proof, whatever a bootstrap of them says.
    assert permutation([0.1, 0.2]) == 0.5

    def sign_of_resamples(values):
        low, high = paired_bootstrap(values)
        return 1 / 5000 if low > 0 or high < 0 else 1.0

    with pytest.raises(AssertionError):
        check_permutation(sign_of_resamples)


def test_pairs_are_made_item_by_item():
    right = {"a": 1, "b": 0, "c": 1, "d": 1}
    student = {k: {"acc": v, "nll": 1.0 + v} for k, v in right.items()}
    teacher = {k: {"acc": 0, "nll": 1.0} for k in "dcba"} | {"e": {"acc": 1, "nll": 0.0}}
    found = pair(student, teacher, ["acc", "nll", "unknown"])
    assert set(found) == {"acc", "nll"}
    assert (found["acc"].test, found["nll"].test) == ("mcnemar", "permutation")
    assert found["acc"].difference == 0.75 and found["acc"].n == 4
    assert (found["acc"].student_higher, found["acc"].teacher_higher) == (3, 0)
    assert found["acc"].p == pytest.approx(0.25)
