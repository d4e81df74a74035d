"""NuSLERP: from one model to another along the arc between them, or between their deltas."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from raymerge.merge_actors.methods.columns import add_to_sums, empty_sums, num_columns, read_sums, spread
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

#: Vectors shorter than this are divided by it, not by their length.
_SHORTEST_LENGTH = 1e-7
#: Arcs with a smaller sine are straight lines.
_SMALLEST_SINE = 1e-8
#: The dots that an arc needs: of the first model, of both, of the second.
_DOTS = ((0, 0), (0, 1), (1, 1))


def nuslerp(block: Block) -> torch.Tensor:
    """Interpolate sin((1-t) A) / sin A * v_1 + sin(t A) / sin A * v_2, t = w_2 / (w_1 + w_2).

    SLERP (Shoemake 1985) with weights, as mergekit defines it under this name: v_i are the two
    models, or their deltas from the base if there is one (which is then added back). t is 0.5
    where |w_1 + w_2| < 1e-6; where |sin A| < 1e-8 the arc is a straight line. A is the angle
    between the flattened tensors (`nuslerp_flatten`); else each last-axis vector has its own
    (the columns of y = x W for a torch Linear), or under `nuslerp_row_wise` each first-axis
    vector (the rows of that W).

    Args:
        block: two models, with or without a base; its state holds the factors of both, numbers
            or one per first-axis vector; None for last-axis vectors.

    Returns:
        The merged block, in the block's compute dtype.
    """
    if block.state is None:
        return weighted_sum(block, row_factors(block), "offsets")
    if block.shared["nuslerp_flatten"]:
        return weighted_sum(block, block.state, "offsets")
    return weighted_sum(block, [spread(factors_V, block) for factors_V in block.state], "offsets")


def arc_factors(
    dots_11: NDArray[np.float64], dots_12: NDArray[np.float64], dots_22: NDArray[np.float64], t: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the factors of v_1 and v_2 at `t` of their arc, for arrays of dots.

    Args:
        dots_11: v_1 . v_1
        dots_12: v_1 . v_2
        dots_22: v_2 . v_2
        t: 0 is v_1, 1 is v_2.
    """
    lengths = [np.maximum(np.sqrt(dots), _SHORTEST_LENGTH) for dots in (dots_11, dots_22)]
    angle = np.arccos(np.clip(dots_12 / (lengths[0] * lengths[1]), -1, 1))
    sine = np.sin(angle)
    is_straight = sine < _SMALLEST_SINE
    divisor = np.where(is_straight, 1.0, sine)
    first = np.where(is_straight, 1 - t, np.sin((1 - t) * angle) / divisor)
    return first, np.where(is_straight, t, np.sin(t * angle) / divisor)


def row_factors(block: Block) -> list[torch.Tensor]:
    """Return both models' factors for each last-axis vector, (R, 1) in the compute dtype."""
    import torch

    dots = row_grams(block, wide_vectors(block, "offsets"))
    first, both, second = (dots[pair].cpu().numpy() for pair in _DOTS)
    return [
        torch.from_numpy(factors).to(device=dots[0, 0].device, dtype=block.dtype)
        for factors in arc_factors(first, both, second, fraction(block.settings))
    ]


def fraction(settings: Settings) -> float:
    """Return t, the place on the arc that the weights name."""
    first, second = (float(model["weight"] or 0) for model in settings.models)
    return 0.5 if abs(first + second) < 1e-6 else second / (first + second)


def collect_column_dots(blocks: Iterable[Block]) -> NDArray[np.int64]:
    """Dot the models along the first axis: sums of `columns`, one per pair of `_DOTS`."""
    sums: list[NDArray[np.int64]] = []
    for block in blocks:
        sums = sums or [empty_sums(num_columns(block)) for _ in _DOTS]
        vectors = wide_vectors(block, "offsets")
        product = block.scratch(vectors[0].dtype)
        for of_pair, (i, j) in zip(sums, _DOTS, strict=True):
            add_to_sums(of_pair, product.copy_(vectors[i]).mul_(vectors[j]), block)
    return np.stack(sums or [empty_sums(0) for _ in _DOTS])


def prepare(settings: Settings) -> Prepare | None:
    """Measure the angles over the whole tensor, or along its first axis."""
    if settings.shared["nuslerp_flatten"]:
        return _measure_tensor(fraction(settings))
    return _measure_columns(fraction(settings)) if settings.shared["nuslerp_row_wise"] else None


def split(settings: Settings) -> Split:
    """Keep rows whole where each last-axis vector has an angle of its own."""
    is_whole = settings.shared["nuslerp_flatten"] or settings.shared["nuslerp_row_wise"]
    return "elementwise" if is_whole else "rowwise"


def _measure_tensor(t: float) -> Prepare:
    summaries = yield Measure(collect=collect_dots, arguments={"of": "offsets"})
    gram_KK = gram_matrix(summaries, 2)
    return [float(factor) for factor in arc_factors(gram_KK[0, 0], gram_KK[0, 1], gram_KK[1, 1], t)]


def _measure_columns(t: float) -> Prepare:
    summaries = yield Measure(collect=collect_column_dots)
    first, both, second = (read_sums(sums_LV) for sums_LV in np.sum(summaries, axis=0))
    return arc_factors(first, both, second, t)


NUSLERP = Method(
    name="nuslerp",
    merge=nuslerp,
    prepare=prepare,
    parameters=(
        Parameter(
            name="weight",
            per_model=True,
            required=True,
            doc="weight of the model; the second one's share is the place on the arc",
        ),
        Parameter(name="nuslerp_flatten", kind=bool, default=True, doc="one angle for the whole tensor"),
        Parameter(
            name="nuslerp_row_wise",
            kind=bool,
            default=False,
            doc="without nuslerp_flatten: one angle per first-axis vector, not per last-axis vector",
        ),
    ),
    split=split,
    base="optional",
    num_models=(2, 2),
    source="https://github.com/arcee-ai/mergekit/blob/main/docs/merge_methods.md",
)
