"""raymerge inspect: what checkpoints hold and whether they belong together."""

from __future__ import annotations

import click

from raymerge.cli.main import print_json, remark


@click.command("inspect", epilog="Example: raymerge inspect --base llama/ math/ code/ --sample 0.05")
@click.argument("models", nargs=-1, required=True, metavar="MODEL [MODEL ...]")
@click.option("--base", help="The model that the others were trained from: a folder, a URI or a Hub id.")
@click.option("--sample", type=float, help="Read only this share of each large tensor [default: all of it].")
@click.option(
    "--tensors", "num_tensors", type=int, default=0, help="Also list the N tensors that moved most."
)
@click.option("--allow-pickle", is_flag=True, help="Read PyTorch .bin files, weights only.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON document.")
def inspect_command(
    models: tuple[str, ...],
    base: str | None,
    sample: float | None,
    num_tensors: int,
    allow_pickle: bool,
    as_json: bool,
) -> None:
    """Show what each MODEL holds, and compare the models with their base.

    MODEL is a folder, a URI or a Hub id, path[@revision]. With --base each model gets a verdict
    (identical, SFT-sized deltas, continued pretraining, different backbone, different
    architecture) and the figures it rests on; without it, models are compared with each other.
    """
    from raymerge.cluster.inspect import inspect
    from raymerge.cluster.inspect_text import inspection_text

    found = inspect(models, base, sample=sample, allow_pickle=allow_pickle)
    for line in found.remarks:
        remark(line)
    if as_json:
        print_json(found.to_mapping())
    else:
        click.echo(inspection_text(found, num_tensors))
