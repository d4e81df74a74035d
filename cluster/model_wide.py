"""Which tensors of a recipe are measured together, for a threshold over the whole model (`trim: model`)."""

from __future__ import annotations

from collections.abc import Sequence

from raymerge.cluster.matched import MergedTensor
from raymerge.merge_actors.errors import RecipeError
from raymerge.merge_actors.methods import METHODS, SPARSIFIERS
from raymerge.merge_actors.methods.prepare import model_wide_steps, steps_of


def measured_together(recipe_name: str, tensors: Sequence[MergedTensor]) -> list[MergedTensor]:
    """Return the tensors of a recipe that share one threshold per model; none if it asks for none.

    Raises:
        RecipeError: sparsified tensors do not agree in the models, or in how those are sparsified,
            so that there is no one threshold.
    """
    treated = [tensor for tensor in tensors if tensor.method in METHODS]
    distinct = {(tensor.method, id(tensor.settings)): tensor for tensor in treated}
    if not any(map(_thresholds, distinct.values())):
        return []
    sparsified = [tensor for tensor in treated if any(_steps(tensor))]
    found = [tensor for tensor in sparsified if _thresholds(tensor)]
    for tensor in sparsified:
        if _thresholds(tensor) != _thresholds(found[0]):
            raise RecipeError(
                f"recipe {recipe_name}: trim: model takes one threshold per model over all tensors, but the models "
                f"of {tensor.name} or their density or trim are not those of {found[0].name}; give all tensors and "
                "slices the same ones, or set trim: tensor"
            )
    return found


def _steps(tensor: MergedTensor) -> list[list[tuple[object, ...]]]:
    steps = steps_of(METHODS[tensor.method], tensor.settings, SPARSIFIERS)
    return [
        [(step.name, *(parameters[each.name] for each in step.parameters)) for step, parameters in of_model]
        for of_model in steps
    ]


def _thresholds(tensor: MergedTensor) -> list[tuple[object, ...]]:
    """Return each model-wide step of a tensor: its place, its model, its parameters."""
    steps = _steps(tensor)
    return [
        (model, number, tensor.stream_names[model], *steps[model][number])
        for model, number in model_wide_steps(METHODS[tensor.method], tensor.settings, SPARSIFIERS)
    ]
