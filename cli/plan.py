"""raymerge plan: what a merge would do, from headers alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from raymerge.cli.main import print_json, remark
from raymerge.cli.shared import recipe_options

if TYPE_CHECKING:
    from raymerge.cluster.options import MergeOptions


@click.command("plan", epilog="Example: raymerge plan ties.yaml --json")
@click.argument("recipes", nargs=-1, required=True, metavar="RECIPE [RECIPE ...]")
@recipe_options
@click.option("--json", "as_json", is_flag=True, help="Print the plan as one JSON document.")
def plan_command(recipes: tuple[str, ...], strict: bool, as_json: bool, **options: Any) -> None:
    """Show what merging RECIPE would read, write and need, without reading any weight."""
    from raymerge.cluster.options import MergeOptions

    show_plan(recipes, MergeOptions(**options), strict=strict, as_json=as_json)


def show_plan(recipes: Sequence[str], options: MergeOptions, *, strict: bool, as_json: bool) -> None:
    """Plan some recipes and print it."""
    from raymerge.cluster.plan_report import plan_report, plan_text

    report = plan_report(recipes, options, strict=strict)
    for line in report["remarks"]:
        remark(line)
    if as_json:
        print_json(report)
    else:
        click.echo(plan_text(report))
