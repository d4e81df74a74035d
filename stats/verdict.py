"""Say in words how far a model is from its base, from statistics of its deltas.

The figures come from matrices alone: norm weights and biases start near 1 and 0 in every
network and would make unrelated models look alike. Ratios and cosines are medians over the
matrices, each counting as often as it has elements, so that a new head or a large embedding
does not decide.

Limits rest on Yu et al. 2023, arXiv:2311.03099 ("DARE"): deltas of supervised fine-tuning (SFT)
lie within 0.002 (its first version said 0.005) and may be dropped at random; continued
pretraining reaches about 0.03, and dropping fails there. The paper's limits are absolute
and were seen on networks with weights of a usual scale, hence the limits relative to the base.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from raymerge.stats.delta import DeltaStatistics

Verdict = Literal[
    "identical", "SFT-sized deltas", "continued pretraining", "different backbone", "different architecture"
]

#: The share of |delta| that has to be within the limit: the tails of SFT deltas reach further.
SFT_QUANTILE = 0.9
#: The larger of the paper's two figures for SFT, since a false alarm is worse than a mild one missed.
SFT_MAGNITUDE = 0.005
#: SFT moves the weights of language models by 0.1 to 10 percent of their norm; small encoders by up to 15.
SFT_RELATIVE_NORM = 0.2
#: Below this, deltas are small whatever the scale of the weights (T5's are 100 times BERT's).
ALWAYS_SFT_RELATIVE_NORM = 0.02
#: Independent matrices have a cosine near 0 (and a relative norm near sqrt(2)); one with deltas as large
#: as the weights themselves still has 0.71, with deltas three times as large 0.32.
SAME_BACKBONE_COSINE = 0.3


@dataclass(frozen=True, slots=True)
class MatrixRow:
    """What one matrix adds to a verdict."""

    num_elements: int
    relative_norm: float
    cosine: float


@dataclass(frozen=True, slots=True)
class Judgement:
    """A verdict and the figures that it rests on."""

    verdict: Verdict
    reason: str
    """One sentence with the figures and the limits."""
    magnitude: float
    """The SFT_QUANTILE of |delta| over all matrices."""
    relative_norm: float
    """Median of ||delta|| / ||base|| over the matrices."""
    cosine: float
    """Median cosine between the matrices of base and model."""


def judge(rows: Sequence[MatrixRow], overall: DeltaStatistics) -> Judgement:
    """Judge a model by its matrices.

    Args:
        rows: one per matrix.
        overall: the sum over the same matrices; it has elements.
    """
    magnitude = overall.quantiles([SFT_QUANTILE])[0]
    relative_norm = _median([(row.relative_norm, row.num_elements) for row in rows])
    cosine = _median([(row.cosine, row.num_elements) for row in rows])
    verdict, reason = _decide(overall, magnitude, relative_norm, cosine)
    return Judgement(verdict, reason, magnitude, relative_norm, cosine)


def _decide(
    overall: DeltaStatistics, magnitude: float, relative_norm: float, cosine: float
) -> tuple[Verdict, str]:
    figures = (
        f"{SFT_QUANTILE:.0%} of |delta| are within {magnitude:.2g} "
        f"and ||delta||/||base|| is {relative_norm:.2g}"
    )
    if overall.num_equal == overall.num_elements and not overall.num_nonfinite:
        return "identical", f"all {overall.num_elements:,} compared elements are equal"
    if cosine < SAME_BACKBONE_COSINE:
        return (
            "different backbone",
            f"the cosine between the weights is {cosine:.2f}; models of one origin have more than "
            f"{SAME_BACKBONE_COSINE}, independent ones about 0",
        )
    if relative_norm <= ALWAYS_SFT_RELATIVE_NORM:
        return "SFT-sized deltas", f"{figures}, at most {ALWAYS_SFT_RELATIVE_NORM}"
    limits = f"{SFT_MAGNITUDE} and {SFT_RELATIVE_NORM}"
    if magnitude <= SFT_MAGNITUDE and relative_norm <= SFT_RELATIVE_NORM:
        return "SFT-sized deltas", f"{figures}, at most {limits}"
    return (
        "continued pretraining",
        f"{figures}; fine-tuning stays within {limits}, and above it dropping deltas (DARE) is known to "
        "fail (arXiv:2311.03099)",
    )


def _median(weighted: Sequence[tuple[float, int]]) -> float:
    """Return the weighted median; matrices without a value (all zero) do not count."""
    known = sorted(pair for pair in weighted if not math.isnan(pair[0]))
    half = sum(weight for _, weight in known) / 2
    passed = 0
    for value, weight in known:
        passed += weight
        if passed >= half:
            return value
    return math.nan
