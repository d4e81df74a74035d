"""The winners of a grid: full checkpoints, one score on the test split, and recipes that give the same bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import yaml

from raymerge.cluster.grid_folder import BEST_NAME, GridFolder
from raymerge.cluster.grid_options import GridOptions
from raymerge.cluster.grid_points import Point, label_of
from raymerge.cluster.merge import merge
from raymerge.cluster.options import MergeOptions
from raymerge.cluster.run_folder import MANIFEST_NAME
from raymerge.cluster.select import Ranked, Selection
from raymerge.merge_actors.errors import CheckpointError
from raymerge.merge_actors.storage.folders import exists

RECIPE_NAME = "recipe.yaml"


def describe(
    ranked: Sequence[Ranked],
    point_of: Callable[[int], Point],
    selection: Selection,
    rows: Mapping[tuple[str, int], Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """Return the winners as plain values, for best.json.

    Args:
        ranked: the winners, the best first.
        point_of: gives a point by its number.
        selection: what they were chosen by.
        rows: rows of the results by split and point.
    """
    found = []
    for number, each in enumerate(ranked, 1):
        point = point_of(each.point)
        found.append(
            {
                "rank": number,
                "name": f"best-{number}",
                "point": each.point,
                "key": point.key,
                "axes": {name: label_of(value) for name, value in point.axes.items()},
                "objectives": {
                    objective.label: value
                    for objective, value in zip(selection.objectives, each.values, strict=True)
                },
                "num_points": each.num_points,
                "validation": _metrics(rows.get(("validation", each.point))),
                "test": _metrics(rows.get(("test", each.point))),
                "recipe": point.recipe,
            }
        )
    return found


def export(
    winners: Sequence[Mapping[str, Any]],
    folder: GridFolder,
    options: GridOptions,
    on_remark: Callable[[str], None],
    *,
    show_progress: bool = False,
) -> list[str]:
    """Write the winners as checkpoints, in one campaign, and their recipes beside the weights.

    Checkpoints of an earlier run stay where they are the same winners.

    Returns:
        the folders, the best first.

    Raises:
        RaymergeError: a merge fails.
    """
    earlier = {each["name"]: each for each in folder.read_json(BEST_NAME) or []}
    wanted = [
        each
        for each in winners
        if not (
            earlier.get(each["name"], {}).get("key") == each["key"]
            and exists(f"{folder.output(each['name'])}/{MANIFEST_NAME}")
        )
    ]
    if wanted:
        recipes = [{**each["recipe"], "name": each["name"]} for each in wanted]
        merge_options = MergeOptions(
            address=options.address,
            in_process=options.in_process,
            workers=options.workers,
            device=options.device,
            slice_mib=options.slice_mib,
            allow_nan=options.allow_nan,
            allow_pickle=options.allow_pickle,
            trust_remote_code=options.trust_remote_code,
            overwrite=True,
        )
        out = folder.output(wanted[0]["name"]) if len(wanted) == 1 else folder.out

        def remark(line: str) -> None:
            if ": key " not in line:  # what the recipe's keys are worth was said when the grid was planned
                on_remark(line)

        merged = merge(recipes, out, merge_options, on_remark=remark, show_progress=show_progress)
        for name, reason in merged.failed.items():
            raise CheckpointError(f"{name} was not exported: {reason}")
    for each in winners:
        folder.write_text(f"{each['name']}/{RECIPE_NAME}", recipe_text(each))
    return [folder.output(each["name"]) for each in winners]


def recipe_text(winner: Mapping[str, Any]) -> str:
    """Return the recipe of a winner as YAML, headed by what it is."""
    axes = ", ".join(f"{name} = {value}" for name, value in winner["axes"].items())
    scores = ", ".join(f"{name} = {value:.6g}" for name, value in winner["objectives"].items())
    recipe = {name: value for name, value in winner["recipe"].items() if name != "name"}
    head = f"# {winner['name']}: point {winner['point']} with {axes}\n# validation: {scores}\n"
    return head + yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=100)


def _metrics(row: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return {metric: {value, error}} of a row."""
    if row is None:
        return None
    found = {}
    for column, value in row.items():
        if column.startswith("metric.") and value is not None:
            name = column.removeprefix("metric.")
            error = row.get(f"stderr.{name}")
            found[name] = {
                "value": value,
                "error": None if error is None or math.isnan(error) else error,  # JSON has no NaN
            }
    return found
