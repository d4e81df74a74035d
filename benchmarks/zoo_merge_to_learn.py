"""Merge to Learn on real fine-tuned encoders: a general model that takes up skills, theta_G + sum_i omega_i tau_i.

    python benchmarks/zoo_merge_to_learn.py ZOO OUT

The general model is the one trained jointly on all domains, the skills are the models with tasks of their own, and
tau_i is what a skill's training changed in the base. omega is swept for each skill alone and for all at once. The rule
that needs no data, omega = steps of the skill's training / steps of the general model's, stands beside the omega
that is best on validation data (mean of general and skill accuracy). Kept in OUT as by zoo_study.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from kept_file import Report
from paired import accuracy, difference
from zoo_command import new_report, read_options, without_skipped
from zoo_pages import answers_of, percent
from zoo_pictures import COLOURS, panels
from zoo_points import Point, ZooSetting, read_settings
from zoo_scores import Answers, Examination

OMEGAS = (0.2, 0.4, 0.6, 0.8, 1.0)
GENERAL = "domains/models/joint"
#: Name of the sweep that adds every skill.
ALL = "all skills"


def skills_setting(domains: ZooSetting, tasks: ZooSetting) -> ZooSetting:
    """Return the skills with their probes and, under the general model's head, the domains' as `general`."""
    general = [
        replace(probe, head=GENERAL, group=probe.group if probe.group == "out of domain" else "general")
        for probe in domains.probes
    ]
    return replace(tasks, name="merge_to_learn", probes=(*general, *tasks.probes))


def num_steps(zoo: Path) -> dict[str, int]:
    """Return the training steps of the general model and of each skill, from the zoo's record."""
    about = json.loads((zoo / "zoo.json").read_text())
    sizes = about["sizes"]

    def steps(model: Mapping[str, Any], epochs: int) -> int:
        return epochs * math.ceil(sum(model["label_counts"]["train"].values()) / sizes["batch"])

    settings = about["settings"]
    found = {name: steps(model, sizes["epochs"]) for name, model in settings["tasks"]["models"].items()}
    return found | {"general": steps(settings["domains"]["joint"], sizes["joint_epochs"])}


def sweep_points(setting: ZooSetting, steps: Mapping[str, int]) -> Iterator[Point]:
    """Yield omega swept for each skill and for all, and the rule's."""
    skills = {Path(model).name: model for model in setting.models}
    for sweep in (*skills, ALL):
        members = list(skills) if sweep == ALL else [sweep]
        rule = {name: steps[name] / steps["general"] for name in members}
        yield Point(
            name=f"{sweep}_0", row="", folder=GENERAL, axes={"sweep": sweep, "omega": "0", "weights": {}}
        )
        omegas = [(f"{omega:g}", dict.fromkeys(members, omega)) for omega in OMEGAS]
        for label, weights in (*omegas, ("rule", rule)):
            models: list[dict[str, Any]] = [{"model": GENERAL, "parameters": {"weight": 1.0}}]
            models += [
                {"model": skills[name], "parameters": {"weight": weight}} for name, weight in weights.items()
            ]
            yield Point(
                name=f"{sweep}_{label}",
                row="",
                recipe={
                    "merge_method": "task_arithmetic",
                    "base_model": setting.base,
                    "heads": "exclude",
                    "models": models,
                },
                axes={"sweep": sweep, "omega": label, "weights": weights},
            )


def main() -> None:
    """Parse the options, run what is not there yet, keep the result."""
    options = read_options(__doc__ or "")
    settings = {each.name: each for each in read_settings(options.zoo)}
    setting = skills_setting(settings["domains"], settings["tasks"])
    steps = num_steps(options.zoo)
    points = without_skipped(sweep_points(setting, steps), options.skip)
    answers: dict[str, Answers] = {}
    for sweep in dict.fromkeys((point.axes or {})["sweep"] for point in points):
        of_sweep = [point for point in points if (point.axes or {})["sweep"] == sweep]
        probes = tuple(each for each in setting.probes if each.group != "tasks" or sweep in (each.name, ALL))
        examination = Examination(
            options.zoo, options.out, replace(setting, probes=probes), options.precision
        )
        answers |= examination.ask(of_sweep, ["validation", "test"])
    report = new_report("zoo_merge_to_learn", "Merge to Learn on real fine-tuned encoders", options)
    _write(report, report.path(options.results), setting, points, answers, steps)
    report.write(options.results)


def _write(
    report: Report,
    page: Path,
    setting: ZooSetting,
    points: Sequence[Point],
    answers: Mapping[str, Answers],
    steps: Mapping[str, int],
) -> None:
    general = [probe.name for probe in setting.probes if probe.group == "general"]
    skills = [Path(model).name for model in setting.models]
    report.text(
        "Test accuracy in % with standard errors. `general`: mean over the domains with the general model's head; "
        "`skill`: on the skill's task with its own head, of all skills their mean. The rule's omega is the ratio of "
        f"training steps: {', '.join(f'{name} {steps[name]}' for name in skills)} to {steps['general']}."
    )
    with panels(page.with_name(f"{page.stem}_tradeoff.png"), ["general against skill"], 7.5, 5.4) as (axes,):
        for colour, sweep in zip(COLOURS, (*skills, ALL), strict=False):
            of_sweep = [point for point in points if (point.axes or {})["sweep"] == sweep]
            if not of_sweep:
                continue
            probes = skills if sweep == ALL else [sweep]
            _write_sweep(report, sweep, of_sweep, answers, general, probes)
            _draw_sweep(axes, colour, sweep, of_sweep, answers, general, probes)
        axes.set_xlabel("general accuracy in % (mean over domains)")
        axes.set_ylabel("skill accuracy in %")
        axes.legend(frameon=False, fontsize=8, title="lines: omega from 0 to 1; stars: the step-ratio rule")
    report.text(f"![trade-off]({page.stem}_tradeoff.png)")
    report.data["steps"] = dict(steps)


def _write_sweep(
    report: Report,
    sweep: str,
    points: Sequence[Point],
    answers: Mapping[str, Answers],
    general: Sequence[str],
    skills: Sequence[str],
) -> None:
    def value(point: Point) -> float:
        halves = (accuracy(answers_of(answers[point.name], each, "validation")) for each in (general, skills))
        return sum(each.value for each in halves) / 2

    untouched = answers[points[0].name]
    best = max((point for point in points if (point.axes or {})["omega"] != "rule"), key=value)
    report.text(f"## {sweep}")
    rows = []
    for point in points:
        own, omega = answers[point.name], (point.axes or {})["omega"]
        lost = difference(answers_of(own, general), answers_of(untouched, general))
        weights = (point.axes or {})["weights"].values()
        label = f"rule: {', '.join(f'{weight:.2f}' for weight in weights)}" if omega == "rule" else omega
        cells = [label + (" (best on validation)" if point is best else "")]
        cells += [percent(accuracy(answers_of(own, each))) for each in (general, ["ood"], skills)]
        rows.append([*cells, f"{100 * lost.value:+.1f} +-{100 * lost.error:.1f}"])
        report.data.setdefault(sweep, {})[omega] = {
            "weights": (point.axes or {})["weights"],
            "recipe": point.recipe,
            "validation": value(point),
            **{
                name: asdict(accuracy(answers_of(own, each)))
                for name, each in (("general", general), ("out of domain", ["ood"]), ("skill", skills))
            },
        }
    report.table(["omega", "general", "out of domain", "skill", "general, change"], rows)


def _draw_sweep(
    axes: Any,
    colour: str,
    sweep: str,
    points: Sequence[Point],
    answers: Mapping[str, Answers],
    general: Sequence[str],
    skills: Sequence[str],
) -> None:
    places = {
        (point.axes or {})["omega"]: tuple(
            100 * accuracy(answers_of(answers[point.name], each)).value for each in (general, skills)
        )
        for point in points
    }
    rule = places.pop("rule", None)
    axes.plot(*zip(*places.values(), strict=True), marker="o", ms=4, color=colour, label=sweep)
    if rule:
        axes.plot(*rule, marker="*", ms=14, color=colour, markeredgecolor="black", linestyle="none")


if __name__ == "__main__":
    main()
