"""SCE: select where the models differ most, calculate their weights, erase what disagrees in sign."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from raymerge.merge_actors.methods.block import fsum_columns
from raymerge.merge_actors.methods.consensus import bits, elected_signs
from raymerge.merge_actors.methods.interface import Measure, Method, Parameter, Prepare, Settings
from raymerge.merge_actors.methods.selection import Cut, find_cuts, keep_largest

if TYPE_CHECKING:
    import torch

    from raymerge.merge_actors.methods.block import Block


@dataclass(frozen=True, slots=True)
class SceState:
    """What SCE knows about the whole tensor."""

    cut: Cut | None
    """Which positions are selected; None for all."""
    weights: tuple[float, ...] = ()
    """Of each model, summing to 1."""


def sce(block: Block) -> torch.Tensor:
    """Merge by SCE: b + sum_i w_i delta_i e_i / sum_i w_i e_i, at the selected positions.

    Wan et al. 2024 (FuseChat), arXiv:2408.07990, section 3.3. Selected are the floor(select_topk
    nnz) positions of largest population variance of delta over the models, nnz counting those
    where it is not 0. w_i = mean of delta_i^2 over the tensor, after the selection, normalised;
    equal weights only if all are 0. e_i says whether delta_i has the sign elected by the sum.

    Args:
        block: a base and any models.

    Returns:
        The merged elements, in the block's compute dtype; the base where nothing counts.
    """
    import torch

    state = block.state
    assert isinstance(state, SceState)
    deltas = selected_deltas(block, state.cut)
    signs = elected_signs(block, deltas)
    divisor, counts = block.zeros(), block.scratch()
    total = deltas[0]
    for delta, weight in zip(deltas, state.weights, strict=True):
        bits(delta).bitwise_xor_(signs)
        delta.clamp_min_(0)
        divisor.add_(torch.sign(delta, out=counts), alpha=weight)
        delta.mul_(weight)
    for delta in deltas[1:]:
        total.add_(delta)
    positive = [weight for weight in state.weights if weight > 0]
    total.div_(divisor.clamp_min_(min(positive)))
    bits(total).bitwise_xor_(signs)
    return total.add_(block.base())


def selected_deltas(block: Block, cut: Cut | None) -> list[torch.Tensor]:
    """Return the deltas of all models, 0 outside the selected positions."""
    deltas = [block.delta(i) for i in range(block.num_models)]
    if cut is not None:
        # The variance of a selected position is never 0, so what keep_largest leaves tells them.
        dropped = keep_largest(variance(block), cut, block) == 0
        for delta in deltas:
            delta.masked_fill_(dropped, 0)
    return deltas


def variance(block: Block) -> torch.Tensor:
    """Return the population variance of delta over the models, for each element."""
    deltas = [block.delta(i) for i in range(block.num_models)]
    mean, total = block.zeros(), block.zeros()
    for delta in deltas:
        mean.add_(delta)
    mean.div_(len(deltas))
    for delta in deltas:
        delta.sub_(mean)
        total.addcmul_(delta, delta)
    return total.div_(len(deltas))


def collect_varying(blocks: Iterable[Block]) -> NDArray[np.int64]:
    """Count the elements, and those whose variance is not 0."""
    rows = [(block.num_elements, int(variance(block).count_nonzero())) for block in blocks]
    counts: NDArray[np.int64] = np.array(rows, np.int64).reshape(-1, 2).sum(axis=0)
    return counts


def collect_squares(blocks: Iterable[Block], cut: Cut | None) -> NDArray[np.float64]:
    """Sum delta_i^2 over the selected positions of each unit: (units, models)."""
    rows = [np.zeros((0, 0))]
    for block in blocks:
        deltas = selected_deltas(block, cut)
        rows.append(np.stack([block.unit_dots(delta, delta) for delta in deltas], axis=1))
    return np.concatenate(rows[1:] or rows)


def _prepare(settings: Settings) -> Prepare:
    share = float(settings.shared["select_topk"])  # type: ignore[arg-type]
    cut = None
    if share < 1:
        num_elements, num_varying = np.sum((yield Measure(collect=collect_varying)), axis=0).tolist()
        is_pointwise = not any("sparsify" in model for model in settings.models)
        (cut,) = yield from find_cuts(variance, {}, num_elements, [int(share * num_varying)], is_pointwise)
    parts = [part for part in (yield Measure(collect=collect_squares, arguments={"cut": cut})) if len(part)]
    squares = fsum_columns(parts) if parts else [0.0] * len(settings.models)
    total = sum(squares)
    equal = 1 / len(settings.models)
    return SceState(cut, tuple(square / total if total > 0 else equal for square in squares))


SCE = Method(
    name="sce",
    merge=sce,
    prepare=_prepare,
    parameters=(
        Parameter(
            name="select_topk",
            default=1.0,
            minimum=0,
            maximum=1,
            doc="share of the varying positions that is kept",
        ),
    ),
    base="required",
    source="arXiv:2408.07990",
)
