"""Metrics and their standard errors, from per-example quantities; float64, numpy alone.

The standard errors are those of sampling the examples. Where a metric is a smooth function of means, the delta
method (infinitesimal jackknife) gives it: se^2 = sum_i IF_i^2 / (N (N - 1)), IF_i the influence of example i.
Spearman's is not such a function: a seeded bootstrap over examples.

Shapes: N examples, K classes, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from raymerge.stats.evaluation.scores import Estimate

Floats = NDArray[np.float64]

NUM_RESAMPLES = 500
_BOOTSTRAP_SEED = 0


def mean(values: ArrayLike) -> Estimate:
    """Estimate a mean: s / sqrt(N), s with N - 1 degrees of freedom."""
    values_N = np.asarray(values, dtype=np.float64)
    return _with_influence(float(values_N.mean()), values_N - values_N.mean())


def ratio(numerators: ArrayLike, denominators: ArrayLike) -> Estimate:
    """Estimate sum(a) / sum(b), such as a loss per token over documents of unlike length.

    IF_i = (a_i - r b_i) / mean(b): examples, not tokens, are what was sampled.
    """
    top_N = np.asarray(numerators, dtype=np.float64)
    bottom_N = np.asarray(denominators, dtype=np.float64)
    if bottom_N.sum() == 0:
        return Estimate(float("nan"), float("nan"))
    value = float(top_N.sum() / bottom_N.sum())
    return _with_influence(value, (top_N - value * bottom_N) / bottom_N.mean())


def exponential(logarithm: Estimate) -> Estimate:
    """Turn a loss into a perplexity: exp(l), with error exp(l) se(l)."""
    value = float(np.exp(logarithm.value))
    return Estimate(value, value * logarithm.standard_error)


def macro_f1(predicted: ArrayLike, gold: ArrayLike) -> Estimate:
    """Average 2 TP_k / (P_k + G_k) over the classes that occur in the labels or the predictions."""
    predicted_N, gold_N = np.asarray(predicted), np.asarray(gold)
    classes_K = np.union1d(predicted_N, gold_N)
    predicted_NK = predicted_N[:, None] == classes_K
    gold_NK = gold_N[:, None] == classes_K
    hits_NK = (predicted_NK & gold_NK).astype(np.float64)
    sizes_NK = predicted_NK.astype(np.float64) + gold_NK
    f1_K = 2 * hits_NK.sum(0) / sizes_NK.sum(0)
    influence_NK = (2 * hits_NK - f1_K * sizes_NK) / sizes_NK.mean(0)
    return _with_influence(float(f1_K.mean()), influence_NK.mean(1))


def matthews(predicted: ArrayLike, gold: ArrayLike) -> Estimate:
    """Correlate predicted with true classes: R_K = cov(p, g) / sqrt(cov(p, p) cov(g, g)) over indicators.

    Gorodkin 2004, doi:10.1016/j.compbiolchem.2004.09.006, eq. 8; for two classes the Matthews coefficient. 0 where
    the labels or the predictions are all one class.
    """
    predicted_N, gold_N = np.asarray(predicted), np.asarray(gold)
    classes_K = np.union1d(predicted_N, gold_N)
    return _correlation(
        (predicted_N[:, None] == classes_K).astype(np.float64),
        (gold_N[:, None] == classes_K).astype(np.float64),
    )


def pearson(first: ArrayLike, second: ArrayLike) -> Estimate:
    """Correlate two quantities; 0 where one of them is constant."""
    first_N1 = np.asarray(first, dtype=np.float64)[:, None]
    return _correlation(first_N1, np.asarray(second, dtype=np.float64)[:, None])


def spearman(first: ArrayLike, second: ArrayLike) -> Estimate:
    """Correlate the ranks of two quantities, ties sharing their mean rank; 0 where one of them is constant."""
    first_N, second_N = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)

    def of_rows(rows: NDArray[np.intp]) -> float:
        return pearson(mean_ranks(first_N[rows]), mean_ranks(second_N[rows])).value

    return bootstrap(len(first_N), of_rows)


def bootstrap(num_examples: int, statistic: Callable[[NDArray[np.intp]], float]) -> Estimate:
    """Estimate a statistic of rows, with the standard deviation over `NUM_RESAMPLES` seeded resamples.

    Args:
        num_examples: N.
        statistic: takes the numbers of the rows that are in, repeated as they were drawn.
    """
    value = statistic(np.arange(num_examples))
    if num_examples < 2:
        return Estimate(value, float("nan"))
    generator = np.random.default_rng(_BOOTSTRAP_SEED)
    drawn_R = [
        statistic(np.sort(generator.integers(num_examples, size=num_examples))) for _ in range(NUM_RESAMPLES)
    ]
    return Estimate(value, float(np.std(drawn_R, ddof=1)))


def mean_ranks(values: ArrayLike) -> Floats:
    """Rank values from 1, equal ones by the mean of their places."""
    values_N = np.asarray(values, dtype=np.float64)
    _, inverse_N, counts = np.unique(values_N, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks_N: Floats = (last - (counts - 1) / 2.0)[inverse_N.reshape(-1)]
    return ranks_N


def _correlation(first_NK: Floats, second_NK: Floats) -> Estimate:
    """Correlate vectors: r = <a, b> / sqrt(<a, a> <b, b>), centred; IF = <za, zb> - r (|za|^2 + |zb|^2) / 2."""
    first_NK = first_NK - first_NK.mean(0)
    second_NK = second_NK - second_NK.mean(0)
    variances = (first_NK**2).sum(1).mean(), (second_NK**2).sum(1).mean()
    if min(variances) <= 0:
        return Estimate(0.0, 0.0 if len(first_NK) > 1 else float("nan"))
    first_NK, second_NK = first_NK / np.sqrt(variances[0]), second_NK / np.sqrt(variances[1])
    products_N = (first_NK * second_NK).sum(1)
    value = float(products_N.mean())
    halves_N = ((first_NK**2).sum(1) + (second_NK**2).sum(1)) / 2
    return _with_influence(value, products_N - value * halves_N)


def _with_influence(value: float, influence_N: Floats) -> Estimate:
    num = len(influence_N)
    if num < 2:
        return Estimate(value, float("nan"))
    return Estimate(value, float(np.sqrt((influence_N**2).sum() / (num * (num - 1)))))
