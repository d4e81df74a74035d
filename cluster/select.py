"""Choose among points: a metric, a weighted mean over tasks, or the Pareto front of several objectives.

Always on the validation split; the test split is scored once, for what was chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from raymerge.cluster.origin import Origin, did_you_mean, join
from raymerge.cluster.setting import shown

Mode = Literal["max", "min"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """One number that is made large or small."""

    weights: tuple[tuple[str, float], ...]
    """Metric ("task.metric") and its weight in the mean."""
    mode: Mode

    @property
    def label(self) -> str:
        """Name of the objective, for tables and plots."""
        if len(self.weights) == 1:
            return self.weights[0][0]
        return "mean of " + ", ".join(
            name if weight == 1 else f"{weight:g} {name}" for name, weight in self.weights
        )

    def value(self, metrics: Mapping[str, float | None]) -> float:
        """Return sum_t w_t m_t / sum_t |w_t|; NaN if a metric is missing."""
        if len(self.weights) == 1:  # w m / |w| without a rounding
            [(name, weight)] = self.weights
            return math.copysign(1.0, weight) * _number(metrics.get(name))
        total = sum(abs(weight) for _, weight in self.weights)
        return math.fsum(weight * _number(metrics.get(name)) for name, weight in self.weights) / total

    def error(self, errors: Mapping[str, float | None]) -> float:
        """Return the standard error of `value`, tasks being independent; NaN if one is missing."""
        total = sum(abs(weight) for _, weight in self.weights)
        return math.hypot(*(weight * _number(errors.get(name)) for name, weight in self.weights)) / total

    def cost(self, value: float) -> float:
        """Return what is to be made small: infinity for NaN."""
        if math.isnan(value):
            return math.inf
        return -value if self.mode == "max" else value


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """The `select` section."""

    objectives: tuple[Objective, ...]
    """One, or several for a Pareto front."""
    average_over: tuple[str, ...] = ()
    """Axes whose points count as repetitions of one setting: seeds, above all."""

    @property
    def is_pareto(self) -> bool:
        """Return whether there are several objectives."""
        return len(self.objectives) > 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranked:
    """A setting and how good it is."""

    point: int
    """Number of the point; of repetitions, the first."""
    values: tuple[float, ...]
    """Per objective; the mean over repetitions."""
    errors: tuple[float, ...]
    """Standard errors; NaN where they are not known."""
    num_points: int = 1
    """Repetitions."""


def read_selection(
    raw: Any,
    origin: Origin,
    metrics: Sequence[str],
    axes: Collection[str],
    higher_is_better: Callable[[str], bool],
) -> Selection:
    """Read the `select` section; without one the first metric counts.

    Raises:
        RecipeError: an unknown key or metric, or the test split is asked for.
    """
    if raw is None:
        return Selection(objectives=(_objective({metrics[0]: 1.0}, None, higher_is_better),))
    if isinstance(raw, str):
        raw = {"metric": raw}
    if not isinstance(raw, Mapping):
        raise origin.error(
            "select", f"is {shown(raw)}; it must be a mapping such as {{metric: {metrics[0]}}}."
        )
    if "split" in raw and raw["split"] != "validation":
        raise origin.error(
            "select.split",
            f"is {shown(raw['split'])}; points are chosen on validation data, and test data are scored once, for "
            "what was chosen.",
        )
    known = ("metric", "mean", "pareto", "mode", "average_over", "split")
    for name in raw:
        if name not in known:
            raise origin.error(
                join("select", name), f"is unknown; known: {', '.join(known)}{did_you_mean(name, known)}."
            )
    forms = [form for form in ("metric", "mean", "pareto") if form in raw]
    if len(forms) != 1:
        raise origin.error("select", "must hold exactly one of 'metric', 'mean' and 'pareto'.")
    mode = raw.get("mode")
    if mode not in (None, "max", "min"):
        raise origin.error("select.mode", f"is {shown(mode)}; it must be max or min.")
    reader = {"metric": _read_metric, "mean": _read_mean, "pareto": _read_pareto}[forms[0]]
    objectives = reader(raw[forms[0]], mode, origin, metrics, higher_is_better)
    return Selection(objectives=objectives, average_over=_read_axes(raw, origin, axes))


def _objective(
    weights: Mapping[str, float], mode: Mode | None, higher_is_better: Callable[[str], bool]
) -> Objective:
    if mode is None:
        names = list(weights)
        mode = "min" if len(names) == 1 and not higher_is_better(names[0]) else "max"
    return Objective(weights=tuple(weights.items()), mode=mode)


def _read_metric(
    raw: Any, mode: Mode | None, origin: Origin, metrics: Sequence[str], higher: Callable[[str], bool]
) -> tuple[Objective, ...]:
    return (_objective({_check_metric(raw, "select.metric", origin, metrics): 1.0}, mode, higher),)


def _read_mean(
    raw: Any, mode: Mode | None, origin: Origin, metrics: Sequence[str], higher: Callable[[str], bool]
) -> tuple[Objective, ...]:
    if isinstance(raw, list | tuple):
        raw = dict.fromkeys(raw, 1.0)
    if not isinstance(raw, Mapping) or not raw:
        raise origin.error("select.mean", f"is {shown(raw)}; it must give a weight to each metric.")
    weights: dict[str, float] = {}
    for name, weight in raw.items():
        key = join("select.mean", name)
        if (
            isinstance(weight, bool)
            or not isinstance(weight, int | float)
            or not math.isfinite(weight)
            or not weight
        ):
            raise origin.error(key, f"is {shown(weight)}; a weight is a number other than 0.")
        weights[_check_metric(name, key, origin, metrics)] = float(weight)
    objective = _objective(weights, mode, higher)
    sign = 1 if objective.mode == "max" else -1
    for name, weight in weights.items():
        if (weight * sign > 0) != higher(name) and (mode is None or len(weights) > 1):
            better, way_out = ("higher", "positive") if higher(name) else ("lower", "negative")
            if objective.mode == "min":
                way_out = "negative" if higher(name) else "positive"
            raise origin.error(
                join("select.mean", name),
                f"is {weight:g}, but {better} is better for {name} and the mean is made "
                f"{'large' if objective.mode == 'max' else 'small'}; give it a {way_out} weight.",
            )
    return (objective,)


def _read_pareto(
    raw: Any, mode: Mode | None, origin: Origin, metrics: Sequence[str], higher: Callable[[str], bool]
) -> tuple[Objective, ...]:
    if mode is not None:
        raise origin.error(
            "select.mode", "has no effect on a Pareto front; write it per metric: {m: max, n: min}."
        )
    if isinstance(raw, list | tuple):
        raw = dict.fromkeys(raw)
    if not isinstance(raw, Mapping) or len(raw) < 2:
        raise origin.error("select.pareto", f"is {shown(raw)}; it must name at least two metrics.")
    objectives = []
    for name, each in raw.items():
        key = join("select.pareto", name)
        if each not in (None, "max", "min"):
            raise origin.error(key, f"is {shown(each)}; it must be max or min.")
        objectives.append(_objective({_check_metric(name, key, origin, metrics): 1.0}, each, higher))
    return tuple(objectives)


def _check_metric(raw: Any, key: str, origin: Origin, metrics: Sequence[str]) -> str:
    if not isinstance(raw, str) or raw not in metrics:
        raise origin.error(
            key,
            f"names {shown(raw)}, which no task yields; known: {', '.join(metrics)}{did_you_mean(str(raw), metrics)}.",
        )
    return raw


def _read_axes(raw: Mapping[str, Any], origin: Origin, axes: Collection[str]) -> tuple[str, ...]:
    value = raw.get("average_over", ())
    names = [value] if isinstance(value, str) else list(value)
    for name in names:
        if name not in axes:
            raise origin.error(
                "select.average_over",
                f"names {shown(name)}, which is no axis; known: {', '.join(axes)}{did_you_mean(str(name), axes)}.",
            )
    return tuple(names)


def rank(rows: Iterable[Mapping[str, Any]], selection: Selection) -> list[Ranked]:
    """Return the finished points, the best first.

    With several objectives the Pareto front comes first, each part in the order of the first
    objective. Points that count as repetitions are one entry. Points whose output is that of
    another point are left out.

    Args:
        rows: of the results.
        selection: what counts.
    """
    rows = [row for row in rows if row["status"] == "ok"]
    same_as = {int(row["point"]): row.get("same_as") for row in rows}
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for row in rows:
        if selection.average_over:
            left_out = {f"axis.{name}" for name in selection.average_over}
            group: Any = tuple(
                (name, value)
                for name, value in row.items()
                if name.startswith("axis.") and name not in left_out
            )
        else:
            group = _first_of(int(row["point"]), same_as)
        groups.setdefault(group, []).append(row)
    if not selection.average_over:  # of equal outputs the first point counts, whichever was evaluated
        groups = {group: [min(members, key=_number_of)] for group, members in groups.items()}
    ranked = [_ranked(members, selection) for members in groups.values()]
    ranked = [each for each in ranked if not any(map(math.isnan, each.values))]
    costs = {each.point: costs_of(each, selection) for each in ranked}
    front = set(pareto_front(costs)) if selection.is_pareto else set()
    return sorted(ranked, key=lambda each: (each.point not in front, *costs[each.point], each.point))


def _first_of(point: int, same_as: Mapping[int, int | None]) -> int:
    """Return the point whose output a point's output was found to be."""
    seen = {point}
    while (other := same_as.get(point)) is not None and int(other) not in seen:
        point = int(other)
        seen.add(point)
    return point


def _number_of(row: Mapping[str, Any]) -> int:
    return int(row["point"])


def _ranked(members: Sequence[Mapping[str, Any]], selection: Selection) -> Ranked:
    members = sorted(members, key=_number_of)
    values, errors = [], []
    for objective in selection.objectives:
        each = [objective.value(_named(row, "metric.")) for row in members]
        values.append(math.fsum(each) / len(each))
        if len(each) == 1:
            errors.append(objective.error(_named(members[0], "stderr.")))
        else:
            spread = math.fsum((value - values[-1]) ** 2 for value in each)
            errors.append(math.sqrt(spread / (len(each) - 1) / len(each)))
    return Ranked(
        point=int(members[0]["point"]), values=tuple(values), errors=tuple(errors), num_points=len(members)
    )


def costs_of(ranked: Ranked, selection: Selection) -> tuple[float, ...]:
    """Return what is to be made small, per objective."""
    return tuple(
        objective.cost(value) for objective, value in zip(selection.objectives, ranked.values, strict=True)
    )


def pareto_front(costs: Mapping[int, Sequence[float]]) -> list[int]:
    """Return the points that no other one beats: none is as small in every cost and smaller in one.

    Args:
        costs: per point.

    Returns:
        points, in the order of their costs.
    """
    front: list[int] = []
    for point in sorted(costs, key=lambda point: (tuple(costs[point]), point)):
        mine = costs[point]
        if not any(
            all(a <= b for a, b in zip(costs[other], mine, strict=True))
            and tuple(costs[other]) != tuple(mine)
            for other in front
        ):
            front.append(point)
    return front


def _named(row: Mapping[str, Any], prefix: str) -> dict[str, float | None]:
    return {name.removeprefix(prefix): value for name, value in row.items() if name.startswith(prefix)}


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
