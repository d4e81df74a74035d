"""Cut a shard's examples into batches by tokens.

Three ways, each with the same statistics as the others: `padded` (examples of like length,
padded on the right), `equal_length` (no padding ever, for models whose linear maps see rows
that no mask can be laid on, such as experts), `single` (one example a batch, for inputs that
do not depend on the example and must count once for each).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from raymerge.stats.calibration_data import Example
from raymerge.stats.masked_rows import Batching, TokenMask

if TYPE_CHECKING:
    import torch

Side = Literal["right", "left"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Examples as tensors. Shapes: B examples, T tokens, U tokens of the decoder."""

    examples: tuple[Example, ...]
    inputs: dict[str, torch.Tensor]
    """Arguments of the model's forward."""
    mask: TokenMask
    """Of the input; in an encoder-decoder of what the encoder reads."""
    target_mask: TokenMask | None
    """Of what the decoder of an encoder-decoder reads."""

    @property
    def num_tokens(self) -> int:
        """Count the real tokens, those of the decoder included."""
        return sum(each.num_tokens for each in self.examples)


def cut_batches(
    examples: Sequence[Example], batching: Batching, batch_tokens: int
) -> list[tuple[Example, ...]]:
    """Group the examples of a shard: longest first, equal lengths in the order of the rows."""
    order = sorted(examples, key=lambda each: (*_lengths(each), -each.number), reverse=True)
    batches: list[tuple[Example, ...]] = []
    current: list[Example] = []
    for example in order:
        first = current[0] if current else example
        is_full = (len(current) + 1) * sum(_lengths(first)) > batch_tokens or batching == "single"
        if current and (is_full or (batching == "equal_length" and _lengths(first) != _lengths(example))):
            batches.append(tuple(current))
            current = []
        current.append(example)
    return [*batches, tuple(current)] if current else batches


def batch_tensors(
    examples: Sequence[Example], *, pad_id: int, start_id: int | None, device: str, side: Side = "right"
) -> Batch:
    """Make the tensors of a batch.

    Args:
        examples: of one shard.
        pad_id: what stands where no token is.
        start_id: the decoder's first token in an encoder-decoder; None if the model has no
            decoder that is fed, or feeds it by itself.
        device: where the tensors go.
        side: where padding goes; decoders then get position_ids that begin at the first real token.
    """
    ids, mask = pad([each.input_ids for each in examples], pad_id, side)
    inputs = {"input_ids": ids, "attention_mask": mask.long()}
    if any(each.token_type_ids for each in examples):
        types = [each.token_type_ids or (0,) * len(each.input_ids) for each in examples]
        inputs["token_type_ids"] = pad(types, 0, side)[0]
    if side == "left":
        inputs["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)
    target_mask = None
    if start_id is not None:
        shifted = [(start_id, *(each.target_ids or ())[:-1]) for each in examples]
        inputs["decoder_input_ids"], target_mask = pad(shifted, pad_id, "right")
        inputs["decoder_attention_mask"] = target_mask.long()
    return Batch(
        examples=tuple(examples),
        inputs={name: tensor.to(device) for name, tensor in inputs.items()},
        mask=_token_mask(mask, device),
        target_mask=None if target_mask is None else _token_mask(target_mask, device),
    )


def pixel_batch(examples: Sequence[Example], inputs: Mapping[str, torch.Tensor], device: str) -> Batch:
    """Make a batch of images, all positions of which count.

    Args:
        examples: of one shard.
        inputs: arguments of the model's forward, from its image processor.
        device: where the tensors go.
    """
    import torch

    return Batch(
        examples=tuple(examples),
        inputs={name: tensor.to(device) for name, tensor in inputs.items()},
        mask=TokenMask(torch.ones(len(examples), 1, dtype=torch.bool, device=device), has_padding=False),
        target_mask=None,
    )


def _token_mask(mask_BT: torch.Tensor, device: str) -> TokenMask:
    return TokenMask(mask_BT.to(device), has_padding=not bool(mask_BT.all()))


def _lengths(example: Example) -> tuple[int, int]:
    return len(example.input_ids) or example.num_positions, len(example.target_ids or ())


def pad(rows: Sequence[Sequence[int]], value: int, side: Side) -> tuple[torch.Tensor, torch.Tensor]:
    """Lay rows of unlike length into one tensor (B, T); return it and where its tokens are."""
    import torch

    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), value, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, where] = torch.tensor(row, dtype=torch.long)
        mask[i, where] = True
    return ids, mask


def shards_of(worker: int, num_workers: int, num_shards: int) -> Iterator[int]:
    """Yield the shards of a worker: every `num_workers`-th, so that all have nearly as many."""
    yield from range(worker, num_shards, num_workers)
