"""Output tensors that a recipe's method does not make: copied from one model, or averaged over several."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from raymerge.cluster.match_rules import common_shape, output_shape
from raymerge.cluster.matched import LoadedModel, MergedTensor, Operand
from raymerge.cluster.recipe import Recipe
from raymerge.merge_actors.dtypes import is_float
from raymerge.merge_actors.methods.interface import Settings, Value

_COPY = Settings(models=({},))


class PlainTensors:
    """Makes them for one recipe; settings that are equal are one object, so that a plan holds each once."""

    def __init__(self, recipe: Recipe, models: Mapping[str, LoadedModel]) -> None:
        """Take the recipe, which says the dtype, and its models by `ModelRef.key`."""
        self._recipe, self._models = recipe, models
        self._averages: dict[tuple[Value, ...], Settings] = {}
        self._thinned: dict[str, Settings] = {}

    def mean(
        self,
        name: str,
        base: Operand | None,
        models: Sequence[Operand],
        note: str,
        settings: Settings,
        streams: Sequence[str],
    ) -> MergedTensor:
        """Average a tensor with the weights of a method by statistics, and with its sparsifying steps."""
        averaged = self.average(name, models, note, [model["weight"] for model in settings.models])
        if base is None or not any(model.get("sparsify") for model in settings.models):
            return averaged
        kept = tuple(
            {key: model[key] for key in ("weight", "sparsify") if key in model} for model in settings.models
        )
        thinned = self._thinned.setdefault(repr(kept), Settings(shared={"normalize": True}, models=kept))
        return dataclasses.replace(averaged, settings=thinned, base=base, stream_names=tuple(streams))

    def average(
        self, name: str, operands: Sequence[Operand], note: str, weights: Sequence[Value]
    ) -> MergedTensor:
        """Average a tensor over those models that are given, each with its weight."""
        operands = [dataclasses.replace(operand, statistic=None) for operand in operands]
        return MergedTensor(
            name=name,
            shape=common_shape(name, operands, self._models),
            dtype=self.dtype(operands[0]),
            method="linear",
            settings=self._averages.setdefault(
                tuple(weights),
                Settings(shared={"normalize": True}, models=tuple({"weight": weight} for weight in weights)),
            ),
            base=None,
            models=tuple(operands),
            stream_names=tuple(operand.model for operand in operands),
            note=note,
        )

    def copy(self, name: str, operand: Operand, note: str) -> MergedTensor:
        """Take a tensor over from one model."""
        if operand.statistic is not None:
            operand = dataclasses.replace(operand, statistic=None)
        needs_maths = operand.low_rank is not None or operand.row_runs is not None
        scale: dict[str, None] = {"scale": None}
        return MergedTensor(
            name=name,
            shape=output_shape(operand),
            dtype=self.dtype(operand) if is_float(operand.info.dtype) else operand.info.dtype,
            method="passthrough" if needs_maths or is_float(operand.info.dtype) else "copy",
            settings=Settings(models=(scale,)) if is_float(operand.info.dtype) else _COPY,
            base=None,
            models=(operand,),
            stream_names=(operand.model,),
            note=note,
        )

    def dtype(self, operand: Operand) -> str:
        """Return the output's dtype of a float tensor."""
        return self._recipe.out_dtype or self._recipe.dtype or operand.info.dtype
