"""Task arithmetic, TIES and their thinned variants: formulas, limits, identities, slicing."""

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raymerge.merge_actors.methods import METHODS
from raymerge.merge_actors.methods.interface import Settings

FAMILY = [
    "task_arithmetic",
    "ties",
    "dare_linear",
    "dare_ties",
    "della_linear",
    "della",
    "breadcrumbs",
    "breadcrumbs_ties",
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(), (0,), (1,), (5,), (70_001,), (3, 0), (1, 9), (40, 33), (300, 500), (2, 7, 11)]


def fine_tunes(
    shape: Sequence[int], num_models: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return a base and models whose deltas share a direction and have some zeros."""
    generator = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.randn, tuple(shape), generator=generator, dtype=torch.float64)
    base, common = draw(), draw()
    models = [base + 0.05 * (common + draw()) * (draw() > -1) for _ in range(num_models)]
    return base.to(dtype), [model.to(dtype) for model in models]


def deltas_of(base: torch.Tensor, models: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the deltas in float64, each rounded to the compute dtype as a merge does."""
    compute = torch.float64 if base.dtype == torch.float64 else torch.float32
    return torch.stack([(model.to(compute) - base.to(compute)).double() for model in models])


def trimmed(delta: torch.Tensor, density: float) -> torch.Tensor:
    """Keep the floor(density n) largest by a stable sort."""
    flat = delta.flatten()
    order = flat.abs().sort(descending=True, stable=True).indices[: int(density * flat.numel())]
    return torch.zeros_like(flat).index_copy_(0, order, flat[order]).view_as(delta)


def elected(vectors: torch.Tensor, weights: torch.Tensor, function: str) -> torch.Tensor:
    """Merge the entries that agree with the sign of the sum, in float64, entry by entry."""
    sign = torch.where(vectors.sum(dim=0) >= 0, 1.0, -1.0)
    agrees = vectors.sign() == sign
    if function == "max":
        return sign * torch.where(agrees, vectors.abs(), 0).amax(dim=0)
    total = torch.where(agrees, vectors, 0).sum(dim=0)
    if function == "sum":
        return total
    column = weights.view(-1, *[1] * (vectors.dim() - 1))
    divisor = torch.where(agrees, column, 0).sum(dim=0)
    return total / torch.where(divisor == 0, 1, divisor)


def tolerance(dtype: torch.dtype) -> float:
    """Four sums and products of elements of order 1 to 4 in the compute dtype."""
    return 2e-15 if dtype == torch.float64 else 1e-6


def test_task_arithmetic_by_hand(merge: Any) -> None:
    base = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    models = [base + torch.tensor([[1.0, 0.0], [2.0, -1.0]]), base + torch.tensor([[0.0, 4.0], [2.0, 1.0]])]
    each = [{"weight": 0.5}, {"weight": 0.25}]
    expected = base + 2 * torch.tensor([[0.5, 1.0], [1.5, -0.25]])
    assert torch.equal(merge("task_arithmetic", models, base, each, **{"lambda": 2.0}), expected)
    normalized = base + 2 / 0.75 * torch.tensor([[0.5, 1.0], [1.5, -0.25]])
    found = merge("task_arithmetic", models, base, each, normalize=True, **{"lambda": 2.0})
    torch.testing.assert_close(found, normalized, rtol=2e-7, atol=0)  # one float32 rounding


def test_ties_by_hand(merge: Any) -> None:
    base = torch.zeros(6)
    first = torch.tensor([4.0, -3.0, 0.5, 2.0, -1.0, 0.0])
    second = torch.tensor([-1.0, -5.0, 0.25, -2.0, 3.0, 0.0])
    # Half of six entries: first keeps 4, -3, 2; second keeps -5, -2, 3.
    # Sums 4, -8, 0, 0 (elects +), 3, 0.
    each = {"weight": 1.0, "density": 0.5}
    assert merge("ties", [first, second], base, each).tolist() == [4.0, -4.0, 0.0, 2.0, 3.0, 0.0]
    assert merge("ties", [first, second], base, each, merge_func="sum").tolist() == [4, -8, 0, 2, 3, 0]
    assert merge("ties", [first, second], base, each, merge_func="max").tolist() == [4, -5, 0, 2, 3, 0]
    assert merge("ties", [first, second], base, each, normalize=False).tolist() == [4, -8, 0, 2, 3, 0]


@settings(deadline=None, max_examples=40)
@given(
    weights=st.lists(st.sampled_from([-0.5, 0.0, 0.25, 0.5, 1.0, 1.5]), min_size=1, max_size=4),
    seed=st.integers(0, 99),
    dtype=st.sampled_from(DTYPES),
    normalize=st.booleans(),
    scale=st.sampled_from([1.0, 0.3, 1.8]),
)
def test_task_arithmetic_equals_the_reference(
    merge: Any, weights: list[float], seed: int, dtype: torch.dtype, normalize: bool, scale: float
) -> None:
    base, models = fine_tunes((9, 13), len(weights), seed, dtype)
    total = torch.einsum("m,mij->ij", torch.tensor(weights, dtype=torch.float64), deltas_of(base, models))
    divisor = sum(weights) if normalize and sum(weights) != 0 else 1.0
    each = [{"weight": weight} for weight in weights]
    merged = merge("task_arithmetic", models, base, each, normalize=normalize, **{"lambda": scale})
    bound = tolerance(dtype) * max(1, 1 / abs(divisor))
    torch.testing.assert_close(
        merged.double(), base.double() + scale * total / divisor, rtol=bound, atol=bound
    )


@settings(deadline=None, max_examples=60)
@given(
    weights=st.lists(st.sampled_from([-0.5, 0.0, 0.25, 0.5, 1.0, 1.5]), min_size=1, max_size=4),
    densities=st.lists(st.floats(0, 1), min_size=4, max_size=4),
    seed=st.integers(0, 99),
    dtype=st.sampled_from(DTYPES),
    function=st.sampled_from(["mean", "sum", "max"]),
)
def test_ties_equals_the_reference(
    merge: Any, weights: list[float], densities: list[float], seed: int, dtype: torch.dtype, function: str
) -> None:
    base, models = fine_tunes((9, 13), len(weights), seed, dtype)
    column = torch.tensor(weights, dtype=torch.float64)
    thinned = [trimmed(*pair) for pair in zip(deltas_of(base, models), densities, strict=False)]
    vectors = torch.stack(thinned) * column.view(-1, 1, 1)
    each = [{"weight": w, "density": d} for w, d in zip(weights, densities, strict=False)]
    merged = merge("ties", models, base, each, merge_func=function)
    # Where entries cancel exactly, or nearly, float32 may elect the other sign; leave those out.
    is_clear = (vectors.sum(dim=0).abs() > 1e-6) | (vectors == 0).all(dim=0)
    expected = base.double() + elected(vectors, column, function)
    torch.testing.assert_close(
        merged.double()[is_clear], expected[is_clear], rtol=4 * tolerance(dtype), atol=4 * tolerance(dtype)
    )


@pytest.mark.parametrize("method", FAMILY)
@pytest.mark.parametrize("dtype", DTYPES)
def test_density_one_and_one_model_gives_the_model(merge: Any, method: str, dtype: torch.dtype) -> None:
    base, (model,) = fine_tunes((40, 33), 1, 1, dtype)
    merged = merge(method, [model], base, {"weight": 1.0})
    # base + (model - base) rounds twice.
    torch.testing.assert_close(merged.to(dtype), model, rtol=tolerance(dtype), atol=tolerance(dtype))


@pytest.mark.parametrize("method", [name for name in FAMILY if name != "task_arithmetic"])
def test_density_zero_gives_the_base(merge: Any, method: str) -> None:
    base, models = fine_tunes((40, 33))
    assert torch.equal(merge(method, models, base, {"weight": 0.7, "density": 0.0}), base)


@pytest.mark.parametrize("method", FAMILY)
@pytest.mark.parametrize("normalize", [False, True])
def test_weight_zero_gives_the_base(merge: Any, method: str, normalize: bool) -> None:
    base, models = fine_tunes((40, 33))
    each = {"weight": 0.0, "density": 0.4}
    assert torch.equal(merge(method, models, base, each, normalize=normalize), base)


@pytest.mark.parametrize("method", ["ties", "dare_ties", "della", "breadcrumbs_ties"])
def test_equal_models_give_the_model(merge: Any, method: str) -> None:
    base, (model,) = fine_tunes((40, 33), 1)
    merged = merge(method, [model] * 5, base, {"weight": 0.3}, normalize=True)
    torch.testing.assert_close(merged, model, rtol=1e-6, atol=1e-6)  # five sums and a division in float32


def test_task_arithmetic_with_lambda_one_over_n_is_the_mean(merge: Any) -> None:
    base, models = fine_tunes((40, 33))
    found = merge("task_arithmetic", models, base, {"weight": 1.0}, **{"lambda": 1 / 3})
    torch.testing.assert_close(found, torch.stack(models).mean(dim=0), rtol=1e-6, atol=1e-6)


def test_ties_of_agreeing_models_at_density_one_is_the_mean(merge: Any) -> None:
    """Pitfall 37."""
    base, models = fine_tunes((40, 33))
    agreeing = [base + (model - base).abs() * torch.sign(base) for model in models]
    moved = torch.stack([model != base for model in agreeing]).all(dim=0)
    found = merge("ties", agreeing, base, {"weight": 1.0}, **{"lambda": 0.5})
    expected = base + 0.5 * (torch.stack(agreeing).mean(dim=0) - base)
    torch.testing.assert_close(found[moved], expected[moved], rtol=1e-6, atol=1e-6)


def test_ties_elects_plus_where_the_sum_is_zero(merge: Any) -> None:
    """Pitfall 40; a sum of -0 elects + as well."""
    base = torch.zeros(3)
    first, second = torch.tensor([2.0, -2.0, 0.0]), torch.tensor([-2.0, 2.0, 0.0])
    assert merge("ties", [first, second], base, {"weight": 1.0}).tolist() == [2.0, 2.0, 0.0]
    negative = merge("ties", [first * 0, second * 0], base, {"weight": -1.0})
    assert negative.tolist() == [0.0, 0.0, 0.0]


def test_ties_of_one_model_only_trims(merge: Any) -> None:
    """Pitfall 43."""
    base, (model,) = fine_tunes((300, 500), 1)
    merged = merge("ties", [model], base, {"weight": 1.0, "density": 0.2})
    expected = base + trimmed((model - base), 0.2)
    assert torch.equal(merged, expected)
    assert int((merged != base).sum()) == 30_000


def test_ties_weights_enter_before_the_election(merge: Any) -> None:
    """Pitfall 42: a heavy model outvotes two light ones."""
    base = torch.zeros(1)
    models = [torch.tensor([-1.0]), torch.tensor([1.0]), torch.tensor([1.0])]
    each = [{"weight": 3.0}, {"weight": 1.0}, {"weight": 1.0}]
    assert merge("ties", models, base, each).tolist() == [-1.0]


def test_weights_that_cancel_among_agreeing_entries_divide_by_one(merge: Any) -> None:
    base = torch.zeros(2)
    models = [torch.tensor([2.0, 1.0]), torch.tensor([-1.0, 1.0])]
    # First entry: 0.1 * 2 and -0.1 * -1 agree and their weights sum to 0. Second: 0.1 and -0.1 elect +.
    each = [{"weight": 0.1}, {"weight": -0.1}]
    torch.testing.assert_close(merge("ties", models, base, each), torch.tensor([0.3, 1.0]))


def test_weights_that_cancel_but_for_rounding_divide_by_one(merge: Any) -> None:
    """0.3 + 0.6 - 0.9 is -1e-16, or 6e-8 in float32: as a divisor it would make garbage of the merge."""
    base, weights = torch.zeros(1), (0.3, 0.6, -0.9)
    each = [{"weight": weight} for weight in weights]
    models = [torch.tensor([value]) for value in (3.0, 2.0, 1.0)]
    merged = merge("task_arithmetic", models, base, each, normalize=True)
    torch.testing.assert_close(merged, torch.tensor([1.2]))
    agreeing = [torch.tensor([value]) for value in (3.0, 2.0, -1.0)]
    torch.testing.assert_close(merge("ties", agreeing, base, each), torch.tensor([3.0]))


@pytest.mark.parametrize("method", FAMILY)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_slicing_does_not_matter(merge: Any, method: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    base, models = fine_tunes(shape, dtype=dtype)
    each = {"weight": 0.6, "density": 0.4}
    for shared in ({}, {"rescale": "l1"}):
        whole = merge(method, models, base, each, **shared)
        assert whole.shape == base.shape
        for slice_units in (1, 2, 5):
            assert torch.equal(merge(method, models, base, each, slice_units=slice_units, **shared), whole)


@pytest.mark.parametrize("method", FAMILY)
def test_inputs_are_left_alone(merge: Any, method: str) -> None:
    base, models = fine_tunes((40, 33))
    before = [tensor.clone() for tensor in (base, *models)]
    merge(method, models, base, {"weight": 0.6, "density": 0.4})
    assert all(map(torch.equal, (base, *models), before))


@pytest.mark.parametrize("method", FAMILY)
def test_bad_numbers_stay_where_they_are(merge: Any, method: str) -> None:
    base, models = fine_tunes((40, 33))
    models[1][3, 4] = float("nan")
    merged = merge(method, models, base, {"weight": 0.6, "density": 0.5})
    assert torch.isfinite(merged).sum() >= merged.numel() - 1


def test_only_a_plain_sum_shows_every_bad_number() -> None:
    assert [name for name in FAMILY if METHODS[name].is_plain_sum] == ["task_arithmetic"]


@pytest.mark.parametrize("method", ["della", "della_linear"])
def test_della_checks_its_probabilities(method: str) -> None:
    check = METHODS[method].check
    assert check is not None
    values = {"weight": 1.0, "density": 0.1, "epsilon": 0.15, "rescale": True}
    assert check(Settings(models=(values | {"density": 0.5},))) is None
    assert check(Settings(models=(values | {"density": 1.0},))) is None
    assert check(Settings(models=(values | {"density": 0.5}, values))) == (
        "density 0.1 with epsilon 0.15 gives keep probabilities of -0.05 to 0.25, which must lie within "
        "(0, 1); set epsilon below 0.1"
    )
    for density, epsilon in (
        (0.25, 0.25),
        (0.75, 0.25),
    ):  # 0 and 1 are no probabilities to divide by or draw at
        at_the_end = values | {"density": density, "epsilon": epsilon}
        assert "must lie within (0, 1)" in (check(Settings(models=(at_the_end,))) or "")
