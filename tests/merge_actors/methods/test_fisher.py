"""Fisher-weighted averaging."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raymerge.merge_actors.methods import block
from raymerge.merge_actors.methods.fisher import FISHER, SCALE, root_mean_square
from raymerge.merge_actors.methods.interface import Settings
from raymerge.merge_actors.methods.slices import merge_tensors


def family(
    seed: int = 0, shape: tuple[int, ...] = (6, 9), num_models: int = 3
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Models, and Fisher values of very different size among elements and models."""
    generator = torch.Generator().manual_seed(seed)
    models = [torch.randn(shape, generator=generator) for _ in range(num_models)]
    fishers = [10 ** (i + 2 * torch.randn(shape, generator=generator)) for i in range(num_models)]
    return models, fishers


def merge(
    models: Sequence[torch.Tensor],
    fishers: Sequence[torch.Tensor],
    *,
    weights: Sequence[float] | None = None,
    scales: Sequence[float] | None = None,
    slice_units: int | None = None,
    **shared: Any,
) -> torch.Tensor:
    values = Settings(
        shared={"floor": 1e-6, "normalize": "none", **shared},
        models=tuple(
            {"weight": weight, **({SCALE: scales[i]} if scales else {})}
            for i, weight in enumerate(weights or [1.0] * len(models))
        ),
    )
    return merge_tensors(
        FISHER, models, None, values, sparsifiers={}, statistics=fishers, slice_units=slice_units
    )


def test_fisher_by_hand() -> None:
    models = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([5.0, -2.0, 1.0])]
    fishers = [torch.tensor([1.0, 3.0, 0.0]), torch.tensor([3.0, 1.0, 0.0])]
    assert merge(models, fishers).tolist() == [4.0, 1.0, 2.0]
    # c = 3, 1: (3 + 15) / 6, (18 - 2) / 10, and 3 : 1 where both are floored.
    expected = torch.tensor([3.0, 1.6, 2.5])
    torch.testing.assert_close(merge(models, fishers, weights=[3, 1]), expected, rtol=1e-6, atol=0)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 1000),
    num_models=st.integers(1, 4),
    normalize=st.sampled_from(["none", "tensor", "model"]),
    floor=st.sampled_from([1e-6, 0.1]),
    data=st.data(),
)
def test_fisher_equals_the_reference(
    seed: int, num_models: int, normalize: str, floor: float, data: st.DataObject
) -> None:
    models, fishers = family(seed, num_models=num_models)
    weights = data.draw(st.lists(st.floats(0.1, 5), min_size=num_models, max_size=num_models))
    # A made-up scale of the whole model, and that of the tensor.
    scales = [0.5 + i for i in range(num_models)]
    divisors = {
        "none": [1.0] * num_models,
        "tensor": [float(f.double().square().mean().sqrt()) for f in fishers],
        "model": scales,
    }[normalize]
    shares = torch.stack(
        [c * (f.double() / s).clamp_min(floor) for c, f, s in zip(weights, fishers, divisors, strict=True)]
    )
    expected = (shares * torch.stack(models).double()).sum(0) / shares.sum(0)
    merged = merge(models, fishers, weights=weights, scales=scales, normalize=normalize, floor=floor)
    # A few float32 roundings of terms of order 1.
    torch.testing.assert_close(merged.double(), expected, rtol=0, atol=3e-6)


def test_equal_fishers_give_the_weighted_mean() -> None:
    models, fishers = family()
    merged = merge(models, [fishers[0]] * 3, weights=[1, 2, 3])
    expected = (models[0] + 2 * models[1] + 3 * models[2]) / 6
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-6)


def test_zero_fishers_give_the_weighted_mean() -> None:
    models, fishers = family()
    zeros = [torch.zeros_like(f) for f in fishers]
    expected = (models[0] + 2 * models[1] + 3 * models[2]) / 6
    for normalize in ("none", "tensor", "model"):
        merged = merge(models, zeros, weights=[1, 2, 3], scales=[1, 1, 1], normalize=normalize)
        torch.testing.assert_close(merged, expected, rtol=0, atol=1e-6)


def test_one_model_and_copies_give_that_model_bit_for_bit() -> None:
    models, fishers = family()
    assert torch.equal(merge(models[:1], fishers[:1]), models[0])
    for normalize in ("none", "tensor"):
        assert torch.equal(merge([models[0]] * 3, fishers, normalize=normalize), models[0])
    for weights in ([1, 0, 0], [0, 1, 0], [0, 0, 1]):
        assert torch.equal(merge(models, fishers, weights=weights), models[weights.index(1)])


@pytest.mark.parametrize("factor", [1e-3, 7.0, 1e6])
def test_a_common_coefficient_changes_nothing(factor: float) -> None:
    models, fishers = family()
    merged = merge(models, fishers, weights=[factor, 2 * factor, 3 * factor])
    torch.testing.assert_close(merged, merge(models, fishers, weights=[1, 2, 3]), rtol=0, atol=2e-6)


@pytest.mark.parametrize("normalize", ["tensor", "model"])
def test_a_models_own_scale_changes_nothing_where_fishers_are_normalised(normalize: str) -> None:
    models, fishers = family()

    def with_factor(factor: float) -> torch.Tensor:
        changed = [fishers[0] * factor, *fishers[1:]]
        scales = [root_mean_square(float(f.double().square().sum()), f.numel()) for f in changed]
        return merge(models, changed, scales=scales, normalize=normalize)

    torch.testing.assert_close(with_factor(1e5), with_factor(1.0), rtol=0, atol=5e-6)
    torch.testing.assert_close(with_factor(1e-9), with_factor(1.0), rtol=0, atol=5e-6)
    plain = merge(models, fishers)
    assert not torch.allclose(merge(models, [fishers[0] * 1e5, *fishers[1:]]), plain, atol=1e-2)


def test_the_order_of_models_means_nothing() -> None:
    models, fishers = family()
    merged = merge(models, fishers, weights=[1, 2, 3], normalize="tensor")
    turned = merge(models[::-1], fishers[::-1], weights=[3, 2, 1], normalize="tensor")
    torch.testing.assert_close(turned, merged, rtol=0, atol=2e-6)


@pytest.mark.parametrize("normalize", ["none", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(), (300,), (40, 7), (0,), (0, 4)])
def test_slices_do_not_change_a_bit(
    shape: tuple[int, ...], dtype: torch.dtype, normalize: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block, "UNIT", 64)
    models, fishers = family(shape=shape)
    models = [model.to(dtype) for model in models]
    whole = merge(models, fishers, normalize=normalize)
    assert whole.shape == shape
    assert whole.dtype == torch.promote_types(dtype, torch.float32)
    for slice_units in (1, 2):
        assert torch.equal(merge(models, fishers, normalize=normalize, slice_units=slice_units), whole)


def test_inputs_are_left_alone() -> None:
    models, fishers = family()
    before = [tensor.clone() for tensor in (*models, *fishers)]
    merge(models, fishers, normalize="tensor")
    assert all(torch.equal(new, old) for new, old in zip((*models, *fishers), before, strict=True))


def test_the_method_as_a_recipe_sees_it() -> None:
    assert (FISHER.kind, FISHER.statistic) == ("block", "fisher")
    defaults = {parameter.name: parameter.default for parameter in FISHER.parameters}
    assert defaults == {"weight": 1.0, "floor": 1e-6, "normalize": "none"}
    assert FISHER.check is not None
    assert FISHER.check(Settings(models=({"weight": 0.0},))) is not None
