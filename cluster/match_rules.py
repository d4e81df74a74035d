"""Small rules of matching: the order of models, shapes of outputs, patterns of names."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence

from raymerge.cluster.matched import LoadedModel, Operand
from raymerge.cluster.recipe import SourceUse
from raymerge.merge_actors.dtypes import is_float
from raymerge.merge_actors.errors import MismatchError
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


def common_shape(
    name: str, operands: Sequence[Operand], models: Mapping[str, LoadedModel]
) -> tuple[int, ...]:
    """Check that all operands, after their rows are mapped, have one shape; return it.

    Raises:
        MismatchError: naming the tensor, two models and their shapes.
    """
    first = operands[0]
    shape = output_shape(first)
    for other in operands[1:]:
        if output_shape(other) != shape:
            raise _shape_error(name, first, other, models)
        if not is_float(other.info.dtype):
            raise MismatchError(
                f"tensor {name} is {first.info.dtype} in model {first.model} but {other.info.dtype} in "
                f"{other.model}; only float tensors can be merged"
            )
    return shape


def _shape_error(
    name: str, first: Operand, other: Operand, models: Mapping[str, LoadedModel]
) -> MismatchError:
    one, two = list(first.info.shape), list(other.info.shape)
    message = f"tensor {name} has shape {one} in model {first.model} but {two} in {other.model}"
    vocabularies = {models[each.model].checkpoint.config.get("vocab_size") for each in (first, other)}
    if one[1:] == two[1:] and len(one) in (1, 2) and {one[0], two[0]} <= vocabularies | {None}:
        return MismatchError(
            f"{message}: the vocabularies differ ({one[0]:,} and {two[0]:,} tokens); choose a policy in "
            "the recipe: vocabulary: union, base (the base's rows only), pad (fill with the mean) or truncate"
        )
    return MismatchError(f"{message}; models of different shape cannot be merged: check the base and sizes")
