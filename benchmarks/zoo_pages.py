"""The kept result of the zoo study: tables with standard errors and paired tests, and pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kept_file import Report
from paired import Accuracy, accuracy, difference
from zoo_pictures import COLOURS, panels
from zoo_points import Point, ZooSetting
from zoo_scores import Answers, Examination, joined

#: Name of the point that others are compared with.
REFERENCE = "regmean"


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """One setting, its points and what they answered."""

    setting: ZooSetting
    points: Sequence[Point]
    rows: Mapping[str, Point]
    """Row of the tables -> the point that stands for it."""
    answers: Mapping[str, Answers]
    """By the points' names: on test data of the shown points, on validation data where there was a choice."""

    def test(self, point: Point, probes: Sequence[str]) -> list[list[bool]]:
        """Return a point's answers on the test data of some probes."""
        return answers_of(self.answers[point.name], probes)

    @property
    def groups(self) -> dict[str, list[str]]:
        """Names of the probes of each group, in order."""
        found: dict[str, list[str]] = {}
        for probe in self.setting.probes:
            found.setdefault(probe.group, []).append(probe.name)
        return found


def examine_study(examination: Examination, points: Sequence[Point]) -> Study:
    """Ask what the tables show: validation data where there is a choice, test data of the chosen and of curves."""
    num_in_row = Counter(point.row for point in points)
    undecided = [point for point in points if point.row and num_in_row[point.row] > 1]
    validation = examination.ask(undecided, ["validation"])
    rows = chosen(points, validation)
    shown = [point for point in points if point.curve or rows.get(point.row) is point]
    return Study(
        setting=examination.setting,
        points=points,
        rows=rows,
        answers=joined(validation, examination.ask(shown, ["test"])),
    )


def chosen(points: Iterable[Point], validation: Mapping[str, Answers]) -> dict[str, Point]:
    """Return the point of every row that is best on validation data; the test data choose nothing.

    Args:
        points: in any number for a row.
        validation: answers of the points that share a row.
    """
    rows: dict[str, list[Point]] = {}
    for point in points:
        if point.row:
            rows.setdefault(point.row, []).append(point)

    def value(point: Point) -> float:
        of_point = validation[point.name]
        return accuracy(answers_of(of_point, list(of_point), "validation")).value

    return {row: max(of_row, key=value) if len(of_row) > 1 else of_row[0] for row, of_row in rows.items()}


def answers_of(answers: Answers, probes: Sequence[str], split: str = "test") -> list[list[bool]]:
    """Return the answers on one split of each probe that has it."""
    return [answers[probe][split] for probe in probes if split in answers[probe]]


def write_study(report: Report, study: Study) -> None:
    """Add a setting's tables to the report and its figures to the data."""
    _write_rows(report, study)
    _write_probes(report, study)
    for curve in curves([study]):
        _write_curve(report, study, curve)
    report.data[study.setting.name] = {
        "chosen": {row: point.name for row, point in study.rows.items()},
        **{point.name: _figures(study, point) for point in study.points},
    }


def curves(studies: Sequence[Study]) -> list[str]:
    """Return the names of all curves, in order."""
    return list(dict.fromkeys(p.curve for study in studies for p in study.points if p.curve))


def _write_rows(report: Report, study: Study) -> None:
    header = ["method", "chosen on validation"]
    for group in study.groups:
        header += [group, "against RegMean 0.9", "p"]
    reference = next(point for point in study.points if point.name == REFERENCE)
    table = []
    for row, point in study.rows.items():
        cells = [row, ", ".join(f"{name} {value:g}" for name, value in (point.axes or {}).items())]
        for probes in study.groups.values():
            own = study.test(point, probes)
            cells.append(percent(accuracy(own)))
            if point is reference:
                cells += ["", ""]
            else:
                found = difference(own, study.test(reference, probes))
                cells += [f"{100 * found.value:+.1f} +-{100 * found.error:.1f}", p_text(found.p)]
        table.append(cells)
    report.table(header, table)


def _write_probes(report: Report, study: Study) -> None:
    names = [probe.name for probe in study.setting.probes]
    sizes = [len(study.answers[REFERENCE][name]["test"]) for name in names]
    report.text("Each test set by itself (number of examples in brackets):")
    report.table(
        ["method", *(f"{name} ({size})" for name, size in zip(names, sizes, strict=True))],
        [
            [row, *(percent(accuracy(study.test(point, [name]))) for name in names)]
            for row, point in study.rows.items()
        ],
    )


def _write_curve(report: Report, study: Study, curve: str) -> None:
    report.text(f"RegMean over {curve}:")
    report.table(
        [curve, *study.groups],
        [
            [
                f"{(point.axes or {})[curve]:g}",
                *(percent(accuracy(study.test(point, probes))) for probes in study.groups.values()),
            ]
            for point in study.points
            if point.curve == curve
        ],
    )


def _figures(study: Study, point: Point) -> dict[str, Any]:
    own = study.answers.get(point.name, {})
    found: dict[str, Any] = {
        "row": point.row,
        "axes": dict(point.axes or {}),
        "recipe": point.recipe,
        "accuracy": {
            name: {split: asdict(accuracy([each])) for split, each in of.items()} for name, of in own.items()
        },
    }
    if any("test" in of for of in own.values()):
        found["groups"] = {
            group: {
                "accuracy": asdict(accuracy(study.test(point, probes))),
                "against_regmean": asdict(
                    difference(study.test(point, probes), answers_of(study.answers[REFERENCE], probes))
                ),
            }
            for group, probes in study.groups.items()
        }
    return found


def draw(page: Path, studies: Sequence[Study]) -> list[Path]:
    """Draw methods, and each curve, one panel per setting, beside the page; returns the pictures."""
    titles = [study.setting.name for study in studies]
    pictures = [page.with_name(f"{page.stem}_{name}.png") for name in ("methods", *curves(studies))]
    with panels(pictures[0], titles, 5.6, 6.4) as drawn:
        for axes, study in zip(drawn, studies, strict=True):
            _draw_methods(axes, study)
    for picture, curve in zip(pictures[1:], curves(studies), strict=True):
        with panels(picture, titles, 5.6, 4.2) as drawn:
            for axes, study in zip(drawn, studies, strict=True):
                _draw_curve(axes, study, curve)
    return pictures


def _draw_methods(axes: Any, study: Study) -> None:
    rows = {row: point for row, point in study.rows.items() if row != "base"}
    for colour, (group, probes) in zip(COLOURS, study.groups.items(), strict=False):
        found = [accuracy(study.test(point, probes)) for point in rows.values()]
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


def _draw_curve(axes: Any, study: Study, curve: str) -> None:
    points = [point for point in study.points if point.curve == curve]
    places = [(point.axes or {})[curve] for point in points]
    for colour, (group, probes) in zip(COLOURS, study.groups.items(), strict=False):
        found = [accuracy(study.test(point, probes)) for point in points]
        axes.errorbar(
            places,
            [100 * each.value for each in found],
            yerr=[100 * each.error for each in found],
            marker="o",
            ms=4,
            capsize=2,
            color=colour,
            label=f"RegMean, {group}",
        )
        if "average" in study.answers:
            mean = 100 * accuracy(answers_of(study.answers["average"], probes)).value
            axes.axhline(mean, color=colour, linestyle="--", linewidth=1, label=f"average, {group}")
    if curve == "samples":
        axes.set_xscale("log", base=2)
    axes.set_xlabel("samples per model" if curve == "samples" else curve)
    axes.set_ylabel("test accuracy in %")
    axes.legend(frameon=False, fontsize=8)


def percent(found: Accuracy) -> str:
    """Return an accuracy and its standard error in percent."""
    return f"{100 * found.value:.1f} +-{100 * found.error:.1f}"


def p_text(p: float) -> str:
    """Return a p value as a table shows it."""
    return "<1e-4" if p < 1e-4 else f"{p:.4f}" if p < 0.1 else f"{p:.2f}"
