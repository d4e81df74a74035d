"""What the tensors of a plan read, and which of them share it."""

from __future__ import annotations

from collections.abc import Sequence

from raymerge.cluster.matched import MergedTensor, Operand, Statistic
from raymerge.merge_actors.methods import METHODS
from raymerge.merge_actors.task import Read
from raymerge.merge_actors.whole_tensors import low_rank_read


def is_solved_for(tensor: MergedTensor) -> bool:
    """Return whether a tensor is a matrix, or matrices, that its method solves for from Gram matrices."""
    return (
        tensor.method in METHODS
        and METHODS[tensor.method].kind == "solve"
        and all(operand.statistic is not None for operand in tensor.models)
    )


def group_by_input(recipes: Sequence[Sequence[MergedTensor]]) -> list[list[tuple[int, int]]]:
    """Group output tensors that read a common input tensor and have one shape (union-find)."""
    parent: dict[tuple[int, int], tuple[int, int]] = {}
    by_input: dict[tuple[object, ...], tuple[int, int]] = {}
    by_operands: dict[tuple[object, ...], tuple[int, int]] = {}

    def root(key: tuple[int, int]) -> tuple[int, int]:
        """Return the one that stands for a tensor's group."""
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    for number, recipe in enumerate(recipes):
        for index, tensor in enumerate(recipe):
            if is_solved_for(tensor):
                continue
            key = (number, index)
            operands = tensor.operands
            alike = (tensor.shape, tensor.method == "copy", _filled_from(tensor))
            same = by_operands.setdefault((*alike, *map(id, operands)), key)
            parent[key] = same
            if same is not key:  # another recipe merges the very same inputs
                continue
            for operand in operands:
                input_key = (operand.info.file, operand.info.begin, *alike)
                parent[root(by_input.setdefault(input_key, key))] = root(key)
    groups: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for key in parent:
        groups.setdefault(root(key), []).append(key)
    return [sorted(group) for group in groups.values()]


def _filled_from(tensor: MergedTensor) -> object:
    """Return what decides the rows that a model lacks: only tensors that agree in it share their reads."""
    operands = tensor.operands
    if all(operand.row_runs is None for operand in operands):
        return None
    rows = frozenset((each.info.file, each.info.begin, each.row_runs, each.fill_weight) for each in operands)
    return rows, tensor.base and (tensor.base.info.file, tensor.base.info.begin)


def disk_place(tensor: MergedTensor) -> tuple[str, int]:
    """Return where a tensor's first input lies: tasks follow the disk."""
    info = tensor.operands[0].info
    return info.file, info.begin


def reads_of(tensors: Sequence[MergedTensor]) -> tuple[tuple[Read, ...], dict[int, int]]:
    """Return the distinct reads of some tensors, and per operand (by identity) its read."""
    numbers: dict[Read, int] = {}
    places: dict[int, int] = {}
    for tensor in tensors:
        for operand in tensor.operands:
            if id(operand) in places:  # recipes of one campaign share them
                continue
            places[id(operand)] = numbers.setdefault(read_of(operand), len(numbers))
            if operand.statistic is not None:
                read = _statistic_read(operand, operand.statistic)
                places[id(operand.statistic)] = numbers.setdefault(read, len(numbers))
    return tuple(numbers), places


def _statistic_read(operand: Operand, statistic: Statistic) -> Read:
    info = statistic.info
    return Read(model=operand.model, tensor=info.name, file=info.file, offset=info.begin, dtype=info.dtype)


def read_of(operand: Operand) -> Read:
    """Return what is read of a model."""
    info, update = operand.info, operand.low_rank
    return Read(
        model=operand.model,
        tensor=info.name,
        file=info.file,
        offset=info.begin,
        dtype=info.dtype,
        row_runs=operand.row_runs,
        fill_weight=operand.fill_weight,
        low_rank=None
        if update is None
        else low_rank_read(update, None if operand.row_runs is None else info.shape[0]),
    )
