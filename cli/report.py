"""raymerge report: results in, a page and pictures out."""

from __future__ import annotations

import click

from raymerge.cli.main import print_json


@click.command(
    "report", epilog="Example: raymerge report results/ writes results/report.html and results/plots/*.png"
)
@click.argument("out", type=click.Path())
@click.option("--top", type=int, default=10, show_default=True, help="Rows of the table of the best points.")
@click.option("--text", "only_text", is_flag=True, help="Print the tables only; write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the tables as one JSON document; write nothing.")
def report_command(out: str, top: int, only_text: bool, as_json: bool) -> None:
    """Draw the results of a grid or a search: OUT/report.html, one page that needs nothing else.

    Best points, the metric along each axis and over pairs of axes, trade-offs between tasks with their Pareto
    front, parallel coordinates. OUT may still be running. Drawing needs matplotlib: pip install
    'raymerge[report]'.
    """
    from raymerge.cluster.report_data import read_report
    from raymerge.cluster.report_text import report_mapping, report_text

    data = read_report(out, top)
    if as_json:
        print_json(report_mapping(data))
        return
    click.echo(report_text(data))
    if not only_text:
        from raymerge.cluster.report import write_report

        for path in write_report(data, out):
            click.echo(f"wrote {path}")
