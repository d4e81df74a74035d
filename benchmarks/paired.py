"""Compare two classifiers on the same examples: difference of accuracies, its standard error, McNemar's exact test."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Accuracy:
    """The mean over data sets of the share of right answers."""

    value: float
    error: float
    """Standard error over examples; which data sets there are is fixed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """How much more often one classifier is right than another, on the same examples."""

    value: float
    error: float
    p: float
    """Two-sided, of McNemar's exact test over all data sets together."""


def accuracy(answers: Sequence[Sequence[bool]]) -> Accuracy:
    """Return the mean accuracy over data sets.

    Args:
        answers: per data set, whether each example was answered right.
    """
    shares = [sum(each) / len(each) for each in answers]
    variance = sum(s * (1 - s) / len(each) for s, each in zip(shares, answers, strict=True))
    return Accuracy(value=sum(shares) / len(shares), error=math.sqrt(variance) / len(shares))


def difference(one: Sequence[Sequence[bool]], other: Sequence[Sequence[bool]]) -> Difference:
    """Return the mean over data sets of accuracy(one) - accuracy(other), from pairs of answers."""
    means, variance, num_only_one, num_only_other = [], 0.0, 0, 0
    for first, second in zip(one, other, strict=True):
        only_first = sum(a and not b for a, b in zip(first, second, strict=True))
        only_second = sum(b and not a for a, b in zip(first, second, strict=True))
        mean = (only_first - only_second) / len(first)
        variance += ((only_first + only_second) / len(first) - mean**2) / len(first)
        means.append(mean)
        num_only_one += only_first
        num_only_other += only_second
    return Difference(
        value=sum(means) / len(means),
        error=math.sqrt(variance) / len(means),
        p=mcnemar(num_only_one, num_only_other),
    )


def mcnemar(num_only_one: int, num_only_other: int) -> float:
    """Return the two-sided p of McNemar's exact test: discordant pairs are as likely either way.

    McNemar 1947; the exact form is a sign test over the pairs in which just one is right.
    """
    total = num_only_one + num_only_other
    tail = sum(math.comb(total, k) for k in range(min(num_only_one, num_only_other) + 1))
    return min(1.0, 2 * tail / 2**total)
