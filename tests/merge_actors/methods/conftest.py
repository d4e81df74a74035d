"""A merge by name: parameters that are not given take the method's defaults, as in a recipe."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import pytest
import torch

from raymerge.cluster.method_parameters import parameters_of
from raymerge.merge_actors.methods import METHODS, SPARSIFIERS
from raymerge.merge_actors.methods.interface import Settings
from raymerge.merge_actors.methods.slices import merge_tensors


class MergeByName(Protocol):
    """merge(method, models, base, per_model, slice_units=..., seed=..., names=..., **shared)."""

    def __call__(
        self,
        method: str,
        models: Sequence[torch.Tensor],
        base: torch.Tensor | None,
        per_model: Mapping[str, Any] | Sequence[Mapping[str, Any]] = ...,
        *,
        slice_units: int | None = ...,
        seed: int = ...,
        names: Sequence[str] | None = ...,
        tensor_name: str = ...,
        **shared: Any,
    ) -> torch.Tensor:
        """Merge whole tensors; one mapping as `per_model` serves all models."""


def settings_by_name(
    method: str, per_model: Sequence[Mapping[str, Any]], shared: Mapping[str, Any]
) -> Settings:
    """Resolve parameters like a recipe: model, then shared, then default; a `sparsify` step likewise."""
    declared = parameters_of(METHODS[method])
    models = []
    for given in per_model:
        values = {
            each.name: given.get(each.name, shared.get(each.name, each.default))
            for each in declared.per_model
        }
        if "sparsify" in given:
            step = SPARSIFIERS[given["sparsify"]["method"]]
            values["sparsify"] = {each.name: each.default for each in step.parameters} | given["sparsify"]
        models.append(values)
    return Settings(
        shared={each.name: shared.get(each.name, each.default) for each in declared.shared},
        models=tuple(models),
    )


@pytest.fixture(scope="session")
def merge() -> MergeByName:
    """Return a function that merges tensors by the name of the method."""

    def run(
        method: str,
        models: Sequence[torch.Tensor],
        base: torch.Tensor | None,
        per_model: Mapping[str, Any] | Sequence[Mapping[str, Any]] = (),
        *,
        slice_units: int | None = None,
        seed: int = 0,
        names: Sequence[str] | None = None,
        tensor_name: str = "tensor",
        **shared: Any,
    ) -> torch.Tensor:
        each = (
            [per_model] * len(models) if isinstance(per_model, Mapping) else per_model or [{}] * len(models)
        )
        return merge_tensors(
            METHODS[method],
            models,
            base,
            settings_by_name(method, each, shared),
            sparsifiers=SPARSIFIERS,
            seed=seed,
            tensor_name=tensor_name,
            model_names=names,
            slice_units=slice_units,
        )

    return run
