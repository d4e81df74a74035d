"""Decode the elements of any float dtype with numpy alone, so that measuring needs no torch.

Legend of shapes: P elements of a flat piece.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from raymerge.merge_actors.dtypes import element_bytes

_NUMPY_TYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16}


def decode(raw: NDArray[np.uint8], dtype: str, out_P: NDArray[np.floating]) -> NDArray[np.floating]:
    """Convert raw little-endian bytes to the float type of `out_P`.

    Args:
        raw: whole elements.
        dtype: safetensors' name of a float dtype.
        out_P: where to put them, float32 or float64; at least as long as needed.

    Returns:
        the part of `out_P` that was filled.
    """
    part_P = out_P[: len(raw) // element_bytes(dtype)]
    if dtype in _NUMPY_TYPES:
        np.copyto(part_P, raw.view(_NUMPY_TYPES[dtype]), casting="same_kind")
    elif dtype == "BF16":
        # A bfloat16 is the upper half of a float32.
        bits_P = raw.view(np.uint16).astype(np.uint32)
        np.left_shift(bits_P, 16, out=bits_P)
        np.copyto(part_P, bits_P.view(np.float32))
    else:
        np.copyto(part_P, _table(dtype)[raw])
    return part_P


@functools.cache
def _table(dtype: str) -> NDArray[np.float32]:
    """Return the value of each byte of an 8-bit float (OCP 8-bit floating point, revision 1.0)."""
    codes = np.arange(256, dtype=np.uint16)
    if dtype == "F8_E5M2":  # the upper half of a float16
        return (codes << 8).view(np.float16).astype(np.float32)
    assert dtype == "F8_E4M3", dtype
    exponent = ((codes >> 3) & 15).astype(np.int32)
    mantissa = (codes & 7).astype(np.float64)
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    values = np.where(exponent == 0, np.ldexp(mantissa / 8, -6), normal)
    values[(codes & 127) == 127] = np.nan  # E4M3 has NaN and no infinity
    return np.where(codes >> 7, -values, values).astype(np.float32)
