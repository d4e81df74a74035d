"""Decide which statistics a layer group yields, who completes each, and what the manifest says. Pure."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raymerge.merge_actors.methods.gram_matrix import triangle_elements
from raymerge.stats.layer_groups import LayerGroup, assign_owners, in_group
from raymerge.stats.linear_maps import LinearMap
from raymerge.stats.masked_rows import Batching
from raymerge.stats.measure_job import Description, Entry, GroupReport, TierCounts
from raymerge.stats.weight_names import expert_of

#: The order in which ways of batching are tried.
_BATCHINGS: tuple[Batching, ...] = ("padded", "equal_length", "single")


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupFindings:
    """What all workers together saw of a layer group."""

    leaders: Mapping[str, str] = field(default_factory=dict)
    """Parameter -> the parameter whose statistics it shares."""
    num_rows: Mapping[tuple[str, int], int] = field(default_factory=dict)
    num_tokens: int = 0
    num_examples: int = 0
    tiers: tuple[TierCounts, ...] = ()
    """Of Grams: up to and with each tier."""
    needs_separate: frozenset[str] = frozenset()
    """Not empty: the pass has to be repeated."""
    needs_batching: Batching | None = None
    """Not None: all passes have to be repeated."""


def combine(reports: Sequence[GroupReport]) -> GroupFindings:
    """Add up what the workers saw.

    A worker whose data never reached a map does not know whether it shares; those that do know must agree.
    """
    asked = [report.needs_batching for report in reports if report.needs_batching]
    if asked:
        return GroupFindings(needs_batching=max(asked, key=_BATCHINGS.index))
    separate = frozenset().union(*(report.needs_separate for report in reports))
    leaders: dict[str, str] = {}
    for report in reports:
        leaders |= report.leaders
    separate |= {
        name
        for report in reports
        for name, leader in leaders.items()
        if report.num_calls.get(name) and report.leaders.get(name) != leader
    }
    num_rows: Counter[tuple[str, int]] = Counter()
    for report in reports:
        num_rows.update(report.num_rows)
    return GroupFindings(
        leaders=leaders,
        num_rows=num_rows,
        num_tokens=sum(report.num_tokens for report in reports),
        num_examples=sum(report.num_examples for report in reports),
        tiers=_cumulative([report.tiers for report in reports]),
        needs_separate=separate,
    )


def _cumulative(by_worker: Sequence[Mapping[int, TierCounts]]) -> tuple[TierCounts, ...]:
    counts, total = [], TierCounts()
    for tier in sorted({tier for each in by_worker for tier in each}):
        for each in by_worker:
            total = total.plus(each.get(tier, TierCounts()))
        counts.append(total)
    return tuple(counts)


def prefix_entries(
    description: Description,
    group: LayerGroup,
    findings: GroupFindings,
    num_workers: int,
    samples_at: Sequence[int],
) -> tuple[list[Entry], dict[str, dict[str, Any]]]:
    """Return the Grams of a group at fewer samples than all, and per number of samples what the manifest says.

    Their names are those of the Grams of all samples with "@SAMPLES" after them.
    """
    entries: list[Entry] = []
    prefixes: dict[str, dict[str, Any]] = {}
    for tier, samples in enumerate(samples_at[:-1]):
        counts = findings.tiers[tier]
        up_to_here = dataclasses.replace(findings, num_rows=counts.num_rows)
        found, modules = gram_entries(description, group, up_to_here, num_workers)
        for entry in found:
            [(key, shape)] = entry.tensors
            entries.append(dataclasses.replace(entry, tensors=((f"{key}@{samples}", shape),), tier=tier))
        prefixes[str(samples)] = {
            "num_tokens": counts.num_tokens,
            "num_examples": counts.num_examples,
            "modules": {name: {**row, "gram": f"{row['gram']}@{samples}"} for name, row in modules.items()},
        }
    return entries, prefixes


def gram_entries(
    description: Description, group: LayerGroup, findings: GroupFindings, num_workers: int
) -> tuple[list[Entry], dict[str, dict[str, Any]]]:
    """Return the Grams of a group and, per weight tensor with a Gram, its row of the manifest.

    Linear maps (and experts kept apart) that no row reached have neither.
    """
    maps = {each.parameter: each for each in description.maps.maps if in_group(each.block, group)}
    found: list[tuple[str, LinearMap, tuple[int, ...], tuple[int, ...]]] = []
    modules: dict[str, dict[str, Any]] = {}
    for each in maps.values():
        leader = maps[findings.leaders.get(each.parameter, each.parameter)]
        for key, tensors, parts in _pieces(each, leader):
            rows = [findings.num_rows.get((leader.parameter, part), 0) for part in parts]
            if not any(rows):
                continue
            is_fused = each.kind == "experts" and len(each.tensors) == 1
            for tensor in tensors:
                modules[tensor] = {
                    "gram": key,
                    "num_rows": rows if is_fused else rows[0],
                    "in_features": each.in_features,
                    "kind": "linear" if each.kind == "experts" and not is_fused else each.kind,
                }
                if is_fused:
                    modules[tensor]["layout"] = each.experts_shape
            if leader is each:
                elements = triangle_elements(each.in_features)
                found.append((key, each, parts, (len(parts), elements) if is_fused else (elements,)))
    costs = {key: len(parts) * each.in_features**2 for key, each, parts, _ in found}
    owners = assign_owners(costs, num_workers)
    entries = [
        Entry(
            parameter=each.parameter,
            parts=parts,
            in_features=each.in_features,
            tensors=((key, shape),),
            owner=owners[key],
        )
        for key, each, parts, shape in found
    ]
    return entries, modules


def _pieces(each: LinearMap, leader: LinearMap) -> list[tuple[str, tuple[str, ...], tuple[int, ...]]]:
    """Return (name of the Gram, weight tensors that it serves, experts that it holds)."""
    if each.kind != "experts" or len(each.tensors) == 1:
        parts = tuple(range(each.num_experts)) if each.kind == "experts" else (0,)
        return [(leader.tensors[0], each.tensors, parts)]
    by_expert: dict[int, list[str]] = {}
    for tensor in each.tensors:
        number = expert_of(tensor)
        assert number is not None, tensor
        by_expert.setdefault(number, []).append(tensor)
    return [(names[0], tuple(names), (number,)) for number, names in sorted(by_expert.items())]


def fisher_entries(
    description: Description, group: LayerGroup, findings: GroupFindings, num_workers: int
) -> tuple[list[Entry], dict[str, dict[str, Any]]]:
    """Return the Fishers of a group's parameters and their rows of the manifest."""
    names = [name for name in description.parameters if in_group(description.parameter_blocks[name], group)]
    costs = {name: sum(_count(shape) for _, shape in description.parameters[name]) for name in names}
    owners = assign_owners(costs, num_workers)
    entries = [
        Entry(
            parameter=name,
            parts=(0,),
            in_features=0,
            tensors=description.parameters[name],
            owner=owners[name],
        )
        for name in names
    ]
    modules = {
        tensor: {"fisher": tensor, "num_examples": findings.num_examples}
        for name in names
        for tensor, _ in description.parameters[name]
    }
    return entries, modules


def expected_tensors(description: Description) -> tuple[str, ...]:
    """Return the weight tensors that should have statistics."""
    if description.parameters:
        return tuple(tensor for tensors in description.parameters.values() for tensor, _ in tensors)
    return tuple(tensor for each in description.maps.maps for tensor in each.tensors)


def _count(shape: tuple[int, ...]) -> int:
    product = 1
    for length in shape:
        product *= length
    return product
