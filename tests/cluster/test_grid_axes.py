"""Axes: exact decimals, ranges, subsets, zip, seeds; what is refused and with which words."""

from __future__ import annotations

from typing import Any

import pytest

from raymerge.cluster.grid_axes import Range, read_dimensions
from raymerge.cluster.origin import Origin
from raymerge.merge_actors.errors import RecipeError

ORIGIN = Origin(file="g.yaml")


def _values(raw: Any, *, is_search: bool = False) -> list[Any]:
    [dimension] = read_dimensions({"a": raw}, ORIGIN, is_search=is_search)
    return list(dimension.axes[0].values)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ([1, 0.5, "ties", True, None], [1, 0.5, "ties", True, None]),
        (["1e-4", "1.5E3", "a"], [1e-4, 1500.0, "a"]),
        ({"start": 0.1, "stop": 0.9, "step": 0.1}, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]),
        ({"start": 0, "stop": 1, "step": 0.3}, [0.0, 0.3, 0.6, 0.9]),
        ({"start": 1, "stop": 5, "step": 2}, [1, 3, 5]),
        ({"start": 1, "stop": 0, "step": -0.5}, [1.0, 0.5, 0.0]),
        ({"low": 0, "high": 1, "num": 5}, [0.0, 0.25, 0.5, 0.75, 1.0]),
        ({"low": 0, "high": 1, "num": 11}, [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]),
        ({"low": 1e-3, "high": 1, "num": 4, "scale": "log"}, [0.001, 0.01, 0.1, 1.0]),
        ({"low": "1e-3", "high": "1e-1", "num": 3, "scale": "log"}, [0.001, 0.01, 0.1]),
        ({"pairs": ["x", "y", "z"]}, [["x", "y"], ["x", "z"], ["y", "z"]]),
        ({"subsets": ["x", "y"], "sizes": 2, "ordered": True}, [["x", "y"], ["y", "x"]]),
        ({"subsets": ["x", "y", "z"], "sizes": [1, 3]}, [["x"], ["y"], ["z"], ["x", "y", "z"]]),
        ({"subsets": ["x", "y"], "sizes": "all"}, [["x"], ["y"], ["x", "y"]]),
    ],
)
def test_values_of_an_axis(raw: Any, expected: list[Any]) -> None:
    values = _values(raw)
    assert values == expected
    assert list(map(type, values)) == list(map(type, expected))


def test_steps_are_decimal_for_every_width() -> None:
    """Binary addition gives 0.30000000000000004 and loses or gains an end; decimal arithmetic does not."""
    for digits in range(1, 5):
        step = float(f"1e-{digits}")
        values = _values({"start": 0, "stop": 1, "step": step})
        assert values == [float(f"{i / 10**digits:.{digits}f}") for i in range(10**digits + 1)]


def test_seeds_and_zip() -> None:
    dimensions = read_dimensions(
        {"zip": {"w": [1, 2], "v": [2, 1]}, "seeds": 3, "b": ["x"]}, ORIGIN, is_search=False
    )
    assert [[axis.name for axis in each.axes] for each in dimensions] == [["w", "v"], ["seed"], ["b"]]
    assert [dimensions[0].at(i) for i in range(2)] == [{"w": 1, "v": 2}, {"w": 2, "v": 1}]
    assert dimensions[1].axes[0].values == (0, 1, 2)
    [first, second] = read_dimensions(
        {"zip": [{"a": [1], "b": [1]}, {"c": [1], "d": [1]}]}, ORIGIN, is_search=False
    )
    assert [axis.name for axis in (*first.axes, *second.axes)] == ["a", "b", "c", "d"]


def test_ranges_of_a_search() -> None:
    [dimension] = read_dimensions(
        {"a": {"low": 1, "high": 8, "kind": "int", "step": 1}}, ORIGIN, is_search=True
    )
    assert dimension.axes[0].range == Range(low=1, high=8, is_int=True, step=1)
    [dimension] = read_dimensions({"a": {"low": 1e-4, "high": 1, "scale": "log"}}, ORIGIN, is_search=True)
    assert dimension.axes[0].range == Range(low=1e-4, high=1, is_log=True)
    assert _values({"low": 0, "high": 1, "num": 3}, is_search=True) == [0.0, 0.5, 1.0]


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        ({}, "key grid is {}; it must name at least one axis: {lambda: [0.5, 1]}."),
        ({"a": []}, "key grid.a has no value; the grid would be empty."),
        ({"a": 3}, "key grid.a is 3; an axis is a list of values: [3]."),
        ({"a": [1, 2, 1]}, "key grid.a holds 1 twice; each value is one row of the results."),
        ({"a-b": [1]}, "key grid.a-b is no name for an axis: letters, digits and _ (it is used as $name)."),
        (
            {"a": {"start": 0, "stop": 1}},
            "key grid.a lacks `step`.",
        ),
        (
            {"a": {"start": 0, "stop": 1, "step": -0.1}},
            "key grid.a goes from 0 to 1 by -0.1: no step leads there; the step must be above 0.",
        ),
        (
            {"a": {"start": 0, "stop": 1, "step": 1e-9}},
            "key grid.a has 1,000,000,001 values; an axis has at most 100,000.",
        ),
        (
            {"a": {"low": 0, "high": 1}},
            "key grid.a lacks `num`, the number of values; a range without it is for raymerge search.",
        ),
        (
            {"a": {"low": 0, "high": 1, "num": 3, "scale": "log"}},
            "key grid.a.low is 0; a log scale needs a positive one.",
        ),
        (
            {"a": {"low": 0, "high": 1, "num": 3, "scale": "logg"}},
            "key grid.a.scale is 'logg'; it must be linear or log (did you mean 'log'?).",
        ),
        (
            {"a": {"start": 0, "stop": 1, "stepp": 1}},
            "key grid.a.stepp is unknown; known: start, stop, step (did you mean 'step'?).",
        ),
        ({"a": {"values": [1]}}, "key grid.a is {'values': [1]}; an axis is a list, {start, stop, step}, "
         "{low, high, num} or {subsets}."),
        (
            {"a": {"subsets": ["x", "y"], "sizes": 3}},
            "key grid.a.sizes is 3; sizes are `all`, or whole numbers in [1, 2].",
        ),
        (
            {"zip": {"a": [1, 2], "b": [1]}},
            "key grid.zip holds 2 values of a and 1 of b; axes that change together need the same number.",
        ),
        ({"seed": [1], "seeds": 2}, "key grid.seeds names the axis 'seed' again, after grid.seed; keep one."),
        ({"seeds": -1}, "key grid.seeds is -1; it must be a number of seeds, or a list of seeds."),
    ],
)  # fmt: skip
def test_what_is_refused(raw: Any, sentence: str) -> None:
    with pytest.raises(RecipeError) as error:
        read_dimensions(raw, ORIGIN, is_search=False)
    assert str(error.value) == f"g.yaml: {sentence}"


def test_a_search_over_seeds_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"grid\.seeds would be searched over"):
        read_dimensions({"seeds": 2}, ORIGIN, is_search=True)
