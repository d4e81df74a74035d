"""Names of element types: safetensors' spelling, torch's, and their width in bytes.

The plan works with the names alone; `torch_dtype` imports torch when it is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

#: safetensors name -> (torch attribute, bytes per element)
_TYPES: dict[str, tuple[str, int]] = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U64": ("uint64", 8),
    "U32": ("uint32", 4),
    "U16": ("uint16", 2),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
#: Floats that a sound value of another type may be too large for.
NARROW = frozenset({"F16", "F8_E4M3", "F8_E5M2"})
_BY_TORCH = {attribute: name for name, (attribute, _) in _TYPES.items()}


def is_known(dtype: str) -> bool:
    """Return whether `dtype` is a safetensors element type that raymerge can read."""
    return dtype in _TYPES


def is_float(dtype: str) -> bool:
    """Return whether `dtype` is a type of floating-point numbers, which are merged, not copied."""
    return dtype in FLOATS


def element_bytes(dtype: str) -> int:
    """Return the width of one element in bytes."""
    return _TYPES[dtype][1]


def torch_name(dtype: str) -> str:
    """Return torch's name of a safetensors dtype: "BF16" -> "bfloat16"."""
    return _TYPES[dtype][0]


def from_torch_name(name: str) -> str | None:
    """Return the safetensors name for "bfloat16" or "torch.bfloat16", or None."""
    return _BY_TORCH.get(name.removeprefix("torch."))


def torch_dtype(dtype: str) -> torch.dtype:
    """Return the torch dtype of a safetensors dtype."""
    import torch

    found = getattr(torch, torch_name(dtype))
    assert isinstance(found, torch.dtype)
    return found
