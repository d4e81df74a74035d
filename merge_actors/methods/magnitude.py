"""Thin by magnitude: keep the largest elements (TIES), or what is neither large nor small (breadcrumbs)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from raymerge.merge_actors.methods.interface import Parameter, Prepare, Sparsifier, Value
from raymerge.merge_actors.methods.kernel_formula import KernelStep, keep_step
from raymerge.merge_actors.methods.selection import Cut, find_cuts, keep_largest
from raymerge.merge_actors.methods.thinning import (
    DENSITY,
    RESCALE,
    Thinned,
    density_of,
    magnitude,
    measure_l1,
)

if TYPE_CHECKING:
    import torch

    from raymerge.merge_actors.methods.block import Block


def trim(
    delta_P: torch.Tensor, parameters: Mapping[str, Value], key: int, block: Block, state: Thinned | None
) -> torch.Tensor:
    """Keep the floor(density n) elements of largest |delta|, ties broken by the lower index.

    Yadav et al. 2023 (TIES), arXiv:2306.01708, section 3.1. `trim: model` is what the paper's
    code does: one threshold over the whole model, the (n - floor(density n))-th smallest
    |delta|, which is itself kept, with all its equals. `rescale` gives the tensor its L1 norm
    back; the paper does not rescale.

    Args:
        delta_P: the delta, overwritten.
        parameters: density, trim, rescale.
        key: not used.
        block: where the elements stand.
        state: the threshold; None at density 0 and 1.

    Returns:
        `delta_P`.
    """
    if density_of(parameters) >= 1:
        return delta_P
    if state is None:
        return delta_P.zero_()
    keep_largest(delta_P, state.cuts[0], block)
    return delta_P.mul_(state.factor) if state.factor != 1 else delta_P


def trim_kernel(parameters: Mapping[str, Value], state: Thinned | None) -> tuple[KernelStep, ...] | None:
    """Return `trim` for the compiled kernels, which do without the L1 norm."""
    if density_of(parameters) >= 1:
        return ()
    if parameters["rescale"]:
        return None
    return (KernelStep(kind="zero"),) if state is None else keep_step(state.cuts[0])


def drop_outliers(
    delta_P: torch.Tensor, parameters: Mapping[str, Value], key: int, block: Block, state: Thinned | None
) -> torch.Tensor:
    """Drop the share gamma of largest |delta| and the share 1 - density - gamma of smallest.

    Davari and Belilovsky 2023 (Model Breadcrumbs), arXiv:2312.06795. Counts are rounded down,
    ties broken by the lower index. Where density + gamma > 1 fewer of the largest are dropped,
    so that the density holds; at density 1 the delta is untouched.

    Args:
        delta_P: the delta, overwritten.
        parameters: density, gamma, rescale.
        key: not used.
        block: where the elements stand.
        state: the two thresholds; None at density 0 and 1.

    Returns:
        `delta_P`.
    """
    if density_of(parameters) >= 1:
        return delta_P
    if state is None:
        return delta_P.zero_()
    outliers, kept = state.cuts
    if not outliers.keeps_none:
        largest = block.scratch().copy_(delta_P)
        keep_largest(delta_P, kept, block)
        delta_P.sub_(keep_largest(largest, outliers, block))
    else:
        keep_largest(delta_P, kept, block)
    return delta_P.mul_(state.factor) if state.factor != 1 else delta_P


def drop_outliers_kernel(
    parameters: Mapping[str, Value], state: Thinned | None
) -> tuple[KernelStep, ...] | None:
    """Return `drop_outliers` for the compiled kernels, which do without the L1 norm."""
    if density_of(parameters) >= 1:
        return ()
    if parameters["rescale"]:
        return None
    if state is None:
        return (KernelStep(kind="zero"),)
    outliers, kept = state.cuts
    dropped = KernelStep(kind="not largest", cut=outliers)
    return (*keep_step(kept), *(() if outliers.keeps_none else (dropped,)))


def _prepare_trim(
    parameters: Mapping[str, Value], index: int, step: int, num_elements: int
) -> Prepare | None:
    return _measure_trim(parameters, index, step, num_elements) if 0 < density_of(parameters) < 1 else None


def _measure_trim(parameters: Mapping[str, Value], index: int, step: int, num_elements: int) -> Prepare:
    of = {"index": index, "step": step}
    rank = int(density_of(parameters) * num_elements)
    if over_the_model(parameters):
        (cut,) = yield from find_cuts(magnitude, of, num_elements, [min(rank + 1, num_elements)], step == 0)
        cuts: tuple[Cut, ...] = (Cut(cut.value),)
    else:
        cuts = yield from find_cuts(magnitude, of, num_elements, [rank], step == 0)
    if not parameters["rescale"]:
        return Thinned(cuts)
    return (yield from measure_l1(trim, parameters, index, step, Thinned(cuts)))


def _prepare_outliers(
    parameters: Mapping[str, Value], index: int, step: int, num_elements: int
) -> Prepare | None:
    return (
        _measure_outliers(parameters, index, step, num_elements) if 0 < density_of(parameters) < 1 else None
    )


def _measure_outliers(parameters: Mapping[str, Value], index: int, step: int, num_elements: int) -> Prepare:
    num_kept = int(density_of(parameters) * num_elements)
    num_outliers = min(int(float(parameters["gamma"]) * num_elements), num_elements - num_kept)  # type: ignore[arg-type]
    ranks = [num_outliers, num_outliers + num_kept]
    of = {"index": index, "step": step}
    state = Thinned((yield from find_cuts(magnitude, of, num_elements, ranks, step == 0)))
    if not parameters["rescale"]:
        return state
    return (yield from measure_l1(drop_outliers, parameters, index, step, state))


def over_the_model(parameters: Mapping[str, Value]) -> bool:
    """Return whether one threshold is taken over all tensors of the model."""
    return parameters["trim"] == "model"


MAGNITUDE = Sparsifier(
    name="magnitude",
    apply=trim,
    kernel=trim_kernel,
    prepare=_prepare_trim,
    is_model_wide=over_the_model,
    parameters=(
        DENSITY,
        Parameter(
            name="trim",
            kind=str,
            default="tensor",
            choices=("tensor", "model"),
            doc="take the largest of each tensor, or of the whole model as the paper's code does",
        ),
        RESCALE,
    ),
    source="arXiv:2306.01708",
)

BREADCRUMBS = Sparsifier(
    name="breadcrumbs",
    apply=drop_outliers,
    kernel=drop_outliers_kernel,
    prepare=_prepare_outliers,
    parameters=(
        DENSITY,
        Parameter(
            name="gamma",
            per_model=True,
            default=0.01,
            minimum=0,
            maximum=1,
            exclusive_maximum=True,
            doc="share of the largest elements that is dropped",
        ),
        RESCALE,
    ),
    source="arXiv:2312.06795",
)
