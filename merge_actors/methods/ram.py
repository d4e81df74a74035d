"""RAM: a position moved by one model takes its delta, one moved by several their mean."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from raymerge.merge_actors.methods.interface import Measure, Method, Parameter, Prepare, Settings

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from raymerge.merge_actors.methods.block import Block


def ram(block: Block) -> torch.Tensor:
    """Merge by RAM: b + sum_i s_i delta_i [|delta_i| > epsilon] / (number of models that moved).

    Reinforced Agent Merging, arXiv:2601.13572. For `ram` s_i = 1. `ramplus_tl` multiplies what
    one model alone has moved by s_i = 1 + r min(rho_i, alpha), rho_i = (shared positions of
    model i) / (its own), counted within the tensor (the paper counts over the model).

    Args:
        block: a base and any models.

    Returns:
        The merged elements, in the block's compute dtype.
    """
    deltas, counts = moved(block)
    if block.state is not None:
        alone = counts == 1
        for delta, scale in zip(deltas, block.state, strict=True):
            if scale != 1:
                delta.copy_((delta * scale).where(alone, delta))
    total = deltas[0]
    for delta in deltas[1:]:
        total.add_(delta)
    return total.div_(counts.clamp_min_(1)).add_(block.base())


def moved(block: Block) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return the deltas, 0 where they are not larger than epsilon, and how many models moved each element."""
    import torch

    epsilon = block.number("epsilon")
    deltas, counts = [], block.zeros()
    for i in range(block.num_models):
        delta = block.delta(i)
        torch.hardshrink(delta, epsilon, out=delta)
        counts.add_(delta != 0)
        deltas.append(delta)
    return deltas, counts


def collect_moved(blocks: Iterable[Block]) -> NDArray[np.int64]:
    """Count per model the positions it shares with others and those it alone moved: (models, 2)."""
    totals = np.zeros((0, 2), np.int64)
    for block in blocks:
        deltas, counts = moved(block)
        several, alone = counts > 1, counts == 1
        rows = [[int(((d != 0) & several).sum()), int(((d != 0) & alone).sum())] for d in deltas]
        totals = np.array(rows, np.int64) + (totals if len(totals) else 0)
    return totals


def _prepare(settings: Settings) -> Prepare:
    parts = [part for part in (yield Measure(collect=collect_moved)) if len(part)]
    totals = np.sum(parts, axis=0).tolist() if parts else [[0, 0]] * len(settings.models)
    strength, bound = (float(settings.shared[name]) for name in ("r", "alpha"))  # type: ignore[arg-type]
    return tuple(1 + strength * min(several / max(alone, 1), bound) for several, alone in totals)


EPSILON = Parameter(
    name="epsilon", default=1e-5, minimum=0, doc="an element is moved if its delta is larger than this"
)

RAM = Method(name="ram", merge=ram, parameters=(EPSILON,), base="required", source="arXiv:2601.13572")

RAMPLUS_TL = Method(
    name="ramplus_tl",
    merge=ram,
    prepare=_prepare,
    parameters=(
        EPSILON,
        Parameter(
            name="r", default=0.1, minimum=0, doc="strength of the factor on what one model alone moved"
        ),
        Parameter(name="alpha", default=0.2, minimum=0, doc="upper bound of the overlap in that factor"),
    ),
    base="required",
    source="arXiv:2601.13572",
)
