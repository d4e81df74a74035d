"""A report for the terminal: the best points, and what each axis does."""

from __future__ import annotations

import math
import statistics
from typing import Any

from raymerge.cluster.grid_progress import duration
from raymerge.cluster.report_data import AxisData, ReportData
from raymerge.cluster.text_tables import cell, text_table

#: An axis of more numbers than this is shown in so many steps.
_MOST_LINES = 40
_NUM_STEPS = 12


def report_text(data: ReportData) -> str:
    """Lay a report out as text."""
    parts = [summary(data), "", *_best_lines(data)]
    for axis in data.axes:
        rows = axis_rows(data, axis)
        parts += ["", f"{data.label} along {axis.name}", text_table([_shown(row) for row in rows])]
    if data.front:
        front = ", ".join(map(str, data.front))
        parts += [
            "",
            f"Pareto front over {' and '.join(o.label for o in data.selection.objectives)}: points {front}",
        ]
    return "\n".join(parts)


def summary(data: ReportData) -> str:
    """Return one line about the run."""
    done = sum(data.counts.values())
    parts = [f"{data.kind} {data.name}: {done:,} of {data.num_points:,} points"]
    parts += [f"{data.counts[status]:,} {status}" for status in ("failed", "pruned") if data.counts[status]]
    parts.append(f"{duration(data.seconds)} of work")
    if data.fixed:
        parts.append("fixed: " + ", ".join(f"{name} = {value}" for name, value in data.fixed.items()))
    return "; ".join(parts)


def best_rows(data: ReportData) -> list[dict[str, Any]]:
    """Return the best settings, one mapping of columns each."""
    tests = {each["point"]: each.get("test") or {} for each in data.winners}
    rows = []
    for number, each in enumerate(data.ranked, 1):
        index = data.row_of(each.point)
        row: dict[str, Any] = {"rank": number, "point": each.point}
        if each.num_points > 1:
            row["points"] = each.num_points
        left_out = data.selection.average_over if each.num_points > 1 else ()
        row |= {axis.name: axis.values[index] for axis in data.axes if axis.name not in left_out}
        for objective, value, error in zip(data.selection.objectives, each.values, each.errors, strict=True):
            row[objective.label] = (value, error)
        if each.num_points == 1:
            shown = {objective.label for objective in data.selection.objectives}
            for name in data.metrics:
                if name not in shown:
                    row[name] = (data.metrics[name][index], data.errors[name][index])
        for name, metric in tests.get(each.point, {}).items():
            row[f"test {name}"] = (metric["value"], math.nan if metric["error"] is None else metric["error"])
        rows.append(row)
    return rows


def axis_rows(data: ReportData, axis: AxisData) -> list[dict[str, Any]]:
    """Return best and median of the objective for each value of an axis, or for steps of it."""
    groups: dict[Any, list[float]] = {}
    for value, objective in zip(axis.values, data.objective, strict=True):
        if not math.isnan(objective):
            groups.setdefault(_step(axis, value), []).append(objective)
    best = max if data.is_max else min
    order = list(axis.levels) if not axis.is_numeric or len(axis.levels) <= _MOST_LINES else sorted(groups)
    return [
        {
            axis.name: value,
            "points": len(groups[value]),
            "best": best(groups[value]),
            "median": statistics.median(groups[value]),
        }
        for value in order
        if value in groups
    ][:_MOST_LINES]


def report_mapping(data: ReportData) -> dict[str, Any]:
    """Return the tables as plain values."""
    return {
        "name": data.name,
        "kind": data.kind,
        "num_points": data.num_points,
        "counts": dict(data.counts),
        "best": [
            {name: _as_json(value) if isinstance(value, tuple) else value for name, value in row.items()}
            for row in best_rows(data)
        ],
        "axes": {axis.name: axis_rows(data, axis) for axis in data.axes},
        "front": list(data.front),
    }


def _as_json(pair: tuple[float, float]) -> dict[str, float | None]:
    return {"value": pair[0], "error": None if math.isnan(pair[1]) else pair[1]}


def _best_lines(data: ReportData) -> list[str]:
    how = "" if data.selection.is_pareto else f", {'high' if data.is_max else 'low'} is good"
    return [
        f"best by {data.label} on validation data{how}",
        text_table([_shown(row) for row in best_rows(data)]),
    ]


def _shown(row: dict[str, Any]) -> dict[str, str]:
    return {name: cell(value) for name, value in row.items()}


def _step(axis: AxisData, value: Any) -> Any:
    """Return the value itself, or of many numbers the middle of a step that it lies in."""
    if not axis.is_numeric or len(axis.levels) <= _MOST_LINES:
        return value
    low, high = float(axis.levels[0]), float(axis.levels[-1])
    if axis.is_log:
        share = math.log(value / low) / math.log(high / low)
    else:
        share = (value - low) / (high - low)
    middle = (min(int(share * _NUM_STEPS), _NUM_STEPS - 1) + 0.5) / _NUM_STEPS
    return float(f"{low * (high / low) ** middle if axis.is_log else low + middle * (high - low):.3g}")
