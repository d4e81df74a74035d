"""What the zoo study merges: its settings, and one recipe per point, as a user would write them.

Paths in recipes are relative to the zoo, which is the working folder while they run: random masks are a function of
a model's path as the recipe spells it, so the results do not depend on where the zoo lies.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raymerge.merge_actors.methods import METHODS

#: The settings whose recipes are not a curve: RegMean's defaults, and the samples of each kind of statistics.
ALPHA, GRAM_SAMPLES, FISHER_SAMPLES = 0.9, 1000, 64
ALPHAS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 1.0)
SAMPLES = (1, 8, 64, 1000)
ESTIMATORS = ("expected", "sampled", "empirical")
_WEIGHTS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
_LAMBDAS = (0.5, 1.0, 1.5, 2.0, 3.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """A data set that every point is measured on."""

    name: str
    data: str
    """Folder of its splits in the zoo."""
    head: str | None
    """Model whose classifier is put on the point's encoder; None: the point has one of its own."""
    group: str
    """Accuracies are averaged over the probes of a group."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ZooSetting:
    """One half of the zoo: a base, models tuned from it, and what they are measured on."""

    name: str
    base: str
    models: tuple[str, ...]
    """Folders of the merged models, in the zoo."""
    has_own_heads: bool
    """Has each model a head of its own, for another task? Then heads are left out of the merge."""
    probes: tuple[Probe, ...]
    max_length: int
    """Tokens of a text; the models were tuned with it."""
    references: Mapping[str, str]
    """Models that are shown beside the merges: name -> folder."""

    def data_of(self, model: str) -> str:
        """Return the folder of the data that a model was tuned on."""
        return f"{self.name}/data/{Path(model).name}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One model that is measured: a merge, or a model of the zoo as it is."""

    name: str
    row: str
    """Row of the table: of several points in one row, the best on validation data is reported."""
    recipe: Mapping[str, Any] | None = None
    """None: `folder` is measured as it is."""
    folder: str = ""
    axes: Mapping[str, Any] | None = None
    """What sets the point apart from others of its row or curve."""
    curve: str | None = None
    """Curve that the point belongs to, if any."""


def read_settings(zoo: Path) -> list[ZooSetting]:
    """Return the settings of a zoo."""
    found = json.loads((zoo / "zoo.json").read_text())
    return [_read_setting(name, each, found["max_length"]) for name, each in found["settings"].items()]


def _read_setting(name: str, found: Mapping[str, Any], max_length: int) -> ZooSetting:
    names = list(found["models"])
    has_own_heads = "labels" not in found
    probes = [
        Probe(
            name=each,
            data=f"{name}/data/{each}",
            head=f"{name}/models/{each}" if has_own_heads else None,
            group="tasks" if has_own_heads else "in domain",
        )
        for each in names
    ]
    if "ood" in found.get("extra_tests", ()):  # other extra tests are more data of the same domains
        probes.append(Probe(name="ood", data=f"{name}/data/ood", head=None, group="out of domain"))
    references = {f"only {each}": f"{name}/models/{each}" for each in names}
    if has_own_heads:  # else the base's head was never trained
        references = {"base": found["base"], **references}
    if found.get("joint"):
        references["joint training"] = f"{name}/models/joint"
    return ZooSetting(
        name=name,
        base=found["base"],
        models=tuple(f"{name}/models/{each}" for each in names),
        has_own_heads=has_own_heads,
        probes=tuple(probes),
        max_length=max_length,
        references=references,
    )


def recipe(
    setting: ZooSetting,
    method: str,
    parameters: Mapping[str, Any],
    *,
    has_base: bool = False,
    data: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the recipe that merges a setting's models.

    Args:
        setting: whose models.
        method: a merge method.
        parameters: for all models.
        has_base: name the base.
        data: what is measured of each model's own training data, if the method merges by data.
    """
    result: dict[str, Any] = {"merge_method": method}
    if has_base:
        result["base_model"] = setting.base
    if setting.has_own_heads:
        result["heads"] = "exclude"
    if data is not None:
        result["data"] = {"split": "train", "max_length": setting.max_length, **data}
        result["models"] = [{"model": each, "data": setting.data_of(each)} for each in setting.models]
    else:
        result["models"] = [{"model": each} for each in setting.models]
    return result | {"parameters": dict(parameters)}


def study_points(setting: ZooSetting) -> Iterator[Point]:
    """Yield every point of a setting."""
    for name, folder in setting.references.items():
        yield Point(name=name, row=name, folder=folder)
    yield Point(name="average", row="average", recipe=recipe(setting, "linear", {"weight": 1.0}))
    yield from _task_vector_points(setting)
    yield from _fisher_points(setting)
    yield from _regmean_points(setting)


def _task_vector_points(setting: ZooSetting) -> Iterator[Point]:
    rows: list[tuple[str, str, str, Sequence[float], dict[str, float]]] = [
        ("task arithmetic", "task_arithmetic", "weight", _WEIGHTS, {}),
        ("DARE 0.9", "dare_linear", "weight", _WEIGHTS, {"density": 0.1}),
        ("DARE 0.9 + TIES", "dare_ties", "weight", _WEIGHTS, {"density": 0.1}),
        ("TIES 20 %", "ties", "lambda", _LAMBDAS, {"weight": 1.0, "density": 0.2}),
    ]
    for row, method, axis, values, fixed in rows:
        for value in values:
            yield Point(
                name=f"{method}_{axis}{value:g}",
                row=row,
                recipe=recipe(setting, method, {**fixed, axis: value}, has_base=True),
                axes={axis: value},
            )


def _fisher_points(setting: ZooSetting) -> Iterator[Point]:
    for estimator in ESTIMATORS:
        data: dict[str, Any] = {"samples": FISHER_SAMPLES, "estimator": estimator}
        if estimator == "empirical":
            data["label_column"] = "label"
        for normalize in ("none", "tensor"):
            yield Point(
                name=f"fisher_{estimator}_{normalize}",
                row=f"Fisher, {estimator}" + (", per tensor" if normalize == "tensor" else ""),
                recipe=recipe(setting, "fisher", {"normalize": normalize}, data=data),
            )


def _regmean_points(setting: ZooSetting) -> Iterator[Point]:
    data = {"samples": GRAM_SAMPLES}
    names = {"regmean": "RegMean 0.9", "regmean_plus": "RegMean++ 0.9"}
    for method, row in names.items():
        if method in METHODS:
            yield Point(name=method, row=row, recipe=recipe(setting, method, {"alpha": ALPHA}, data=data))
    by_sum = recipe(setting, "regmean", {"alpha": ALPHA, "normalize": "sum"}, data=data)
    yield Point(name="regmean_sum", row="RegMean 0.9, sum", recipe=by_sum)
    for alpha in ALPHAS:
        yield Point(
            name=f"regmean_alpha{alpha:g}",
            row="RegMean, alpha chosen",
            recipe=recipe(setting, "regmean", {"alpha": alpha}, data=data),
            axes={"alpha": alpha},
            curve="alpha",
        )
    for samples in SAMPLES:
        yield Point(
            name=f"regmean_samples{samples}",
            row="",
            recipe=recipe(setting, "regmean", {"alpha": ALPHA}, data={"samples": samples}),
            axes={"samples": samples},
            curve="samples",
        )
