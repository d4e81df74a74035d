"""NuSLERP: weights, deltas, and angles per tensor, per last-axis and per first-axis vector."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raymerge.merge_actors.methods import METHODS, SPARSIFIERS, columns
from raymerge.merge_actors.methods.interface import Settings
from raymerge.merge_actors.methods.slices import merge_tensors, split_of

FLAT, LAST_AXIS, FIRST_AXIS = (True, False), (False, False), (False, True)
SHAPES = st.sampled_from([(), (1,), (13,), (1, 5), (7, 1), (6, 9), (3, 4, 5)])


def settings_of(mode: tuple[bool, bool], weights: tuple[float, float]) -> Settings:
    shared = {"nuslerp_flatten": mode[0], "nuslerp_row_wise": mode[1]}
    return Settings(shared=shared, models=tuple({"weight": weight} for weight in weights))


def merge(
    models: list[torch.Tensor],
    base: torch.Tensor | None,
    mode: tuple[bool, bool] = FLAT,
    weights: tuple[float, float] = (1.0, 1.0),
    slice_units: int | None = None,
) -> torch.Tensor:
    return merge_tensors(
        METHODS["nuslerp"],
        models,
        base,
        settings_of(mode, weights),
        sparsifiers=SPARSIFIERS,
        slice_units=slice_units,
    )


def reference(
    models: list[torch.Tensor], base: torch.Tensor | None, mode: tuple[bool, bool], t: float
) -> tuple[torch.Tensor, float]:
    """Interpolate vector by vector, in float64, and return the largest factor of a vector beside it."""
    shape = models[0].shape
    origin = torch.zeros(shape, dtype=torch.float64) if base is None else base.double()
    first, second = (model.double() - origin for model in models)
    if mode == FLAT or len(shape) < 2:
        rows = [v.reshape(1, -1) for v in (first, second)]
    elif mode == LAST_AXIS:
        rows = [v.reshape(-1, shape[-1]) for v in (first, second)]
    else:
        rows = [v.reshape(shape[0], -1).T for v in (first, second)]
    factors = [_arc_factors(a, b, t) for a, b in zip(*rows, strict=True)]
    merged = torch.stack([f * a + g * b for (f, g), a, b in zip(factors, *rows, strict=True)])
    if mode == FIRST_AXIS and len(shape) >= 2:
        merged = merged.T
    return merged.reshape(shape) + origin, max(abs(factor) for pair in factors for factor in pair)


def _arc_factors(a: torch.Tensor, b: torch.Tensor, t: float) -> tuple[float, float]:
    lengths = [max(float(v.norm()), 1e-7) for v in (a, b)]
    angle = math.acos(max(-1.0, min(1.0, float(a @ b) / (lengths[0] * lengths[1]))))
    if math.sin(angle) < 1e-8:
        return 1 - t, t
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def test_by_hand() -> None:
    # Rows are at right angles, columns are parallel; t = 3 / 4.
    models = [torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([[0.0, 4.0], [0.0, 8.0]])]
    near, far = math.sin(math.pi / 8), math.cos(math.pi / 8)
    expected = torch.tensor([[near, 4 * far], [2 * near, 8 * far]])
    for mode in (FLAT, LAST_AXIS):
        merged = merge(models, None, mode, (1, 3))
        torch.testing.assert_close(merged, expected, rtol=1e-6, atol=0)
    # A column and a column of zeros are at right angles too.
    torch.testing.assert_close(merge(models, None, FIRST_AXIS, (1, 3)), expected, rtol=1e-6, atol=0)
    parallel = [models[0], 3 * models[0]]
    torch.testing.assert_close(merge(parallel, None, FIRST_AXIS, (1, 3)), 2.5 * models[0], rtol=1e-6, atol=0)


@settings(deadline=None)
@given(
    shape=SHAPES,
    seed=st.integers(0, 1000),
    mode=st.sampled_from([FLAT, LAST_AXIS, FIRST_AXIS]),
    has_base=st.booleans(),
    weights=st.tuples(st.floats(0.1, 3), st.floats(0.1, 3)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_equals_the_reference(
    shape: tuple[int, ...],
    seed: int,
    mode: tuple[bool, bool],
    has_base: bool,
    weights: tuple[float, float],
    dtype: torch.dtype,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]
    base = tensors[2] if has_base else None
    expected, largest_factor = reference(tensors[:2], base, mode, weights[1] / sum(weights))
    merged = merge(tensors[:2], base, mode, weights)
    # Elements are below 8 and rounded thrice, times the factors, which are large (1 / sin A) where
    # vectors are nearly opposite; there they also follow the last bits of the angle.
    tolerance = (1e-14 if dtype == torch.float64 else 2e-6) * max(1.0, largest_factor) ** 2
    torch.testing.assert_close(merged.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("mode", [FLAT, LAST_AXIS, FIRST_AXIS])
def test_ends_and_equal_models(mode: tuple[bool, bool]) -> None:
    first, second, base = torch.randn(8, 6), torch.randn(8, 6), torch.randn(8, 6)
    assert torch.equal(merge([first, second], None, mode, (1, 0)), first)
    assert torch.equal(merge([first, second], None, mode, (0, 1)), second)
    for origin in (None, base):
        merged = merge([first, first.clone()], origin, mode, (1, 2))
        # x / 3 + 2 x / 3, and with a base a subtraction and an addition, rounded to float32.
        torch.testing.assert_close(merged, first, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", [FLAT, LAST_AXIS, FIRST_AXIS])
def test_frozen_tensor_stays(mode: tuple[bool, bool]) -> None:
    base = torch.randn(8, 6)
    assert torch.equal(merge([base.clone(), base.clone()], base, mode), base)


def test_weights_that_cancel_meet_half_way() -> None:
    models = [torch.randn(9), torch.randn(9)]
    assert torch.equal(merge(models, None, FLAT, (1, -1)), merge(models, None, FLAT, (1, 1)))


def test_only_the_ratio_of_the_weights_counts() -> None:
    models = [torch.randn(9), torch.randn(9)]
    assert torch.equal(merge(models, None, FLAT, (-1, -3)), merge(models, None, FLAT, (1, 3)))


def test_only_last_axis_vectors_need_whole_rows() -> None:
    splits = [
        split_of(METHODS["nuslerp"], settings_of(mode, (1, 1)), SPARSIFIERS)
        for mode in (FLAT, LAST_AXIS, FIRST_AXIS, (True, True))
    ]
    assert splits == ["elementwise", "rowwise", "elementwise", "elementwise"]


@pytest.mark.parametrize("shape", [(300, 700), (70, 30, 100), (2, 90_000), (150_000,)])
def test_first_axis_does_not_depend_on_slices(shape: tuple[int, ...]) -> None:
    models, base = [torch.randn(shape), torch.randn(shape)], torch.randn(shape)
    whole = merge(models, base, FIRST_AXIS)
    for slice_units in (1, 2, 5):
        assert torch.equal(whole, merge(models, base, FIRST_AXIS, slice_units=slice_units))


@pytest.mark.parametrize("shape", [(300, 700), (70, 30, 100)])
def test_first_axis_over_many_units_equals_the_reference(shape: tuple[int, ...]) -> None:
    models, base = [torch.randn(shape), torch.randn(shape)], torch.randn(shape)
    expected, largest_factor = reference(models, base, FIRST_AXIS, 0.5)
    # Float32 terms below 10, rounded thrice.
    merged = merge(models, base, FIRST_AXIS)
    torch.testing.assert_close(merged.double(), expected, rtol=0, atol=3e-6 * max(1.0, largest_factor))


def test_column_sums_are_exact_and_do_not_depend_on_order() -> None:
    values = np.array(
        [[2.0**52, -(2.0**-60), 2.0**-79], [-(2.0**52) + 1, 2.0**-40, -(2.0**-80)], [0.5, 0.0, 0.0]]
    )
    expected = np.array([1.5, 2.0**-40 - 2.0**-60, 2.0**-80])
    for rows in (values, values[::-1]):
        sums = columns.empty_sums(3)
        for row in rows:
            columns._add_limbs(sums, row)
        assert columns.read_sums(sums).tolist() == expected.tolist()


def test_column_sums_of_what_is_not_finite_are_nan() -> None:
    sums = columns.empty_sums(4)
    columns._add_limbs(sums, np.array([1.0, np.nan, np.inf, 2.0**133]))
    assert np.isnan(columns.read_sums(sums)).tolist() == [False, True, True, True]
