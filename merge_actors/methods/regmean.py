"""RegMean: merge linear maps so that they agree with each model on that model's own inputs.

    W* = argmin_W sum_m c_m |X_m (W - W_m)^T|^2,    c_m = weight_m / rows_m, or weight_m

Jin et al. 2022, arXiv:2212.09849, section 3; `alpha` scales the off-diagonal of each X_m^T X_m. A tensor
that is no linear map, and so has no Gram matrix, is averaged. The solve is in `regmean_solve.py`; here is the
method as a recipe sees it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from raymerge.merge_actors.errors import RecipeError
from raymerge.merge_actors.methods.interface import Method, Parameter, Settings

if TYPE_CHECKING:
    import torch

    from raymerge.merge_actors.methods.block import Block


def check_rows(name: str, num_rows: Sequence[int], in_features: int, alpha: float, force: bool) -> str | None:
    """Say what is wrong with statistics of fewer rows than input features; None if they suffice.

    Args:
        name: the tensor.
        num_rows: rows of each model that counts.
        in_features: I.
        alpha: as it will be used.
        force: solve with alpha 1 all the same.

    Raises:
        RecipeError: `alpha` is 1 and `force` is not set.
    """
    if sum(num_rows) >= in_features:
        return None
    found = (
        f"{name}: the statistics have {sum(num_rows):,} tokens in all for {in_features:,} input features, "
        "which leaves some directions open"
    )
    if alpha < 1:
        return f"{found}; alpha {alpha:g} keeps them near the mean, more samples would be better."
    if not force:
        raise RecipeError(f"{found}; set alpha below 1 (0.9), take more samples, or set force: true.")
    return f"{found}; they stay near the mean (force: true)."


def mean_of_rest(block: Block) -> torch.Tensor:
    """Average a tensor that has no Gram matrix (bias, norm, embedding): sum_m w_m x_m / sum_m w_m.

    Args:
        block: any models, no base.

    Returns:
        The average, in the block's compute dtype.
    """
    weights = block.numbers("weight")
    total = block.model(0)
    if weights[0] != 1:
        total.mul_(weights[0])
    model = block.scratch() if len(weights) > 1 else None
    for i, weight in enumerate(weights[1:], start=1):
        total.add_(block.model(i, out=model), alpha=weight)
    return total.div_(sum(weights))


def weights_count(settings: Settings) -> str | None:
    """Say what is wrong if no model counts."""
    weights = [float(model["weight"] or 0) for model in settings.models]
    if sum(weights) > 0:
        return None
    return f"the weights {weights} sum to 0; at least one model must have a weight above 0"


WEIGHT = Parameter(
    name="weight",
    per_model=True,
    default=1.0,
    minimum=0,
    doc="factor on the model's statistics, and in means",
)

REGMEAN = Method(
    name="regmean",
    merge=mean_of_rest,
    kind="solve",
    statistic="gram",
    parameters=(
        WEIGHT,
        Parameter(
            name="alpha",
            default=0.9,
            minimum=0,
            maximum=1,
            doc="factor on the Gram matrices' off-diagonal: 1 is plain RegMean, less keeps closer to each model",
        ),
        Parameter(
            name="normalize",
            kind=str,
            default="tokens",
            choices=("tokens", "sum"),
            doc="divide each model's Gram matrix by its number of tokens, or not",
        ),
        Parameter(
            name="force",
            kind=bool,
            default=False,
            doc="solve with alpha 1 where there are fewer tokens than input features",
        ),
    ),
    is_plain_sum=True,
    check=weights_count,
    source="arXiv:2212.09849",
)
