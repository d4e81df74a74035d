"""raymerge grid: a grid file in, a table of results and the best checkpoints out."""

from __future__ import annotations

from typing import Any, NoReturn

import click

from raymerge.cli.main import print_json, remark
from raymerge.cli.shared import run_options


@click.command(
    "grid",
    epilog="Example: raymerge grid grid.yaml results/ --dry-run shows the number of points, bytes and time; without "
    "--dry-run the points are run.",
)
@click.argument("grid", type=click.Path(), metavar="GRID")
@click.argument("out", type=click.Path())
@run_options
@click.option("--seed", type=int, help="Seed of the random masks [default: the recipe's, else 0].")
@click.option("--limit", type=int, help="Run the first N points only.")
@click.option("--resume", is_flag=True, help="Keep the results in OUT that belong to GRID; run the rest.")
@click.option("--overwrite", is_flag=True, help="Throw away the results and checkpoints in OUT.")
@click.option("--dry-run", is_flag=True, help="Check everything, print points, bytes and time, and stop.")
@click.option("--strict", is_flag=True, help="Refuse recipe keys that have no effect.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON document.")
@click.option("--quiet", is_flag=True, help="No progress and no table.")
def grid_command(
    grid: str, out: str, strict: bool, dry_run: bool, as_json: bool, quiet: bool, **options: Any
) -> None:
    """Merge and evaluate every point of GRID; results go to OUT/results.parquet.

    GRID is a recipe with `$name` in it, plus `grid:` (the axes), `evaluate:` (the tasks), and if wanted `where:`,
    `select:` and `export:`. Models are evaluated in memory; only the winners become checkpoints, OUT/best-1 and
    so on.
    """
    from raymerge.cluster.grid_options import GridOptions

    chosen = GridOptions(**options)
    if dry_run:
        from raymerge.cluster.grid_estimate import estimate

        show_estimate(estimate(grid, out, chosen, strict=strict), as_json=as_json)
        return
    from raymerge.cluster.grid import grid as run

    try:
        result = run(grid, out, chosen, strict=strict, on_remark=remark, show_progress=not (quiet or as_json))
    except KeyboardInterrupt:
        show_interrupt(out)
    if as_json:
        print_json(result.to_mapping())
    elif not quiet:
        show_result(result)


def show_estimate(found: dict[str, Any], *, as_json: bool) -> None:
    """Print what a grid or a search would take."""
    from raymerge.cluster.grid_estimate import estimate_text

    for line in found["remarks"]:
        remark(line)
    print_json(found) if as_json else click.echo(estimate_text(found))


def show_interrupt(out: str) -> NoReturn:
    """Say how to go on, and exit."""
    click.echo(
        f"\ninterrupted; finished points are kept: go on with the same command and --resume ({out})", err=True
    )
    raise SystemExit(130) from None


def show_result(result: Any) -> None:
    """Print the winners and what was done."""
    from raymerge.cluster.grid_progress import duration
    from raymerge.cluster.text_tables import best_table

    if result.best:
        click.echo(best_table(result.best))
    parts = [f"{result.num_run:,} points run in {duration(result.seconds)}"]
    for number, what in (
        (result.num_resumed, "kept from before"),
        (result.num_shared, "the same model as another point"),
        (result.num_pruned, "stopped early"),
        (result.num_failed, "failed (see the column `error`)"),
    ):
        if number:
            parts.append(f"{number:,} {what}")
    click.echo(f"{'; '.join(parts)}; results in {result.out}; raymerge report {result.out} draws them")
    for place in result.outputs:
        click.echo(f"checkpoint {place}, its recipe {place}/recipe.yaml")
