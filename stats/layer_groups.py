"""Cut a model's layers into groups whose statistics fit a worker's memory. Pure.

Groups are runs of consecutive blocks [begin, end); what stands outside the blocks goes with the
last group, whose pass runs to the model's end. A worker holds the parameters outside the blocks
all the time, and of the blocks either all or, if the model does not fit, those of the group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raymerge.merge_actors.errors import RecipeError


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """Bytes that a worker needs, per part of the model."""

    block_weights: Sequence[int]
    """Parameters of each block."""
    other_weights: int
    """Parameters outside the blocks."""
    block_statistics: Sequence[int]
    """Sums that are collected for each block."""
    other_statistics: int
    activations: int
    """Hidden states of a batch, an estimate."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerGroup:
    """Blocks that one pass over the data measures."""

    number: int
    begin: int
    end: int
    is_last: bool
    """Does the pass run to the model's end, and measure what stands outside the blocks?"""


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupPlan:
    """How a model is measured within a budget."""

    groups: tuple[LayerGroup, ...]
    is_streamed: bool
    """Are blocks loaded when their group comes, rather than all at the start?"""
    peak_bytes: int
    """The most that a worker needs at a time, by these figures."""


def plan_groups(needs: Needs, budget_bytes: int | None, budget_name: str) -> GroupPlan:
    """Choose the fewest groups that fit; keep the model whole if it leaves room for any block.

    Args:
        needs: of the model.
        budget_bytes: of a worker; None for one group and no limit.
        budget_name: what an error calls the budget.

    Raises:
        RecipeError: a single block does not fit.
    """
    whole = needs.other_weights + sum(needs.block_weights) + needs.activations
    for is_streamed in (False, True):
        fixed = needs.other_weights + needs.activations if is_streamed else whole
        groups, peak = _fill(needs, budget_bytes, fixed, is_streamed=is_streamed)
        if budget_bytes is None or peak <= budget_bytes:
            return GroupPlan(groups=groups, is_streamed=is_streamed, peak_bytes=peak)
    raise RecipeError(
        f"{budget_name} is {_gib(budget_bytes)}, but a worker needs {_gib(peak)} for the layer with the largest "
        "statistics; give more memory, or smaller batches (batch_tokens)."
    )


def _fill(
    needs: Needs, budget_bytes: int | None, fixed: int, *, is_streamed: bool
) -> tuple[tuple[LayerGroup, ...], int]:
    num_blocks = len(needs.block_statistics)
    first_block = needs.block_weights[0] if is_streamed and num_blocks else 0  # may have to run in every pass
    bounds = [0]
    used = peak = fixed
    for i in range(num_blocks + 1):
        cost = needs.other_statistics
        if i < num_blocks:
            cost = needs.block_statistics[i] + (needs.block_weights[i] if is_streamed else 0)
        if budget_bytes is not None and used + cost > budget_bytes and bounds[-1] < i:
            bounds.append(i)  # i == num_blocks: a last group of what stands outside the blocks alone
            used = fixed + first_block
        used += cost
        peak = max(peak, used)
    ends = [*bounds[1:], num_blocks]
    groups = tuple(
        LayerGroup(number=number, begin=begin, end=end, is_last=number == len(bounds) - 1)
        for number, (begin, end) in enumerate(zip(bounds, ends, strict=True))
    )
    return groups, peak


def in_group(block: int | None, group: LayerGroup) -> bool:
    """Return whether a group measures what stands in a block, or outside of all (None)."""
    return group.is_last if block is None else group.begin <= block < group.end


def assign_owners(costs: Mapping[str, int], num_workers: int) -> dict[str, int]:
    """Give every statistic to a worker, the largest first, each to the worker with the least so far."""
    loads = [0] * num_workers
    owners = {}
    for name in sorted(costs, key=lambda each: (-costs[each], each)):
        owner = min(range(num_workers), key=lambda worker: (loads[worker], worker))
        owners[name] = owner
        loads[owner] += costs[name]
    return owners


def _gib(num_bytes: int | None) -> str:
    return f"{(num_bytes or 0) / 2**30:.3g} GiB"
