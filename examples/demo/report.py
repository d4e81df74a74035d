"""Show the demo's results: a table for the terminal and a picture."""

import math
import re
from pathlib import Path
from typing import Any


def table(results: dict[str, Any]) -> str:
    """Return accuracies in percent, one line per encoder, with the standard error of each."""
    skills = list(results["num_test_texts"])
    header = f"{'accuracy in %':<18}" + "".join(f"{skill:>14}" for skill in skills) + f"{'mean':>14}"
    rule = "-" * len(header)
    chance = "".join(f"{100 / results['num_labels'][skill]:>14.1f}" for skill in skills)
    lines = [header, rule, f"{'chance':<18}{chance}"]
    previous = "base"
    for name in results["accuracy"]:
        if _kind(name, results) != _kind(previous, results):
            lines.append(rule)
        previous = name
        cells = [_with_error(*pair) for pair in (*_cells(name, results), mean(name, results))]
        lines.append(f"{name:<18}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


def mean(name: str, results: dict[str, Any]) -> tuple[float, float]:
    """Return the mean accuracy of an encoder over the skills, and its standard error."""
    cells = _cells(name, results)
    error = math.sqrt(sum(error**2 for _, error in cells)) / len(cells)
    return sum(accuracy for accuracy, _ in cells) / len(cells), error


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw the mean accuracy of every encoder as a bar, and its skills as points."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(results["accuracy"])
    skills = list(results["num_test_texts"])
    colours = {"base": "#9aa0a6", "single": "#8ab4d8", "merge": "#2a6f97"}
    figure, axes = pyplot.subplots(figsize=(8, 4.2), layout="constrained")
    for position, name in enumerate(names):
        value, error = mean(name, results)
        axes.bar(
            position, 100 * value, 0.72, yerr=100 * error, color=colours[_kind(name, results)], capsize=3
        )
        axes.annotate(f"{100 * value:.0f}", (position, 2), ha="center", color="white", weight="bold")
    for marker, colour, skill in zip(
        "os^Dv", ("#d1495b", "#edae49", "#30638e", "#3d5a45", "#66418c"), skills, strict=False
    ):
        points = [100 * results["accuracy"][name][skill] for name in names]
        axes.scatter(
            range(len(names)),
            points,
            s=36,
            c=colour,
            marker=marker,
            label=skill,
            zorder=3,
            edgecolors="white",
        )
    axes.set_xticks(range(len(names)), [re.sub("[ _]", "\n", name) for name in names])
    axes.set_ylim(0, 100)
    axes.set_ylabel("test accuracy in %")
    axes.set_title("One encoder, three skills: bars are means over the skills", loc="left", fontsize=11)
    axes.legend(loc="upper left", ncols=len(skills), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _cells(name: str, results: dict[str, Any]) -> list[tuple[float, float]]:
    """Return (accuracy, standard error of a share) per skill."""
    cells = []
    for skill, num_texts in results["num_test_texts"].items():
        accuracy = results["accuracy"][name][skill]
        cells.append((accuracy, math.sqrt(accuracy * (1 - accuracy) / num_texts)))
    return cells


def _with_error(accuracy: float, error: float) -> str:
    return f"{100 * accuracy:.1f} +-{100 * error:.1f}"


def _kind(name: str, results: dict[str, Any]) -> str:
    return "merge" if name in results["recipes"] else "base" if name == "base" else "single"
