"""NaN and infinity: counting them, and knowing when a method's result would not show them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from raymerge.merge_actors.dtypes import element_bytes, torch_name
from raymerge.merge_actors.host_input import HostInput
from raymerge.merge_actors.methods.interface import Method, Settings

if TYPE_CHECKING:
    import torch

_CHUNK = 1 << 20
#: Bytes of a float -> bit pattern of its positive infinity; a NaN's pattern lies above it.
_INFINITY = {
    2: {"bfloat16": 0x7F80, "float16": 0x7C00},
    4: {"float32": 0x7F800000},
    8: {"float64": 0x7FF << 52},
}
#: The bit pattern that a NaN is written with.
_NAN = {
    "bfloat16": 0x7FC0,
    "float16": 0x7E00,
    "float32": 0x7FC00000,
    "float64": 0x7FF8 << 48,
    "float8_e4m3fn": 0x7F,
    "float8_e5m2": 0x7F,
}


def count_nonfinite(tensor_P: torch.Tensor) -> int:
    """Count the NaN and infinite elements of a flat tensor of any dtype.

    Runs at memory speed when there are none, which is looked at first.
    """
    if not tensor_P.is_floating_point() or _is_all_finite(tensor_P):
        return 0
    import torch

    found = 0
    for at in range(0, tensor_P.numel(), _CHUNK):
        chunk = tensor_P[at : at + _CHUNK]
        values = chunk if chunk.element_size() >= 4 else chunk.float()
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


def _is_all_finite(tensor_P: torch.Tensor) -> bool:
    """Return whether no element is NaN or infinite; False may also mean that nobody looked.

    As signed integers the bit patterns of positive infinity and NaN are the greatest, and as
    unsigned ones those of negative infinity and NaN: two maxima decide, without a copy.
    """
    infinity = _INFINITY.get(tensor_P.element_size(), {}).get(str(tensor_P.dtype).removeprefix("torch."))
    if infinity is None or not tensor_P.numel():
        return not tensor_P.numel()
    if tensor_P.device.type != "cpu":
        total = float(tensor_P.sum(dtype=None if tensor_P.element_size() > 2 else _float32()))
        return total - total == 0
    import torch

    return _lies_below(tensor_P.view(torch.uint8).numpy(), tensor_P.element_size(), infinity)


def holds_only_finite(values: HostInput) -> bool:
    """Return whether all of some values of 2, 4 or 8 bytes are finite, without torch."""
    width = element_bytes(values.dtype)
    return not len(values.data) or _lies_below(values.data, width, _INFINITY[width][torch_name(values.dtype)])


def _lies_below(data: NDArray[np.uint8], width: int, infinity: int) -> bool:
    signed = data.view({2: np.int16, 4: np.int32, 8: np.int64}[width])
    unsigned = data.view({2: np.uint16, 4: np.uint32, 8: np.uint64}[width])
    sign = 1 << (8 * width - 1)
    return bool(signed.max() < infinity) and bool(unsigned.max() < (infinity | sign))


def write_one_nan(stored_P: torch.Tensor, values_P: torch.Tensor) -> None:
    """Give every NaN of `values_P` one bit pattern in `stored_P`, its rounding to a float dtype.

    How the sign and the payload of a NaN are rounded depends on where in a vector it stood.
    """
    import torch

    width = stored_P.element_size()
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[width]
    pattern = _NAN[str(stored_P.dtype).removeprefix("torch.")]
    stored_P.view(integers).masked_fill_(torch.isnan(values_P), pattern)


def _float32() -> torch.dtype:
    import torch

    return torch.float32
