"""Sums that depend on nothing but the numbers: not on threads, rows beside, or slices."""

import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from raymerge.merge_actors.methods.block import halve_rows, sum_rows
from raymerge.merge_actors.methods.gram import collect_dots, gram_matrix


@pytest.fixture
def threads() -> Iterator[None]:
    """Give torch's number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("add", [sum_rows, halve_rows])
@pytest.mark.parametrize("columns", [1, 2, 3, 17, 4096, 65_536, 70_001])
def test_row_sums(add: Callable[[torch.Tensor], torch.Tensor], columns: int) -> None:
    values = torch.randn(5, columns, dtype=torch.float64)
    expected = [math.fsum(row) for row in values.tolist()]
    # Pairwise sums of at most 70,001 terms of order 1 in float64.
    assert np.allclose(add(values.clone()).numpy(), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("add", [sum_rows, halve_rows])
@pytest.mark.parametrize("columns", [3, 1000, 65_536, 63_000])
def test_a_row_sum_does_not_depend_on_the_rows_beside_it(
    add: Callable[[torch.Tensor], torch.Tensor], columns: int
) -> None:
    values = torch.randn(6, columns, dtype=torch.float64)
    together = add(values.clone())
    for row in range(6):
        assert torch.equal(add(values[row : row + 1].clone()), together[row : row + 1])


@pytest.mark.parametrize("add", [sum_rows, halve_rows])
def test_row_sums_do_not_depend_on_threads(
    add: Callable[[torch.Tensor], torch.Tensor], threads: None
) -> None:
    lone_rows = torch.randn(20, 1, 65_536, dtype=torch.float64)
    sums = []
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        sums.append(torch.cat([add(row.clone()) for row in lone_rows]))
    assert all(torch.equal(sums[0], other) for other in sums[1:])


def test_gram_matrix_is_summed_exactly() -> None:
    # 1e16 + 1 is not a float64; any order of adding pairs loses the ones.
    parts = [np.array([[1e16, 1.0, 2.0], [1.0, 1.0, 2.0]]), np.array([[-1e16, 1.0, 2.0]])]
    for order in itertools.permutations(parts):
        assert gram_matrix(order, 2).tolist() == [[1.0, 3.0], [3.0, 6.0]]


def test_gram_matrix_of_nothing_is_zero() -> None:
    assert gram_matrix([collect_dots([], of="models")], 2).tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_gram_matrix_with_an_infinity_is_nan() -> None:
    # fsum itself raises for inf - inf.
    table = np.array([[np.inf, 1.0, 1.0], [-np.inf, 1.0, 1.0]])
    assert np.isnan(gram_matrix([table], 2)).all()
