"""Sums of X^T X: exactness in float32, shards in float64, half the operations."""

from __future__ import annotations

import pytest
import torch

from raymerge.merge_actors.methods.gram_matrix import unpack_upper
from raymerge.stats.gram_accumulator import GramAccumulator, add_gram, gram_bytes

KEY = ("layer.weight", 0)


@pytest.mark.parametrize("in_features", [1, 7, 256, 257, 700])
def test_the_upper_triangle_equals_the_product(in_features: int) -> None:
    rows_RI = torch.randn(50, in_features, generator=torch.Generator().manual_seed(1))
    gram_II = torch.zeros(in_features, in_features)
    add_gram(gram_II, rows_RI)
    add_gram(gram_II, rows_RI[:20], weight=3)
    wide = rows_RI.double()
    expected = wide.T @ wide + 3 * wide[:20].T @ wide[:20]
    torch.testing.assert_close(gram_II.triu().double(), expected.triu(), rtol=1e-5, atol=1e-4)


def test_the_update_takes_half_the_operations() -> None:
    rows_RI = torch.zeros(3, 4096)
    num_operations = add_gram(torch.zeros(4096, 4096), rows_RI)
    assert num_operations == 2 * 3 * 4096**2 * 9 // 16  # eight block columns: (8 + 1) / (2 * 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_4096_rows_of_ones_one_at_a_time_count_exactly(dtype: torch.dtype) -> None:
    # A bfloat16 accumulator would stop at 256.
    grams = GramAccumulator("cpu")
    for _ in range(4096):
        grams.add(KEY, torch.ones(1, 4, dtype=dtype))
    grams.end_shard()
    assert torch.equal(unpack_upper(grams.total(KEY, 4), 4), torch.full((4, 4), 4096.0).double())


def test_shards_are_added_in_float64() -> None:
    grams = GramAccumulator("cpu")
    for size in (2.0**15, 1.0, 1.0):  # 2^30 + 1 + 1 is not a float32
        grams.add(KEY, torch.tensor([[size]]))
        grams.end_shard()
    assert grams.total(KEY, 1).item() == 2**30 + 2


def test_a_shard_that_is_not_ended_counts_nothing() -> None:
    grams = GramAccumulator("cpu")
    grams.add(KEY, torch.ones(2, 3))
    assert grams.total(KEY, 3).tolist() == [0.0] * 6


def test_nan_and_infinity_are_seen_in_the_running_shard() -> None:
    grams = GramAccumulator("cpu")
    grams.add(KEY, torch.ones(2, 3))
    assert list(grams.non_finite()) == []
    grams.add(("other", 0), torch.tensor([[1.0, float("inf")]]))
    assert list(grams.non_finite()) == [("other", 0)]


def test_only_timed_updates_are_counted() -> None:
    grams = GramAccumulator("cpu")
    grams.add(KEY, torch.ones(2, 3))
    assert grams.num_operations == 0
    grams.is_timed = True
    grams.add(KEY, torch.ones(2, 3))
    assert grams.num_operations == 2 * 2 * 3 * 3
    assert grams.seconds > 0


def test_memory_is_counted_as_square_and_triangle() -> None:
    assert gram_bytes(10) == 4 * 100 + 8 * 55


def test_forgetting_frees_a_key() -> None:
    grams = GramAccumulator("cpu")
    grams.add(KEY, torch.ones(1, 2))
    grams.end_shard()
    grams.forget(KEY)
    assert grams.total(KEY, 2).tolist() == [0.0] * 3


@pytest.mark.gpu
def test_bfloat16_rows_on_a_gpu_are_summed_in_float32() -> None:
    rows_RI = torch.randn(8192, 512, device="cuda").bfloat16()
    gram_II = torch.zeros(512, 512, device="cuda")
    add_gram(gram_II, rows_RI)
    wide = rows_RI.double()
    torch.testing.assert_close(gram_II.triu().double(), (wide.T @ wide).triu(), rtol=1e-5, atol=1e-2)
