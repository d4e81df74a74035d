"""The k largest of a tensor, found slice by slice, are those of a stable sort."""

import pickle
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raymerge.merge_actors.errors import MismatchError
from raymerge.merge_actors.methods import selection
from raymerge.merge_actors.methods.block import UNIT, Block, Pool
from raymerge.merge_actors.methods.interface import Settings
from raymerge.merge_actors.methods.selection import Cut, find_cuts, keep_largest


def values_of(block: Block) -> torch.Tensor:
    return block.model(0)


def sample_of_ones(blocks: Iterable[Block], **arguments: Any) -> np.ndarray[Any, Any]:
    return np.full(sum(block.num_elements for block in blocks) // 10, 0x3F800000, np.int32)


def blocks(values: torch.Tensor, unit: int, units_per_block: int = 1, begin: int = 0) -> Iterable[Block]:
    """Cut a flat tensor into blocks, of several units as on a GPU if asked."""
    pool = Pool(values.device)
    for at in range(0, values.numel(), unit * units_per_block):
        pool.reset()
        yield Block(
            raw_base_P=None,
            raw_models_P=[values[at : at + unit * units_per_block]],
            begin=begin + at,
            shape=(values.numel(),),
            unit=unit,
            settings=Settings(models=({},)),
            stages=[()],
            keys=[0],
            state=None,
            pool=pool,
            is_rowwise=False,
        )


def cuts_of(
    values: torch.Tensor,
    ranks: list[int],
    *,
    unit: int = UNIT,
    units_per_slice: int = 1,
    units_per_block: int = 1,
) -> tuple[tuple[Cut, ...], int]:
    """Answer the questions of a search from slices; return the cuts and the number of rounds."""
    step = unit * units_per_slice
    search = find_cuts(values_of, {}, values.numel(), ranks, is_pointwise=True)
    num_rounds = 0
    try:
        measure = next(search)
        while True:
            num_rounds += 1
            assert num_rounds < 12
            measure = pickle.loads(pickle.dumps(measure))
            answers = [
                measure.collect(
                    blocks(values[at : at + step], unit, units_per_block, at), **measure.arguments
                )
                for at in range(0, values.numel(), step)
            ]
            measure = search.send(pickle.loads(pickle.dumps(answers)))
    except StopIteration as stop:
        return stop.value, num_rounds


def kept(values: torch.Tensor, cut: Cut, unit: int, units_per_block: int = 1) -> torch.Tensor:
    return torch.cat(
        [keep_largest(b.model(0), cut, b).clone() for b in blocks(values, unit, units_per_block)]
    )


def reference(values: torch.Tensor, rank: int) -> torch.Tensor:
    order = torch.sort(values.abs(), descending=True, stable=True).indices[:rank]
    return torch.zeros_like(values).index_copy_(0, order, values[order])


def make(kind: str, num_elements: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(num_elements, generator=generator)
    match kind:
        case "normal":
            return normal
        case "double":
            return normal.double()
        case "bf16 deltas":
            base = torch.randn(num_elements, generator=generator).mul(0.02).bfloat16()
            return (base.float() + 0.001 * normal).bfloat16().float() - base.float()
        case "equal":
            return torch.full((num_elements,), 0.25)
        case "zeros":
            return torch.zeros(num_elements)
        case "mostly zeros":
            return normal * (normal.abs() > 2)
        case "two values":
            return torch.where(normal > 0.3, 3.0, -1.0)
        case "tiny and huge":
            return normal * torch.tensor(10.0) ** torch.randint(-44, 38, (num_elements,), generator=generator)
        case "sorted":
            return normal.sort().values
        case "hidden from the sample":  # large exactly where a stride of 61 or 127 does not look
            return torch.where(torch.arange(num_elements) % UNIT % 127 % 61 == 0, 1e-3 * normal, normal)
        case _:
            raise AssertionError(kind)


KINDS = [
    "normal",
    "double",
    "bf16 deltas",
    "equal",
    "zeros",
    "mostly zeros",
    "two values",
    "tiny and huge",
    "sorted",
    "hidden from the sample",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [1e-5, 0.01, 0.2, 0.5, 0.97, 0.99999])
def test_large_tensors_keep_what_a_sort_keeps(kind: str, share: float) -> None:
    values = make(kind, 5 * UNIT + 777, seed=3)
    rank = int(share * values.numel())
    (cut,), _ = cuts_of(values, [rank], units_per_slice=2)
    assert torch.equal(kept(values, cut, UNIT), reference(values, rank))


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(KINDS),
    num_elements=st.integers(1, 400),
    share=st.floats(0, 1),
    units_per_slice=st.integers(1, 7),
    units_per_block=st.integers(1, 7),
    seed=st.integers(0, 99),
)
def test_any_slicing_keeps_what_a_sort_keeps(
    kind: str, num_elements: int, share: float, units_per_slice: int, units_per_block: int, seed: int
) -> None:
    values = make(kind, num_elements, seed)
    ranks = [int(share * num_elements), num_elements, 0]
    cuts, _ = cuts_of(
        values, ranks, unit=37, units_per_slice=units_per_slice, units_per_block=units_per_block
    )
    for rank, cut in zip(ranks, cuts, strict=True):
        assert torch.equal(kept(values, cut, 37, units_per_block), reference(values, rank))


@pytest.mark.parametrize("kind", KINDS)
def test_the_path_of_accelerators_gives_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = make(kind, 20_000, seed=5)
    ranks = [7, 4_000, 19_999]
    expected, _ = cuts_of(values, ranks, unit=1_000, units_per_slice=4)
    monkeypatch.setattr(selection, "_answer_on_cpu", selection._answer_on_device)
    found, _ = cuts_of(values, ranks, unit=1_000, units_per_slice=6, units_per_block=3)
    assert found == expected


@pytest.mark.parametrize("kind", ["normal", "bf16 deltas"])
def test_a_usual_tensor_takes_two_rounds(kind: str) -> None:
    values = make(kind, 8 * UNIT, seed=1)
    _, num_rounds = cuts_of(values, [int(0.2 * values.numel()), int(0.01 * values.numel())])
    assert num_rounds == 2


@pytest.mark.parametrize("kind", KINDS)
def test_histograms_narrow_what_is_too_much_to_collect(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_MOST_COLLECTED", 100)
    values = make(kind, 30_000, seed=2)
    for rank in (1, 300, 15_000, 29_999):
        (cut,), _ = cuts_of(values, [rank], unit=1_000)
        assert torch.equal(kept(values, cut, 1_000), reference(values, rank))


def test_a_misleading_sample_costs_rounds_and_not_exactness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "collect_sample", sample_of_ones)
    values = make("normal", 30_000, seed=2)
    for rank in (1, 300, 15_000, 29_999):
        (cut,), num_rounds = cuts_of(values, [rank], unit=1_000)
        assert num_rounds > 2 or rank in (1, 29_999)
        assert torch.equal(kept(values, cut, 1_000), reference(values, rank))


def sample_of_the_middle(blocks: Iterable[Block], **arguments: Any) -> np.ndarray[Any, Any]:
    num_elements = sum(block.num_elements for block in blocks)
    return np.linspace(0.5, 0.6, num_elements // 10, dtype=np.float32).view(np.int32)


def test_histograms_of_a_range_beside_the_rank_lead_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sample promises many values where none of the rank are: the first histogram lies above or below it."""
    monkeypatch.setattr(selection, "_MOST_COLLECTED", 100)
    monkeypatch.setattr(selection, "collect_sample", sample_of_the_middle)
    values = make("normal", 30_000, seed=2)
    for rank in (1, 300, 9_000, 15_000, 25_000, 29_999):
        (cut,), _ = cuts_of(values, [rank], unit=1_000)
        assert torch.equal(kept(values, cut, 1_000), reference(values, rank))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_numbers_do_not_hang_the_search(bad: float) -> None:
    values = make("normal", 20_000, seed=4)
    values[100:15_000:3] = bad
    for rank in (1, 1_000, 19_000):
        (cut,), _ = cuts_of(values, [rank], unit=1_000)
        if bad == float("inf"):
            assert torch.equal(kept(values, cut, 1_000), reference(values, rank))


def test_equals_are_kept_in_the_order_of_elements() -> None:
    values = torch.tensor([1.0, -2.0, 2.0, 1.0, 2.0, -1.0, 1.0])
    (cut,), _ = cuts_of(values, [5], unit=2)
    assert cut == Cut(1.0, unit=1, quota=1)
    assert kept(values, cut, 2).tolist() == [1.0, -2.0, 2.0, 1.0, 2.0, 0.0, 0.0]


def test_a_threshold_over_float32_and_float64_is_refused() -> None:
    search = find_cuts(values_of, {}, 20, [3], is_pointwise=True)
    next(search)
    with pytest.raises(MismatchError, match="some tensors of the model are float64"):
        search.send([np.ones(10, np.int32), np.ones(10, np.int64)])
