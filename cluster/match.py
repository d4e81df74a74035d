"""Decide, from headers alone, what every tensor of the output is made of.

Recipe and checkpoints in, one `MergedTensor` per output tensor out: which tensor of which
model, under which settings, or why it is copied instead. Nothing about slices, workers or
files of the output is known here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

from raymerge.cluster.fisher_scales import with_scales
from raymerge.cluster.heads import Heads, is_head_tensor
from raymerge.cluster.match_rules import (
    all_measured,
    canonical_order,
    common_shape,
    is_excluded,
    output_shape,
)
from raymerge.cluster.matched import LoadedModel, MergedTensor, Operand, Statistic
from raymerge.cluster.model_ref import ModelRef
from raymerge.cluster.name_prefix import prefix_hint
from raymerge.cluster.places import Place, places_by_slice
from raymerge.cluster.plain_tensors import PlainTensors
from raymerge.cluster.recipe import LayerSlice, Measurement, Module, Recipe, SourceUse
from raymerge.cluster.remarks import as_note
from raymerge.cluster.settings import resolve
from raymerge.cluster.vocabulary import Vocabulary
from raymerge.merge_actors.dtypes import is_float
from raymerge.merge_actors.errors import MismatchError, RecipeError
from raymerge.merge_actors.methods import METHODS
from raymerge.merge_actors.methods.interface import Method, Settings
from raymerge.merge_actors.methods.regmean import check_rows
from raymerge.merge_actors.wording import some_of
from raymerge.stats.statistics_file import Statistics

#: What a tensor is as an input, by model, what was measured of it, and name; None if the model lacks it.
KnownOperands = dict[tuple[str, Measurement | None], dict[str, Operand | None]]


def match(
    recipe: Recipe,
    models: Mapping[str, LoadedModel],
    vocabulary: Vocabulary | None,
    statistics: Mapping[Measurement, Statistics] | None = None,
    heads: Heads | None = None,
    known: KnownOperands | None = None,
) -> tuple[list[MergedTensor], list[str]]:
    """Match the tensors of all models of a recipe.

    Args:
        recipe: what to make.
        models: by `ModelRef.key`; at least all models of the recipe.
        vocabulary: which rows of each model make the output's vocabulary; None if all agree.
        statistics: what the recipe's models are merged by; what is still to be measured is not in it.
        heads: what becomes of classification heads; None merges them like other tensors.
        known: keeps operands for the next recipe of the same models, statistics and vocabulary.

    Returns:
        the output's tensors in the order of the donor's files, and remarks for the user.

    Raises:
        MismatchError: models that do not belong together.
        RecipeError: a layer range outside a model, or a module that no tensor belongs to.
    """
    method = METHODS[recipe.merge_method]
    known = {} if known is None else known
    matcher = _Matcher(recipe, method, models, vocabulary, statistics or {}, heads, known)
    tensors: list[MergedTensor] = []
    for module, layers, names in places_by_slice(recipe, models):
        tensors += matcher.match_slice(module, layers, names)
    if not tensors:
        raise RecipeError(f"recipe {recipe.name} yields no tensor at all; check its modules and layer ranges")
    return with_scales(recipe, tensors, statistics or {}), matcher.remarks()


class _Matcher:
    def __init__(
        self,
        recipe: Recipe,
        method: Method,
        models: Mapping[str, LoadedModel],
        vocabulary: Vocabulary | None,
        statistics: Mapping[Measurement, Statistics],
        heads: Heads | None,
        known: KnownOperands,
    ) -> None:
        self.recipe, self.method, self.models, self.vocabulary = recipe, method, models, vocabulary
        self.statistics, self.heads, self._known = statistics, heads, known
        self._notes: dict[str, list[str]] = {}
        self._asked: set[str] = set()
        self._names: list[str] = []
        self._ordered: dict[tuple[int, tuple[int, ...]], Settings] = {}
        self._plain = PlainTensors(recipe, models)

    def match_slice(self, module: Module, layers: LayerSlice, places: Sequence[Place]) -> list[MergedTensor]:
        """Match the tensors of one slice of layers; those that are left out are noted."""
        uses = layers.uses()
        order, streams = canonical_order(layers.sources, self.method)
        known = [self._known.setdefault((use.model.key, use.measurement), {}) for use in uses]
        found = []
        for place in places:
            self._names.append(place.name)
            operands = []
            for use, name, of_use in zip(uses, place.source_names, known, strict=True):
                if name not in of_use:
                    of_use[name] = self._operand(use, name)
                operands.append(of_use[name])
            if self.heads is not None and layers.sources and is_head_tensor(place.name):
                merged = self._match_head(module, layers, place, operands, order)
            else:
                merged = self._match_tensor(module, layers, place, operands, order, streams)
            if merged is not None:
                found.append(merged)
        return found

    def remarks(self) -> list[str]:
        """Sum the notes up, one line per reason."""
        lines = [
            f"exclude: {pattern} has no effect, no tensor's name fits it"
            for pattern in self.recipe.exclude
            if not any(is_excluded(name, [pattern]) for name in self._names)
        ]
        for note, names in self._notes.items():
            line = f"{note}: {some_of(names)}"
            lines.append(as_note(line) if note in self._asked else line)
        return lines

    def _operand(self, use: SourceUse, name: str) -> Operand | None:
        model = self.models[use.model.key]
        own_name = model.checkpoint.tied.get(name, name)
        info = model.checkpoint.tensors.get(own_name)
        if model.adapter is not None and name in model.adapter.full:
            info = model.adapter.full[name]
        if info is None:
            return None
        runs = self.vocabulary.row_runs(use.model.key, info) if self.vocabulary else None
        return Operand(
            use.model.key,
            info,
            low_rank=model.adapter.pairs.get(name) if model.adapter else None,
            row_runs=runs,
            num_rows=self.vocabulary.num_rows if self.vocabulary and runs is not None else 0,
            statistic=self._statistic(use, own_name),
        )

    def _statistic(self, use: SourceUse, name: str) -> Statistic | None:
        """Return the statistic of one tensor, if the model's statistics hold one."""
        found = self.statistics.get(use.measurement) if use.measurement else None
        module = found.modules.get(name) if found else None
        if module is None:
            return None
        is_transposed = module.kind == "conv1d" or module.experts_layout == "EIO"
        return Statistic(module.tensor, module.num_rows, module.in_features, is_transposed)

    def _match_head(
        self,
        module: Module,
        layers: LayerSlice,
        place: Place,
        operands: Sequence[Operand | None],
        order: Sequence[int],
    ) -> MergedTensor | None:
        """Treat a tensor of a classification head as `heads` says."""
        heads = self.heads
        assert heads is not None
        if heads.policy == "exclude":
            self._note("left out (heads: exclude)", place.name, as_asked=True)
            return None
        merged = operands[1:] if layers.base else operands
        if heads.policy == "keep":
            own = next((each for each in merged if each is not None and each.model == heads.donor), None)
            return (
                None
                if own is None
                else self._copied(place.name, own, f"head of {heads.donor}", as_asked=True)
            )
        settings = resolve(self.recipe, module, layers, self.method, place.name, place.layer_t)
        weights = [float(model.get("weight") or 0) if "weight" in model else 1.0 for model in settings.models]
        having = [(operand, weights[i]) for i in order if (operand := merged[i]) is not None]
        if not having:
            self._note("left out, only the base has this head", place.name)
            return None
        heads.check_weights(place.name, [(operand.model, operand.info, weight) for operand, weight in having])
        found = [
            dataclasses.replace(
                operand,
                row_runs=runs,
                num_rows=len(heads.union) if runs is not None else 0,
                fill_weight=weight if runs is not None else 1.0,
                statistic=None,
            )
            for operand, weight in having
            for runs in [heads.row_runs(operand.model, operand.info)]
        ]
        has_labels = any(heads.has_label_rows(each.model, each.info) for each in found)
        note = "head rows matched by label, averaged" if has_labels else "inner layer of a head, averaged"
        self._note(note, place.name, as_asked=True)
        return self._plain.average(place.name, found, note, [weight for _, weight in having])

    def _match_tensor(
        self,
        module: Module,
        layers: LayerSlice,
        place: Place,
        operands: list[Operand | None],
        order: Sequence[int],
        streams: Sequence[str],
    ) -> MergedTensor | None:
        present = [operand for operand in operands if operand is not None]
        donor = present[0]
        if not is_float(donor.info.dtype):
            return self._copied(
                place.name, donor, "not a float tensor: copied from the base or the first model"
            )
        if len(present) == 1 and len(operands) == 1 and not layers.sources:
            return self._copied(place.name, donor, "")
        if len(present) < len(operands):
            return self._match_incomplete(layers, place, operands, present)
        shape = common_shape(place.name, present, self.models)
        base, merged = (present[0], present[1:]) if layers.base else (None, present)
        settings = resolve(self.recipe, module, layers, self.method, place.name, place.layer_t)
        settings, models = self._reorder(settings, order), tuple(merged[i] for i in order)
        coverage: Literal["", "measured"] = ""
        if self.method.statistic is not None:
            excluded = is_excluded(place.name, self.recipe.exclude)
            if excluded or not all_measured(models):
                return self._fall_back(layers, place, present, models, settings, streams, excluded)
            coverage = "measured"
            if self.method.kind == "solve":
                self._check_rows(place.name, models, settings)
        return MergedTensor(
            name=place.name,
            shape=shape,
            dtype=self._plain.dtype(donor),
            method=self.method.name,
            settings=settings,
            base=base,
            models=models,
            stream_names=tuple(streams),
            coverage=coverage,
        )

    def _fall_back(
        self,
        layers: LayerSlice,
        place: Place,
        present: Sequence[Operand],
        models: Sequence[Operand],
        settings: Settings,
        streams: Sequence[str],
        excluded: bool,
    ) -> MergedTensor:
        """Treat a tensor that is not merged by statistics: excluded, not measured, or not measurable."""
        kind = self.method.statistic
        base = present[0] if layers.base else None
        names = place.source_names[-len(layers.sources) :]
        is_expected = any(map(self._is_expected, layers.sources, names))
        if not (excluded or is_expected):
            note = f"averaged, no {kind} statistics for it"
            self._note(note, place.name, as_asked=True)
            return self._plain.mean(place.name, base, models, note, settings, streams)
        why = "excluded" if excluded else f"no {kind} statistics"
        coverage: Literal["", "excluded", "fallback"] = "excluded" if excluded else "fallback"
        coverage = coverage if is_expected else ""
        policy = self.recipe.fallback
        if policy == "error" and not excluded:
            lacking = dict.fromkeys(each.model for each in models if each.statistic is None)
            raise MismatchError(
                f"tensor {place.name} has no {kind} statistics of {', '.join(lacking)}; measure more data, or "
                f"set exclude: {place.name}, or fallback: mean, base, first or {{model: MODEL}}"
            )
        if policy in ("mean", "error"):
            note = f"{why}: averaged"
            self._note(note, place.name, as_asked=excluded)
            found = self._plain.mean(place.name, base, models, note, settings, streams)
            return dataclasses.replace(found, coverage=coverage)
        chosen = self._fallback_operand(place.name, present)
        copied = self._copied(place.name, chosen, f"{why}: taken from {chosen.model}", as_asked=excluded)
        return dataclasses.replace(copied, coverage=coverage)

    def _is_expected(self, use: SourceUse, name: str) -> bool:
        """Return whether a tensor should have been measured: for Grams, whether it is a linear map."""
        found = self.statistics.get(use.measurement) if use.measurement else None
        return found is not None and name in found.coverage.linear_maps

    def _fallback_operand(self, name: str, present: Sequence[Operand]) -> Operand:
        """Return the one model's tensor that the recipe's `fallback` takes."""
        policy = self.recipe.fallback
        if policy == "first":
            return present[0]
        ref = self.recipe.base_model if policy == "base" else policy
        assert isinstance(ref, ModelRef)
        found = self._operand(SourceUse(model=ref), name)
        if found is None or output_shape(found) != output_shape(present[0]):
            has = "does not have it" if found is None else f"has it with the shape {list(found.info.shape)}"
            raise MismatchError(
                f"tensor {name} is to be taken from {ref.key} (fallback), which {has}; set fallback: mean or first"
            )
        return found

    def _check_rows(self, name: str, models: Sequence[Operand], settings: Settings) -> None:
        """Refuse statistics of fewer rows than input features at alpha 1; remark on them below it."""
        counted = [
            operand.statistic
            for operand, model in zip(models, settings.models, strict=True)
            if operand.statistic is not None and model["weight"]
        ]
        alpha, force = float(settings.shared["alpha"] or 0), bool(settings.shared["force"])
        of_experts = list(zip(*(statistic.num_rows for statistic in counted), strict=True))
        for expert, rows in enumerate(of_experts):
            label = name if len(of_experts) == 1 else f"{name}[{expert}]"
            if not any(rows):
                self._note("experts that no token reached are averaged", label)
            elif check_rows(label, rows, counted[0].in_features, alpha, force):
                self._note(
                    "fewer tokens than input features, which leaves some directions near the mean", label
                )

    def _match_incomplete(
        self,
        layers: LayerSlice,
        place: Place,
        operands: Sequence[Operand | None],
        present: Sequence[Operand],
    ) -> MergedTensor | None:
        """Treat a tensor that some models lack by the recipe's `missing` policy."""
        lacking = [
            use.model.key for use, operand in zip(layers.uses(), operands, strict=True) if operand is None
        ]
        policy = self.recipe.missing
        if policy == "error":
            where = f"tensor {place.name} stands in model {present[0].model} but not in {', '.join(lacking)}"
            one, other = (
                (key, self.models[key].checkpoint.tensors) for key in (present[0].model, lacking[0])
            )
            if hint := prefix_hint(one, other):
                raise MismatchError(f"{where}: {hint}")
            raise MismatchError(
                f"{where}; say in {self.recipe.origin.file or 'the recipe'} what to do with such tensors: missing: "
                "base (take the base's), present (average the models that have it) or drop"
            )
        if policy == "drop":
            self._note("left out, not all models have it", place.name)
            return None
        if policy == "base":
            if layers.base is None or operands[0] is None:
                self._note("left out, the base does not have it", place.name)
                return None
            return self._copied(place.name, operands[0], "copied from the base, not all models have it")
        having = [operand for operand in (operands[1:] if layers.base else operands) if operand is not None]
        if not having:
            return self._copied(place.name, present[0], "copied from the base, no other model has it")
        if len(having) == 1:
            return self._copied(place.name, having[0], "copied from the one model that has it")
        note = "averaged over the models that have it"
        self._note(note, place.name)
        return self._plain.average(place.name, having, note, [1.0] * len(having))

    def _copied(self, name: str, operand: Operand, note: str, *, as_asked: bool = False) -> MergedTensor:
        if note:
            self._note(note, name, as_asked=as_asked)
        return self._plain.copy(name, operand, note)

    def _note(self, note: str, name: str, *, as_asked: bool = False) -> None:
        """Keep a remark on a tensor; what the recipe asks for, or no statistics could change, needs no warning."""
        self._notes.setdefault(note, []).append(name)
        if as_asked:
            self._asked.add(note)

    def _reorder(self, settings: Settings, order: Sequence[int]) -> Settings:
        key = (id(settings), tuple(order))
        if key not in self._ordered:
            models = tuple(settings.models[i] for i in order)
            same = models == settings.models
            self._ordered[key] = settings if same else dataclasses.replace(settings, models=models)
        return self._ordered[key]
