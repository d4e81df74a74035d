"""Cutting shards into batches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raymerge.stats.batches import batch_tensors, cut_batches, shards_of
from raymerge.stats.calibration_data import Example
from raymerge.stats.masked_rows import Batching


def _examples(lengths: list[int]) -> list[Example]:
    return [Example(number=i, input_ids=tuple(range(1, length + 1))) for i, length in enumerate(lengths)]


@given(
    lengths=st.lists(st.integers(1, 30), max_size=40),
    batching=st.sampled_from(["padded", "equal_length", "single"]),
    batch_tokens=st.integers(1, 100),
)
def test_every_example_is_in_one_batch_within_the_limit(
    lengths: list[int], batching: Batching, batch_tokens: int
) -> None:
    batches = cut_batches(_examples(lengths), batching, batch_tokens)
    assert sorted(each.number for batch in batches for each in batch) == list(range(len(lengths)))
    for batch in batches:
        widths = [len(each.input_ids) for each in batch]
        assert len(batch) == 1 or len(batch) * max(widths) <= batch_tokens
        if batching == "equal_length":
            assert len(set(widths)) == 1
        if batching == "single":
            assert len(batch) == 1


def test_tensors_are_padded_and_masked() -> None:
    batch = batch_tensors(_examples([3, 1]), pad_id=0, start_id=None, device="cpu")
    assert batch.inputs["input_ids"].tolist() == [[1, 2, 3], [1, 0, 0]]
    assert batch.mask.mask_BT.tolist() == [[True, True, True], [True, False, False]]
    assert batch.mask.has_padding and batch.target_mask is None
    assert batch.num_tokens == 4
    assert "position_ids" not in batch.inputs and "token_type_ids" not in batch.inputs


def test_padding_on_the_left_counts_positions_from_the_first_token() -> None:
    batch = batch_tensors(_examples([3, 1]), pad_id=0, start_id=None, device="cpu", side="left")
    assert batch.inputs["input_ids"].tolist() == [[1, 2, 3], [0, 0, 1]]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0]]


def test_a_decoder_reads_its_targets_shifted_by_its_start_token() -> None:
    examples = [
        Example(number=0, input_ids=(1, 2), target_ids=(7, 8, 9)),
        Example(number=1, input_ids=(1,), target_ids=(7,)),
    ]
    batch = batch_tensors(examples, pad_id=0, start_id=5, device="cpu")
    assert batch.inputs["decoder_input_ids"].tolist() == [[5, 7, 8], [5, 0, 0]]
    assert batch.target_mask is not None
    assert batch.target_mask.mask_BT.tolist() == [[True, True, True], [True, False, False]]
    assert batch.num_tokens == 3 + 4
    assert torch.equal(batch.inputs["decoder_attention_mask"], batch.target_mask.mask_BT.long())


@pytest.mark.parametrize("num_workers", [1, 2, 3, 7])
def test_every_shard_has_one_worker(num_workers: int) -> None:
    shards = [shard for worker in range(num_workers) for shard in shards_of(worker, num_workers, 5)]
    assert sorted(shards) == list(range(5))
