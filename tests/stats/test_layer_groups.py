"""Cutting layers into groups: whole plans, limits, owners."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymerge.merge_actors.errors import RecipeError
from raymerge.stats.layer_groups import LayerGroup, Needs, assign_owners, in_group, plan_groups

NEEDS = Needs(
    block_weights=[10, 10, 10, 10],
    other_weights=5,
    block_statistics=[20, 20, 20, 20],
    other_statistics=4,
    activations=1,
)


def _bounds(groups: tuple[LayerGroup, ...]) -> list[tuple[int, int]]:
    return [(group.begin, group.end) for group in groups]


def test_without_a_budget_there_is_one_group() -> None:
    plan = plan_groups(NEEDS, None, "the budget")
    assert _bounds(plan.groups) == [(0, 4)]
    assert plan.groups[0].is_last and not plan.is_streamed
    assert plan.peak_bytes == 5 + 40 + 1 + 80 + 4


def test_a_model_that_fits_stays_whole() -> None:
    plan = plan_groups(NEEDS, 46 + 45, "the budget")
    assert not plan.is_streamed
    assert _bounds(plan.groups) == [(0, 2), (2, 4)]
    assert plan.peak_bytes == 46 + 44


def test_what_stands_outside_the_blocks_gets_a_group_of_its_own_if_need_be() -> None:
    plan = plan_groups(NEEDS, 46 + 40, "the budget")
    assert _bounds(plan.groups) == [(0, 2), (2, 4), (4, 4)]
    assert [group.is_last for group in plan.groups] == [False, False, True]


def test_a_model_that_does_not_fit_is_streamed() -> None:
    plan = plan_groups(NEEDS, 50, "the budget")
    assert plan.is_streamed
    assert _bounds(plan.groups) == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert plan.peak_bytes == 6 + 10 + 30 + 4  # the first block may run again in later passes


def test_a_layer_that_does_not_fit_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"--memory-gib is .* GiB, but a worker needs .* GiB"):
        plan_groups(NEEDS, 30, "--memory-gib")


@given(
    sizes=st.lists(st.tuples(st.integers(0, 50), st.integers(1, 50)), min_size=0, max_size=12),
    budget=st.integers(1, 400),
)
def test_groups_cover_every_block_once_within_the_budget(sizes: list[tuple[int, int]], budget: int) -> None:
    needs = Needs(
        block_weights=[weights for weights, _ in sizes],
        other_weights=3,
        block_statistics=[statistics for _, statistics in sizes],
        other_statistics=2,
        activations=1,
    )
    try:
        plan = plan_groups(needs, budget, "the budget")
    except RecipeError:
        return
    assert plan.peak_bytes <= budget
    covered = [i for group in plan.groups for i in range(len(sizes)) if in_group(i, group)]
    assert covered == list(range(len(sizes)))
    assert [group for group in plan.groups if in_group(None, group)] == [plan.groups[-1]]


def test_owners_are_balanced_and_do_not_depend_on_the_order() -> None:
    costs = {"a": 9, "b": 5, "c": 4, "d": 1}
    assert assign_owners(costs, 2) == {"a": 0, "b": 1, "c": 1, "d": 0}
    assert assign_owners(dict(reversed(costs.items())), 2) == assign_owners(costs, 2)
