"""Model Stock, per tensor and per last-axis vector."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raymerge.merge_actors.methods import METHODS, SPARSIFIERS
from raymerge.merge_actors.methods.interface import Settings
from raymerge.merge_actors.methods.slices import merge_tensors, split_of


def merge(models: list[torch.Tensor], base: torch.Tensor, *, filter_wise: bool = False) -> torch.Tensor:
    values = Settings(shared={"filter_wise": filter_wise}, models=({},) * len(models))
    return merge_tensors(METHODS["model_stock"], models, base, values, sparsifiers=SPARSIFIERS)


def reference(models: list[torch.Tensor], base: torch.Tensor, *, filter_wise: bool) -> torch.Tensor:
    """Follow the formula vector by vector in float64."""
    shape = base.shape
    rows = (-1, shape[-1]) if filter_wise and len(shape) else (1, -1)
    origin = base.double().reshape(rows)
    vectors = [model.double().reshape(rows) for model in models]
    merged = []
    for r in range(len(origin)):
        deltas = [vector[r] - origin[r] for vector in vectors]
        cosines = [
            float(a @ b / (a.norm() * b.norm())) if a.norm() * b.norm() > 0 else 0.0
            for a, b in itertools.combinations(deltas, 2)
        ]
        cosine = max(0.0, sum(cosines) / len(cosines))
        t = len(models) * cosine / (1 + (len(models) - 1) * cosine)
        merged.append(t * sum(vector[r] for vector in vectors) / len(vectors) + (1 - t) * origin[r])
    return torch.stack(merged).reshape(shape)


def test_by_hand() -> None:
    # Deltas at 60 degrees: t = 2 * 0.5 / 1.5 = 2 / 3, of the mean (3, sqrt(3)).
    base = torch.tensor([1.0, 1.0])
    models = [base + torch.tensor([4.0, 0.0]), base + torch.tensor([2.0, 2 * math.sqrt(3)])]
    expected = base + 2 / 3 * torch.tensor([3.0, math.sqrt(3)])
    torch.testing.assert_close(merge(models, base), expected, rtol=1e-6, atol=0)


@settings(deadline=None)
@given(
    seed=st.integers(0, 1000),
    num_models=st.integers(2, 5),
    filter_wise=st.booleans(),
    shape=st.sampled_from([(), (1,), (9,), (6, 8), (2, 3, 5), (4, 1)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    agreement=st.sampled_from([0.0, 1.0, 10.0]),
)
def test_equals_the_reference(
    seed: int,
    num_models: int,
    filter_wise: bool,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    agreement: float,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    base, common = (torch.randn(shape, generator=generator) for _ in range(2))
    models = [
        (base + agreement * common + torch.randn(shape, generator=generator)).to(dtype)
        for _ in range(num_models)
    ]
    merged = merge(models, base.to(dtype), filter_wise=filter_wise)
    expected = reference(models, base.to(dtype), filter_wise=filter_wise)
    # Elements of order 30 in float32; the angles of its deltas carry their rounding too.
    tolerance = 1e-13 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(merged.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("filter_wise", [False, True])
def test_limits(filter_wise: bool) -> None:
    base, model = torch.randn(6, 5), torch.randn(6, 5)
    # Copies: the angle is 0 and t is 1; one subtraction and one addition are rounded.
    copies = merge([model, model.clone(), model.clone()], base, filter_wise=filter_wise)
    torch.testing.assert_close(copies, model, rtol=0, atol=1e-6)
    # Frozen, or frozen in all models but one: no angle, the base.
    assert torch.equal(merge([base.clone()] * 3, base, filter_wise=filter_wise), base)
    assert torch.equal(merge([base.clone(), model], base, filter_wise=filter_wise), base)
    # Exactly opposed, where the formula divides by 0.
    opposed = torch.zeros(6, 5)
    assert torch.equal(merge([model, -model], opposed, filter_wise=filter_wise), opposed)


def test_orthogonal_deltas_give_the_base() -> None:
    base = torch.tensor([3.0, 4.0, 5.0])
    models = [base + torch.tensor([1.0, 0, 0]), base + torch.tensor([0, 2.0, 0])]
    assert torch.equal(merge(models, base), base)


def test_result_lies_between_base_and_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        base, first, second = (torch.randn(4, generator=generator, dtype=torch.float64) for _ in range(3))
        merged = merge([first, second], base)
        mean = (first + second) / 2 - base
        t = float((merged - base) @ mean / (mean @ mean))
        assert -1e-12 <= t <= 1 + 1e-12


def test_filter_wise_needs_whole_rows() -> None:
    method = METHODS["model_stock"]
    for filter_wise, split in ((False, "elementwise"), (True, "rowwise")):
        values = Settings(shared={"filter_wise": filter_wise}, models=({}, {}))
        assert split_of(method, values, SPARSIFIERS) == split
