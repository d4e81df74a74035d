"""raymerge merge: recipes in, checkpoints out."""

from __future__ import annotations

from typing import Any

import click

from raymerge.cli.main import print_json, remark
from raymerge.cli.shared import recipe_options


@click.command(
    "merge",
    epilog="Example: raymerge merge ties.yaml dare.yaml merged/ writes merged/ties and merged/dare, reading every "
    "input slice once.",
)
@click.argument("recipes", nargs=-1, required=True, metavar="RECIPE [RECIPE ...]")
@click.argument("out", type=click.Path())
@click.option("--address", help="Address of a Ray cluster [default: RAY_ADDRESS, else a Ray of its own].")
@click.option("--in-process", is_flag=True, help="Merge in this process, without Ray.")
@click.option("--workers", type=int, help="Merge workers [default: one per GPU, or per core up to 16].")
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where to merge.",
)
@recipe_options
@click.option("--resume", is_flag=True, help="Go on with an unfinished run for OUT.")
@click.option(
    "--overwrite",
    is_flag=True,
    help="Replace an OUT that raymerge wrote (of several recipes, their folders in it), or drop an unfinished run.",
)
@click.option("--fsync", is_flag=True, help="Flush OUT to the disk before it gets its name.")
@click.option("--allow-nan", is_flag=True, help="Merge inputs that hold NaN or infinity, with a warning.")
@click.option(
    "--stage",
    type=click.Path(),
    metavar="DIR",
    help="Folder on each node's own disk: ranges of remote inputs are fetched once per node, and outputs for an "
    "object store are made there [default: no copies of inputs; outputs in the temporary folder].",
)
@click.option("--trace", type=click.Path(), help="Write a timeline for chrome://tracing or ui.perfetto.dev.")
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON document.")
@click.option("--quiet", is_flag=True, help="No progress and no summary.")
def merge_command(
    recipes: tuple[str, ...],
    out: str,
    strict: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Merge models as recipes say, into OUT.

    RECIPE is a YAML file or a folder of them. With several recipes each has a folder of its own
    name in OUT, and every slice of an input is read once for all of them.
    """
    from raymerge.cluster.options import MergeOptions

    chosen = MergeOptions(**options)
    if dry_run:
        from raymerge.cli.plan import show_plan

        show_plan(recipes, chosen, strict=strict, as_json=as_json)
        return
    from raymerge.cluster.merge import merge

    try:
        result = merge(
            recipes, out, chosen, strict=strict, on_remark=remark, show_progress=not (quiet or as_json)
        )
    except KeyboardInterrupt:
        click.echo(
            f"\ninterrupted; finished tasks are kept: go on with the same command and --resume ({out})",
            err=True,
        )
        raise SystemExit(130) from None
    for name, reason in result.failed.items():
        click.echo(f"error: recipe {name} was not merged: {reason}", err=True)
    if as_json:
        print_json(result.to_mapping())
    elif not quiet:
        from raymerge.cluster.progress import gib
        from raymerge.merge_actors.wording import counted

        totals, places = result.totals, ", ".join(result.outputs)
        moved = totals.read_bytes + totals.write_bytes
        click.echo(
            f"merged into {places} in {result.seconds:.1f} s: {gib(totals.read_bytes)} read, "
            f"{gib(totals.write_bytes)} written, {moved / result.seconds / 1e9:.2f} GB/s over all, "
            f"{counted(result.num_workers, 'worker')} on {result.device}"
            + (
                f", {result.num_resumed:,} of {result.num_tasks:,} tasks resumed"
                if result.num_resumed
                else ""
            )
        )
    if result.failed:
        raise SystemExit(1)
