"""Fisher-weighted averaging: each element of a model counts by how sure the model's data make it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from raymerge.merge_actors.methods.block import fsum_columns
from raymerge.merge_actors.methods.interface import Measure, Method, Parameter, Prepare, Settings
from raymerge.merge_actors.methods.regmean import WEIGHT, weights_count

if TYPE_CHECKING:
    import torch

    from raymerge.merge_actors.methods.block import Block

#: Where the plan puts a model's scale for `normalize: model`, beside the model's parameters.
SCALE = "statistic_scale"


def fisher(block: Block) -> torch.Tensor:
    """Average models by their Fisher information: sum_i c_i F_i x_i / sum_i c_i F_i, element by element.

    Matena & Raffel 2022, arXiv:2111.09832, section 3, F_i being at least `floor`, so that elements that
    no data touch are averaged by the weights c_i alone. `normalize` divides F_i by its root mean
    square over the tensor or over the whole model first, so that a model whose Fisher values are
    all larger does not win everywhere; the paper does so over the model. A factor that all c_i
    share changes nothing.

    Computed as x_0 + sum_i c_i F_i (x_i - x_0) / sum_i c_i F_i, so that copies of a model give that model.

    Args:
        block: any models, no base; a statistic F_i for each model, no value negative.

    Returns:
        The average, in the block's compute dtype.
    """
    weights, floor = block.numbers("weight"), block.number("floor")
    scales = _scales(block)
    anchor = next(i for i, weight in enumerate(weights) if weight > 0)
    first, total, divisor = block.model(anchor), block.zeros(), block.zeros()
    delta, share = block.scratch(), block.scratch()
    for i, (weight, scale) in enumerate(zip(weights, scales, strict=True)):
        if weight == 0:
            continue
        share = block.statistic(i, out=share)
        if scale != 1:
            share.div_(scale)
        share.clamp_min_(floor).mul_(weight)
        divisor.add_(share)
        if i != anchor:
            total.addcmul_(block.model(i, out=delta).sub_(first), share)
    return first.add_(total.div_(divisor))


def root_mean_square(sum_of_squares: float, num_elements: int) -> float:
    """Return the scale of Fisher values: their root mean square, 1 where all are 0."""
    return math.sqrt(sum_of_squares / num_elements) if sum_of_squares > 0 else 1.0


def collect_squares(blocks: Iterable[Block]) -> NDArray[np.float64]:
    """Sum F_i^2 over each unit of a slice, and count its elements: (units, models + 1)."""
    rows = [np.zeros((0, 0))]
    for block in blocks:
        values, columns = block.scratch(), []
        for i in range(block.num_models):
            values = block.statistic(i, out=values)
            columns.append(block.unit_dots(values, values))
        # Only the total of the counts matters, not which unit they stand at.
        counts = np.zeros_like(columns[0])
        counts[:1] = block.num_elements
        rows.append(np.stack([*columns, counts], axis=1))
    return np.concatenate(rows[1:] or rows)


def _prepare(settings: Settings) -> Prepare | None:
    return _measure(settings) if settings.shared["normalize"] == "tensor" else None


def _measure(settings: Settings) -> Prepare:
    parts = [part for part in (yield Measure(collect=collect_squares)) if len(part)]
    *squares, count = fsum_columns(parts) if parts else [0.0] * (len(settings.models) + 1)
    return tuple(root_mean_square(square, int(count)) for square in squares)


def _scales(block: Block) -> list[float]:
    if block.shared["normalize"] == "model":
        return block.numbers(SCALE)
    return list(block.state) if block.shared["normalize"] == "tensor" else [1.0] * block.num_models


FISHER = Method(
    name="fisher",
    merge=fisher,
    statistic="fisher",
    prepare=_prepare,
    parameters=(
        WEIGHT,
        Parameter(
            name="floor",
            default=1e-6,
            minimum=0,
            exclusive_minimum=True,
            doc="least Fisher value, after the normalisation",
        ),
        Parameter(
            name="normalize",
            kind=str,
            default="none",
            choices=("none", "tensor", "model"),
            doc="divide a model's Fisher values by their root mean square over the tensor or the whole model",
        ),
    ),
    check=weights_count,
    source="arXiv:2111.09832",
)
