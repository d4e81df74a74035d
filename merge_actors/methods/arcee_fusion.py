"""Arcee Fusion: take over the elements of the other model that matter most."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from raymerge.merge_actors.methods.interface import Measure, Method, Prepare, Settings
from raymerge.merge_actors.methods.selection import find_cuts

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

    import torch

    from raymerge.merge_actors.methods.block import Block

_EPS = 1e-8


def arcee_fusion(block: Block) -> torch.Tensor:
    """Take x where it is important, b elsewhere: importance >= median + 1.5 (Q3 - Q1).

    Arcee AI 2025, MergeKit 0.1 release notes. The importance of an element is |x - b| times
    KL(softmax(x) || softmax(b)) of its row, 1e-8 added to each probability. Quartiles are over
    the tensor, with linear interpolation; the original takes them from a random million elements.

    Args:
        block: a base and one model, whole rows.

    Returns:
        The merged elements, in the block's compute dtype.
    """
    taken = importance(block) >= block.state
    return block.delta(0).mul_(taken).add_(block.base())


def importance(block: Block) -> torch.Tensor:
    """Return |delta| KL(softmax(x) || softmax(b)) of the row, for each element."""
    import torch

    fine = torch.softmax(block.model(0), dim=-1).add_(_EPS)
    base = torch.softmax(block.base(), dim=-1).add_(_EPS)
    # Of two equal rows rounding can leave a divergence just below 0.
    divergence_R1 = (fine * torch.log(fine / base)).sum(dim=-1, keepdim=True).clamp_min_(0)
    return block.delta(0).abs_().mul_(divergence_R1)


def collect_num_elements(blocks: Iterable[Block]) -> int:
    """Count the elements of a slice."""
    return sum(block.num_elements for block in blocks)


def quantiles(num_elements: int, shares: tuple[float, ...]) -> Generator[Any, Any, list[float]]:
    """Find quantiles of the importance, linearly interpolated between order statistics."""
    places = [share * (num_elements - 1) for share in shares]
    ranks = [num_elements - index for place in places for index in (math.floor(place), math.ceil(place))]
    cuts = yield from find_cuts(importance, {}, num_elements, ranks, is_pointwise=False)
    return [
        low.value + (place - math.floor(place)) * (high.value - low.value)
        for place, low, high in zip(places, cuts[::2], cuts[1::2], strict=True)
    ]


def _prepare(settings: Settings) -> Prepare:
    num_elements = sum((yield Measure(collect=collect_num_elements)))
    if num_elements == 0:
        return 0.0
    first, median, third = yield from quantiles(num_elements, (0.25, 0.5, 0.75))
    return median + 1.5 * (third - first)


ARCEE_FUSION = Method(
    name="arcee_fusion",
    merge=arcee_fusion,
    prepare=_prepare,
    split="rowwise",
    base="required",
    num_models=(1, 1),
    source="https://www.arcee.ai/blog/meet-mergekit-v0-1-arcee-fusion-expanded-model-support-multi-gpu-acceleration",
)
