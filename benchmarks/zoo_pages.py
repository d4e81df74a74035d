"""The kept result of the zoo study: tables with standard errors and paired tests, and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kept_file import Report
from paired import Accuracy, accuracy, difference
from zoo_pictures import COLOURS, panels
from zoo_points import Point, ZooSetting
from zoo_scores import Answers

#: What others are compared with.
REFERENCE = "regmean"


def groups(setting: ZooSetting) -> dict[str, list[str]]:
    """Return the probes of each group, in order."""
    found: dict[str, list[str]] = {}
    for probe in setting.probes:
        found.setdefault(probe.group, []).append(probe.name)
    return found


def answers_of(answers: Answers, probes: Sequence[str], split: str = "test") -> list[list[bool]]:
    """Return the answers on one split of each probe that has it."""
    return [answers[probe][split] for probe in probes if split in answers[probe]]


def chosen(points: Sequence[Point], answers: Mapping[str, Answers]) -> dict[str, Point]:
    """Return the point of every row that is best on validation data; the test data choose nothing."""
    best: dict[str, tuple[float, Point]] = {}
    for point in points:
        if point.row:
            of_point = answers[point.name]
            value = accuracy(answers_of(of_point, list(of_point), "validation")).value
            if point.row not in best or value > best[point.row][0]:
                best[point.row] = (value, point)
    return {row: point for row, (_, point) in best.items()}


def write_setting(
    report: Report, setting: ZooSetting, points: Sequence[Point], answers: Mapping[str, Answers]
) -> None:
    """Add a setting's tables to the report and its figures to the data."""
    rows = chosen(points, answers)
    _write_main_table(report, setting, rows, answers)
    _write_probe_table(report, setting, rows, answers)
    for curve in dict.fromkeys(point.curve for point in points if point.curve):
        _write_curve(report, setting, curve, [point for point in points if point.curve == curve], answers)
    report.data[setting.name] = {point.name: _figures(setting, point, answers) for point in points}
    report.data[setting.name]["chosen"] = {row: point.name for row, point in rows.items()}


def _write_main_table(
    report: Report, setting: ZooSetting, rows: Mapping[str, Point], answers: Mapping[str, Answers]
) -> None:
    header = ["method", "chosen on validation"]
    for group in groups(setting):
        header += [group, "against RegMean 0.9", "p"]
    table = []
    for row, point in rows.items():
        cells = [row, _axes(point) if point.axes else ""]
        for probes in groups(setting).values():
            own = answers_of(answers[point.name], probes)
            found = difference(own, answers_of(answers[REFERENCE], probes))
            cells.append(percent(accuracy(own)))
            is_reference = point.name == REFERENCE
            cells += (
                ["", ""]
                if is_reference
                else [f"{100 * found.value:+.1f} +-{100 * found.error:.1f}", _p(found.p)]
            )
        table.append(cells)
    report.table(header, table)


def _write_probe_table(
    report: Report, setting: ZooSetting, rows: Mapping[str, Point], answers: Mapping[str, Answers]
) -> None:
    names = [probe.name for probe in setting.probes]
    sizes = [len(answers[REFERENCE][name]["test"]) for name in names]
    report.text("Each test set by itself:")
    header = ["method", *(f"{name} ({size})" for name, size in zip(names, sizes, strict=True))]
    report.table(
        header,
        [
            [row, *(percent(accuracy(answers_of(answers[point.name], [name]))) for name in names)]
            for row, point in rows.items()
        ],
    )


def _write_curve(
    report: Report,
    setting: ZooSetting,
    curve: str,
    points: Sequence[Point],
    answers: Mapping[str, Answers],
) -> None:
    report.text(f"RegMean over {curve}:")
    report.table(
        [curve, *groups(setting), "validation"],
        [
            [
                f"{(point.axes or {})[curve]:g}",
                *(
                    percent(accuracy(answers_of(answers[point.name], each)))
                    for each in groups(setting).values()
                ),
                percent(accuracy(answers_of(answers[point.name], list(answers[point.name]), "validation"))),
            ]
            for point in points
        ],
    )


def _figures(setting: ZooSetting, point: Point, answers: Mapping[str, Answers]) -> dict[str, Any]:
    own = answers[point.name]
    return {
        "row": point.row,
        "axes": dict(point.axes or {}),
        "recipe": point.recipe,
        "accuracy": {
            name: {split: asdict(accuracy([of])) for split, of in each.items()} for name, each in own.items()
        },
        "groups": {
            group: {
                "accuracy": asdict(accuracy(answers_of(own, probes))),
                "against_regmean": asdict(
                    difference(answers_of(own, probes), answers_of(answers[REFERENCE], probes))
                ),
            }
            for group, probes in groups(setting).items()
        },
    }


def draw(
    page: Path, settings: Sequence[tuple[ZooSetting, Sequence[Point], Mapping[str, Answers]]]
) -> list[Path]:
    """Draw methods, and each curve, one panel per setting, beside the page; returns the pictures."""
    curves = dict.fromkeys(p.curve for _, points, _ in settings for p in points if p.curve)
    pictures = [page.with_name(f"{page.stem}_{name}.png") for name in ("methods", *curves)]
    titles = [setting.name for setting, _, _ in settings]
    with panels(pictures[0], titles, 5.6, 6.4) as drawn:
        for axes, (setting, points, answers) in zip(drawn, settings, strict=True):
            _draw_methods(axes, setting, points, answers)
    for picture, curve in zip(pictures[1:], curves, strict=True):
        with panels(picture, titles, 5.6, 4.2) as drawn:
            for axes, (setting, points, answers) in zip(drawn, settings, strict=True):
                of_curve = [point for point in points if point.curve == curve]
                _draw_curve(axes, setting, of_curve, answers, curve)
    return pictures


def _draw_methods(
    axes: Any, setting: ZooSetting, points: Sequence[Point], answers: Mapping[str, Answers]
) -> None:
    rows = {row: point for row, point in chosen(points, answers).items() if row != "base"}
    for colour, (group, probes) in zip(COLOURS, groups(setting).items(), strict=False):
        found = [accuracy(answers_of(answers[point.name], probes)) for point in rows.values()]
        axes.errorbar(
            [100 * each.value for each in found],
            range(len(found)),
            xerr=[100 * each.error for each in found],
            fmt="o",
            color=colour,
            capsize=2,
            label=group,
        )
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set_xlabel("test accuracy in %, with standard errors")
    axes.legend(frameon=False)


def _draw_curve(
    axes: Any, setting: ZooSetting, points: Sequence[Point], answers: Mapping[str, Answers], curve: str
) -> None:
    places = [(point.axes or {})[curve] for point in points]
    for colour, (group, probes) in zip(COLOURS, groups(setting).items(), strict=False):
        found = [accuracy(answers_of(answers[point.name], probes)) for point in points]
        values, errors = [100 * each.value for each in found], [100 * each.error for each in found]
        axes.errorbar(
            places, values, yerr=errors, marker="o", ms=4, capsize=2, color=colour, label=f"RegMean, {group}"
        )
        mean = 100 * accuracy(answers_of(answers["average"], probes)).value
        axes.axhline(mean, color=colour, linestyle="--", linewidth=1, label=f"average, {group}")
    if curve == "samples":
        axes.set_xscale("log", base=2)
    axes.set_xlabel(f"{curve} of RegMean" if curve == "alpha" else f"{curve} per model")
    axes.set_ylabel("test accuracy in %")
    axes.legend(frameon=False, fontsize=8)


def percent(found: Accuracy) -> str:
    """Return an accuracy and its standard error in percent."""
    return f"{100 * found.value:.1f} +-{100 * found.error:.1f}"


def _axes(point: Point) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in (point.axes or {}).items())


def _p(p: float) -> str:
    return "<1e-4" if p < 1e-4 else f"{p:.4f}" if p < 0.1 else f"{p:.2f}"
