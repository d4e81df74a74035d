"""Small rules of matching: the order of models, shapes of outputs, patterns of names."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from raymerge.cluster.matched import Operand
from raymerge.cluster.recipe import SourceUse
from raymerge.merge_actors.methods.interface import Method


def is_excluded(name: str, patterns: Sequence[str]) -> bool:
    """Return whether a pattern meets a tensor: with * ? [ as in a shell, otherwise as a part of the name."""
    return any(
        fnmatch.fnmatchcase(name, pattern) if any(sign in pattern for sign in "*?[") else pattern in name
        for pattern in patterns
    )


def all_measured(models: Sequence[Operand]) -> bool:
    """Return whether every model has a statistic that fits its tensor as it will be read."""
    return all(operand.statistic is not None and operand.row_runs is None for operand in models)


def canonical_order(sources: Sequence[SourceUse], method: Method) -> tuple[list[int], list[str]]:
    """Return the order in which models are summed, and the names of their random streams.

    Where the maths is symmetric the order is that of the models' keys, so that the same models
    in another order give the same bytes. The second use of one model is stream "KEY#2".
    """
    names: list[str] = []
    for use in sources:
        count = 1 + sum(1 for earlier in sources[: len(names)] if earlier.model.key == use.model.key)
        names.append(use.model.key if count == 1 else f"{use.model.key}#{count}")
    order = (
        sorted(range(len(names)), key=names.__getitem__) if method.is_symmetric else list(range(len(names)))
    )
    return order, [names[i] for i in order]


def output_shape(operand: Operand) -> tuple[int, ...]:
    """Return the shape of the output's tensor, whose rows may be more or fewer than the model's."""
    shape = operand.info.shape
    return shape if operand.row_runs is None else (operand.num_rows, *shape[1:])
