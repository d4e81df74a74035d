"""SCE, RAM and Arcee Fusion: what is selected by variance, movement and importance."""

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float64])


def fine_tunes(
    shape: tuple[int, ...], num_models: int, seed: int, dtype: torch.dtype, spread: float = 0.1
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return a base and models that moved three quarters of the elements."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator, dtype=torch.float64)
    steps = [torch.randn((2, *shape), generator=generator, dtype=torch.float64) for _ in range(num_models)]
    return base.to(dtype), [(base + spread * s[0] * (s[1].abs() > 0.32)).to(dtype) for s in steps]


def deltas_of(base: torch.Tensor, models: list[torch.Tensor]) -> torch.Tensor:
    """Return the deltas in float64, each rounded to the compute dtype as a merge does."""
    compute = torch.float64 if base.dtype == torch.float64 else torch.float32
    return torch.stack([(model.to(compute) - base.to(compute)).double() for model in models])


def sce_reference(deltas: torch.Tensor, share: float) -> torch.Tensor:
    """Follow the three steps of the paper in float64."""
    variance = deltas.var(dim=0, unbiased=False).flatten()
    if share < 1:
        order = variance.sort(descending=True, stable=True).indices[
            : int(share * int(variance.count_nonzero()))
        ]
        deltas = deltas * torch.zeros_like(variance).index_fill_(0, order, 1).view_as(deltas[0])
    squares = (deltas**2).flatten(1).mean(dim=1)
    weights = squares / squares.sum() if squares.sum() > 0 else torch.full_like(squares, 1 / len(deltas))
    sign = torch.where(deltas.sum(dim=0) >= 0, 1.0, -1.0)
    counting = weights.view(-1, *[1] * (deltas.dim() - 1)) * (deltas.sign() == sign)
    total = counting.sum(dim=0)
    return (counting * deltas).sum(dim=0) / torch.where(total == 0, 1, total)


def test_sce_by_hand(merge: Any) -> None:
    base = torch.zeros(4)
    models = [torch.tensor([3.0, 1.0, 0.5, 2.0]), torch.tensor([-1.0, 1.0, 0.5, 1.0])]
    # Variances 4, 0, 0, 0.25: of the two varying positions the first one is kept at 0.5.
    # At 0.5 the squares are 9 and 1; the first entry elects +, which the first model alone has.
    # floor(0.99 * 2) is 1 as well. Products and quotients are rounded once each.
    for share in (0.5, 0.99):
        found = merge("sce", models, base, select_topk=share)
        torch.testing.assert_close(found, torch.tensor([3.0, 0.0, 0.0, 0.0]), rtol=2e-7, atol=0)
    # At 1 nothing is selected away: squares 14.25 and 3.25.
    found = merge("sce", models, base, select_topk=1.0)
    expected = torch.tensor([3.0, 1.0, 0.5, (14.25 * 2 + 3.25) / 17.5])
    torch.testing.assert_close(found, expected, rtol=2e-7, atol=0)


@settings(deadline=None, max_examples=40)
@given(
    num_models=st.integers(1, 4),
    share=st.sampled_from([0.0, 0.1, 0.37, 0.9, 1.0]),
    seed=st.integers(0, 99),
    dtype=DTYPES,
    spread=st.sampled_from([0.1, 1e-3]),
)
def test_sce_equals_the_reference(
    merge: Any, num_models: int, share: float, seed: int, dtype: torch.dtype, spread: float
) -> None:
    base, models = fine_tunes((9, 13), num_models, seed, dtype, spread)
    deltas = deltas_of(base, models)
    # bf16 deltas have equal variances that float32 tells apart: other positions, no less right.
    assume(dtype != torch.bfloat16 or share in (0, 1))
    merged = merge("sce", models, base, select_topk=share).double()
    # float32 sums of elements up to 4, rounded a few times.
    bound = 1e-14 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(merged, base.double() + sce_reference(deltas, share), rtol=bound, atol=bound)


def test_sce_weighs_small_deltas_by_their_squares(merge: Any) -> None:
    """The peer takes equal weights where the squares sum to less than 1e-6, as usual fine-tunes' do."""
    base = torch.zeros(100, dtype=torch.float64)
    models = [torch.full_like(base, 1e-4), torch.full_like(base, 3e-4)]
    merged = merge("sce", models, base)
    torch.testing.assert_close(merged, torch.full_like(base, (1 * 1e-4 + 9 * 3e-4) / 10), rtol=1e-14, atol=0)


@pytest.mark.parametrize("method", ["sce", "ram", "ramplus_tl"])
def test_models_that_did_not_move_give_the_base(merge: Any, method: str) -> None:
    base = torch.randn(40, 33).bfloat16()
    assert torch.equal(merge(method, [base, base.clone()], base), base.float())


def ram_reference(deltas: torch.Tensor, epsilon: float, strength: float, bound: float) -> torch.Tensor:
    """Treat position by position what nobody, one and several models moved."""
    moved = deltas.abs() > epsilon
    counts = moved.sum(dim=0)
    merged = torch.zeros_like(deltas[0])
    for delta, own in zip(deltas, moved, strict=True):
        shared, alone = int((own & (counts > 1)).sum()), int((own & (counts == 1)).sum())
        factor = 1 + strength * min(shared / max(alone, 1), bound)
        merged += torch.where(own & (counts == 1), factor * delta, 0)
        merged += torch.where(own & (counts > 1), delta / counts, 0)
    return merged


def test_ram_by_hand(merge: Any) -> None:
    base = torch.zeros(4)
    models = [torch.tensor([1.0, 4.0, 0.05, 0.0]), torch.tensor([0.0, 2.0, 0.01, 8.0])]
    assert merge("ram", models, base, epsilon=0.1).tolist() == [1.0, 3.0, 0.0, 8.0]
    # Each model shares one position and has one of its own: rho = 1, bounded by 0.5.
    plus = merge("ramplus_tl", models, base, epsilon=0.1, r=0.5, alpha=0.5)
    assert plus.tolist() == [1.25, 3.0, 0.0, 10.0]


@settings(deadline=None, max_examples=40)
@given(
    num_models=st.integers(1, 4),
    seed=st.integers(0, 99),
    dtype=DTYPES,
    bound=st.sampled_from([0.0, 0.2, 9.0]),
)
def test_ram_equals_the_reference(
    merge: Any, num_models: int, seed: int, dtype: torch.dtype, bound: float
) -> None:
    base, models = fine_tunes((9, 13), num_models, seed, dtype)
    deltas = deltas_of(base, models)
    tolerance = 1e-14 if dtype == torch.float64 else 2e-6
    for method, strength in (("ram", 0.0), ("ramplus_tl", 0.3)):
        merged = merge(method, models, base, epsilon=0.03, r=strength, alpha=bound).double()
        expected = base.double() + ram_reference(deltas, 0.03, strength, bound)
        torch.testing.assert_close(merged, expected, rtol=tolerance, atol=tolerance)


def fusion_reference(base: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """Compute importance and quantiles with torch, in float64."""
    x, b = (tensor.double().reshape(-1, tensor.shape[-1]) for tensor in (model, base))
    p, q = torch.softmax(x, dim=-1) + 1e-8, torch.softmax(b, dim=-1) + 1e-8
    importance = (x - b).abs() * (p * (p / q).log()).sum(dim=-1, keepdim=True)
    first, median, third = torch.quantile(importance.flatten(), torch.tensor([0.25, 0.5, 0.75]).double())
    return torch.where(importance >= median + 1.5 * (third - first), x, b).view_as(base)


@settings(deadline=None, max_examples=40)
@given(
    shape=st.sampled_from([(40,), (9, 13), (3, 5, 7), (2, 300)]),
    seed=st.integers(0, 99),
    spread=st.sampled_from([0.1, 1.0]),
)
def test_fusion_equals_the_reference(merge: Any, shape: tuple[int, ...], seed: int, spread: float) -> None:
    base, models = fine_tunes(shape, 1, seed, torch.float64, spread)
    merged = merge("arcee_fusion", models, base)
    # Taken elements are base + (model - base), rounded twice.
    torch.testing.assert_close(merged, fusion_reference(base, models[0]), rtol=1e-14, atol=1e-14)


def test_fusion_takes_outliers(merge: Any) -> None:
    base = torch.zeros(2, 8, dtype=torch.float64)
    model = base.clone()
    model[0, 0], model[0, 1:] = 5.0, 0.01
    merged = merge("arcee_fusion", [model], base)
    assert merged[0, 0] == 5.0
    assert torch.equal(merged[1], base[1])


def test_fusion_of_equal_models_is_exact(merge: Any) -> None:
    base = torch.randn(40, 33).bfloat16()
    assert torch.equal(merge("arcee_fusion", [base.clone()], base), base.float())


@pytest.mark.parametrize("method", ["sce", "ram", "ramplus_tl", "arcee_fusion"])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (70_001,), (3, 0), (1, 9), (300, 500), (2, 7, 11)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slicing_does_not_matter(merge: Any, method: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    base, models = fine_tunes(shape, 1 if method == "arcee_fusion" else 3, 0, dtype)
    shared = {"select_topk": 0.3} if method == "sce" else {}
    whole = merge(method, models, base, **shared)
    assert whole.shape == base.shape
    for slice_units in (1, 2, 5):
        assert torch.equal(merge(method, models, base, slice_units=slice_units, **shared), whole)
