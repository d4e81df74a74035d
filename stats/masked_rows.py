"""Which rows of a linear map's input are inputs of real tokens.

Shapes: B examples, T tokens, I in features, R rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

#: How a shard's examples are grouped; see `batches.py`.
Batching = Literal["padded", "equal_length", "single"]


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows that count, and how often."""

    rows_RI: torch.Tensor
    weight: int = 1
    """The examples of the batch, if the rows are the same for each of them."""


@dataclass(frozen=True, slots=True)
class TokenMask:
    """Which positions of a batch hold tokens."""

    mask_BT: torch.Tensor
    """Bool."""
    has_padding: bool
    """Is any position not a token?"""


class NeedsBatching(Exception):
    """No mask can be laid on an input: the shard must be cut into other batches."""

    def __init__(self, batching: Batching) -> None:
        super().__init__(batching)
        self.batching = batching


def real_rows(
    input_tensor: torch.Tensor, masks: list[TokenMask], *, num_examples: int, are_tokens: bool
) -> Rows:
    """Select the rows of an input that belong to real tokens.

    Args:
        input_tensor: what the module was called with, (..., I).
        masks: masks that may be meant, the likeliest first.
        num_examples: B.
        are_tokens: are rows in no known order nevertheless rows of tokens? (An expert gets the
            tokens that were sent to it.)

    Raises:
        NeedsBatching: the batch has padding and the rows cannot be told apart.
    """
    in_features = input_tensor.shape[-1]
    shape = tuple(input_tensor.shape[:-1])
    if shape and shape[0] == 1 and num_examples > 1 and len(shape) > 1:
        return Rows(input_tensor.reshape(-1, in_features), weight=num_examples)
    has_padding = any(each.has_padding for each in masks)
    for mask in masks:
        if shape[:2] == tuple(mask.mask_BT.shape):
            return Rows(_select(input_tensor, mask.mask_BT, mask.has_padding))
        if len(shape) == 1 and shape[0] == mask.mask_BT.numel():
            return Rows(_select(input_tensor, mask.mask_BT.reshape(-1), mask.has_padding))
    is_by_example = num_examples == 1 or shape[:1] == (num_examples,)
    if not is_by_example and not are_tokens:
        raise NeedsBatching("single")
    if has_padding and (not is_by_example or len(shape) > 1):
        raise NeedsBatching("equal_length")
    return Rows(input_tensor.reshape(-1, in_features))


def _select(input_tensor: torch.Tensor, mask: torch.Tensor, has_padding: bool) -> torch.Tensor:
    rows = input_tensor[mask] if has_padding else input_tensor
    return rows.reshape(-1, input_tensor.shape[-1])
