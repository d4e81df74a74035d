"""raymerge verify: hold an output against its manifest."""

from __future__ import annotations

import click

from raymerge.cli.main import print_json, remark
from raymerge.cli.shared import trust_option


@click.command("verify", epilog="Example: raymerge verify merged/")
@click.argument("out", type=click.Path())
@click.option(
    "--load/--no-load", default=True, show_default=True, help="Also load the output with transformers."
)
@trust_option
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON document.")
def verify_command(out: str, load: bool, trust_remote_code: bool, as_json: bool) -> None:
    """Read OUT again and compare it with its manifest.

    Files and their lengths, headers, index, the checksum of every tensor, and whether config,
    tokenizer and weights load in transformers (code of a checkpoint is not run unasked). OUT is the
    folder of one merge, or of a campaign. Exits with 1 at the first difference.
    """
    from raymerge.cluster.progress import gib
    from raymerge.cluster.verify import verify
    from raymerge.merge_actors.wording import counted

    result = verify(out, load=load, trust_remote_code=trust_remote_code)
    for output in result.outputs:
        for line in output.remarks:
            remark(line)
    if as_json:
        print_json(result.to_mapping())
        return
    for output in result.outputs:
        rate = output.num_bytes / max(output.seconds, 1e-9) / 1e9
        line = (
            f"{output.folder}: {counted(output.num_tensors, 'tensor')} in {counted(output.num_files, 'file')} "
            f"as written, {gib(output.num_bytes)} read at {rate:.2f} GB/s"
        )
        if output.load is not None and output.load.how != "skipped":
            preposition = "as" if output.load.how == "loaded" else "with"
            line += f"; {output.load.how} {preposition} {output.load.architecture}"
        click.echo(line)
