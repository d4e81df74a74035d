"""The sparsifying steps: DARE, trim, DELLA and breadcrumbs, alone and before any method."""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from raymerge.merge_actors.methods import METHODS, SPARSIFIERS
from raymerge.merge_actors.methods.block import Pool
from raymerge.merge_actors.methods.interface import Settings
from raymerge.merge_actors.methods.prepare import TensorState, model_wide_preparation
from raymerge.merge_actors.methods.slices import TensorSlice
from raymerge.merge_actors.randomness import stream_key

SIGMAS = 5.0


def pair(
    shape: tuple[int, ...] = (250, 400),
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    spread: float = 0.05,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a base of zeros, so that the merged tensor is the thinned delta itself, and a model."""
    generator = torch.Generator().manual_seed(seed)
    return torch.zeros(shape, dtype=dtype), (torch.randn(shape, generator=generator) * spread).to(dtype)


def thin(
    merge: Any, method: str, delta: torch.Tensor, step: Mapping[str, Any], **options: Any
) -> torch.Tensor:
    """Return the delta after a step of the recipe."""
    each = {"weight": 1.0, "sparsify": {"method": method, **step}}
    merged: torch.Tensor = merge("task_arithmetic", [delta], torch.zeros_like(delta), each, **options)
    return merged


def test_dare_by_hand(merge: Any) -> None:
    _, delta = pair()
    merged = thin(merge, "random", delta, {"density": 0.25})
    is_kept = merged != 0
    assert torch.equal(merged[is_kept], delta[is_kept] * 4)
    assert abs(int(is_kept.sum()) - 25_000) < SIGMAS * np.sqrt(25_000 * 0.75)


@pytest.mark.parametrize("method", ["random", "magnitude", "della", "breadcrumbs"])
@pytest.mark.parametrize("rescale", [False, True, "l1"])
def test_density_one_is_bit_equal_to_no_step(merge: Any, method: str, rescale: Any) -> None:
    """Pitfalls 26, 35 and 45."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(40, 33, generator=generator).bfloat16()
    models = [(base + 0.01 * torch.randn(40, 33, generator=generator)).bfloat16() for _ in range(3)]
    step = {"method": method, "density": 1.0, "rescale": rescale}
    found = merge("task_arithmetic", models, base, {"weight": 0.3, "sparsify": step})
    assert torch.equal(found, merge("task_arithmetic", models, base, {"weight": 0.3}))


@pytest.mark.parametrize("method", ["random", "magnitude", "della", "breadcrumbs"])
@pytest.mark.parametrize("rescale", [False, True, "l1"])
def test_density_zero_gives_the_base_without_bad_numbers(merge: Any, method: str, rescale: Any) -> None:
    """Pitfalls 28 and 45."""
    base = torch.randn(40, 33)
    each = {"weight": 1.0, "sparsify": {"method": method, "density": 0.0, "rescale": rescale}}
    assert torch.equal(merge("task_arithmetic", [base + 1], base, each), base)


def test_dare_equals_task_arithmetic_on_average_with_the_stated_variance(merge: Any) -> None:
    """Pitfall 27: E = delta, Var = delta^2 p / (1 - p)."""
    _, delta = pair((64,))
    draws = torch.stack(
        [thin(merge, "random", delta, {"density": 0.2}, seed=s) for s in range(3_000)]
    ).double()
    variance = delta.double() ** 2 * 0.8 / 0.2
    error = (draws.mean(dim=0) - delta).abs()
    assert (error < SIGMAS * (variance / 3_000).sqrt()).all()
    # The relative error of an estimated two-point variance is at most about 2 / sqrt(draws).
    torch.testing.assert_close(draws.var(dim=0), variance, rtol=SIGMAS * 2 / np.sqrt(3_000), atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("drop", [0.9, 0.99, 0.999])
def test_dare_keep_rate(merge: Any, dtype: torch.dtype, drop: float) -> None:
    """Pitfall 29."""
    delta = torch.ones(1 << 20, dtype=dtype)
    num_kept = int(thin(merge, "random", delta, {"density": 1 - drop}).count_nonzero())
    expected = (1 - drop) * delta.numel()
    assert abs(num_kept - expected) < SIGMAS * np.sqrt(expected * drop)


def test_dare_masks_depend_on_seed_model_tensor_and_step_alone(merge: Any) -> None:
    """Pitfall 30."""
    delta = torch.ones(10_000)

    def mask(**options: Any) -> torch.Tensor:
        return thin(merge, "random", delta, {"density": 0.5}, **options) != 0

    first = mask(names=["a"], seed=1)
    assert torch.equal(first, mask(names=["a"], seed=1, slice_units=1))
    for other in (
        mask(names=["b"], seed=1),
        mask(names=["a"], seed=2),
        mask(names=["a"], seed=1, tensor_name="u"),
    ):
        # Half of the places agree by chance.
        assert abs(int((first == other).sum()) - 5_000) < SIGMAS * 50


def test_dare_as_a_step_is_dare_linear(merge: Any) -> None:
    base, model = pair()
    each = {"weight": 0.7, "sparsify": {"method": "random", "density": 0.3}}
    by_step = merge("task_arithmetic", [model, 2 * model], base, each)
    assert torch.equal(
        by_step, merge("dare_linear", [model, 2 * model], base, {"weight": 0.7, "density": 0.3})
    )


def test_two_random_steps_of_one_model_do_not_share_a_mask(merge: Any) -> None:
    base, model = pair()
    each = {"weight": 1.0, "density": 0.5, "sparsify": {"method": "random", "density": 0.5}}
    num_kept = int(merge("dare_linear", [model], base, each).count_nonzero())
    assert abs(num_kept - 25_000) < SIGMAS * np.sqrt(25_000 * 0.75)


def test_dare_masks_are_nested_over_the_drop_rate(merge: Any) -> None:
    """Pitfall 34."""
    _, delta = pair()
    masks = [thin(merge, "random", delta, {"density": density}) != 0 for density in (0.9, 0.5, 0.1, 0.001)]
    for larger, smaller in itertools.pairwise(masks):
        assert not (smaller & ~larger).any()


def test_dare_rescales_by_the_density_and_not_by_the_norm(merge: Any) -> None:
    """Pitfall 31; l1 is the other dialect, by name."""
    _, delta = pair()
    plain = thin(merge, "random", delta, {"density": 0.1, "rescale": False})
    is_kept = plain != 0
    assert torch.equal(plain[is_kept], delta[is_kept])
    by_density = thin(merge, "random", delta, {"density": 0.1})
    assert torch.equal(by_density[is_kept], (delta[is_kept] * np.float32(1 / 0.1)))
    by_norm = thin(merge, "random", delta, {"density": 0.1, "rescale": "l1"})
    # Each product is rounded to float32, without bias over 10,000 of them.
    assert by_norm.double().abs().sum().item() == pytest.approx(delta.double().abs().sum().item(), rel=1e-7)
    assert not torch.equal(by_norm, by_density)


@pytest.mark.parametrize("strategy", ["random", "magnitude"])
def test_dare_of_weights_drops_fine_tuned_weights(merge: Any, strategy: str) -> None:
    """Pitfall 32: delta becomes m x / (1 - p) - b, so a merge at weight 1 gives m x / (1 - p)."""
    generator = torch.Generator().manual_seed(2)
    base = torch.randn(40, 33, generator=generator)
    model = base + 0.01 * torch.randn(40, 33, generator=generator)
    step = {"method": "random", "density": 0.5, "mask_target": "weights", "mask_strategy": strategy}
    merged = merge("task_arithmetic", [model], base, {"weight": 1.0, "sparsify": step})
    is_kept = merged.abs() > 1e-3
    # The sum of base and difference rounds twice, of numbers up to 8.
    torch.testing.assert_close(merged[is_kept], 2 * model[is_kept], rtol=0, atol=2e-6)
    assert merged[~is_kept].abs().max() < 1e-6 or strategy == "random"
    if strategy == "magnitude":
        assert int(is_kept.sum()) == 660
        assert model[is_kept].abs().min() >= model[~is_kept].abs().max()


def test_dare_leaves_unmoved_entries_alone(merge: Any) -> None:
    """Pitfall 33."""
    base = torch.randn(1_000).bfloat16()
    model = base.clone()
    model[::3] += 1
    merged = merge("dare_linear", [model, model], base, {"weight": 0.5, "density": 0.3})
    is_unmoved = model == base
    assert torch.equal(merged[is_unmoved], base[is_unmoved].float())


def test_dare_by_magnitude_keeps_the_largest(merge: Any) -> None:
    _, delta = pair()
    merged = thin(merge, "random", delta, {"density": 0.3, "mask_strategy": "magnitude", "rescale": False})
    assert torch.equal(merged, thin(merge, "magnitude", delta, {"density": 0.3}))


def test_dare_before_ties_trims_among_the_survivors(merge: Any) -> None:
    """Pitfall 44: 30 % survive, the 10 % largest of all elements are trimmed out of them."""
    base, model = pair()
    step = {"method": "random", "density": 0.3}
    merged = merge("ties", [model], base, {"weight": 1.0, "density": 0.1, "sparsify": step})
    survivors = thin(merge, "random", model, {"density": 0.3})
    kept = survivors.flatten().abs().topk(10_000).indices
    expected = torch.zeros(100_000).index_copy_(0, kept, survivors.flatten()[kept]).view_as(base)
    assert torch.equal(merged, expected)


@pytest.mark.parametrize("method", ["linear", "slerp", "model_stock", "ram", "sce"])
def test_dare_comes_before_any_method(merge: Any, method: str) -> None:
    """Merging thinned models is the same as merging base + thinned delta."""
    generator = torch.Generator().manual_seed(2)
    base = torch.randn(40, 33, generator=generator)
    models = [
        base + 0.1 * torch.randn(40, 33, generator=generator) for _ in range(1 if method == "slerp" else 3)
    ]
    thinned = [
        merge("dare_linear", [model], base, {"weight": 1.0, "density": 0.4}, names=[str(i)])
        for i, model in enumerate(models)
    ]
    step = {"method": "random", "density": 0.4}
    shared = {"t": 0.4} if method == "slerp" else {}
    found = merge(method, models, base, {"weight": 1.0, "sparsify": step}, **shared)
    expected = merge(method, thinned, base, {"weight": 1.0}, **shared)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)  # base + delta is rounded twice more


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_trim_keeps_the_exact_count(merge: Any, dtype: torch.dtype) -> None:
    """Pitfall 38; deltas of bf16 weights have many equals."""
    _, delta = pair(dtype=dtype)
    for density in (0.001, 0.2, 0.777):
        merged = thin(merge, "magnitude", delta, {"density": density})
        order = delta.flatten().abs().sort(descending=True, stable=True).indices[: int(density * 100_000)]
        expected = torch.zeros_like(merged).view(-1)
        expected[order] = delta.flatten()[order].to(merged.dtype)
        assert torch.equal(merged.view(-1), expected)


@pytest.mark.parametrize("value", [0.0, 1.0, float("inf")])
def test_trim_of_equal_elements_keeps_the_first(merge: Any, value: float) -> None:
    """Pitfall 35."""
    delta = torch.full((200_000,), value)
    merged = thin(merge, "magnitude", delta, {"density": 0.25})
    expected = torch.where(torch.arange(200_000) < 50_000, value, 0.0)
    assert torch.equal(merged, expected)


def model_wide_state(tensors: list[torch.Tensor], settings: Settings, cut_every: int | None) -> TensorState:
    """Measure a model of several tensors as the driver does."""
    slices = []
    for number, tensor in enumerate(tensors):
        step = cut_every or tensor.numel()
        slices += [
            TensorSlice(
                method=METHODS["ties"],
                settings=settings,
                sparsifiers=SPARSIFIERS,
                shape=tuple(tensor.shape),
                begin=at,
                base_P=torch.zeros_like(tensor.view(-1)[at : at + step]),
                models_P=[tensor.view(-1)[at : at + step]],
                keys=[stream_key(0, "0", str(number))],
                pool=Pool(tensor.device),
            )
            for at in range(0, tensor.numel(), step)
        ]
    num_elements = sum(tensor.numel() for tensor in tensors)
    preparation = model_wide_preparation(METHODS["ties"], settings, num_elements, SPARSIFIERS)
    try:
        asked = next(preparation)
        while True:
            asked = preparation.send([[s.measure(m, asked.state) for s in slices] for m in asked.measures])
    except StopIteration as stop:
        state = stop.value
    assert isinstance(state, TensorState)
    return state


@pytest.mark.parametrize("rescale", [False, "l1"])
def test_trim_over_the_model_is_what_the_code_of_the_paper_does(rescale: Any) -> None:
    """Pitfalls 38 and 39: |delta| >= the (n - floor(d n))-th smallest of the whole model."""
    tensors = [pair((70_000,), seed=1, spread=0.01)[1], pair((50, 60), seed=2, spread=1.0)[1]]
    model = {"weight": 1.0, "density": 0.05, "trim": "model", "rescale": rescale}
    settings = Settings(shared={"normalize": True, "merge_func": None, "lambda": 1.0}, models=(model,))
    flat = torch.cat([tensor.view(-1) for tensor in tensors])
    num_dropped = flat.numel() - int(0.05 * flat.numel())
    threshold = flat.abs().kthvalue(num_dropped).values
    states = [model_wide_state(tensors, settings, cut_every) for cut_every in (None, 65_536)]
    assert states[0] == states[1]
    kept_sum = flat[flat.abs() >= threshold].double().abs().sum()
    factor = float(flat.double().abs().sum() / kept_sum) if rescale else 1.0
    for tensor in tensors:
        piece = TensorSlice(
            method=METHODS["ties"],
            settings=settings,
            sparsifiers=SPARSIFIERS,
            shape=tuple(tensor.shape),
            begin=0,
            base_P=torch.zeros_like(tensor).view(-1),
            models_P=[tensor.view(-1)],
            keys=[0],
            pool=Pool(tensor.device),
        )
        merged = torch.cat([part.clone() for _, part in piece.merged_blocks(states[0])]).view_as(tensor)
        expected = tensor.where(tensor.abs() >= threshold, 0) * np.float32(factor)
        torch.testing.assert_close(merged, expected, rtol=2e-7, atol=0)  # one rounding of the factor
    # Nearly all of the small tensor goes by one threshold, none of the rest: two scales differ.
    assert (
        (tensors[0].abs() >= threshold).float().mean()
        < 0.03
        < 0.5
        < (tensors[1].abs() >= threshold).float().mean()
    )


def test_ties_with_rescale_has_no_bad_numbers_on_large_fp16_tensors(merge: Any) -> None:
    """A fault of the peer: the L1 norm of a large fp16 tensor overflows."""
    _, delta = pair((400, 500), dtype=torch.float16, spread=3.0)
    merged = merge("ties", [delta], torch.zeros_like(delta), {"weight": 1.0, "density": 0.5}, rescale=True)
    assert torch.isfinite(merged).all()
    assert merged.double().abs().sum().item() == pytest.approx(delta.double().abs().sum().item(), rel=1e-6)


def test_della_by_hand(merge: Any) -> None:
    """Keep probabilities rise linearly with the rank in the row, whatever the order of the columns."""
    ranks = torch.tensor([3, 0, 4, 1, 2])
    delta = (ranks + 1.0) * torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    rows = delta.repeat(40_000, 1)
    merged = thin(merge, "della", rows, {"density": 0.5, "epsilon": 0.2})
    probability = 0.3 + 0.4 * ranks.double() / 4
    num_kept = (merged != 0).sum(dim=0)
    deviation = (40_000 * probability * (1 - probability)).sqrt()
    assert ((num_kept - 40_000 * probability).abs() < SIGMAS * deviation).all()
    expected = (rows.double() / probability).float()
    is_kept = merged != 0
    torch.testing.assert_close(merged[is_kept], expected[is_kept], rtol=2e-7, atol=0)  # rounded twice


def test_della_without_spread_is_dare(merge: Any) -> None:
    _, delta = pair()
    della = thin(merge, "della", delta, {"density": 0.3, "epsilon": 0.0})
    assert torch.equal(della, thin(merge, "random", delta, {"density": 0.3}))


@pytest.mark.parametrize("shape", [(), (1,), (7, 1)])
def test_della_of_rows_of_one_element_keeps_by_the_density(merge: Any, shape: tuple[int, ...]) -> None:
    delta = torch.ones(shape)
    della = thin(merge, "della", delta, {"density": 0.3})
    assert torch.equal(della, thin(merge, "random", delta, {"density": 0.3}))


def test_della_l1_keeps_the_norm(merge: Any) -> None:
    _, delta = pair()
    merged = thin(merge, "della", delta, {"density": 0.4, "rescale": "l1"})
    assert merged.double().abs().sum().item() == pytest.approx(delta.double().abs().sum().item(), rel=1e-7)


@pytest.mark.parametrize(
    ("density", "gamma"), [(0.5, 0.1), (0.5, 0.0), (0.9, 0.3), (0.001, 0.5), (0.995, 0.02)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_breadcrumbs_keeps_the_middle(merge: Any, density: float, gamma: float, dtype: torch.dtype) -> None:
    """Gamma 0 drops nothing at the top; the peer then dropped everything."""
    _, delta = pair((200, 300), dtype=dtype)
    merged = thin(merge, "breadcrumbs", delta, {"density": density, "gamma": gamma})
    num_kept = int(density * 60_000)
    num_top = min(int(gamma * 60_000), 60_000 - num_kept)
    order = delta.flatten().abs().sort(descending=True, stable=True).indices[num_top : num_top + num_kept]
    expected = torch.zeros(60_000)
    expected[order] = delta.flatten()[order].float()
    assert torch.equal(merged.view(-1), expected)


def test_l1_of_thinned_weights_is_refused() -> None:
    check = SPARSIFIERS["random"].check
    assert check is not None
    values = {"density": 0.5, "rescale": "l1", "mask_target": "weights"}
    message = "rescale: l1 keeps the norm of the delta, but mask_target is weights; set rescale: true"
    assert check(values) == message
    assert check(values | {"rescale": True}) is None


def test_memory_does_not_grow_with_the_number_of_models() -> None:
    """Task arithmetic and DARE need one delta at a time, whatever is merged."""
    taken = []
    for count in (2, 9):
        models = [torch.randn(1_000) for _ in range(count)]
        model = {
            "weight": 0.5,
            "density": 0.5,
            "rescale": True,
            "mask_strategy": "random",
            "mask_target": "delta",
        }
        settings = Settings(shared={"normalize": False, "lambda": 1.0}, models=(model,) * count)
        pool = Pool(models[0].device)
        piece = TensorSlice(
            method=METHODS["dare_linear"],
            settings=settings,
            sparsifiers=SPARSIFIERS,
            shape=(1_000,),
            begin=0,
            base_P=torch.zeros(1_000).bfloat16(),
            models_P=models,
            keys=range(count),
            pool=pool,
        )
        assert len(list(piece.merged_blocks(TensorState()))) == 1
        taken.append(sum(len(buffers) for buffers in pool._free.values()))
    assert taken[0] == taken[1] == 5  # base, sum, delta, words, their scratch


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "ties", "della", "breadcrumbs_ties"])
def test_cuda_gives_what_the_cpu_gives(merge: Any, method: str) -> None:
    base, model = pair((3_000, 2_000), dtype=torch.bfloat16)
    each = {"weight": 0.7, "density": 0.3}
    on_cpu = merge(method, [model, 2 * model], base, each)
    on_cuda = merge(method, [model.cuda(), 2 * model.cuda()], base.cuda(), each).cpu()
    assert torch.equal(on_cpu == 0, on_cuda == 0)
    torch.testing.assert_close(on_cpu, on_cuda, rtol=2.4e-7, atol=0)  # two units in the last place
