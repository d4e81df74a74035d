"""What is merged: one recipe in its normal form.

Every spelling that a file may use (`models`, `slices`, `modules`, implied bases, aliases of
parameters) becomes the same few frozen classes. Reading files is `recipe_reader.py`; the value
of a parameter for one tensor is `settings.py`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import yaml

from raymerge.cluster.method_parameters import find_method
from raymerge.cluster.model_ref import ModelRef
from raymerge.cluster.origin import Origin
from raymerge.cluster.tokenizer_policy import TokenizerPolicy

if TYPE_CHECKING:
    from raymerge.cluster.recipe_data import MeasuredData

#: A number, a switch, a name, a gradient over the layers, or the mapping of a sparsifier.
SettingValue = float | int | bool | str | tuple[float | str, ...] | Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Conditional:
    """A value, and the tensors that it is for."""

    value: SettingValue
    """A tuple is a gradient over the layers of the slice: floats are interpolated linearly, of n
    switches or names the one at floor(t (n - 1)) is taken."""
    filter: str | None = None
    """Substring of the tensor's name; None matches every tensor."""


#: The first entry whose filter matches gives the value; none matching leaves it to the next level.
Setting = tuple[Conditional, ...]

#: Statistics of a model: (`ModelRef.key`, their folder or the data that they are measured on).
Measurement = tuple[str, "str | MeasuredData"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceUse:
    """A model as it is used in one slice."""

    model: ModelRef
    """The model."""
    parameters: Mapping[str, Setting] = field(default_factory=dict)
    """Settings of this model alone, by the canonical name of the parameter."""
    layer_range: tuple[int, int] | None = None
    """Its layers [begin, end); None for the whole model."""
    statistics: str | None = None
    """Folder of statistics measured on the model, for the methods that use them."""
    samples: int | None = None
    """Take the statistics of so many samples, which were kept on the way; None for all."""
    data: MeasuredData | None = None
    """What to measure the model on, if there are no statistics yet."""
    where: str = field(default="", compare=False, repr=False)
    """Key path in the file ("slices[0].sources[1]"), for errors."""

    @property
    def measurement(self) -> Measurement | None:
        """Whose statistics these are, and where they are or what they are measured on; None without any."""
        if self.statistics is None:
            return None if self.data is None else (self.model.key, self.data)
        source = self.statistics if self.samples is None else f"{self.statistics}@{self.samples}"
        return self.model.key, source


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSlice:
    """Layers of the output, and the models they are merged from."""

    sources: tuple[SourceUse, ...]
    """The merged models, WITHOUT the base, in the order of the file and of `Settings.models`.

    All layer ranges of a slice, the base's included, have one length. Empty when the slice
    lists one model only under a method that merges into a base: then `base` is copied.
    """
    base: SourceUse | None = None
    """The base as it is used here, whose tensors are read; None when no base takes part.

    A base that a method does not use (linear with a `base_model`) is not here: if it is listed
    among the models it is one of `sources`.
    """
    parameters: Mapping[str, Setting] = field(default_factory=dict)
    """Settings of this slice."""
    where: str = field(default="", compare=False, repr=False)
    """Key path in the file, for errors."""

    @property
    def base_model(self) -> ModelRef | None:
        """The base of this slice, after the recipe's own; None when no base takes part."""
        return self.base.model if self.base else None

    @property
    def num_layers(self) -> int | None:
        """Number of layers in the slice; None for whole models."""
        first = self.sources[0] if self.sources else self.base
        assert first is not None
        return first.layer_range[1] - first.layer_range[0] if first.layer_range else None

    def uses(self) -> tuple[SourceUse, ...]:
        """Return the base, if one takes part, and then the merged models."""
        return (self.base, *self.sources) if self.base else self.sources


@dataclass(frozen=True, kw_only=True, slots=True)
class Module:
    """A part of the network with layers of its own: "default", or a tower such as "text_decoder"."""

    name: str
    """Key under `modules`; "default" where the recipe has none."""
    slices: tuple[LayerSlice, ...]
    """Stacked in this order; layers are renumbered in the output. One slice without layer
    ranges is the whole module."""
    parameters: Mapping[str, Setting] = field(default_factory=dict)
    """Settings of this module."""
    where: str = field(default="", compare=False, repr=False)
    """Key path in the file, for errors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """One merge: method, models, parameters, dtypes, vocabulary."""

    name: str
    """Unique in its campaign; the name of the output folder when there are several."""
    merge_method: str
    """Key of the method registry."""
    base_model: ModelRef | None = None
    """The base as written; where no base takes part it still gives config and tokenizer."""
    modules: tuple[Module, ...]
    """At least one."""
    parameters: Mapping[str, Setting] = field(default_factory=dict)
    """Settings of the whole recipe."""
    dtype: str | None = None
    """Type of the output ("BF16"), unless `out_dtype` is set; the maths is float32 whatever it is."""
    out_dtype: str | None = None
    """Type of the output; None means `dtype`, and without that the type of the donor's tensor."""
    tokenizer: TokenizerPolicy | None = None
    """None: tokenizer files are copied from the donor and vocabularies have to agree."""
    chat_template: str | None = None
    """A template's name, "auto", or Jinja text; None copies the donor's."""
    missing: Literal["error", "base", "present", "drop"] = "error"
    """A tensor that some models lack: refuse; take the base's; merge over the models that have
    it; leave it out."""
    vocabulary: Literal["union", "base", "pad", "truncate"] | None = None
    """Vocabularies of different size: None refuses."""
    exclude: tuple[str, ...] = ()
    """Patterns of tensors that are not merged by statistics though they have some: names with * ? [ as in a
    shell, or parts of names."""
    fallback: Literal["mean", "base", "first", "error"] | ModelRef = "mean"
    """What becomes of excluded tensors, and of those that should have statistics and have none."""
    heads: Literal["merge", "label-aware", "keep", "exclude"] | ModelRef | None = None
    """Classification heads: merge as they are; match rows by label; keep each model's beside the output;
    leave out; keep one model's. None merges heads of equal labels and refuses others."""
    gradient_tail: Literal["first", "last"] = "first"
    """Value of a gradient for tensors after the layers (final norm, lm_head): the first, or, as
    in files written before March 2025, the last."""
    seed: int = 0
    """Seed of every random mask."""
    depends_on: tuple[str, ...] = ()
    """Names of earlier recipes of the campaign that are models of this one."""
    origin: Origin = field(default_factory=Origin, compare=False, repr=False)
    """Where it was written."""

    def slices(self) -> tuple[tuple[Module, LayerSlice], ...]:
        """Return every slice of every module, in order."""
        return tuple((module, each) for module in self.modules for each in module.slices)

    def all_models(self) -> tuple[ModelRef, ...]:
        """Return every model whose tensors are read, bases first, in the order of the file."""
        bases = [each.base.model for _, each in self.slices() if each.base]
        merged = [use.model for _, each in self.slices() for use in each.sources]
        return tuple(dict.fromkeys(bases + merged))

    @property
    def donor(self) -> ModelRef:
        """The model that gives config, tokenizer and untreated files: the base, else the first."""
        return self.base_model or self.all_models()[0]

    def to_mapping(self) -> dict[str, Any]:
        """Return the normal form as plain values: dumped and read again it is an equal recipe."""
        mapping: dict[str, Any] = {"name": self.name, "merge_method": self.merge_method}
        if self.base_model:
            mapping["base_model"] = self.base_model.to_value()
        # Where a method uses no base, the base of the deltas is named but is no source.
        lists_base = find_method(self.merge_method).base != "unused"
        mapping["modules"] = {each.name: _module_mapping(each, lists_base) for each in self.modules}
        if self.parameters:
            mapping["parameters"] = _parameters_mapping(self.parameters)
        for key in ("dtype", "out_dtype", "chat_template", "vocabulary"):
            if getattr(self, key) is not None:
                mapping[key] = getattr(self, key)
        if self.tokenizer:
            mapping["tokenizer"] = self.tokenizer.to_mapping()
        if self.exclude:
            mapping["exclude"] = list(self.exclude)
        if self.fallback != "mean":
            mapping["fallback"] = _policy_value(self.fallback, "model")
        if self.heads is not None:
            mapping["heads"] = _policy_value(self.heads, "keep")
        mapping |= {"missing": self.missing, "gradient_tail": self.gradient_tail, "seed": self.seed}
        return mapping

    def to_yaml(self) -> str:
        """Return the normal form as YAML: read again it is this recipe."""
        return yaml.safe_dump(self.to_mapping(), sort_keys=False, allow_unicode=True, width=100)


def load_recipes(
    source: str | os.PathLike[str] | Mapping[str, Any] | Sequence[Mapping[str, Any]],
    *,
    strict: bool = False,
) -> tuple[list[Recipe], list[str]]:
    """Read the recipes of a file, a text or mappings.

    Args:
        source: path of a YAML file; YAML text (a string with a line break); a mapping; or
            mappings that form one campaign.
        strict: turn warnings about unknown and ineffective keys into errors.

    Returns:
        the recipes in order, and remarks to show the user: warnings open with "file:line:",
        quiet remarks with "note:".

    Raises:
        RecipeError: with one sentence that names file, line, key, value and rule.
    """
    # The reader builds the classes above, so it can only be imported once they exist.
    from raymerge.cluster.recipe_reader import read_recipes

    return read_recipes(source, strict=strict)


def _policy_value(policy: str | ModelRef, key: str) -> Any:
    """Return a policy's name, or {key: the model that it names}."""
    return {key: policy.to_value()} if isinstance(policy, ModelRef) else policy


def _module_mapping(module: Module, lists_base: bool) -> dict[str, Any]:
    mapping: dict[str, Any] = {"slices": [_slice_mapping(each, lists_base) for each in module.slices]}
    if module.parameters:
        mapping["parameters"] = _parameters_mapping(module.parameters)
    return mapping


def _slice_mapping(layers: LayerSlice, lists_base: bool) -> dict[str, Any]:
    uses = layers.uses() if lists_base else layers.sources
    mapping: dict[str, Any] = {"sources": [_use_mapping(use) for use in uses]}
    if layers.base:
        mapping["base_model"] = layers.base.model.to_value()
    if layers.parameters:
        mapping["parameters"] = _parameters_mapping(layers.parameters)
    return mapping


def _use_mapping(use: SourceUse) -> dict[str, Any]:
    mapping: dict[str, Any] = {"model": use.model.to_value()}
    if use.layer_range:
        mapping["layer_range"] = list(use.layer_range)
    if use.statistics is not None:
        prefix = {"path": use.statistics, "samples": use.samples}
        mapping["statistics"] = use.statistics if use.samples is None else prefix
    if use.data is not None:
        mapping["data"] = use.data.to_mapping()
    if use.parameters:
        mapping["parameters"] = _parameters_mapping(use.parameters)
    return mapping


def _parameters_mapping(parameters: Mapping[str, Setting]) -> dict[str, Any]:
    return {name: _setting_value(setting) for name, setting in parameters.items()}


def _setting_value(setting: Setting) -> Any:
    if len(setting) == 1 and setting[0].filter is None:
        return _plain(setting[0].value)
    return [
        {"filter": each.filter, "value": _plain(each.value)}
        if each.filter is not None
        else {"value": _plain(each.value)}
        for each in setting
    ]


def _plain(value: Any) -> Any:
    """Return tuples as lists and mappings as dicts, which YAML can hold."""
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return value
