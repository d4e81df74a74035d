"""Gram matrices as packed triangles: the upper triangle with its diagonal, row after row.

    gram_II    g00 g01 g02      flat_T    g00 g01 g02 g11 g12 g22
               g01 g11 g12
               g02 g12 g22

This is what travels and what lies on disk (as float32): half the bytes of the square.
Packing and unpacking work band by band, so they need no index of the size of the matrix
and run on any device.

Shape letters: I in features, T elements of a triangle, I (I + 1) / 2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

#: Rows that are packed in one step.
_BAND = 128


def triangle_elements(in_features: int) -> int:
    """Return the number of elements of a packed triangle: I (I + 1) / 2."""
    return in_features * (in_features + 1) // 2


def triangle_features(num_elements: int) -> int:
    """Return I for a packed triangle of `num_elements`.

    Raises:
        ValueError: no triangle has so many elements.
    """
    in_features = (math.isqrt(8 * num_elements + 1) - 1) // 2
    if triangle_elements(in_features) != num_elements:
        raise ValueError(f"{num_elements} elements are no packed triangle; it has I (I + 1) / 2 of them.")
    return in_features


def pack_upper(gram_II: torch.Tensor) -> torch.Tensor:
    """Pack a symmetric matrix; only its upper triangle is read.

    Args:
        gram_II: any float dtype, any device.

    Returns:
        flat_T, of the same dtype and device.
    """
    in_features = gram_II.shape[0]
    flat_T = gram_II.new_empty(triangle_elements(in_features))
    for begin, end, first, last in _bands(in_features):
        band = gram_II[begin:end, begin:]
        flat_T[first:last] = band.masked_select(_upper(band))
    return flat_T


def unpack_upper(flat_T: torch.Tensor, in_features: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Unpack a triangle to the full symmetric matrix.

    Args:
        flat_T: a packed triangle, any float dtype, any device.
        in_features: I.
        dtype: of the result; that of `flat_T` if None.

    Returns:
        gram_II, on the device of `flat_T`.
    """
    assert flat_T.numel() == triangle_elements(in_features), (flat_T.numel(), in_features)
    gram_II = flat_T.new_empty((in_features, in_features), dtype=dtype)
    for begin, end, first, last in _bands(in_features):
        band = gram_II[begin:end, begin:]
        band.masked_scatter_(_upper(band), flat_T[first:last].to(gram_II.dtype))
        corner = band[:, : end - begin]
        corner.copy_(corner.triu() + corner.triu(1).T)
        gram_II[end:, begin:end] = gram_II[begin:end, end:].T
    return gram_II


def packed_diagonal(flat_T: torch.Tensor, in_features: int) -> torch.Tensor:
    """Return a copy of the diagonal of a packed triangle, shape (I,)."""
    return flat_T[diagonal_places(in_features, flat_T.device)]


def diagonal_places(in_features: int, device: torch.device) -> torch.Tensor:
    """Return where the diagonal's elements stand in a packed triangle, int64 (I,)."""
    import torch

    row_I = torch.arange(in_features, device=device)
    return row_I * in_features - row_I * (row_I - 1) // 2


def _bands(in_features: int) -> Iterator[tuple[int, int, int, int]]:
    """Walk over bands of rows: yields rows [begin, end) and their elements [first, last) in the triangle."""
    first = 0
    for begin in range(0, in_features, _BAND):
        end = min(begin + _BAND, in_features)
        last = first + triangle_elements(in_features - begin) - triangle_elements(in_features - end)
        yield begin, end, first, last
        first = last


def _upper(band: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.ones(band.shape, dtype=torch.bool, device=band.device).triu_()
