"""Values that an output's type is too narrow for: they become infinite, or the type's largest value."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


class _Range(NamedTuple):
    """The end of a type's range."""

    edge: float
    """Magnitude from which rounding leaves the range: halfway to the value that would follow the largest."""
    is_edge_in: bool
    """Does the edge itself still round to the largest value?"""
    largest: float
    saturates: bool
    """Does what lies beyond become the largest value, and not infinity?"""


_RANGES = {
    "F16": _Range(65520.0, False, 65504.0, False),
    "F8_E5M2": _Range(61440.0, False, 57344.0, False),
    "F8_E4M3": _Range(464.0, True, 448.0, True),
}


def count_beyond(values: torch.Tensor, dtype: str) -> int:
    """Count the finite values that a type (as safetensors spells it) cannot hold, near enough."""
    found = _RANGES.get(dtype)
    if found is None or not values.numel():
        return 0
    sizes = values.abs()
    beyond = sizes > found.edge if found.is_edge_in else sizes >= found.edge
    return int(beyond.logical_and_(values.isfinite()).sum())


def saturates(dtype: str) -> bool:
    """Return whether values beyond a type's range become its largest value."""
    return dtype in _RANGES and _RANGES[dtype].saturates


def beyond_warning(count: int, tensor: str, dtype: str) -> str:
    """Say what became of values beyond a type's range."""
    became = f"{_RANGES[dtype].largest:g}, its largest value" if saturates(dtype) else "infinite"
    return (
        f"{count:,} values of tensor {tensor} are beyond the range of {dtype} and became {became}; choose another "
        "out_dtype, such as bfloat16"
    )
