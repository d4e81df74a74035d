"""How a recipe names a model: path[@revision][+adapter[@revision]], or a mapping.

A path is a local folder, a URI or a Hub id. Nothing is looked up here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

from raymerge.merge_actors.storage.uris import without_file_scheme


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelRef:
    """One model as a recipe names it; hashable, and equal when it is the same reference."""

    path: str
    """Local folder, URI, Hub id, or the name of an earlier recipe of the campaign."""
    revision: str | None = None
    """Branch, tag or commit on the Hub; None for the default branch and for folders."""
    adapter: ModelRef | None = None
    """A PEFT adapter that is added to the model; it has no adapter of its own."""

    @property
    def key(self) -> str:
        """The canonical string, which names the model in errors, journals and seeds."""
        own = f"{self.path}@{self.revision}" if self.revision else self.path
        return f"{own}+{self.adapter.key}" if self.adapter else own

    def __str__(self) -> str:
        return self.key

    def to_value(self) -> str | dict[str, Any]:
        """Return what a recipe would hold: the string, or a mapping where it is ambiguous."""
        if _reads_back(self):
            return self.key
        mapping: dict[str, Any] = {"model": _part(self)}
        if self.adapter:
            mapping["lora"] = _part(self.adapter)
        return mapping


class ModelPlace(TypedDict):
    """Where a model and its adapter are, as `open_model` and `MeasureJob` take it."""

    model: str
    revision: str | None
    adapter: str | None
    adapter_revision: str | None


def place_of(ref: ModelRef) -> ModelPlace:
    """Return where a model and its adapter are."""
    adapter = ref.adapter
    return ModelPlace(
        model=ref.path,
        revision=ref.revision,
        adapter=adapter.path if adapter else None,
        adapter_revision=adapter.revision if adapter else None,
    )


def parse_model(value: object) -> ModelRef:
    """Read a model reference from a string or a mapping.

    Raises:
        ValueError: with half a sentence ("names two revisions"), to be completed by a caller
            that knows the key and the line.
    """
    if isinstance(value, str):
        return _parse_string(value)
    if isinstance(value, Mapping):
        return _parse_mapping(value)
    raise ValueError("must be a model: a path, a Hub id, or a mapping {model: ..., lora: ...}")


def _parse_string(text: str) -> ModelRef:
    parts = [part.strip() for part in text.split("+")]
    if len(parts) > 2:
        raise ValueError(
            "names more than one adapter after '+'; write {model: {path: ...}, lora: ...} "
            "if the '+' belongs to a path"
        )
    adapter = _parse_path(parts[1]) if len(parts) == 2 else None
    model = _parse_path(parts[0])
    return ModelRef(path=model.path, revision=model.revision, adapter=adapter)


def _parse_path(text: str) -> ModelRef:
    """Split path@revision; in a URI other than hf:// an "@" is part of the address."""
    text = without_file_scheme(text)
    scheme, is_uri, _ = text.partition("://")
    if is_uri and scheme != "hf":
        return ModelRef(path=text)
    path, at, revision = text.partition("@")
    if not path or (at and not revision):
        raise ValueError("is not a model: it must be path[@revision][+adapter[@revision]]")
    if "@" in revision:
        raise ValueError(
            "names more than one revision after '@'; write {model: {path: ..., revision: ...}} "
            "if the '@' belongs to a path"
        )
    return ModelRef(path=path, revision=revision or None)


def _parse_mapping(value: Mapping[str, Any]) -> ModelRef:
    unknown = sorted(set(value) - {"model", "path", "revision", "lora", "adapter", "override_architecture"})
    if unknown:
        raise ValueError(f"holds the unknown key {unknown[0]!r}; a model has path, revision and lora")
    if ("model" in value) == ("path" in value):
        raise ValueError("must name its model by exactly one of 'model' and 'path'")
    inner = value.get("model")
    if isinstance(inner, Mapping):
        model = _parse_mapping(inner)
    elif "model" in value:
        model = parse_model(inner)
    else:
        model = ModelRef(path=without_file_scheme(_text(value["path"], "path")))
    lora = value.get("lora", value.get("adapter"))
    adapter = model.adapter if lora is None else parse_model(lora)
    if adapter and (adapter.adapter or (model.adapter and lora is not None)):
        raise ValueError("names more than one adapter; a model takes one")
    revision = model.revision
    if value.get("revision") is not None:
        revision = _text(value["revision"], "revision")
        if model.revision not in (None, revision):
            raise ValueError(f"names the revisions {model.revision!r} and {revision!r}; keep one")
    return ModelRef(path=model.path, revision=revision, adapter=adapter)


def _text(value: object, key: str) -> str:
    """Return a path or a revision; a revision such as 1234567 is a number to YAML."""
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise ValueError(f"has {key} {value!r}; it must be a text")
    return str(value)


def _part(model: ModelRef) -> dict[str, Any]:
    part: dict[str, Any] = {"path": model.path}
    if model.revision:
        part["revision"] = model.revision
    return part


def _reads_back(model: ModelRef) -> bool:
    try:
        return _parse_string(model.key) == model
    except ValueError:
        return False
