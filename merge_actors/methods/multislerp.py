"""Multi-SLERP: the weighted mean direction of several models, at their mean length."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from raymerge.merge_actors.methods.gram import collect_dots, gram_matrix, weighted_sum
from raymerge.merge_actors.methods.interface import Measure, Method, Parameter, Prepare, Settings

if TYPE_CHECKING:
    import torch

    from raymerge.merge_actors.methods.block import Block

#: Mean directions shorter than this are rounding noise: a dot of unit vectors is good to 1e-16.
SHORTEST_MEAN = 1e-7


def multislerp(block: Block) -> torch.Tensor:
    """Average directions and lengths apart: (sum_i w_i u_i) / |sum_i w_i u_i| * sum_i w_i |v_i|.

    C. Goddard 2024, "Multi-SLERP". v_i are the models, or their deltas from the base if there
    is one (which is then added back); u_i = v_i / (|v_i| + eps) and the w_i sum to 1 under
    `normalize_weights`. The method is published as a step in the tangent space at the mean m of
    the u_i: T = sum_i w_i (u_i - (u_i.m) m), then m cos|T| + T sin|T| / |T|. With the same
    weights in m and T, as published, sum_i w_i u_i = |sum| m makes T zero, so m is the result.

    Where the directions cancel (|sum_i w_i u_i| < max(eps, 1e-7)) the mean has none, and the
    result is sum_i w_i v_i, as published for two models; deltas that are all zero so give the
    base.

    Args:
        block: the models, with or without a base; its state is one coefficient per model.

    Returns:
        The merged block, in the block's compute dtype.
    """
    return weighted_sum(block, block.state, "offsets")


def coefficients(gram_MM: NDArray[np.float64], weights: list[float], eps: float) -> list[float]:
    """Return the factor of each v_i in the result.

    Args:
        gram_MM: dots of the v_i with one another.
        weights: one per model, summing to 1 unless the user wants otherwise.
        eps: added to each length.
    """
    lengths_M = np.sqrt(np.diag(gram_MM))
    units_M = np.array(weights) / (lengths_M + eps)
    mean = float(np.sqrt(np.maximum(0.0, units_M @ gram_MM @ units_M)))
    if mean < max(eps, SHORTEST_MEAN):
        return weights
    scale = float(np.array(weights) @ lengths_M) / mean
    return [float(unit) * scale for unit in units_M]


def prepare(settings: Settings) -> Prepare:
    """Measure the dots of the models, or of their deltas, over the whole tensor."""
    summaries = yield Measure(collect=collect_dots, arguments={"of": "offsets"})
    weights = [float(model["weight"] or 0) for model in settings.models]
    if settings.shared["normalize_weights"]:
        weights = [weight / sum(weights) for weight in weights]
    return coefficients(gram_matrix(summaries, len(weights)), weights, float(settings.shared["eps"] or 0))


def weights_do_not_cancel(settings: Settings) -> str | None:
    """Say what is wrong if weights that are to be normalised sum to zero."""
    weights = [float(model["weight"] or 0) for model in settings.models]
    if settings.shared["normalize_weights"] and abs(sum(weights)) < 1e-12:
        return f"the weights {weights} sum to 0, which normalize_weights cannot divide by; change a weight"
    return None


MULTISLERP = Method(
    name="multislerp",
    merge=multislerp,
    prepare=prepare,
    parameters=(
        Parameter(name="weight", per_model=True, required=True, doc="weight of the model"),
        Parameter(name="normalize_weights", kind=bool, default=True, doc="divide the weights by their sum"),
        Parameter(
            name="eps",
            default=1e-8,
            minimum=0,
            exclusive_minimum=True,
            doc="added to each length before dividing by it",
        ),
    ),
    base="optional",
    check=weights_do_not_cancel,
    source="https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
)
