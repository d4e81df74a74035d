"""What scoring yields: a small array per quantity with one row per example, and the metrics made of them.

Scores of disjoint ranges of batches concatenate in any order; a metric never depends on how they were cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

#: Quantity -> array whose first axis is the examples; "example" holds their numbers.
Scores = dict[str, NDArray[np.generic]]

EXAMPLE = "example"


class Estimate(NamedTuple):
    """A metric over the examples that were scored."""

    value: float
    standard_error: float
    """NaN where it cannot be told (fewer than two examples)."""


def concatenate(parts: Sequence[Scores]) -> Scores:
    """Join the scores of disjoint ranges of batches and sort them by example.

    Raises:
        ValueError: there are no parts, or an example stands in two of them.
    """
    if not parts:
        raise ValueError("no scores to concatenate.")
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    numbers = joined[EXAMPLE]
    order = np.argsort(numbers, kind="stable")
    if (numbers[order][1:] == numbers[order][:-1]).any():
        raise ValueError("an example was scored twice.")
    return {name: array[order] for name, array in joined.items()}


def paired_difference(first: NDArray[np.generic], second: NDArray[np.generic]) -> Estimate:
    """Estimate the mean difference of two models on the same examples, and its standard error.

    Args:
        first: a quantity per example, such as `scores["correct"]`, sorted by example.
        second: the same quantity of the other model.
    """
    difference_N = first.astype(np.float64) - second.astype(np.float64)
    num = len(difference_N)
    error = float(difference_N.std(ddof=1) / np.sqrt(num)) if num > 1 else float("nan")
    return Estimate(float(difference_N.mean()), error)


def as_plain(metrics: Mapping[str, Estimate]) -> dict[str, dict[str, float]]:
    """Return metrics as JSON values."""
    return {
        name: {"value": found.value, "standard_error": found.standard_error}
        for name, found in metrics.items()
    }
