"""Choosing: means over tasks, Pareto fronts, repetitions, and points that do not count."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymerge.cluster.select import Objective, Selection, pareto_front, rank


def _row(point: int, axes: dict[str, Any] | None = None, **metrics: float | None) -> dict[str, Any]:
    columns = {f"metric.{name.replace('_', '.', 1)}": value for name, value in metrics.items()}
    errors = {name.replace("metric", "stderr"): 0.01 for name in columns}
    return {
        "point": point,
        "status": "ok",
        "same_as": None,
        **{f"axis.{name}": value for name, value in (axes or {}).items()},
        **columns,
        **errors,
    }


ACCURACY = Selection(objectives=(Objective(weights=(("a.acc", 1.0),), mode="max"),))
LOSS = Selection(objectives=(Objective(weights=(("a.loss", 1.0),), mode="min"),))


def test_the_best_comes_first_and_ties_go_to_the_earlier_point() -> None:
    rows = [
        _row(0, a_acc=0.5),
        _row(1, a_acc=0.7),
        _row(2, a_acc=0.7),
        _row(3, a_acc=math.nan),
        _row(4, a_acc=None),
    ]
    assert [each.point for each in rank(rows, ACCURACY)] == [1, 2, 0]
    assert [each.point for each in rank([_row(0, a_loss=2.0), _row(1, a_loss=1.0)], LOSS)] == [1, 0]


def test_failed_pruned_and_equal_points_are_no_winners() -> None:
    rows = [
        _row(0, a_acc=0.9) | {"status": "failed"},
        _row(1, a_acc=0.8) | {"status": "pruned"},
        _row(2, a_acc=0.7),
        _row(3, a_acc=0.7) | {"same_as": 2},
        _row(4, a_acc=0.6) | {"same_as": 6},  # 6 was evaluated, but 4 comes first
        _row(5, a_acc=0.6) | {"same_as": 4},
        _row(6, a_acc=0.6),
    ]
    for finished in (rows, rows[::-1]):  # in whichever order they were finished
        assert [each.point for each in rank(finished, ACCURACY)] == [2, 4]


@pytest.mark.parametrize(("weight", "value"), [(1.0, 0.3), (7.0, 0.3), (-1.0, -0.3), (-0.5, -0.3)])
def test_of_the_weight_of_a_single_metric_only_the_sign_counts(weight: float, value: float) -> None:
    """`mean: {a.loss: -1}, mode: max` seeks the smallest loss, and shows it as such."""
    objective = Objective(weights=(("a.loss", weight),), mode="max")
    assert objective.value({"a.loss": 0.3}) == value
    assert objective.error({"a.loss": 0.01}) == pytest.approx(0.01)
    assert math.isnan(objective.value({}))
    best = rank([_row(0, a_loss=2.0), _row(1, a_loss=1.0)], Selection(objectives=(objective,)))[0]
    assert best.point == (0 if weight > 0 else 1)


def test_a_weighted_mean_over_tasks() -> None:
    mean = Objective(weights=(("a.acc", 3.0), ("b.loss", -1.0)), mode="max")
    selection = Selection(objectives=(mean,))
    [best, second] = rank([_row(0, a_acc=0.8, b_loss=2.0), _row(1, a_acc=0.7, b_loss=1.0)], selection)
    assert (best.point, best.values) == (1, ((3 * 0.7 - 1.0) / 4,))
    assert second.values == ((3 * 0.8 - 2.0) / 4,)
    assert best.errors[0] == pytest.approx(math.hypot(0.03, 0.01) / 4)
    assert mean.label == "mean of 3 a.acc, -1 b.loss"


def test_repetitions_count_once_by_their_mean() -> None:
    selection = Selection(objectives=ACCURACY.objectives, average_over=("seed",))
    rows = [
        _row(0, {"w": 1, "seed": 0}, a_acc=0.9),
        _row(1, {"w": 1, "seed": 1}, a_acc=0.1),
        _row(2, {"w": 2, "seed": 0}, a_acc=0.6),
        _row(3, {"w": 2, "seed": 1}, a_acc=0.8),
    ]
    [best, second] = rank(rows, selection)
    assert (best.point, best.num_points) == (2, 2)
    assert best.values[0] == pytest.approx(0.7)
    assert best.errors[0] == pytest.approx(0.1)  # spread 0.1414 over sqrt(2)
    assert second.values[0] == pytest.approx(0.5)


def test_the_front_comes_first() -> None:
    both = Selection(objectives=(ACCURACY.objectives[0], LOSS.objectives[0]))
    rows = [
        _row(0, a_acc=0.5, a_loss=1.0),  # front
        _row(1, a_acc=0.9, a_loss=3.0),  # front
        _row(2, a_acc=0.7, a_loss=3.0),  # beaten by 1
        _row(3, a_acc=0.6, a_loss=2.0),  # front
    ]
    assert [each.point for each in rank(rows, both)] == [1, 3, 0, 2]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=20))
def test_a_front_is_what_nobody_beats(costs: list[tuple[int, int, int]]) -> None:
    def beats(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
        return all(x <= y for x, y in zip(a, b, strict=True)) and a != b

    front = set(pareto_front(dict(enumerate(costs))))
    for i, cost in enumerate(costs):
        assert (i in front) == (not any(beats(other, cost) for other in costs))
    for i, j in itertools.combinations(front, 2):
        assert not beats(costs[i], costs[j])
