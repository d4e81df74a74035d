"""Hidden states between layer groups: one safetensors file per block and shard, a tensor per batch."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from raymerge.merge_actors.errors import CheckpointError
from raymerge.merge_actors.files import write_error
from raymerge.stats.block_passes import Form

if TYPE_CHECKING:
    import torch

_FOLDER = "boundary"


def write_boundary(
    folder: str, block: int, shard: int, outputs: Sequence[torch.Tensor], forms: Mapping[str, Form]
) -> None:
    """Keep the hidden states after a block, and what the stacks up to it return."""
    from safetensors.torch import save_file

    path = _path(folder, block, shard)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        save_file(
            {str(number): output.contiguous() for number, output in enumerate(outputs)},
            temporary,
            metadata={"forms": json.dumps({stack: form.encode() for stack, form in forms.items()})},
        )
        os.replace(temporary, path)
    except OSError as error:
        raise write_error(path, error) from error


def read_boundary(folder: str, block: int, shard: int) -> tuple[list[torch.Tensor], dict[str, Form]]:
    """Read what `write_boundary` kept.

    Raises:
        CheckpointError: it is not there.
    """
    from safetensors import SafetensorError, safe_open

    path = _path(folder, block, shard)
    try:
        with safe_open(path, "pt") as stream:
            forms = json.loads(stream.metadata()["forms"])
            # Copies: in memory that is aligned as a forward pass would align it, kernels round alike.
            outputs = [stream.get_tensor(str(number)).clone() for number in range(len(stream.keys()))]
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"the cached activations {path} cannot be read ({error}); start again with --overwrite."
        ) from error
    return outputs, {stack: Form.decode(text) for stack, text in forms.items()}


def remove_boundaries(folder: str, keep: Collection[int]) -> None:
    """Delete the hidden states after all blocks but those in `keep`."""
    for path in glob.glob(os.path.join(glob.escape(folder), _FOLDER, "*.safetensors")):
        if int(os.path.basename(path).split("-")[0]) not in keep:
            os.remove(path)


def _path(folder: str, block: int, shard: int) -> str:
    return os.path.join(folder, _FOLDER, f"{block:05d}-{shard:05d}.safetensors")
