"""Read what a recipe says of tensors that the method does not treat: `exclude`, `fallback`, `heads`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from raymerge.cluster.model_ref import ModelRef
from raymerge.cluster.origin import did_you_mean, join
from raymerge.cluster.reading import Reading
from raymerge.cluster.setting import shown

FALLBACKS = ("mean", "base", "first", "error")
HEADS = ("merge", "label-aware", "keep", "exclude")


def read_policies(
    raw: Mapping[str, Any], base_model: ModelRef | None, models: Sequence[ModelRef], reading: Reading
) -> dict[str, Any]:
    """Return the policies that a document sets, as fields of `Recipe`.

    Args:
        raw: the document.
        base_model: its base.
        models: all models whose tensors it merges.
        reading: of the document.

    Raises:
        RecipeError: a policy that does not exist, or one that names a model that is not merged.
    """
    found: dict[str, Any] = {}
    for key in ("exclude", "fallback"):
        if raw.get(key) is not None and reading.method.statistic is None:
            reading.warn(key, f"has no effect: {reading.method.name} uses no statistics")
    if reading.method.statistic is not None:
        if raw.get("exclude") is not None:
            found["exclude"] = _read_patterns(raw["exclude"], reading)
        if raw.get("fallback") is not None:
            found["fallback"] = _read_policy(raw["fallback"], "fallback", "model", FALLBACKS, models, reading)
            if found["fallback"] == "base" and base_model is None:
                raise reading.origin.error("fallback", "is base, but the recipe names no base_model.")
    if raw.get("heads") is not None:
        found["heads"] = _read_policy(raw["heads"], "heads", "keep", HEADS, models, reading)
    return found


def _read_patterns(raw: Any, reading: Reading) -> tuple[str, ...]:
    patterns = [raw] if isinstance(raw, str) else reading.require_list(raw, "exclude")
    for number, pattern in enumerate(patterns):
        if not isinstance(pattern, str) or not pattern:
            raise reading.origin.error(
                f"exclude[{number}]",
                f"is {shown(pattern)}; it must be a part of a tensor's name, or a pattern with *.",
            )
    return tuple(patterns)


def _read_policy(
    raw: Any, key: str, model_key: str, names: Sequence[str], models: Sequence[ModelRef], reading: Reading
) -> str | ModelRef:
    """Read one of some names, or {model_key: MODEL} with one of the recipe's models."""
    if isinstance(raw, str) and raw in names:
        return raw
    if isinstance(raw, Mapping) and set(raw) == {model_key}:
        model = reading.model(raw[model_key], join(key, model_key))
        if model not in models:
            known = ", ".join(each.key for each in models)
            raise reading.origin.error(
                join(key, model_key), f"is {model.key}, which is none of the models: {known}."
            )
        return model
    hint = did_you_mean(raw, names) if isinstance(raw, str) else ""
    raise reading.origin.error(
        key, f"is {shown(raw)}; it must be one of {', '.join(names)}, or {{{model_key}: MODEL}}{hint}."
    )
