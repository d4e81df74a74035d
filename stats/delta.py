"""Measure how models differ, block by block: delta statistics and the agreement of task vectors.

Accumulators are small, hold no weights, and add up in any grouping: `a.add(b)`. Sums are
float64; a caller that wants the same last digit every time adds them in one order. Quantiles
come from a histogram over the logarithm of |delta|, with a relative error of at most
`QUANTILE_RELATIVE_ERROR`.

Legend of shapes: M models, P elements of a flat block, Q quantiles, K buckets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

#: Bits of the mantissa that a bucket keeps, beside the 8 of the exponent.
_MANTISSA_BITS = 6
_SHIFT = 23 - _MANTISSA_BITS
_NUM_BUCKETS = 1 << (8 + _MANTISSA_BITS)
#: A bucket is [a, a (1 + 2^-6)) at its widest, and its middle stands for it.
QUANTILE_RELATIVE_ERROR = 2.0 ** -(_MANTISSA_BITS + 1)


@dataclass(slots=True)
class MagnitudeHistogram:
    """Counts of magnitudes by the upper 14 bits of their float32 (exponent, 6 bits of mantissa)."""

    counts_K: NDArray[np.int64] = field(default_factory=lambda: np.zeros(_NUM_BUCKETS, np.int64))
    """Bucket 0 is zero and whatever is below 2^-132."""

    def count(self, values_P: NDArray[np.floating]) -> None:
        """Count finite values; their sign does not matter."""
        bits_P = np.ascontiguousarray(values_P, dtype=np.float32).view(np.uint32) & np.uint32(0x7FFFFFFF)
        np.right_shift(bits_P, _SHIFT, out=bits_P)
        self.counts_K += np.bincount(bits_P, minlength=_NUM_BUCKETS)

    def add(self, other: MagnitudeHistogram) -> None:
        """Add the counts of other values."""
        self.counts_K += other.counts_K

    def quantiles(self, fractions: Sequence[float]) -> list[float]:
        """Return the smallest magnitudes that at least these fractions of all values do not exceed."""
        cumulative_K = np.cumsum(self.counts_K)
        total = int(cumulative_K[-1])
        if not total:
            return [math.nan for _ in fractions]
        ranks_Q = np.maximum(1, np.ceil(np.asarray(fractions) * total))
        buckets_Q = np.searchsorted(cumulative_K, ranks_Q)
        edges = (np.stack([buckets_Q, buckets_Q + 1]).astype(np.uint32) << np.uint32(_SHIFT)).view(np.float32)
        middles_Q = np.where(buckets_Q == 0, 0.0, edges.astype(np.float64).mean(axis=0))
        return [float(middle) for middle in middles_Q]


@dataclass(slots=True)
class DeltaStatistics:
    """How one model differs from another, over the elements seen so far.

    Elements where either model is NaN or infinite are counted in `num_nonfinite` and nowhere else.
    """

    num_elements: int = 0
    """Finite in both models."""
    num_equal: int = 0
    """Of those, exactly equal after decoding (+0 equals -0)."""
    num_nonfinite: int = 0
    sum_squares: float = 0.0
    """Of the deltas."""
    base_sum_squares: float = 0.0
    model_sum_squares: float = 0.0
    max_magnitude: float = 0.0
    """Largest |delta|."""
    histogram: MagnitudeHistogram = field(default_factory=MagnitudeHistogram)
    """Of |delta|."""

    def add(self, other: DeltaStatistics) -> None:
        """Add the statistics of other elements."""
        self.num_elements += other.num_elements
        self.num_equal += other.num_equal
        self.num_nonfinite += other.num_nonfinite
        self.sum_squares += other.sum_squares
        self.base_sum_squares += other.base_sum_squares
        self.model_sum_squares += other.model_sum_squares
        self.max_magnitude = max(self.max_magnitude, other.max_magnitude)
        self.histogram.add(other.histogram)

    @property
    def norm(self) -> float:
        """Return the Euclidean norm of the delta."""
        return math.sqrt(self.sum_squares)

    @property
    def relative_norm(self) -> float:
        """Return ||delta|| / ||base||: 0 for equal models, infinite over a base of zeros."""
        if not self.sum_squares:
            return 0.0
        return math.sqrt(self.sum_squares / self.base_sum_squares) if self.base_sum_squares else math.inf

    @property
    def cosine(self) -> float:
        """Return the cosine between the two models' weights; NaN if one of them is zero.

        2 <b, m> = ||b||^2 + ||m||^2 - ||m - b||^2, so no product of its own is summed.
        """
        product = math.sqrt(self.base_sum_squares) * math.sqrt(self.model_sum_squares)
        if not product:
            return math.nan
        dot = (self.base_sum_squares + self.model_sum_squares - self.sum_squares) / 2
        return min(1.0, max(-1.0, dot / product))

    @property
    def equal_fraction(self) -> float:
        """Return the share of exactly equal elements."""
        return self.num_equal / self.num_elements if self.num_elements else math.nan

    def quantiles(self, fractions: Sequence[float]) -> list[float]:
        """Return quantiles of |delta|, none above the largest (see `QUANTILE_RELATIVE_ERROR`)."""
        return [min(value, self.max_magnitude) for value in self.histogram.quantiles(fractions)]


@dataclass(slots=True)
class Agreement:
    """How two task vectors (model minus base) point, over the elements seen so far."""

    dot: float = 0.0
    first_sum_squares: float = 0.0
    second_sum_squares: float = 0.0
    num_elements: int = 0
    num_both_moved: int = 0
    """Elements that neither model left at the base's value."""
    num_conflicts: int = 0
    """Of those, the ones that moved in opposite directions."""

    def add(self, other: Agreement) -> None:
        """Add the figures of other elements."""
        self.dot += other.dot
        self.first_sum_squares += other.first_sum_squares
        self.second_sum_squares += other.second_sum_squares
        self.num_elements += other.num_elements
        self.num_both_moved += other.num_both_moved
        self.num_conflicts += other.num_conflicts

    @property
    def cosine(self) -> float:
        """Return the cosine of the task vectors; NaN if one of them is zero."""
        product = math.sqrt(self.first_sum_squares) * math.sqrt(self.second_sum_squares)
        return min(1.0, max(-1.0, self.dot / product)) if product else math.nan

    @property
    def conflict_fraction(self) -> float:
        """Return the share of sign conflicts among the elements where both moved."""
        return self.num_conflicts / self.num_both_moved if self.num_both_moved else math.nan


def measure_delta(
    base_P: NDArray[np.floating], model_P: NDArray[np.floating]
) -> tuple[DeltaStatistics, NDArray[np.floating]]:
    """Measure one block.

    Args:
        base_P: the base's elements, float32 or float64.
        model_P: the model's, of the same dtype.

    Returns:
        the statistics, and the delta (P,) in that dtype with 0 where either is not finite.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        delta_P = model_P - base_P
    found = DeltaStatistics(num_elements=len(delta_P))
    is_finite_P = np.isfinite(delta_P)
    num_finite = int(np.count_nonzero(is_finite_P))
    kept = (base_P, model_P, delta_P)
    if num_finite < len(delta_P):
        found.num_nonfinite = len(delta_P) - num_finite
        found.num_elements = num_finite
        delta_P[~is_finite_P] = 0
        kept = (base_P[is_finite_P], model_P[is_finite_P], delta_P[is_finite_P])
    base_kept_P, model_kept_P, delta_kept_P = kept
    if not num_finite:
        return found, delta_P
    found.num_equal = num_finite - int(np.count_nonzero(delta_kept_P))
    found.sum_squares = _dot(delta_kept_P, delta_kept_P)
    found.base_sum_squares = _dot(base_kept_P, base_kept_P)
    found.model_sum_squares = _dot(model_kept_P, model_kept_P)
    found.max_magnitude = float(max(delta_kept_P.max(), -delta_kept_P.min(), 0.0))
    found.histogram.count(delta_kept_P)
    return found, delta_P


def measure_agreement(first_P: NDArray[np.floating], second_P: NDArray[np.floating]) -> Agreement:
    """Measure how the deltas of two models agree in one block of finite elements."""
    both_P = (first_P != 0) & (second_P != 0)
    conflicts_P = both_P & (np.signbit(first_P) != np.signbit(second_P))
    return Agreement(
        dot=_dot(first_P, second_P),
        first_sum_squares=_dot(first_P, first_P),
        second_sum_squares=_dot(second_P, second_P),
        num_elements=len(first_P),
        num_both_moved=int(np.count_nonzero(both_P)),
        num_conflicts=int(np.count_nonzero(conflicts_P)),
    )


def _dot(first_P: NDArray[np.floating], second_P: NDArray[np.floating]) -> float:
    # Not np.dot: the sums of a threaded BLAS depend on the number of threads.
    return float(np.multiply(first_P, second_P, dtype=np.float64).sum())
