"""The scale of a model's Fisher values over all tensors that are merged by them: `normalize: model`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from raymerge.cluster.matched import MergedTensor, Operand
from raymerge.cluster.recipe import Measurement, Recipe
from raymerge.merge_actors.errors import MismatchError
from raymerge.merge_actors.methods.fisher import SCALE, root_mean_square
from raymerge.merge_actors.methods.interface import Settings
from raymerge.stats.statistics_file import Statistics


def with_scales(
    recipe: Recipe, tensors: Sequence[MergedTensor], statistics: Mapping[Measurement, Statistics]
) -> list[MergedTensor]:
    """Give every tensor that asks for it the scale of each of its models.

    The root mean square is that over all elements that this recipe merges by a model's Fisher
    values: without excluded tensors, which would otherwise weigh in on all others.

    Raises:
        MismatchError: statistics were measured before sums of squares were kept.
    """
    asking = [tensor for tensor in tensors if _asks(tensor)]
    if not asking:
        return list(tensors)
    files = _sums_by_place(recipe, statistics)
    scales = {
        stream: _scale(stream, [_operand(tensor, stream) for tensor in asking], files)
        for stream in dict.fromkeys(name for tensor in asking for name in tensor.stream_names)
    }
    changed: dict[tuple[int, tuple[str, ...]], Settings] = {}
    found = []
    for tensor in tensors:
        if _asks(tensor):
            key = (id(tensor.settings), tensor.stream_names)
            if key not in changed:
                models = tuple(
                    {**model, SCALE: scales[stream]}
                    for model, stream in zip(tensor.settings.models, tensor.stream_names, strict=True)
                )
                changed[key] = dataclasses.replace(tensor.settings, models=models)
            tensor = dataclasses.replace(tensor, settings=changed[key])
        found.append(tensor)
    return found


def _asks(tensor: MergedTensor) -> bool:
    return tensor.method == "fisher" and tensor.settings.shared["normalize"] == "model"


def _operand(tensor: MergedTensor, stream: str) -> Operand | None:
    """Return a model's operand; a slice may be merged from other models than the first."""
    names = dict(zip(tensor.stream_names, tensor.models, strict=True))
    return names.get(stream)


def _sums_by_place(
    recipe: Recipe, statistics: Mapping[Measurement, Statistics]
) -> dict[tuple[str, int], float | None]:
    """Return the sums of squares by (file, first byte) of the Fisher values."""
    used = {use.measurement for _, layers in recipe.slices() for use in layers.sources}
    return {
        (module.tensor.file, module.tensor.begin): module.sum_squares
        for measurement in used
        if measurement is not None and measurement in statistics
        for module in statistics[measurement].modules.values()
    }


def _scale(
    stream: str, operands: Sequence[Operand | None], files: Mapping[tuple[str, int], float | None]
) -> float:
    squares, count = [], 0
    for operand in operands:
        if operand is None or operand.statistic is None:
            continue
        info = operand.statistic.info
        square = files[info.file, info.begin]
        if square is None:
            raise MismatchError(
                f"normalize: model needs the sum of squares of {stream}'s Fisher values, which its statistics "
                f"({info.file}) do not hold; measure the model again, or set normalize: tensor"
            )
        squares.append(square)
        count += info.num_elements
    return root_mean_square(math.fsum(squares), max(1, count))
