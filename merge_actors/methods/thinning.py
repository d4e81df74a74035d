"""What the sparsifying steps share: their parameters and the L1 rescaling.

A step is measured with the steps before it applied. L1 rescaling multiplies a thinned delta
by (sum |delta| before) / (sum |delta| after), both over the whole tensor, taken per unit in
float64 and added exactly, so the factor does not depend on how the tensor was cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from raymerge.merge_actors.methods.block import fsum_columns
from raymerge.merge_actors.methods.interface import Measure, Parameter, Prepare, Value
from raymerge.merge_actors.methods.selection import Cut

if TYPE_CHECKING:
    import torch

    from raymerge.merge_actors.methods.block import Block

DENSITY = Parameter(
    name="density",
    per_model=True,
    default=1.0,
    minimum=0,
    maximum=1,
    doc="share of the elements that is kept",
)
RESCALE = Parameter(
    name="rescale",
    kind=bool,
    default=False,
    choices=("l1",),
    doc="make up for what is dropped; l1: so that the sum of sizes of the tensor is kept",
)


@dataclass(frozen=True, slots=True)
class Thinned:
    """What a step knows about its whole tensor."""

    cuts: tuple[Cut, ...] = ()
    """Which elements are the largest, for the steps that go by magnitude."""
    factor: float = 1.0
    """L1 rescaling of what is kept."""


#: thin(delta, parameters, key, block, state): drops elements without L1 rescaling
Thin = Callable[["torch.Tensor", Mapping[str, Value], int, "Block", Thinned], "torch.Tensor"]


def density_of(parameters: Mapping[str, Value]) -> float:
    """Return the share to keep."""
    return float(parameters["density"])  # type: ignore[arg-type]


def magnitude(block: Block, index: int, step: int, target: str = "delta") -> torch.Tensor:
    """Return |delta| of a model as step `step` finds it, or |base + delta| for the target "weights"."""
    delta = block.delta(index, num_stages=step)
    return (delta.add_(block.base()) if target == "weights" else delta).abs_()


def measure_l1(thin: Thin, parameters: Mapping[str, Value], index: int, step: int, state: Thinned) -> Prepare:
    """Find the factor that gives a thinned tensor its L1 norm back; 1 if nothing is left of it."""
    sums = yield Measure(
        collect=collect_l1,
        arguments={"thin": thin, "parameters": parameters, "index": index, "step": step, "state": state},
    )
    before, after = fsum_columns(sums)
    return Thinned(state.cuts, before / after if before > 0 and after > 0 else 1.0)


def collect_l1(
    blocks: Iterable[Block],
    thin: Thin,
    parameters: Mapping[str, Value],
    index: int,
    step: int,
    state: Thinned,
) -> NDArray[np.float64]:
    """Sum |delta| over each unit before and after thinning: (units, 2)."""
    rows = [np.zeros((0, 2))]
    for block in blocks:
        delta = block.delta(index, num_stages=step)
        before = block.unit_sums(delta.abs())
        after = thin(delta, parameters, block.step_key(index, step), block, state)
        rows.append(np.stack([before, block.unit_sums(after.abs())], axis=1))
    return np.concatenate(rows)
