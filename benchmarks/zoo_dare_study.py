"""DARE on real fine-tuned encoders: how much of a delta can be dropped, and what dropping does for each method.

    python benchmarks/zoo_dare_study.py ZOO OUT

Two parts, over the setting whose models have tasks and heads of their own (`--settings` names another). Dropping from
one model: DARE, without rescaling, by magnitude, and from the weights instead of the delta, each model on its own task.
Merging: drop rate x scale x method; of the scales of a method the best on validation data is reported, at each
drop rate. Everything is kept in OUT as by zoo_study.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kept_file import Report
from paired import Accuracy, accuracy, difference
from zoo_command import new_report, read_options, without_skipped
from zoo_pages import answers_of, chosen, percent
from zoo_pictures import COLOURS, one_panel
from zoo_points import ALPHA, FISHER_SAMPLES, GRAM_SAMPLES, Point, ZooSetting, read_settings, recipe
from zoo_scores import Answers, Examination, joined

#: Drop rates.
SINGLE_DROPS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 0.99)
MERGE_DROPS = (0.0, 0.5, 0.9, 0.99)
#: What is dropped from one model, and how: parameters of a `random` step.
VARIANTS: dict[str, dict[str, Any]] = {
    "DARE": {},
    "by magnitude": {"mask_strategy": "magnitude", "rescale": False},
    "without rescaling": {"rescale": False},
    "weights, not deltas": {"mask_target": "weights"},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeWay:
    """A method that DARE is put before."""

    name: str
    method: str
    fixed: Mapping[str, float | str]
    axis: str | None = None
    """Parameter that scales the merge, if it has one."""
    values: Sequence[float] = ()
    data: Mapping[str, Any] | None = None


MERGE_WAYS = (
    MergeWay(name="average", method="linear", fixed={"weight": 1.0}),
    MergeWay(
        name="task arithmetic",
        method="task_arithmetic",
        fixed={},
        axis="weight",
        values=(0.3, 0.5, 0.7, 1.0),
    ),
    MergeWay(
        name="TIES 20 %",
        method="ties",
        fixed={"weight": 1.0, "density": 0.2},
        axis="lambda",
        values=(1.0, 1.5, 2.0, 3.0),
    ),
    MergeWay(
        name="TIES 100 %",
        method="ties",
        fixed={"weight": 1.0, "density": 1.0},
        axis="lambda",
        values=(1.0, 1.5, 2.0, 3.0),
    ),
    MergeWay(name="Fisher", method="fisher", fixed={"normalize": "none"}, data={"samples": FISHER_SAMPLES}),
    MergeWay(name="RegMean", method="regmean", fixed={"alpha": ALPHA}, data={"samples": GRAM_SAMPLES}),
)


def single_points(setting: ZooSetting) -> Iterator[Point]:
    """Yield one model thinned in every way at every rate; the setting has one model."""
    for variant, parameters in VARIANTS.items():
        for drop in SINGLE_DROPS:
            thinned = {"weight": 1.0, "density": round(1 - drop, 10), **parameters}
            yield Point(
                name=f"{variant.replace(',', '')}_{drop:g}",
                row="",
                recipe=recipe(setting, "dare_linear", thinned, has_base=True),
                axes={"variant": variant, "drop": drop},
            )


def merge_points(setting: ZooSetting) -> Iterator[Point]:
    """Yield every method at every drop rate and scale."""
    for way in MERGE_WAYS:
        for drop in MERGE_DROPS:
            for value in way.values or (None,):
                parameters: dict[str, Any] = dict(way.fixed)
                if way.axis:
                    parameters[way.axis] = value
                if drop:
                    parameters["sparsify"] = {"method": "dare", "drop": drop}
                has_base = bool(drop) or way.axis is not None
                suffix = f"_{way.axis}{value:g}" if way.axis else ""
                yield Point(
                    name=f"{way.name.replace(' %', '').replace(' ', '_')}_drop{drop:g}{suffix}",
                    row=row_name(way.name, drop),
                    recipe=recipe(setting, way.method, parameters, has_base=has_base, data=way.data),
                    axes={"way": way.name, "drop": drop, "scale": value},
                )


def row_name(way: str, drop: float) -> str:
    """Return the name of the row of points that differ in their scale only."""
    return f"{way}, p {drop:g}"


def single_settings(setting: ZooSetting) -> Iterator[ZooSetting]:
    """Yield each model by itself, measured on its own data alone."""
    for model in setting.models:
        name = Path(model).name
        probes = tuple(probe for probe in setting.probes if probe.name == name)
        yield replace(setting, models=(model,), probes=probes)


def main() -> None:
    """Parse the options, run what is not there yet, keep the result."""
    options = read_options(__doc__ or "")
    settings = read_settings(options.zoo)
    wanted = options.settings or [each.name for each in settings if each.has_own_heads]
    for setting in (each for each in settings if each.name in wanted):
        singles = []
        for single in single_settings(setting):
            points = without_skipped(single_points(single), options.skip)
            examination = Examination(options.zoo, options.out, single, options.precision)
            singles.append((points, examination.ask(points, ["test"])))
        merges = without_skipped(merge_points(setting), options.skip)
        examination = Examination(options.zoo, options.out, setting, options.precision)
        validation = examination.ask(merges, ["validation"])
        best = chosen(merges, validation)
        answers = joined(validation, examination.ask(list(best.values()), ["test"]))
        report = new_report("zoo_dare", f"DARE on real fine-tuned encoders: {setting.name}", options)
        _write_singles(report, report.path(options.results), singles)
        _write_merges(report, report.path(options.results), setting, merges, best, answers)
        report.write(options.results)


def _write_singles(
    report: Report, page: Path, singles: Sequence[tuple[Sequence[Point], Mapping[str, Answers]]]
) -> None:
    def test(variant: str, drop: float) -> list[list[bool]]:
        return [
            *(
                each
                for points, answers in singles
                for point in points
                if point.axes == {"variant": variant, "drop": drop}
                for each in answers_of(answers[point.name], list(answers[point.name]))
            )
        ]

    variants = list(dict.fromkeys((p.axes or {})["variant"] for p in singles[0][0]))
    drops = list(dict.fromkeys((p.axes or {})["drop"] for p in singles[0][0]))
    found = {variant: [accuracy(test(variant, drop)) for drop in drops] for variant in variants}
    report.text(
        f"## Dropping from one model\n\nMean test accuracy in % of {len(singles)} fine-tuned models, each on its own "
        "task, with standard errors over examples; p is the share of elements dropped."
    )
    report.table(
        ["p", *variants],
        [
            [f"{drop:g}", *(percent(found[variant][i]) for variant in variants)]
            for i, drop in enumerate(drops)
        ],
    )
    best = max(drop for drop in drops if drop <= 0.9)
    change = difference(test("DARE", best), test("DARE", 0.0))
    report.text(
        f"DARE at p = {best:g} against the whole models, on the same examples: {100 * change.value:+.1f} "
        f"+-{100 * change.error:.1f} (McNemar p {change.p:.2g})."
    )
    report.data["single"] = {
        variant: {f"{drop:g}": asdict(found[variant][i]) for i, drop in enumerate(drops)}
        for variant in variants
    }
    _draw_lines(page.with_name(f"{page.stem}_single.png"), drops, found, "accuracy on the own task in %")
    report.text(f"![dropping from one model]({page.stem}_single.png)")


def _write_merges(
    report: Report,
    page: Path,
    setting: ZooSetting,
    points: Sequence[Point],
    best: Mapping[str, Point],
    answers: Mapping[str, Answers],
) -> None:
    probes = [probe.name for probe in setting.probes]
    ways = list(dict.fromkeys((point.axes or {})["way"] for point in points))
    drops = list(dict.fromkeys((point.axes or {})["drop"] for point in points))

    def test(way: str, drop: float) -> list[list[bool]]:
        return answers_of(answers[best[row_name(way, drop)].name], probes)

    def validation(point: Point) -> float:
        return accuracy(answers_of(answers[point.name], probes, "validation")).value

    found = {way: [accuracy(test(way, drop)) for drop in drops] for way in ways}
    report.text(
        f"## Dropping before merging {len(setting.models)} models\n\nMean test accuracy in % over {', '.join(probes)}. "
        "At each drop rate p the scale (in brackets) is the best on validation data."
    )
    rows = []
    for i, drop in enumerate(drops):
        cells = [f"{drop:g}"]
        for way in ways:
            scale = (best[row_name(way, drop)].axes or {})["scale"]
            cells.append(percent(found[way][i]) + (f" ({scale:g})" if scale is not None else ""))
        rows.append(cells)
    report.table(["p", *ways], rows)
    report.text(
        "What DARE does for each method: its best drop rate above 0 and scale on validation data against none dropped, "
        "on the same test examples (paired standard error, McNemar's exact test, not corrected for the number of rows)."
    )
    rows = []
    for way in ways:
        drop = max((each for each in drops if each), key=lambda each: validation(best[row_name(way, each)]))
        change = difference(test(way, drop), test(way, 0.0))
        rows.append(
            [way, f"{drop:g}", f"{100 * change.value:+.1f} +-{100 * change.error:.1f}", f"{change.p:.2f}"]
        )
    report.table(["method", "best p", "with DARE against without", "p value"], rows)
    report.data["merges"] = {
        point.name: {
            "axes": dict(point.axes or {}),
            "recipe": point.recipe,
            **{
                split: asdict(accuracy(found_on))
                for split in ("validation", "test")
                if (found_on := answers_of(answers[point.name], probes, split))
            },
        }
        for point in points
    }
    _draw_lines(page.with_name(f"{page.stem}_merges.png"), drops, found, "mean accuracy over the tasks in %")
    report.text(f"![dropping before merging]({page.stem}_merges.png)")


def _draw_lines(
    path: Path, drops: Sequence[float], found: Mapping[str, Sequence[Accuracy]], label: str
) -> None:
    with one_panel(path) as axes:
        places = range(len(drops))
        for colour, (name, values) in zip(COLOURS, found.items(), strict=False):
            axes.errorbar(
                places,
                [100 * each.value for each in values],
                yerr=[100 * each.error for each in values],
                marker="o",
                capsize=2,
                color=colour,
                label=name,
            )
        axes.set_xticks(places, [f"{drop:g}" for drop in drops])
        axes.set_xlabel("share of elements dropped, p")
        axes.set_ylabel(label)
        axes.legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    main()
