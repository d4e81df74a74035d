"""raymerge search: a search file in, a table of trials and the best checkpoints out."""

from __future__ import annotations

from typing import Any

import click

from raymerge.cli.grid import show_estimate, show_interrupt, show_result
from raymerge.cli.main import print_json, remark
from raymerge.cli.shared import run_options


@click.command(
    "search",
    epilog="Example: raymerge search search.yaml results/ --limit 20 runs 20 trials; the same command with --resume "
    "and without --limit runs the rest.",
)
@click.argument("search", type=click.Path(), metavar="SEARCH")
@click.argument("out", type=click.Path())
@run_options
@click.option("--seed", type=int, help="Seed of the sampler [default: the file's, else 0].")
@click.option("--limit", type=int, help="Run so many trials at most [default: `trials` of the file].")
@click.option("--resume", is_flag=True, help="Go on after the trials in OUT.")
@click.option("--overwrite", is_flag=True, help="Throw away the results and checkpoints in OUT.")
@click.option("--dry-run", is_flag=True, help="Check everything, print trials, bytes and time, and stop.")
@click.option("--strict", is_flag=True, help="Refuse recipe keys that have no effect.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON document.")
@click.option("--quiet", is_flag=True, help="No progress and no table.")
def search_command(
    search: str, out: str, strict: bool, dry_run: bool, as_json: bool, quiet: bool, **options: Any
) -> None:
    """Look for the best point of SEARCH, each batch of trials chosen by what earlier ones gave.

    SEARCH is a grid file whose axes may be ranges, {low: 0, high: 1}, plus `search:` (sampler, trials, batch,
    pruning). Trials do not depend on the number of evaluators. Needs Optuna: pip install 'raymerge[search]'.
    """
    from raymerge.cluster.grid_options import GridOptions

    chosen = GridOptions(**options)
    if dry_run:
        from raymerge.cluster.grid_estimate import estimate_search

        show_estimate(estimate_search(search, out, chosen, strict=strict), as_json=as_json)
        return
    from raymerge.cluster.search import search as run

    try:
        result = run(
            search, out, chosen, strict=strict, on_remark=remark, show_progress=not (quiet or as_json)
        )
    except KeyboardInterrupt:
        show_interrupt(out)
    if as_json:
        print_json(result.to_mapping())
    elif not quiet:
        show_result(result)
