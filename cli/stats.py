"""raymerge stats: statistics of a model over a calibration set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from raymerge.cli.main import print_json, remark
from raymerge.cli.shared import trust_option

if TYPE_CHECKING:
    from raymerge.cluster.statistics import StatisticsResult

_DATA_OPTIONS = {
    "data": "source",
    "data_config": "config",
    "split": "split",
    "text_column": "text_column",
    "text_pair_column": "text_pair_column",
    "label_column": "label_column",
    "image_column": "image_column",
    "samples": "samples",
    "samples_at": "samples_at",
    "max_length": "max_length",
    "batch_tokens": "batch_tokens",
    "chat_template": "chat_template",
    "packed": "packed",
}


def _numbers(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...]:
    """Read numbers between commas."""
    try:
        return tuple(int(part) for part in (value or "").split(",") if part.strip())
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of whole numbers such as 100,200,400.") from None


@click.command(
    "stats",
    epilog="Example: raymerge stats math/ --kind gram --data calibration.jsonl --samples 1000 --out math-grams/",
)
@click.argument("model")
@click.option(
    "--kind",
    type=click.Choice(["gram", "fisher"]),
    default="gram",
    show_default=True,
    help="Gram matrices (regmean) or Fisher.",
)
@click.option(
    "--data",
    required=True,
    help="File or folder of Parquet, JSONL, CSV, text or images; or a data set's name.",
)
@click.option("--data-config", help="Configuration of a named data set.")
@click.option("--split", help="Split of a data set or folder [default: train where there is one].")
@click.option("--text-column", default="text", show_default=True, help="Column of the text.")
@click.option(
    "--text-pair-column", help="Column of a second text; of an encoder-decoder, what the decoder reads."
)
@click.option("--label-column", help="Column of the label, for empirical Fisher.")
@click.option("--image-column", help="Column of images, for a vision model; a folder of images needs none.")
@click.option("--samples", type=int, help="Rows to take, always the same ones [default: all].")
@click.option(
    "--samples-at",
    help="Numbers of samples, 100,200,400: keep the Gram matrices at each, from one pass.",
    metavar="N,N,...",
    callback=_numbers,
)
@click.option(
    "--max-length", type=int, help="Tokens of an example [default: the model's limit, at most 512]."
)
@click.option("--batch-tokens", type=int, default=4096, show_default=True, help="Tokens of a batch.")
@click.option("--chat-template", is_flag=True, help="The text column holds conversations.")
@click.option("--packed", is_flag=True, help="Join texts and cut them into full examples.")
@click.option(
    "--estimator",
    type=click.Choice(["expected", "sampled", "empirical"]),
    default="expected",
    show_default=True,
    help="Of Fisher: over all labels, a drawn one, or the true one.",
)
@click.option("--out", required=True, type=click.Path(), help="Folder to write.")
@click.option("--address", help="Address of a Ray cluster [default: RAY_ADDRESS, else a Ray of its own].")
@click.option("--in-process", is_flag=True, help="Measure in this process, without Ray.")
@click.option("--workers", type=int, help="Activation workers [default: one per GPU, or per core up to 16].")
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where the model runs.",
)
@click.option(
    "--memory-gib", type=float, help="GiB a worker may use for weights and sums [default: what is free]."
)
@click.option("--resume", is_flag=True, help="Go on with an unfinished run for OUT.")
@click.option(
    "--overwrite", is_flag=True, help="Replace an OUT that raymerge wrote, or drop an unfinished run for it."
)
@click.option("--allow-pickle", is_flag=True, help="Read PyTorch .bin files, weights only.")
@trust_option
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON document.")
@click.option("--quiet", is_flag=True, help="No progress and no summary.")
def stats_command(model: str, out: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Measure MODEL over a calibration set and write its statistics to OUT.

    MODEL is a folder, a URI or a Hub id, path[@revision], or with a LoRA adapter MODEL+ADAPTER. Statistics do
    not depend on the number of workers, the size of batches or the memory budget. A finished layer group
    is kept: after a failure the same command with --resume repeats only the group that was under way.
    """
    from raymerge.cluster.progress import StatisticsLine
    from raymerge.cluster.statistics import collect_statistics
    from raymerge.cluster.statistics_options import StatisticsOptions
    from raymerge.stats.data_rows import DataSpec

    data = DataSpec(**{field: options.pop(name) for name, field in _DATA_OPTIONS.items()})
    shown = StatisticsLine() if not (quiet or as_json) else None
    try:
        result = collect_statistics(
            model,
            out,
            StatisticsOptions(data=data, **options),
            on_remark=lambda line: remark(f"note: {line}"),
            on_progress=shown.show if shown else lambda progress: None,
        )
    except KeyboardInterrupt:
        click.echo(
            "\ninterrupted; finished layer groups are kept: go on with the same command and --resume",
            err=True,
        )
        raise SystemExit(130) from None
    if shown:
        shown.clear()
    if as_json:
        print_json(result.to_mapping())
    elif not quiet:
        click.echo(_summary(result))


def _summary(result: StatisticsResult) -> str:
    from raymerge.merge_actors.wording import counted, some_of

    found = result.to_mapping()
    what = "linear maps" if found["kind"] == "gram" else "tensors"
    lines = [
        f"wrote {found['out']} in {found['seconds']:.1f} s: {counted(found['tokens'], 'token')} of "
        f"{counted(found['examples'], 'example')}, {counted(found['workers'], 'worker')} on {found['device']}, "
        f"{counted(found['groups'], 'layer group')}",
        f"coverage: {found['covered']:,} of {found['expected']:,} {what} have statistics",
    ]
    if found["uncovered"]:
        lines.append(f"not reached by the data: {some_of(found['uncovered'], 5)}")
    if found["kind"] == "gram":
        timing = found["timing"]
        lines.append(
            f"Gram update {timing['update_tflops']:.3g} TFLOP/s, forward pass {timing['forward_tflops']:.3g} TFLOP/s"
        )
    return "\n".join(lines)
