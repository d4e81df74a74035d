"""NaN and infinity: counting them, and knowing when a method's result would not show them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raymerge.merge_actors.methods.interface import Method, Settings

if TYPE_CHECKING:
    import torch

_CHUNK = 1 << 20


def count_nonfinite(tensor_P: torch.Tensor) -> int:
    """Count the NaN and infinite elements of a flat tensor of any dtype.

    Runs at memory speed when there are none: the sum of a chunk is finite unless an element
    is not, or the sum overflows, and only then are the elements looked at.
    """
    import torch

    if not tensor_P.is_floating_point():
        return 0
    found = 0
    for at in range(0, tensor_P.numel(), _CHUNK):
        chunk = tensor_P[at : at + _CHUNK]
        values = chunk if chunk.element_size() >= 4 else chunk.float()
        total = float(values.sum())
        if total - total != 0:
            found += int(torch.isfinite(values).logical_not_().sum())
    return found


def hides_nonfinite(method: Method, settings: Settings) -> bool:
    """Return whether an input's NaN may fail to show in the merged tensor.

    Only a sum that keeps every element of every model with a weight other than 0 is sure to
    show it; everything else has its inputs looked at before they are merged.
    """
    if not method.is_plain_sum or any(model.get("sparsify") for model in settings.models):
        return True
    return any(model.get("weight") == 0 for model in settings.models)
