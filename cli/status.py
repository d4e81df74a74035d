"""raymerge status: where a run stands."""

from __future__ import annotations

import time

import click

from raymerge.cli.main import print_json


@click.command("status", epilog="Example: raymerge status s3://bucket/merged --watch")
@click.argument("out", type=click.Path())
@click.option("--watch", is_flag=True, help="Say it again every few seconds until the run has ended.")
@click.option("--json", "as_json", is_flag=True, help="Print it as one JSON document.")
def status_command(out: str, watch: bool, as_json: bool) -> None:
    """Show how far the merge, measurement, grid or search into OUT is, from its files: on any machine that sees OUT.

    Exits with 0 if it runs or has finished, with 1 if it stopped before its end.
    """
    from raymerge.cluster.status import run_status

    status = run_status(out)
    while watch and status.state == "running":
        click.echo(status.text())
        time.sleep(5)
        status = run_status(out)
    if as_json:
        print_json(status.to_mapping())
    else:
        click.echo(status.text())
    raise SystemExit(1 if status.state == "unfinished" else 0)
