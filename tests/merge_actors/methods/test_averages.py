"""linear and passthrough."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raymerge.merge_actors.methods import METHODS, SPARSIFIERS
from raymerge.merge_actors.methods.interface import Settings
from raymerge.merge_actors.methods.slices import merge_tensors


def average(models: list[torch.Tensor], weights: list[float], *, normalize: bool = True) -> torch.Tensor:
    values = Settings(shared={"normalize": normalize}, models=tuple({"weight": weight} for weight in weights))
    return merge_tensors(METHODS["linear"], models, None, values, sparsifiers=SPARSIFIERS)


def copy(model: torch.Tensor, scale: float | None) -> torch.Tensor:
    values = Settings(models=({"scale": scale},))
    return merge_tensors(METHODS["passthrough"], [model], None, values, sparsifiers=SPARSIFIERS)


def test_linear_by_hand() -> None:
    models = [torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[5.0, -2.0], [0.0, 8.0]])]
    assert torch.equal(average(models, [1, 3]), torch.tensor([[4.0, -1.0], [0.75, 7.0]]))
    assert torch.equal(average(models, [1, 3], normalize=False), torch.tensor([[16.0, -4.0], [3.0, 28.0]]))


@settings(deadline=None)
@given(
    num_models=st.integers(1, 5),
    normalize=st.booleans(),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_linear_equals_the_reference(num_models: int, normalize: bool, seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    models = [torch.randn(7, 5, generator=generator).to(dtype) for _ in range(num_models)]
    weights = torch.rand(num_models, generator=generator, dtype=torch.float64) + 0.1
    reference = torch.einsum("m,mij->ij", weights, torch.stack(models).double())
    if normalize:
        reference /= weights.sum()
    merged = average(models, weights.tolist(), normalize=normalize)
    # At most five terms of order 1, each rounded twice to float32.
    tolerance = 1e-14 if dtype == torch.float64 else 3e-6
    torch.testing.assert_close(merged.double(), reference, rtol=tolerance, atol=tolerance)


def test_linear_limits() -> None:
    first, second = torch.randn(9), torch.randn(9)
    assert torch.equal(average([first, second], [1, 0]), first)
    assert torch.equal(average([first, second], [0, 1]), second)
    assert torch.equal(average([first], [0.3], normalize=False), first * 0.3)
    assert torch.equal(average([first] * 4, [1, 1, 1, 1]), first)


def test_linear_leaves_its_inputs_alone() -> None:
    models = [torch.randn(9), torch.randn(9)]
    before = [model.clone() for model in models]
    average(models, [2, 3])
    assert all(torch.equal(model, old) for model, old in zip(models, before, strict=True))


@pytest.mark.parametrize(("normalize", "is_refused"), [(True, True), (False, False)])
def test_linear_refuses_weights_that_cancel(normalize: bool, is_refused: bool) -> None:
    check = METHODS["linear"].check
    assert check is not None
    values = Settings(shared={"normalize": normalize}, models=({"weight": 0.5}, {"weight": -0.5}))
    expected = (
        "the weights [0.5, -0.5] sum to 0, which normalize cannot divide by; set normalize: false"
        if is_refused
        else None
    )
    assert check(values) == expected


def test_passthrough() -> None:
    model = torch.randn(3, 4).bfloat16()
    assert torch.equal(copy(model, None), model.float())
    assert torch.equal(copy(model, 0.25), model.float() * 0.25)
    assert torch.equal(copy(model, 0.0), torch.zeros(3, 4))


def test_weights_that_cancel_but_for_rounding_are_refused() -> None:
    """0.1 + 0.2 - 0.3 is 6e-17, and dividing by that would blow the average up."""
    check = METHODS["linear"].check
    assert check is not None
    models = tuple({"weight": weight} for weight in (0.1, 0.2, -0.3))
    assert "sum to 0" in (check(Settings(shared={"normalize": True}, models=models)) or "")


@pytest.mark.parametrize("wide", [0, 1])
def test_one_wide_input_makes_the_merge_wide(wide: int) -> None:
    models = [torch.randn(9), torch.randn(9)]
    models[wide] = torch.randn(9, dtype=torch.float64)
    merged = average(models, [1, 1])
    assert merged.dtype == torch.float64
    torch.testing.assert_close(merged, (models[0].double() + models[1].double()) / 2, rtol=1e-15, atol=1e-15)
