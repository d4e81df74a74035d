"""Which values along an axis a line may join.

In a grid: those of points that differ in this axis alone. The trials of a search have nothing in common but
what was drawn for them: over them goes the median of neighbours, which joins no two trials.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from raymerge.cluster.report_data import AxisData, ReportData

#: Steps of the median over the trials of a search, and the fewest trials that a step holds.
_MOST_STEPS, _LEAST_TRIALS = 8, 5
#: The axis of repetitions, whether or not the selection averages over it.
_SEED = "seed"


def line_through_best(
    data: ReportData, axis: AxisData, chosen: Sequence[int], values: Sequence[float], *, is_max: bool
) -> dict[float, float]:
    """Return place -> value of the points that have the other axes in common with the best one.

    Points that count as repetitions of one setting (seeds) are averaged, and nothing is joined along them. Axes
    that change together with this one (`zip`) are part of it.

    Args:
        data: of a grid.
        axis: a numeric one.
        chosen: the points in question.
        values: per point of the data.
        is_max: is more better?
    """
    repeated = (*data.selection.average_over, _SEED)
    if axis.name in repeated:
        return {}
    others = [
        each
        for each in data.axes
        if each is not axis and each.name not in repeated and not _is_together(axis, each)
    ]
    settings: dict[tuple[Any, ...], dict[float, list[float]]] = {}
    for i in chosen:
        if not math.isnan(values[i]):
            line = settings.setdefault(tuple(other.values[i] for other in others), {})
            line.setdefault(axis.place(axis.values[i]), []).append(values[i])
    means = [
        {at: statistics.fmean(found) for at, found in sorted(line.items())} for line in settings.values()
    ]
    best = max if is_max else min
    return best(means, key=lambda line: best(line.values())) if means else {}


def median_of_trials(axis: AxisData, chosen: Sequence[int], values: Sequence[float]) -> dict[float, float]:
    """Return place -> median of the trials there: of each value if there are few, else of steps of neighbours.

    Args:
        axis: a numeric one.
        chosen: the trials in question.
        values: per trial of the data.
    """
    trials = sorted((axis.place(axis.values[i]), values[i]) for i in chosen if not math.isnan(values[i]))
    by_place: dict[float, list[float]] = {}
    for place, value in trials:
        by_place.setdefault(place, []).append(value)
    if len(by_place) > _MOST_STEPS:
        num_steps = min(_MOST_STEPS, len(trials) // _LEAST_TRIALS)
        edges = [len(trials) * step // num_steps for step in range(num_steps + 1)] if num_steps else []
        steps = [trials[begin:end] for begin, end in itertools.pairwise(edges)]
        by_place = {
            statistics.median(place for place, _ in step): [value for _, value in step] for step in steps
        }
    medians: Mapping[float, float] = {at: statistics.median(found) for at, found in by_place.items()}
    return dict(medians) if len(medians) > 1 else {}


def _is_together(axis: AxisData, other: AxisData) -> bool:
    """Return whether each value of one axis comes with one value of the other."""
    pairs = set(zip(axis.values, other.values, strict=True))
    return len(pairs) == len(axis.levels) == len(other.levels)
