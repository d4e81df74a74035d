"""SLERP of two tensors, and NearSWAP, which shares its inputs."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raymerge.merge_actors.methods import METHODS, SPARSIFIERS
from raymerge.merge_actors.methods.interface import Settings
from raymerge.merge_actors.methods.slices import merge_tensors

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])


def merge(name: str, base: torch.Tensor, model: torch.Tensor, t: float) -> torch.Tensor:
    values = Settings(shared={"t": t}, models=({},))
    return merge_tensors(METHODS[name], [model], base, values, sparsifiers=SPARSIFIERS)


def slerp_reference(base: torch.Tensor, model: torch.Tensor, t: float) -> torch.Tensor:
    """Turn the base's direction towards the model's in the plane of both, by rotation in float64."""
    a, b = base.double().flatten(), model.double().flatten()
    unit_a, unit_b = (v / v.norm() if v.norm() > 1e-8 else v for v in (a, b))
    cosine = float(unit_a @ unit_b)
    if abs(cosine) > 0.9995:
        return ((1 - t) * a + t * b).view(base.shape)
    angle = math.acos(cosine)
    of_a, of_b = math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
    return (of_a * a + of_b * b).view(base.shape)


def test_slerp_by_hand() -> None:
    base, model = torch.tensor([[3.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 5.0]])
    half = math.sqrt(0.5)
    expected = torch.tensor([[3 * half, 0.0], [0.0, 5 * half]])
    torch.testing.assert_close(merge("slerp", base, model, 0.5), expected, rtol=1e-7, atol=0)


def test_slerp_of_unit_vectors_turns_at_constant_speed() -> None:
    angle = 1.1
    base = torch.tensor([1.0, 0.0], dtype=torch.float64)
    model = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
    for t in (0.2, 0.5, 0.9):
        expected = torch.tensor([math.cos(t * angle), math.sin(t * angle)], dtype=torch.float64)
        # Float64 throughout; an arc cosine and two sines.
        torch.testing.assert_close(merge("slerp", base, model, t), expected, rtol=0, atol=1e-15)


@settings(deadline=None)
@given(seed=st.integers(0, 1000), t=st.floats(0, 1), dtype=DTYPES, spread=st.sampled_from([0.01, 0.3, 5.0]))
def test_slerp_equals_the_reference(seed: int, t: float, dtype: torch.dtype, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(6, 8, generator=generator).to(dtype)
    model = (base.double() + spread * torch.randn(6, 8, generator=generator)).to(dtype)
    merged = merge("slerp", base, model, t)
    # Two products and a sum in float32, of elements up to 20; angles are in float64 on both sides.
    tolerance = 1e-13 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(
        merged.double(), slerp_reference(base, model, t), rtol=tolerance, atol=20 * tolerance
    )


@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
def test_slerp_ends_are_exact(scale: float) -> None:
    base, model = torch.randn(50, 3) * scale, torch.randn(50, 3) * scale
    assert torch.equal(merge("slerp", base, model, 0.0), base)
    assert torch.equal(merge("slerp", base, model, 1.0), model)


def test_slerp_of_equal_tensors_is_exact() -> None:
    base = torch.randn(1000)
    assert torch.equal(merge("slerp", base, base.clone(), 0.37), base)


def test_slerp_of_colinear_tensors_is_straight() -> None:
    base = torch.randn(1000)
    # Also where the model points the other way, where the arc is undefined.
    for factor in (2.0, -1.0):
        expected = (0.75 + 0.25 * factor) * base
        torch.testing.assert_close(merge("slerp", base, factor * base, 0.25), expected, rtol=1e-6, atol=1e-7)


def test_slerp_of_a_zero_tensor_takes_the_sine_of_the_other() -> None:
    base, zeros = torch.randn(10), torch.zeros(10)
    expected = math.sin(0.75 * math.pi / 2) * base
    torch.testing.assert_close(merge("slerp", base, zeros, 0.25), expected, rtol=1e-6, atol=0)
    assert torch.equal(merge("slerp", zeros, zeros.clone(), 0.25), zeros)


def test_nearswap_by_hand() -> None:
    base = torch.tensor([1.0, 1.0, 1.0, 1.0])
    model = torch.tensor([1.25, 3.0, -3.0, 1.0])
    assert torch.equal(merge("nearswap", base, model, 0.5), torch.tensor([1.25, 1.5, 0.5, 1.0]))


@settings(deadline=None)
@given(
    seed=st.integers(0, 1000),
    t=st.sampled_from([0.0, 1e-9, 3e-7, 1e-6, 1e-4, 0.1, 10.0]),
    spread=st.sampled_from([1e-7, 1e-3, 1.0]),
    dtype=DTYPES,
)
def test_nearswap_equals_the_reference(seed: int, t: float, spread: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(40, generator=generator).to(dtype)
    model = (base.double() + spread * torch.randn(40, generator=generator)).to(dtype)
    a, b = base.double(), model.double()
    weight = (t / (a - b).abs().clamp(min=1e-6)).clamp(0, 1)
    merged = merge("nearswap", base, model, t)
    # The delta and the sum are rounded to float32; elements are at most 5.
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(merged.double(), weight * b + (1 - weight) * a, rtol=0, atol=tolerance)


def test_nearswap_at_0_is_the_base() -> None:
    base = torch.randn(100)
    assert torch.equal(merge("nearswap", base, torch.randn(100), 0.0), base)
