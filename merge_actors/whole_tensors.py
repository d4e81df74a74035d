"""Read whole tensors of a checkpoint, an adapter's updates added with the bits that a merge uses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raymerge.merge_actors.checkpoint.adapter import LowRank
from raymerge.merge_actors.checkpoint.header import TensorInfo
from raymerge.merge_actors.dtypes import torch_dtype
from raymerge.merge_actors.files import Files
from raymerge.merge_actors.inputs import arena_bytes, read_pieces
from raymerge.merge_actors.task import LowRankRead, Piece, Read

if TYPE_CHECKING:
    import torch


def read_tensor(files: Files, tensor: TensorInfo, update: LowRank | None = None) -> torch.Tensor:
    """Return a tensor: in its stored dtype, or with its update added in float32.

    Args:
        files: to read from.
        tensor: where it stands.
        update: a low-rank product to add to it.
    """
    import torch

    if update is None:
        raw = torch.empty(tensor.num_bytes, dtype=torch.uint8)
        if tensor.num_bytes:
            files.read_into(tensor.file, tensor.begin, raw.numpy().data)
        return raw.view(torch_dtype(tensor.dtype)).reshape(tensor.shape)
    read = Read(
        model="",
        tensor=tensor.name,
        file=tensor.file,
        offset=tensor.begin,
        dtype=tensor.dtype,
        low_rank=low_rank_read(update),
    )
    piece = Piece(shape=tensor.shape, begin=0, end=tensor.num_elements, reads=(read,), jobs=())
    [[weight_P]] = read_pieces([piece], files, torch.empty(arena_bytes([piece]), dtype=torch.uint8))
    return weight_P.view(tensor.shape)


def low_rank_read(update: LowRank, num_rows: int | None = None) -> LowRankRead:
    """Return how a worker reads an update.

    Args:
        update: of a base tensor.
        num_rows: of the model's tensor where its vocabulary differs from the output's.
    """
    return LowRankRead(
        a_file=update.a.file,
        a_offset=update.a.begin,
        b_file=update.b.file,
        b_offset=update.b.begin,
        dtype=update.a.dtype,
        rank=update.rank,
        scale=update.scale,
        is_transposed=update.is_transposed,
        num_rows=num_rows,
    )
