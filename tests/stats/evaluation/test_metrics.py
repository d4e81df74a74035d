"""Metrics against hand-computed values and independent formulas; standard errors against resampling."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest

from raymerge.stats.evaluation import metrics
from raymerge.stats.evaluation.scores import Estimate, concatenate, paired_difference


def test_mean_by_hand() -> None:
    found = metrics.mean([1, 0, 1, 1])
    assert found.value == 0.75
    assert found.standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / 3))  # s^2 = n p (1 - p) / (n - 1)


def test_ratio_by_hand() -> None:
    found = metrics.ratio([2.0, 6.0], [1, 3])  # 8 / 4; both examples have the ratio itself
    assert found == Estimate(2.0, 0.0)
    found = metrics.ratio([1.0, 6.0], [1, 3])  # r = 7 / 4, IF = (-0.75, 0.75) / 2
    assert found.value == 1.75
    assert found.standard_error == pytest.approx(math.sqrt(2 * 0.375**2 / 2))
    assert math.isnan(metrics.ratio([0], [0]).value)


def test_perplexity_by_hand() -> None:
    assert metrics.exponential(Estimate(math.log(3), 0.1)) == pytest.approx((3.0, 0.3))


def test_macro_f1_by_hand() -> None:
    gold = ["a", "a", "b", "b", "b", "c"]
    predicted = ["a", "b", "b", "b", "a", "b"]
    # a: TP 1, predicted 2, gold 2; b: TP 2, predicted 4, gold 3; c: never predicted
    assert metrics.macro_f1(predicted, gold).value == pytest.approx((2 / 4 + 4 / 7 + 0) / 3)


def test_matthews_of_two_classes_is_the_textbook_formula() -> None:
    rng = np.random.default_rng(0)
    gold = rng.integers(2, size=60)
    predicted = np.where(rng.random(60) < 0.7, gold, 1 - gold)
    true_positive, true_negative = ((predicted == k) & (gold == k) for k in (1, 0))
    tp, tn = true_positive.sum(), true_negative.sum()
    fp, fn = ((predicted == 1) & (gold == 0)).sum(), ((predicted == 0) & (gold == 1)).sum()
    expected = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert metrics.matthews(predicted, gold).value == pytest.approx(expected)


def test_matthews_of_three_classes_is_that_of_the_confusion_matrix() -> None:
    rng = np.random.default_rng(1)
    gold = rng.integers(3, size=80)
    predicted = np.where(rng.random(80) < 0.5, gold, rng.integers(3, size=80))
    confusion = np.zeros((3, 3))
    np.add.at(confusion, (gold, predicted), 1)
    correct, num = np.trace(confusion), confusion.sum()
    rows, columns = confusion.sum(1), confusion.sum(0)
    expected = (correct * num - rows @ columns) / math.sqrt(
        (num**2 - columns @ columns) * (num**2 - rows @ rows)
    )
    assert metrics.matthews(predicted, gold).value == pytest.approx(expected)


def test_constant_predictions_correlate_with_nothing() -> None:
    assert metrics.matthews([1, 1, 1], [0, 1, 2]) == Estimate(0.0, 0.0)
    assert metrics.pearson([2.0, 2.0, 2.0], [1, 2, 3]).value == 0.0
    assert metrics.spearman([2.0, 2.0, 2.0], [1, 2, 3]).value == 0.0


def test_ranks_of_ties_are_their_mean() -> None:
    np.testing.assert_array_equal(metrics.mean_ranks([10, 20, 10, 5]), [2.5, 4, 2.5, 1])


def test_spearman_by_hand() -> None:
    # ranks (1, 2, 3, 4) and (2, 1, 4, 3): 1 - 6 sum d^2 / (n (n^2 - 1)) = 1 - 24 / 60
    assert metrics.spearman([1.0, 5.0, 6.0, 9.0], [0.3, 0.1, 0.9, 0.4]).value == pytest.approx(0.6)


def test_pearson_against_numpy() -> None:
    rng = np.random.default_rng(2)
    first, second = rng.normal(size=(2, 50))
    assert metrics.pearson(first, second).value == pytest.approx(np.corrcoef(first, second)[0, 1])


_RNG = np.random.default_rng(3)
_GOLD = _RNG.integers(3, size=400)
_PREDICTED = np.where(_RNG.random(400) < 0.6, _GOLD, _RNG.integers(3, size=400))
_SCORE = _GOLD + _RNG.normal(size=400)


@pytest.mark.parametrize(
    "metric",
    [
        lambda rows: metrics.mean(_PREDICTED[rows] == _GOLD[rows]),
        lambda rows: metrics.ratio(_SCORE[rows], 1 + _GOLD[rows]),
        lambda rows: metrics.macro_f1(_PREDICTED[rows], _GOLD[rows]),
        lambda rows: metrics.matthews(_PREDICTED[rows], _GOLD[rows]),
        lambda rows: metrics.pearson(_SCORE[rows], _GOLD[rows]),
    ],
    ids=["mean", "ratio", "macro_f1", "matthews", "pearson"],
)
def test_analytic_errors_are_those_of_resampling(metric: Callable[[np.ndarray], Estimate]) -> None:
    analytic = metric(np.arange(400))
    resampled = metrics.bootstrap(400, lambda rows: metric(rows).value)
    assert resampled.value == analytic.value
    # 500 resamples tell a standard deviation to 1 / sqrt(1000) = 3%: four times that
    assert analytic.standard_error == pytest.approx(resampled.standard_error, rel=0.13)


def test_one_example_has_no_error() -> None:
    for found in (metrics.mean([1.0]), metrics.macro_f1([1], [1]), metrics.spearman([1.0], [2.0])):
        assert math.isnan(found.standard_error)


def test_the_bootstrap_is_seeded() -> None:
    assert metrics.spearman(_SCORE, _GOLD) == metrics.spearman(_SCORE, _GOLD)


def test_scores_concatenate_in_any_order_and_refuse_a_repeated_example() -> None:
    parts = [{"example": np.array([i, i + 1]), "x": np.array([10 * i, 10 * i + 10])} for i in (0, 2, 4)]
    for order in itertools.permutations(parts):
        joined = concatenate(list(order))
        np.testing.assert_array_equal(joined["x"], np.arange(6) * 10)
    with pytest.raises(ValueError, match="scored twice"):
        concatenate([parts[0], parts[0]])


def test_paired_difference_by_hand() -> None:
    found = paired_difference(np.array([True, True, False, True]), np.array([True, False, False, False]))
    assert found.value == 0.5
    assert found.standard_error == pytest.approx(math.sqrt(1 / 3 / 4))
