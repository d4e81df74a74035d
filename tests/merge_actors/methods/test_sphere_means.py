"""Multi-SLERP and the Karcher mean: averages of directions and of lengths."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raymerge.merge_actors.methods import METHODS, SPARSIFIERS
from raymerge.merge_actors.methods.interface import Settings
from raymerge.merge_actors.methods.karcher import mean_direction
from raymerge.merge_actors.methods.slices import merge_tensors

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float64])


def multislerp(
    models: list[torch.Tensor],
    base: torch.Tensor | None,
    weights: list[float],
    *,
    normalize: bool = True,
    eps: float = 1e-8,
) -> torch.Tensor:
    values = Settings(
        shared={"normalize_weights": normalize, "eps": eps},
        models=tuple({"weight": weight} for weight in weights),
    )
    return merge_tensors(METHODS["multislerp"], models, base, values, sparsifiers=SPARSIFIERS)


def karcher(models: list[torch.Tensor], max_iter: int = 10, tol: float = 1e-5) -> torch.Tensor:
    values = Settings(shared={"max_iter": max_iter, "tol": tol}, models=({},) * len(models))
    return merge_tensors(METHODS["karcher"], models, None, values, sparsifiers=SPARSIFIERS)


def family(
    seed: int, num_models: int, dtype: torch.dtype, spread: float
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    base, common = (torch.randn(6, 7, generator=generator) for _ in range(2))
    deltas = [common + torch.randn(6, 7, generator=generator) for _ in range(num_models)]
    return base.to(dtype), [(base + spread * delta).to(dtype) for delta in deltas]


def multislerp_reference(
    models: list[torch.Tensor], base: torch.Tensor | None, weights: list[float], eps: float
) -> torch.Tensor:
    """Take the published way through the tangent space, in float64."""
    origin = torch.zeros(models[0].shape, dtype=torch.float64) if base is None else base.double()
    vectors = torch.stack([(model.double() - origin).flatten() for model in models])
    w = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    lengths = vectors.norm(dim=1)
    units = vectors / (lengths + eps).unsqueeze(1)
    mean = w @ units / (w @ units).norm()
    tangent = w @ (units - (units @ mean).unsqueeze(1) * mean)
    size = tangent.norm() + 1e-300
    point = mean * torch.cos(size) + tangent * torch.sin(size) / size
    return (point * (w @ lengths)).view(models[0].shape) + origin


def karcher_reference(models: list[torch.Tensor]) -> torch.Tensor:
    """Iterate on whole vectors in float64, to convergence, with logarithm and exponential maps."""
    vectors = [model.double().flatten() for model in models]
    units = [v / v.norm() for v in vectors if v.norm() > 0]
    mean = sum(units[1:], units[0])
    mean = mean / mean.norm()
    for _ in range(1000):
        step = torch.zeros_like(mean)
        for unit in units:
            across = unit - (unit @ mean) * mean
            sine = across.norm()
            if sine > 1e-12:
                step += torch.atan2(sine, unit @ mean) * across / sine / len(units)
        size = step.norm()
        if size < 1e-13:
            break
        mean = torch.cos(size) * mean + torch.sin(size) * step / size
        mean = mean / mean.norm()
    return (mean * sum(float(v.norm()) for v in vectors) / len(vectors)).view(models[0].shape)


def test_multislerp_by_hand() -> None:
    # Directions (1, 0) and (0, 1) with equal weights: 45 degrees; lengths 2 and 4: 3.
    models = [torch.tensor([2.0, 0.0]), torch.tensor([0.0, 4.0])]
    expected = torch.full((2,), 3 * math.sqrt(0.5))
    torch.testing.assert_close(multislerp(models, None, [2, 2]), expected, rtol=1e-6, atol=0)
    base = torch.tensor([10.0, 20.0])
    moved = [base + model for model in models]
    torch.testing.assert_close(multislerp(moved, base, [2, 2]), base + expected, rtol=1e-6, atol=0)


@settings(deadline=None)
@given(
    seed=st.integers(0, 1000),
    num_models=st.integers(1, 5),
    has_base=st.booleans(),
    dtype=DTYPES,
    spread=st.sampled_from([0.01, 0.5, 3.0]),
    eps=st.sampled_from([1e-8, 0.1]),
)
def test_multislerp_equals_the_published_steps(
    seed: int, num_models: int, has_base: bool, dtype: torch.dtype, spread: float, eps: float
) -> None:
    base, models = family(seed, num_models, dtype, spread)
    weights = [0.3 + i for i in range(num_models)]
    origin = base if has_base else None
    merged = multislerp(models, origin, weights, eps=eps)
    # Elements of order 10, a few roundings each; coefficients are in float64.
    tolerance = 1e-13 if dtype == torch.float64 else 1e-5
    expected = multislerp_reference(models, origin, weights, eps)
    torch.testing.assert_close(merged.double(), expected, rtol=0, atol=tolerance)


def test_multislerp_of_frozen_deltas_is_the_base() -> None:
    base = torch.randn(5, 6)
    merged = multislerp([base.clone() for _ in range(3)], base, [1, 2, 3])
    assert torch.equal(merged, base)


def test_multislerp_of_one_frozen_delta_keeps_the_direction_of_the_other() -> None:
    base, delta = torch.zeros(8), torch.randn(8)
    merged = multislerp([base.clone(), delta], base, [1, 3])
    torch.testing.assert_close(merged, 0.75 * delta, rtol=1e-6, atol=0)


@pytest.mark.parametrize("num_models", [2, 4])
def test_means_of_directions_that_cancel_are_plain_means(num_models: int) -> None:
    first, second = torch.randn(20), torch.randn(20)
    models = [first, -2 * first, second, -5 * second][:num_models]
    mean = torch.stack(models).mean(dim=0)
    # Float32 sums of terms below 20.
    torch.testing.assert_close(multislerp(models, None, [1.0] * num_models), mean, rtol=0, atol=2e-6)
    torch.testing.assert_close(karcher(models), mean, rtol=0, atol=2e-6)


def test_multislerp_without_normalization_scales_with_the_weights() -> None:
    _, models = family(1, 3, torch.float32, 1.0)
    once = multislerp(models, None, [0.2, 0.3, 0.5])
    thrice = multislerp(models, None, [0.6, 0.9, 1.5], normalize=False)
    torch.testing.assert_close(thrice, 3 * once, rtol=1e-6, atol=1e-6)


def test_multislerp_refuses_weights_that_cancel() -> None:
    check = METHODS["multislerp"].check
    assert check is not None
    values = Settings(shared={"normalize_weights": True}, models=({"weight": 1.0}, {"weight": -1.0}))
    assert check(values) == (
        "the weights [1.0, -1.0] sum to 0, which normalize_weights cannot divide by; change a weight"
    )


def test_karcher_by_hand() -> None:
    # At 0, 30 and 90 degrees the mean direction is 40 degrees; lengths 1, 2, 6: 3.
    angles = (0.0, math.pi / 6, math.pi / 2)
    models = [
        scale * torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
        for scale, angle in zip((1, 2, 6), angles, strict=True)
    ]
    mean = math.radians(40)
    expected = 3 * torch.tensor([math.cos(mean), math.sin(mean)], dtype=torch.float64)
    # On a circle one step lands on the mean; float64.
    torch.testing.assert_close(karcher(models), expected, rtol=0, atol=1e-14)


@settings(deadline=None)
@given(
    seed=st.integers(0, 1000),
    num_models=st.integers(1, 5),
    dtype=DTYPES,
    spread=st.sampled_from([1e-3, 0.1, 1.0]),
)
def test_karcher_equals_the_reference(seed: int, num_models: int, dtype: torch.dtype, spread: float) -> None:
    _, models = family(seed, num_models, dtype, spread)
    merged = karcher(models, max_iter=200, tol=1e-7)
    # Stopped at steps of 1e-7, on vectors of length 10 and more; elements in float32 are rounded
    # to 5e-7.
    torch.testing.assert_close(merged.double(), karcher_reference(models), rtol=0, atol=3e-6)


@settings(deadline=None)
@given(seed=st.integers(0, 1000), num_models=st.integers(2, 6))
def test_karcher_mean_balances_its_tangents_and_is_nearest(seed: int, num_models: int) -> None:
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((num_models, 9)) + 1.0
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    factors = mean_direction(units @ units.T, 500, 1e-12)
    assert factors is not None
    mean = factors @ units

    def cost(point: np.ndarray) -> float:
        return float((np.arccos(np.clip(units @ point / np.linalg.norm(point), -1, 1)) ** 2).sum())

    # |T| is resolved to 1e-8 in coefficients of a Gram matrix: the docstring's accuracy.
    dots = np.clip(units @ mean, -1, 1)
    tangent = (np.arccos(dots) / np.sin(np.arccos(dots))) @ (units - dots[:, None] * mean)
    assert abs(np.linalg.norm(mean) - 1) < 1e-12
    assert np.linalg.norm(tangent) < 1e-7
    for _ in range(5):
        assert cost(mean) <= cost(mean + 0.05 * rng.standard_normal(9))


def test_karcher_leaves_tensors_of_zeros_out_of_the_direction() -> None:
    model = torch.randn(12)
    torch.testing.assert_close(karcher([model, torch.zeros(12)]), model / 2, rtol=1e-6, atol=0)
    assert torch.equal(karcher([torch.zeros(12)] * 3), torch.zeros(12))


def test_karcher_ignores_an_opposite_model_in_its_steps() -> None:
    # Scalars have two directions only: two models against one.
    models = [torch.tensor(2.0), torch.tensor(4.0), torch.tensor(-3.0)]
    torch.testing.assert_close(karcher(models), torch.tensor(3.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_means_scale_with_their_inputs(scale: float) -> None:
    _, models = family(3, 3, torch.float64, 1.0)
    scaled = [scale * model for model in models]
    # eps and tol are lengths of unit vectors here, so only rounding is left.
    torch.testing.assert_close(karcher(scaled), scale * karcher(models), rtol=1e-12, atol=0)
    torch.testing.assert_close(
        multislerp(scaled, None, [1, 1, 1], eps=1e-30),
        scale * multislerp(models, None, [1, 1, 1], eps=1e-30),
        rtol=1e-12,
        atol=0,
    )


def test_nan_reaches_the_whole_tensor() -> None:
    # A norm that is NaN leaves no element that could be right.
    models = [torch.randn(10), torch.randn(10)]
    models[1][3] = math.nan
    assert karcher(models).isnan().all()
    assert multislerp(models, None, [1, 1]).isnan().all()
