"""Packed triangles of Gram matrices."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raymerge.merge_actors.methods import gram_matrix
from raymerge.merge_actors.methods.gram_matrix import (
    pack_upper,
    packed_diagonal,
    triangle_elements,
    triangle_features,
    unpack_upper,
)


def symmetric(in_features: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    square = torch.randn(in_features, in_features, dtype=torch.float64)
    # A product x^T x is symmetric but for the last bits, which BLAS adds in its own order.
    return (square + square.T).to(dtype)


def test_a_triangle_by_hand() -> None:
    gram = torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 5.0], [3.0, 5.0, 6.0]])
    flat = pack_upper(gram)
    assert flat.tolist() == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert torch.equal(unpack_upper(flat, 3), gram)
    assert packed_diagonal(flat, 3).tolist() == [1.0, 4.0, 6.0]


@settings(deadline=None, max_examples=40)
@given(
    in_features=st.integers(0, 60),
    band=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_packing_is_numpys_order_and_comes_back(in_features: int, band: int, dtype: torch.dtype) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gram_matrix, "_BAND", band)
        gram = symmetric(in_features, dtype)
        flat = pack_upper(gram)
        assert flat.dtype == dtype
        assert torch.equal(flat, gram[tuple(map(torch.from_numpy, np.triu_indices(in_features)))])
        assert torch.equal(unpack_upper(flat, in_features), gram)
        assert torch.equal(packed_diagonal(flat, in_features), gram.diagonal())


def test_bands_of_the_usual_height() -> None:
    gram = symmetric(300)
    assert torch.equal(unpack_upper(pack_upper(gram), 300), gram)


def test_only_the_upper_triangle_is_read() -> None:
    gram = symmetric(150)
    broken = gram.clone()
    broken[torch.ones(150, 150).tril(-1).bool()] = torch.nan
    assert torch.equal(unpack_upper(pack_upper(broken), 150), gram)


def test_unpacking_to_another_dtype() -> None:
    gram = symmetric(140)
    assert torch.equal(unpack_upper(pack_upper(gram), 140, torch.float64), gram.double())


def test_number_of_elements() -> None:
    assert [triangle_elements(n) for n in (0, 1, 2, 3, 28_672)] == [0, 1, 3, 6, 411_056_128]
    assert all(triangle_features(triangle_elements(n)) == n for n in (0, 1, 2, 17, 28_672, 1 << 26))
    with pytest.raises(ValueError, match=r"7 elements are no packed triangle"):
        triangle_features(7)
