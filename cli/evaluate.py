"""raymerge evaluate: score a checkpoint on the tasks of a grid."""

from __future__ import annotations

from typing import Any

import click

from raymerge.cli.main import print_json, remark
from raymerge.cli.shared import trust_option


@click.command(
    "evaluate", epilog="Example: raymerge evaluate merged/ --tasks grid.yaml --split test --scores merged.npz"
)
@click.argument("model")
@click.option("--tasks", required=True, metavar="FILE", help="YAML with an evaluate: section, or its keys.")
@click.option(
    "--split",
    type=click.Choice(["validation", "test"]),
    default="validation",
    show_default=True,
    help="Which data of the tasks.",
)
@click.option(
    "--scores",
    type=click.Path(),
    metavar="FILE",
    help="Also write the scores of every example, as a NumPy archive.",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where the model runs.",
)
@click.option("--allow-pickle", is_flag=True, help="Read PyTorch .bin files, weights only.")
@trust_option
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON document.")
def evaluate_command(model: str, tasks: str, scores: str | None, as_json: bool, **options: Any) -> None:
    """Score MODEL on the tasks of FILE, as a grid scores its points.

    MODEL is a folder, a URI or a Hub id, path[@revision]. Every metric has a standard error over the
    examples; with --scores two models can be compared example by example.
    """
    from raymerge.cluster.evaluate import evaluate, save_scores

    found = evaluate(model, tasks, on_remark=lambda line: remark(f"note: {line}"), **options)
    if scores is not None:
        save_scores(scores, found.scores)
    if as_json:
        print_json(found.to_mapping())
        return
    width = max(map(len, found.metrics))
    for name, estimate in found.metrics.items():
        click.echo(f"{name:{width}}  {estimate.value:10.4f}  +- {estimate.standard_error:.4f}")
    num = sum(len(each["example"]) for each in found.scores.values())
    click.echo(f"{num:,} examples of the {found.split} split in {found.seconds:.1f} s", err=True)
