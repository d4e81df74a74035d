"""Weighted averages of models and the copy of a single one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raymerge.merge_actors.methods.interface import Method, Parameter, Settings
from raymerge.merge_actors.methods.kernel_formula import KernelFormula

if TYPE_CHECKING:
    import torch

    from raymerge.merge_actors.methods.block import Block


def linear(block: Block) -> torch.Tensor:
    """Average models: sum_i w_i x_i, divided by sum_i w_i when `normalize`.

    Wortsman et al. 2022, "Model soups", arXiv:2203.05482.

    Args:
        block: any models, no base.

    Returns:
        The average, in the block's compute dtype.
    """
    weights = block.numbers("weight")
    total = sum(weights) if block.shared["normalize"] else 1.0
    average, model = block.model(0), block.scratch()
    if weights[0] != 1:
        average.mul_(weights[0])
    for i, weight in enumerate(weights[1:], start=1):
        average.add_(block.model(i, out=model), alpha=weight)
    # Divided at the end: 1/3 rounded to float32 would make three equal models a little smaller.
    return average.div_(total) if total != 1 else average


def linear_kernel(settings: Settings) -> KernelFormula:
    """Return `linear` for the compiled kernels."""
    weights = tuple(float(model["weight"]) for model in settings.models)  # type: ignore[arg-type]
    total = sum(weights) if settings.shared["normalize"] else 1.0
    return KernelFormula(kind="average", weights=weights, divisor=total)


def passthrough(block: Block) -> torch.Tensor:
    """Copy the one model: x, times `scale` if it is given."""
    out = block.model(0)
    scale = block.settings.models[0]["scale"]
    return out if scale is None else out.mul_(float(scale))


def weights_do_not_cancel(settings: Settings) -> str | None:
    """Say what is wrong if weights that are to be normalised sum to zero."""
    weights = [float(model["weight"] or 0) for model in settings.models]
    if settings.shared.get("normalize") and abs(sum(weights)) < 1e-12:
        return f"the weights {weights} sum to 0, which normalize cannot divide by; set normalize: false"
    return None


LINEAR = Method(
    name="linear",
    merge=linear,
    kernel=linear_kernel,
    parameters=(
        Parameter(name="weight", per_model=True, required=True, doc="weight of the model"),
        Parameter(name="normalize", kind=bool, default=True, doc="divide by the sum of the weights"),
    ),
    is_plain_sum=True,
    check=weights_do_not_cancel,
    source="arXiv:2203.05482",
)

PASSTHROUGH = Method(
    name="passthrough",
    merge=passthrough,
    parameters=(Parameter(name="scale", per_model=True, default=None, doc="factor on the tensor"),),
    num_models=(1, 1),
    is_plain_sum=True,
)
