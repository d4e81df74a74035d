"""Model Stock: from the base towards the mean of the models, as far as their angles say."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from raymerge.merge_actors.methods.gram import (
    collect_dots,
    gram_matrix,
    row_grams,
    weighted_sum,
    wide_vectors,
)
from raymerge.merge_actors.methods.interface import Measure, Method, Parameter, Prepare, Settings, Split

if TYPE_CHECKING:
    import torch

    from raymerge.merge_actors.methods.block import Block


def model_stock(block: Block) -> torch.Tensor:
    """Interpolate t mean_i x_i + (1 - t) b with t = N c / (1 + (N - 1) c).

    Jang et al. 2024, arXiv:2403.19522, the ratio for N fine-tuned models; c is the mean over
    pairs of models of cos(x_i - b, x_j - b), over the whole tensor, or over each last-axis
    vector under `filter_wise`. The paper derives t for one angle of at most 90 degrees common
    to all pairs, where 0 <= t <= 1; for a negative c, whose t would leave that range (and is
    unbounded at c = -1 / (N - 1)), t is 0: models that disagree give the base. The cosine with
    a delta of zeros is 0.

    Args:
        block: the base and at least two models; its state is t, or None for one t per row.

    Returns:
        The merged block, in the block's compute dtype.
    """
    count = block.num_models
    if block.state is not None:
        return weighted_sum(block, [block.state / count] * count, "offsets")
    share_R1 = row_ratios(block).div_(count).to(block.dtype)
    return weighted_sum(block, [share_R1] * count, "offsets")


def ratio(gram_MM: NDArray[np.float64]) -> float:
    """Return t, how far to go from the base to the mean of the models.

    Args:
        gram_MM: dots of the deltas with one another.
    """
    count = len(gram_MM)
    lengths_M = np.sqrt(np.diag(gram_MM))
    cosines = []
    for i, j in itertools.combinations(range(count), 2):
        product = lengths_M[i] * lengths_M[j]
        cosines.append(gram_MM[i, j] / product if product != 0 else 0.0)
    mean = np.maximum(0.0, math.fsum(cosines) / len(cosines))
    return float(count * mean / (1 + (count - 1) * mean))


def row_ratios(block: Block) -> torch.Tensor:
    """Return t of each row, float64 (R, 1)."""
    count = block.num_models
    dots = row_grams(block, wide_vectors(block, "offsets"))
    cosines = []
    for i, j in itertools.combinations(range(count), 2):
        product_R1 = dots[i, i].sqrt() * dots[j, j].sqrt()
        cosines.append(dots[i, j] / product_R1.masked_fill(product_R1 == 0, 1))
    mean_R1 = (sum(cosines[1:], cosines[0]) / len(cosines)).clamp_(min=0)
    return count * mean_R1 / (1 + (count - 1) * mean_R1)


def prepare(settings: Settings) -> Prepare | None:
    """Measure the angles between the deltas over the whole tensor, if that is what is asked."""
    return None if settings.shared["filter_wise"] else _measure(len(settings.models))


def _measure(num_models: int) -> Prepare:
    summaries = yield Measure(collect=collect_dots, arguments={"of": "offsets"})
    return ratio(gram_matrix(summaries, num_models))


def split(settings: Settings) -> Split:
    """Keep rows whole where each has an angle of its own."""
    return "rowwise" if settings.shared["filter_wise"] else "elementwise"


MODEL_STOCK = Method(
    name="model_stock",
    merge=model_stock,
    prepare=prepare,
    parameters=(
        Parameter(
            name="filter_wise", kind=bool, default=False, doc="one ratio per last-axis vector, not per tensor"
        ),
    ),
    split=split,
    base="required",
    num_models=(2, None),
    source="arXiv:2403.19522",
)
