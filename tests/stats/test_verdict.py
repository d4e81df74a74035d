"""Verdicts from figures alone: each limit from both sides, and what must not decide."""

import numpy as np
import pytest

from raymerge.stats.delta import DeltaStatistics, measure_delta
from raymerge.stats.verdict import Judgement, MatrixRow, judge


def _judge(*matrices: tuple[float, float, int]) -> Judgement:
    """Judge Gaussian matrices: (scale of the base, scale of the delta, elements)."""
    random = np.random.default_rng(0)
    rows, overall = [], DeltaStatistics()
    for scale, moved, count in matrices:
        base_P = (random.standard_normal(count) * scale).astype(np.float32)
        model_P = (base_P + random.standard_normal(count) * moved).astype(np.float32)
        found, _ = measure_delta(base_P, model_P)
        rows.append(MatrixRow(count, found.relative_norm, found.cosine))
        overall.add(found)
    return judge(rows, overall)


@pytest.mark.parametrize(
    ("scale", "moved", "verdict"),
    [
        (0.02, 0.0, "identical"),
        (0.02, 0.0002, "SFT-sized deltas"),
        (0.02, 0.002, "SFT-sized deltas"),
        (0.05, 0.0029, "SFT-sized deltas"),  # 90 % within 0.0048
        (0.05, 0.0033, "continued pretraining"),  # 90 % within 0.0054
        (0.02, 0.01, "continued pretraining"),
        (0.02, 0.03, "continued pretraining"),  # the paper's figure for continued pretraining
        (0.005, 0.002, "continued pretraining"),  # small in value, 40 % of the weights
        (1.0, 0.01, "SFT-sized deltas"),  # large in value, 1 % of the weights
        (0.02, 0.1, "different backbone"),
    ],
)
def test_the_size_of_the_deltas_decides(scale: float, moved: float, verdict: str) -> None:
    assert _judge((scale, moved, 20_000)).verdict == verdict


def test_one_new_large_matrix_does_not_decide() -> None:
    judgement = _judge((0.02, 0.001, 20_000), (0.02, 0.001, 20_000), (5.0, 20.0, 15_000))
    assert judgement.cosine > 0.99
    assert judgement.verdict != "different backbone"


def test_frozen_matrices_beside_tuned_ones_are_fine_tuning() -> None:
    judgement = _judge((0.02, 0.0, 20_000), (0.02, 0.0, 20_000), (0.02, 0.003, 5_000))
    assert judgement.verdict == "SFT-sized deltas"


def test_the_reason_states_the_figures_and_the_limits() -> None:
    judgement = _judge((0.02, 0.03, 20_000))
    assert judgement.reason == (
        f"90% of |delta| are within {judgement.magnitude:.2g} and ||delta||/||base|| is "
        f"{judgement.relative_norm:.2g}; fine-tuning stays within 0.005 and 0.2, and above it dropping "
        "deltas (DARE) is known to fail (arXiv:2311.03099)"
    )
    assert judgement.magnitude == pytest.approx(
        0.03 * 1.645, rel=0.03
    )  # the normal distribution's 0.9 quantile
    assert judgement.relative_norm == pytest.approx(1.5, rel=0.03)
