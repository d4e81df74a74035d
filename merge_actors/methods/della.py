"""DELLA: drop elements of a delta at random, the smaller of a row more often."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from raymerge.merge_actors.methods.interface import Parameter, Prepare, Sparsifier, Value
from raymerge.merge_actors.methods.thinning import DENSITY, Thinned, density_of, measure_l1
from raymerge.merge_actors.randomness import fill_words, keep_limit

if TYPE_CHECKING:
    import torch

    from raymerge.merge_actors.methods.block import Block


def drop_by_rank(
    delta_RC: torch.Tensor, parameters: Mapping[str, Value], key: int, block: Block, state: Thinned | None
) -> torch.Tensor:
    """Keep each element with probability q = density - epsilon + 2 epsilon rank / (C - 1), times 1 / q.

    Deep et al. 2024 (DELLA-Merging, MAGPRUNE), arXiv:2406.11617. The rank of |delta| counts from 0
    (smallest) to C - 1 along the last axis, equals by their index; a row of one element has
    q = density. `rescale: l1` keeps the tensor's L1 norm instead; `rescale: false` only drops.

    Args:
        delta_RC: the delta, rows R of C columns, overwritten.
        parameters: density, epsilon, rescale.
        key: of the random stream.
        block: where the elements stand.
        state: the L1 factor, if it was measured.

    Returns:
        `delta_RC`.
    """
    if density_of(parameters) >= 1:
        return delta_RC
    if density_of(parameters) <= 0:
        return delta_RC.zero_()
    thin_by_rank(delta_RC, parameters, key, block, state or Thinned())
    return delta_RC.mul_(state.factor) if state is not None and state.factor != 1 else delta_RC


def thin_by_rank(
    delta_RC: torch.Tensor, parameters: Mapping[str, Value], key: int, block: Block, state: Thinned
) -> torch.Tensor:
    """Drop and rescale by the keep probabilities, without the L1 factor."""
    import torch

    limits_C, scales_C = _tables(
        delta_RC.shape[-1],
        density_of(parameters),
        float(parameters["epsilon"]),  # type: ignore[arg-type]
        parameters["rescale"] is True,
        delta_RC.dtype,
        str(delta_RC.device),
    )
    words = block.scratch(torch.int32)
    fill_words(words.view(-1), block.scratch(torch.int32).view(-1), key, block.begin)
    # Probabilities stand in the order of rank, so the masks are made in that order and sent back.
    order_RC = delta_RC.abs().sort(dim=-1, stable=True).indices
    kept_RC = words.gather(-1, order_RC) < limits_C
    factors_RC = kept_RC.to(delta_RC.dtype).mul_(scales_C)
    return delta_RC.mul_(torch.empty_like(delta_RC).scatter_(-1, order_RC, factors_RC))


@functools.lru_cache(maxsize=16)
def _tables(
    num_columns: int, density: float, epsilon: float, is_rescaled: bool, dtype: torch.dtype, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return per rank, smallest magnitude first, the limit of its word and its scale."""
    import torch

    ranks = np.arange(num_columns) / max(1, num_columns - 1)
    keep_C = density - epsilon + 2 * epsilon * ranks if num_columns > 1 else np.array([density])
    limits = torch.tensor([keep_limit(drop) for drop in (1 - keep_C).tolist()], dtype=torch.int32)
    scales = torch.from_numpy(1 / keep_C if is_rescaled else np.ones(num_columns))
    return limits.to(device), scales.to(device, dtype)


def probabilities_lie_within(parameters: Mapping[str, Value]) -> str | None:
    """Say what is wrong if some keep probability is not in (0, 1)."""
    density, epsilon = density_of(parameters), float(parameters["epsilon"])  # type: ignore[arg-type]
    if density in (0, 1) or (density - epsilon > 0 and density + epsilon < 1):
        return None
    largest = min(density, 1 - density)
    return (
        f"density {density:g} with epsilon {epsilon:g} gives keep probabilities of {density - epsilon:g} to "
        f"{density + epsilon:g}, which must lie within (0, 1); set epsilon below {largest:g}"
    )


def _prepare(parameters: Mapping[str, Value], index: int, step: int, num_elements: int) -> Prepare | None:
    if parameters["rescale"] != "l1" or not 0 < density_of(parameters) < 1:
        return None
    return measure_l1(thin_by_rank, parameters, index, step, Thinned())


DELLA = Sparsifier(
    name="della",
    apply=drop_by_rank,
    prepare=_prepare,
    check=probabilities_lie_within,
    split="rowwise",
    parameters=(
        DENSITY,
        Parameter(
            name="epsilon",
            per_model=True,
            default=0.15,
            minimum=0,
            maximum=1,
            doc="half the spread of the keep probabilities around the density",
        ),
        Parameter(
            name="rescale",
            kind=bool,
            default=True,
            choices=("l1",),
            doc="divide what is kept by its probability; l1: so that the sum of sizes of the tensor is kept",
        ),
    ),
    source="arXiv:2406.11617",
)
