"""Which rows of an input count."""

from __future__ import annotations

import pytest
import torch

from raymerge.stats.masked_rows import NeedsBatching, TokenMask, real_rows

MASK_BT = torch.tensor([[True, True, False], [True, False, False]])
PADDED = [TokenMask(MASK_BT, has_padding=True)]
FULL = [TokenMask(torch.ones(2, 3, dtype=torch.bool), has_padding=False)]


def _rows(shape: tuple[int, ...], masks: list[TokenMask] = PADDED, are_tokens: bool = False) -> object:
    found = real_rows(
        torch.arange(float(torch.Size(shape).numel())).reshape(shape),
        masks,
        num_examples=2,
        are_tokens=are_tokens,
    )
    return found.rows_RI.tolist(), found.weight


def test_tokens_by_example_and_flattened_lose_their_padding() -> None:
    by_example = _rows((2, 3, 1))
    assert by_example == ([[0.0], [1.0], [3.0]], 1)
    assert _rows((6, 1)) == by_example


def test_one_row_for_each_example_counts_whole() -> None:
    assert _rows((2, 1)) == ([[0.0], [1.0]], 1)


def test_rows_that_are_the_same_for_all_examples_count_for_each() -> None:
    assert _rows((1, 4, 1)) == ([[0.0], [1.0], [2.0], [3.0]], 2)


def test_the_first_mask_that_fits_is_taken() -> None:
    other = TokenMask(torch.tensor([[True] * 4, [True, False, False, False]]), has_padding=True)
    assert _rows((2, 4, 1), [*PADDED, other]) == ([[0.0], [1.0], [2.0], [3.0], [4.0]], 1)


def test_rows_that_no_mask_fits_ask_for_batches_in_which_all_rows_count() -> None:
    with pytest.raises(NeedsBatching) as found:
        _rows((2, 5, 1))  # of each example, but not by token
    assert found.value.batching == "equal_length"
    with pytest.raises(NeedsBatching) as found:
        _rows((5, 1), are_tokens=True)  # sent to an expert
    assert found.value.batching == "equal_length"
    with pytest.raises(NeedsBatching) as found:
        _rows((5, 1), FULL)  # of nobody knows what
    assert found.value.batching == "single"


def test_without_padding_routed_rows_count_whole() -> None:
    assert _rows((5, 1), FULL, are_tokens=True) == ([[float(i)] for i in range(5)], 1)
    assert _rows((2, 2, 1), FULL) == ([[float(i)] for i in range(4)], 1)
