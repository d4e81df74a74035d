"""SLERP: from the base to the one other model along the arc between them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from raymerge.merge_actors.methods.gram import collect_dots, gram_matrix
from raymerge.merge_actors.methods.interface import Measure, Method, Parameter, Prepare, Settings

if TYPE_CHECKING:
    import torch

    from raymerge.merge_actors.methods.block import Block

#: Beyond this cosine the arc is taken for a straight line.
COLINEAR_COSINE = 0.9995
#: A vector shorter than this is not scaled to unit length.
SHORTEST_NORM = 1e-8


def slerp(block: Block) -> torch.Tensor:
    """Interpolate on the arc: sin((1-t) A) / sin A * a + sin(t A) / sin A * b.

    Shoemake 1985, "Animating rotation with quaternion curves", here over the flattened tensor:
    a is the base, b the other model, A the angle between them. Where |cos A| > 0.9995 it is
    (1 - t) a + t b. Not scaled to any norm: a and b keep their own. t = 0 gives the base and
    t = 1 the model, both exactly.

    Args:
        block: the base and one model; its state is what `arc` returns, or None for a straight line.

    Returns:
        The point at `t`, in the block's compute dtype.
    """
    import torch

    model = block.model(0)
    if block.state is None:
        return torch.lerp(block.base(), model, block.number("t"), out=model)
    of_base, of_model = block.state
    return torch.mul(block.base(), of_base, out=block.scratch()).add_(model, alpha=of_model)


def arc(gram_KK: NDArray[np.float64], t: float) -> tuple[float, float] | None:
    """Return the factors of a and b at `t` of the arc, or None where the arc is a straight line.

    Args:
        gram_KK: dots of (a, b) with each other, (2, 2).
        t: from 0 (a) to 1 (b).
    """
    norms = [norm if norm > SHORTEST_NORM else 1.0 for norm in np.sqrt(np.diag(gram_KK))]
    cosine = float(np.clip(gram_KK[0, 1] / (norms[0] * norms[1]), -1, 1))
    if abs(cosine) > COLINEAR_COSINE:
        return None
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def prepare(settings: Settings) -> Prepare:
    """Measure both norms and the angle between them over the whole tensor."""
    summaries = yield Measure(collect=collect_dots, arguments={"of": "ends"})
    t = settings.shared["t"]
    assert isinstance(t, (int, float))
    return arc(gram_matrix(summaries, 2), t)


SLERP = Method(
    name="slerp",
    merge=slerp,
    prepare=prepare,
    parameters=(
        Parameter(
            name="t",
            required=True,
            minimum=0,
            maximum=1,
            doc="place on the arc: 0 is the base, 1 the other model",
        ),
    ),
    base="required",
    num_models=(1, 1),
    source="Shoemake 1985, doi:10.1145/325334.325242",
)
