"""What is at hand while one document is read: its origin, its method, and the remarks so far."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from raymerge.cluster.method_parameters import (
    NO_SPARSIFIER,
    MethodParameters,
    is_parameter_of_any_method,
    parameters_of,
)
from raymerge.cluster.model_ref import ModelRef, parse_model
from raymerge.cluster.origin import Origin, did_you_mean, join
from raymerge.cluster.recipe import Conditional, Setting, SettingValue
from raymerge.cluster.setting import read_setting, read_sparsify, read_value, shown
from raymerge.merge_actors.errors import RecipeError
from raymerge.merge_actors.methods.interface import Method, Parameter

#: Keys of other tools that change how they run, never what is merged: ignored with a note.
HARMLESS_KEYS = frozenset(
    "allow_crimes async_write clone_tensors copy_tokenizer cuda device int8_mask lazy_unpickle "
    "lora_merge_cache lora_merge_dtype low_cpu_memory multi_gpu num_threads out_shard_size "
    "override_architecture quiet read_to_gpu safe_serialization transformers_cache trust_remote_code "
    "verbosity write_model_card".split()
)
#: Names too far from ours for a comparison of letters.
_MEANT = {"random_seed": "seed", "lora": "model: path+adapter", "revision": "model: path@revision"}


@dataclass(kw_only=True, slots=True)
class Reading:
    """One document being read."""

    origin: Origin
    """Lines of the document."""
    method: Method
    """The recipe's method, whose parameters are the known ones."""
    warnings: list[str] = field(default_factory=list)
    """What has no effect, one sentence each, in the order of reading."""
    notes: dict[str, str] = field(default_factory=dict)
    """Harmless key -> one quiet sentence."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """Keys of the document's `data`, which hold for every model that does not say otherwise."""
    parameters: MethodParameters = field(init=False)
    """The parameters of the method and its sparsifier."""

    def __post_init__(self) -> None:
        self.parameters = parameters_of(self.method)

    def warn(self, key: str, sentence: str) -> None:
        """Add the warning "file:line: key KEY SENTENCE"."""
        self.warnings.append(f"{self.origin.at(key)}: key {key} {sentence}.")

    def note_harmless(self, name: str, key: str) -> None:
        """Remark once that a key of other tools is ignored."""
        self.notes.setdefault(
            name, f"note: {self.origin.at(key)}: key {key} changes nothing in the result and is ignored."
        )

    def require_mapping(self, raw: Any, key: str) -> Mapping[str, Any]:
        """Return `raw` if it is a mapping."""
        if not isinstance(raw, Mapping):
            raise self.origin.error(key, f"is {shown(raw)}; it must be a mapping.")
        return raw

    def require_list(self, raw: Any, key: str) -> list[Any]:
        """Return `raw` if it is a list with something in it."""
        if not isinstance(raw, list | tuple) or not raw:
            raise self.origin.error(key, f"is {shown(raw)}; it must be a list with at least one entry.")
        return list(raw)

    def check_keys(self, raw: Mapping[str, Any], known: Collection[str], where: str) -> None:
        """Warn of every key of a mapping that is not known at its place."""
        for name in raw:
            if name in known or (not where and name.startswith("x-")):
                continue
            key = join(where, name)
            if name in HARMLESS_KEYS:
                self.note_harmless(name, key)
            elif name == "sparsify" or self.parameters.find(name):
                self.warn(key, "has no effect here; move it under 'parameters'")
            elif name in _MEANT:
                self.warn(key, f"is unknown and has no effect (did you mean {_MEANT[name]!r}?)")
            else:
                hint = did_you_mean(name, [*known, *self.parameters.names()])
                self.warn(key, f"is unknown and has no effect{hint}")

    def model(self, raw: Any, key: str) -> ModelRef:
        """Read a model reference."""
        if isinstance(raw, Mapping) and "override_architecture" in raw:
            self.note_harmless("override_architecture", join(key, "override_architecture"))
        try:
            return parse_model(raw)
        except ValueError as error:
            raise self.origin.error(key, f"is {shown(raw)}; it {error}.") from None

    def choice(self, raw: Any, choices: Iterable[str], key: str) -> str:
        """Read one of some names."""
        names = list(choices)
        if raw not in names:
            hint = did_you_mean(str(raw), names)
            raise self.origin.error(key, f"is {shown(raw)}; it must be one of {', '.join(names)}{hint}.")
        assert isinstance(raw, str)
        return raw

    def settings(
        self, raw: Mapping[str, Any], where: str, *, of_one_model: bool = False
    ) -> dict[str, Setting]:
        """Read the `parameters` of a mapping; the result has canonical names only."""
        if raw.get("parameters") is None:
            return {}
        place = join(where, "parameters")
        settings: dict[str, Setting] = {}
        spelled: dict[str, str] = {}
        for name, value in self.require_mapping(raw["parameters"], place).items():
            key = join(place, name)
            if name == "sparsify":
                settings[name] = self._sparsify(value, key)
                continue
            parameter = self.parameters.find(name)
            if parameter is None:
                self._warn_of_parameter(name, key)
            elif of_one_model and not self.parameters.is_per_model(parameter):
                self.warn(key, f"has no effect under one model: {name} is given once, for all models")
            elif parameter.name in settings:
                raise self.origin.error(key, f"says the same as {spelled[parameter.name]!r}; keep one.")
            else:
                spelled[parameter.name] = name
                settings[parameter.name] = self._setting(value, parameter, key)
        return settings

    def _setting(self, raw: Any, parameter: Parameter, key: str) -> Setting:
        def read(value: Any, value_key: str) -> SettingValue:
            return read_value(value, parameter, self.origin, value_key)

        return read_setting(raw, self.origin, key, read, self.warn)

    def _sparsify(self, raw: Any, key: str) -> Setting:
        def read(value: Any, value_key: str) -> SettingValue:
            return read_sparsify(value, self.origin, value_key, self.warn)

        return read_setting(raw, self.origin, key, read, self.warn)

    def _warn_of_parameter(self, name: str, key: str) -> None:
        if name in HARMLESS_KEYS:
            self.note_harmless(name, key)
            return
        hint = did_you_mean(name, [*self.parameters.names(), "sparsify"])
        if is_parameter_of_any_method(name):
            self.warn(key, f"has no effect: {self.method.name} has no parameter {name!r}{hint}")
        else:
            self.warn(key, f"is unknown and has no effect{hint}")


def has_sparsify(settings: Mapping[str, Setting]) -> bool:
    """Return whether a level asks for a sparsifier for at least some tensors."""
    asked: tuple[Conditional, ...] = settings.get("sparsify", ())
    return any(isinstance(each.value, Mapping) and each.value["method"] != NO_SPARSIFIER for each in asked)


def fail_if_strict(warnings: list[str], strict: bool) -> None:
    """Raise the first warning as an error."""
    if strict and warnings:
        more = f" (and {len(warnings) - 1} more)" if len(warnings) > 1 else ""
        raise RecipeError(f"{warnings[0]}{more}")
