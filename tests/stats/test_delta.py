"""Delta statistics against plain numpy over whole arrays, and their sums over pieces."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from raymerge.merge_actors.dtypes import torch_dtype
from raymerge.stats.decode import decode
from raymerge.stats.delta import (
    QUANTILE_RELATIVE_ERROR,
    Agreement,
    DeltaStatistics,
    MagnitudeHistogram,
    measure_agreement,
    measure_delta,
)

F32 = NDArray[np.float32]


def _values(seed: int, count: int, scale: float = 1.0) -> F32:
    return (np.random.default_rng(seed).standard_normal(count) * scale).astype(np.float32)


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"])
def test_decode_gives_what_torch_gives_for_every_bit_pattern(dtype: str) -> None:
    width = torch.empty(0, dtype=torch_dtype(dtype)).element_size()
    if width <= 2:
        raw = np.arange(1 << (8 * width), dtype=np.uint16 if width == 2 else np.uint8).view(np.uint8)
    else:
        raw = _values(0, 1000).astype(np.float64 if width == 8 else np.float32).view(np.uint8)
    out_P = np.empty(len(raw), np.float64 if dtype == "F64" else np.float32)
    with np.errstate(invalid="ignore"):  # signalling NaNs among the bit patterns
        found_P = decode(raw, dtype, out_P)
    expected_P = torch.from_numpy(raw.copy()).view(torch_dtype(dtype)).to(torch.from_numpy(out_P).dtype)
    np.testing.assert_array_equal(found_P, expected_P.numpy())


def test_figures_of_a_block_worked_out_by_hand() -> None:
    base_P = np.array([3, 4, 0, 0], np.float32)
    model_P = np.array([3, 4, 2, -1], np.float32)
    found, delta_P = measure_delta(base_P, model_P)
    assert delta_P.tolist() == [0, 0, 2, -1]
    assert (found.num_elements, found.num_equal, found.max_magnitude) == (4, 2, 2.0)
    assert found.norm == pytest.approx(math.sqrt(5))
    assert found.relative_norm == pytest.approx(math.sqrt(5) / 5)
    assert found.cosine == pytest.approx(25 / (5 * math.sqrt(30)))
    assert found.equal_fraction == 0.5
    # Medians and quantiles are values that occur, up to the width of a bucket; the largest is exact.
    assert found.quantiles([0.5, 0.75, 1.0]) == [0.0, pytest.approx(1, rel=QUANTILE_RELATIVE_ERROR), 2.0]


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 3e-3, 1.0, 1e20])
def test_quantiles_keep_their_stated_error_at_every_scale(scale: float) -> None:
    values_P = np.exp(_values(1, 50_000).astype(np.float64) * 3) * scale
    histogram = MagnitudeHistogram()
    histogram.count(-values_P)
    fractions = [0.0, 0.001, 0.1, 0.5, 0.9, 0.999, 1.0]
    expected = np.quantile(values_P, fractions, method="inverted_cdf")
    # A float32's own rounding comes on top of the bucket's width.
    np.testing.assert_allclose(histogram.quantiles(fractions), expected, rtol=QUANTILE_RELATIVE_ERROR + 1e-6)


def test_what_is_not_finite_is_counted_and_left_out() -> None:
    base_P = np.array([1, np.nan, 1, np.inf, 3e38], np.float32)
    model_P = np.array([2, 1, -np.inf, np.inf, -3e38], np.float32)
    found, delta_P = measure_delta(base_P, model_P)
    assert (found.num_elements, found.num_nonfinite, found.norm) == (1, 4, 1.0)
    assert delta_P.tolist() == [1, 0, 0, 0, 0]
    assert measure_delta(base_P[1:2], model_P[1:2])[0].num_nonfinite == 1


def test_nothing_measured_has_no_figures() -> None:
    empty = DeltaStatistics()
    assert math.isnan(empty.cosine) and math.isnan(empty.equal_fraction)
    assert math.isnan(empty.quantiles([0.5])[0])
    assert math.isnan(Agreement().cosine) and math.isnan(Agreement().conflict_fraction)


def test_a_base_of_zeros_has_no_cosine_and_no_finite_ratio() -> None:
    found, _ = measure_delta(np.zeros(3, np.float32), np.ones(3, np.float32))
    assert math.isnan(found.cosine) and found.relative_norm == math.inf
    same, _ = measure_delta(np.zeros(3, np.float32), np.zeros(3, np.float32))
    assert same.relative_norm == 0


@settings(deadline=None, max_examples=30)
@given(cuts=st.lists(st.integers(0, 999), max_size=6), seed=st.integers(0, 99))
def test_pieces_add_up_to_the_whole(cuts: list[int], seed: int) -> None:
    base_P, model_P, other_P = _values(seed, 1000), _values(seed + 1, 1000), _values(seed + 2, 1000)
    model_P[::3] = base_P[::3]
    whole, delta_P = measure_delta(base_P, model_P)
    _, other_delta_P = measure_delta(base_P, other_P)
    agreement = measure_agreement(delta_P, other_delta_P)
    total, summed = DeltaStatistics(), Agreement()
    edges = [0, *sorted(cuts), 1000]
    for begin, end in itertools.pairwise(edges):
        part, part_P = measure_delta(base_P[begin:end], model_P[begin:end])
        total.add(part)
        summed.add(measure_agreement(part_P, other_delta_P[begin:end]))
    assert (total.num_elements, total.num_equal) == (whole.num_elements, whole.num_equal)
    assert total.max_magnitude == whole.max_magnitude
    np.testing.assert_array_equal(total.histogram.counts_K, whole.histogram.counts_K)
    # Only the order of float64 sums differs.
    assert total.norm == pytest.approx(whole.norm, rel=1e-12)
    assert total.cosine == pytest.approx(whole.cosine, rel=1e-9)
    assert summed.cosine == pytest.approx(agreement.cosine, rel=1e-9, abs=1e-12)
    assert (summed.num_both_moved, summed.num_conflicts) == (
        agreement.num_both_moved,
        agreement.num_conflicts,
    )


def test_agreement_worked_out_by_hand() -> None:
    first_P = np.array([1, -1, 2, 0, 5], np.float32)
    second_P = np.array([2, 3, 0, 0, -1e-30], np.float32)
    found = measure_agreement(first_P, second_P)
    assert (found.num_both_moved, found.num_conflicts) == (3, 2)
    assert found.conflict_fraction == pytest.approx(2 / 3)
    assert found.cosine == pytest.approx(-1 / (math.sqrt(31) * math.sqrt(13)))


def test_figures_against_numpy_over_a_large_block() -> None:
    base_P, model_P = _values(5, 200_000, 0.02), _values(6, 200_000, 0.02)
    found, delta_P = measure_delta(base_P, model_P)
    exact_P = base_P.astype(np.float64), model_P.astype(np.float64)
    expected = exact_P[0] @ exact_P[1] / (np.linalg.norm(exact_P[0]) * np.linalg.norm(exact_P[1]))
    # The delta is rounded to float32 once per element.
    assert found.cosine == pytest.approx(expected, abs=1e-7)
    assert found.norm == pytest.approx(np.linalg.norm(delta_P.astype(np.float64)), rel=1e-12)
