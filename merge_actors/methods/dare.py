"""DARE: drop elements of a delta at random and rescale the rest. See `randomness` for the masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from raymerge.merge_actors.methods.interface import Parameter, Prepare, Sparsifier, Value
from raymerge.merge_actors.methods.kernel_formula import KernelStep
from raymerge.merge_actors.methods.selection import find_cuts, keep_largest
from raymerge.merge_actors.methods.thinning import (
    DENSITY,
    Thinned,
    density_of,
    magnitude,
    measure_l1,
)
from raymerge.merge_actors.randomness import fill_words, keep_limit, zero_dropped

if TYPE_CHECKING:
    import torch

    from raymerge.merge_actors.methods.block import Block


def drop_at_random(
    delta_P: torch.Tensor, parameters: Mapping[str, Value], key: int, block: Block, state: Thinned | None
) -> torch.Tensor:
    """Drop a share p = 1 - density of the elements: delta <- m delta / (1 - p).

    Yu et al. 2023, arXiv:2311.03099, equation 1; m = 0 with probability p. At p = 0 the delta
    is untouched, at p = 1 nothing is left. `rescale: l1` keeps the tensor's L1 norm instead of
    its expectation; `rescale: false` only drops. The paper's ablations: `mask_strategy:
    magnitude` drops the smallest elements, `mask_target: weights` drops elements of the
    fine-tuned weights, so that delta <- m x / (1 - p) - b.

    Args:
        delta_P: the delta, overwritten.
        parameters: density, rescale, mask_strategy, mask_target.
        key: of the random stream.
        block: where the elements stand.
        state: the L1 factor or the magnitude threshold, if any was measured.

    Returns:
        `delta_P`.
    """
    if density_of(parameters) >= 1:
        return delta_P
    state = state or Thinned()
    thin_at_random(delta_P, parameters, key, block, state)
    return delta_P.mul_(state.factor) if state.factor != 1 else delta_P


def thin_at_random(
    delta_P: torch.Tensor, parameters: Mapping[str, Value], key: int, block: Block, state: Thinned
) -> torch.Tensor:
    """Drop and rescale by 1 / (1 - p), without the L1 factor."""
    density = density_of(parameters)
    on_weights = parameters["mask_target"] == "weights"
    if on_weights:
        delta_P.add_(block.base())
    if density <= 0:
        delta_P.zero_()
    elif parameters["mask_strategy"] == "magnitude":
        keep_largest(delta_P, state.cuts[0], block)
    else:
        drop_words(delta_P, key, block, keep_limit(1 - density))
    if density > 0 and parameters["rescale"] is True:
        delta_P.mul_(1 / density)
    return delta_P.sub_(block.base()) if on_weights else delta_P


def drop_at_random_kernel(
    parameters: Mapping[str, Value], state: Thinned | None
) -> tuple[KernelStep, ...] | None:
    """Return `drop_at_random` for the compiled kernels, which do without the ablations and the L1 norm."""
    del state
    if parameters["mask_strategy"] != "random" or parameters["mask_target"] != "delta":
        return None
    density, rescale = density_of(parameters), parameters["rescale"]
    if density >= 1:
        return ()
    if density <= 0:
        return (KernelStep(kind="zero"),)
    if rescale == "l1":
        return None
    factor = 1 / density if rescale is True else 1.0
    return (KernelStep(kind="random", limit=keep_limit(1 - density), factor=factor),)


def drop_words(delta_P: torch.Tensor, key: int, block: Block, limit: int) -> None:
    """Zero the elements whose random word is at least `limit`."""
    import torch

    words, other = block.scratch(torch.int32).view(-1), block.scratch(torch.int32).view(-1)
    zero_dropped(delta_P.view(-1), fill_words(words, other, key, block.begin), limit)


def l1_needs_the_delta(parameters: Mapping[str, Value]) -> str | None:
    """Say what is wrong if the norm of the delta is to be kept while the weights are thinned."""
    if parameters["rescale"] == "l1" and parameters["mask_target"] == "weights":
        return "rescale: l1 keeps the norm of the delta, but mask_target is weights; set rescale: true"
    return None


def _prepare(parameters: Mapping[str, Value], index: int, step: int, num_elements: int) -> Prepare | None:
    by_magnitude = parameters["mask_strategy"] == "magnitude"
    if not 0 < density_of(parameters) < 1 or not (by_magnitude or parameters["rescale"] == "l1"):
        return None
    return _measure(parameters, index, step, num_elements)


def _measure(parameters: Mapping[str, Value], index: int, step: int, num_elements: int) -> Prepare:
    state = Thinned()
    if parameters["mask_strategy"] == "magnitude":
        of = {"index": index, "step": step, "target": parameters["mask_target"]}
        num_kept = int(density_of(parameters) * num_elements)
        state = Thinned((yield from find_cuts(magnitude, of, num_elements, [num_kept], step == 0)))
    if parameters["rescale"] == "l1":
        state = yield from measure_l1(thin_at_random, parameters, index, step, state)
    return state


RANDOM = Sparsifier(
    name="random",
    apply=drop_at_random,
    kernel=drop_at_random_kernel,
    prepare=_prepare,
    check=l1_needs_the_delta,
    parameters=(
        DENSITY,
        Parameter(
            name="rescale",
            kind=bool,
            default=True,
            choices=("l1",),
            doc="divide what is kept by the density; l1: so that the sum of sizes of the tensor is kept",
        ),
        Parameter(
            name="mask_strategy",
            kind=str,
            default="random",
            choices=("random", "magnitude"),
            doc="drop at random, or the smallest",
        ),
        Parameter(
            name="mask_target",
            kind=str,
            default="delta",
            choices=("delta", "weights"),
            doc="drop elements of the delta, or of the fine-tuned weights",
        ),
    ),
    source="arXiv:2311.03099",
)
