"""The recipes of the benchmarks, in the language that raymerge and the peer both read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

WEIGHTS = (0.5, 0.3, 0.2)
#: DARE drops nine of ten and TIES keeps the top fifth: their papers' settings.
DENSITIES = {"dare_linear": 0.1, "ties": 0.2}
PEER_METHODS = ("task_arithmetic", "dare_linear", "ties", "linear", "slerp")


def write_recipe(file: Path, method: str, base: Path, fine_tunes: Sequence[Path]) -> Path:
    """Write the recipe that merges the fine-tunes by `method`, and return its path."""
    recipe: dict[str, Any] = {"merge_method": method, "dtype": "bfloat16"}
    if method == "slerp":  # two models: the base and the first fine-tune
        recipe |= {"base_model": os.fspath(base), "parameters": {"t": 0.4}}
        recipe["models"] = [{"model": os.fspath(model)} for model in (base, fine_tunes[0])]
    else:
        if method != "linear":
            recipe["base_model"] = os.fspath(base)
        recipe["models"] = [
            {"model": os.fspath(model), "parameters": _parameters(method, weight)}
            for model, weight in zip(fine_tunes, WEIGHTS, strict=True)
        ]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return file


def inputs(method: str, base: Path, fine_tunes: Sequence[Path]) -> list[Path]:
    """Return the models that the method reads."""
    if method == "slerp":
        return [base, fine_tunes[0]]
    return list(fine_tunes) if method == "linear" else [base, *fine_tunes]


def _parameters(method: str, weight: float) -> dict[str, float]:
    density = DENSITIES.get(method)
    return {"weight": weight} if density is None else {"weight": weight, "density": density}
