"""Karcher mean: the point of the sphere nearest, along arcs, to all models."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from raymerge.merge_actors.methods.gram import collect_dots, gram_matrix, weighted_sum
from raymerge.merge_actors.methods.interface import Measure, Method, Parameter, Prepare, Settings

if TYPE_CHECKING:
    import torch

    from raymerge.merge_actors.methods.block import Block

#: Below this sine, an angle is 0 or pi to the accuracy of a float64 cosine.
_SMALLEST_SINE = 1e-8


def karcher(block: Block) -> torch.Tensor:
    """Average directions on the sphere and lengths apart: s u, s = mean_i |x_i|.

    Karcher 1977, "Riemannian center of mass and mollifier smoothing". u minimises the sum of
    squared angles to the unit vectors u_i = x_i / |x_i|. From the normalised mean of the u_i,
    each step follows T = mean_i A_i / sin A_i (u_i - cos A_i u), A_i the angle from u to u_i,
    along the sphere: u <- u cos|T| + T sin|T| / |T|, until |T| < tol or after max_iter steps.

    A tensor of zeros has no direction: it is left out of u and counts in s. A u_i opposite to u
    has no shortest arc: it adds nothing to T. Where the directions cancel (the mean of the u_i
    is shorter than tol) no mean direction exists, and the result is the plain mean.

    u stays in the span of the inputs, so the steps run on one coefficient per model, with the
    dots of the inputs in float64. |T|^2 is then a difference of numbers near 1, good to 1e-16;
    so |T| is good to 1e-8, and a tol below that asks for max_iter steps. The result does not
    suffer: T is of third order in the angles between models, and those enter as A / sin A.

    Args:
        block: the models; its state is one coefficient per model.

    Returns:
        The mean, in the block's compute dtype.
    """
    return weighted_sum(block, block.state, "models")


def coefficients(gram_MM: NDArray[np.float64], max_iter: int, tol: float) -> list[float]:
    """Return the factor of each x_i in the mean.

    Args:
        gram_MM: dots of the models with one another.
        max_iter: most steps.
        tol: length of T under which it has converged.
    """
    lengths_M = np.sqrt(np.diag(gram_MM))
    is_used_M = ~(lengths_M == 0)
    result_M = np.full(len(lengths_M), 1 / len(lengths_M))
    if not is_used_M.any():
        return [float(c) for c in result_M]
    used_U = lengths_M[is_used_M]
    cosine_UU = gram_MM[np.ix_(is_used_M, is_used_M)] / np.outer(used_U, used_U)
    np.fill_diagonal(cosine_UU, 1.0)
    direction_U = mean_direction(cosine_UU, max_iter, tol)
    if direction_U is not None:
        result_M[:] = 0
        result_M[is_used_M] = direction_U * lengths_M.mean() / used_U
    return [float(c) for c in result_M]


def mean_direction(cosine_UU: NDArray[np.float64], max_iter: int, tol: float) -> NDArray[np.float64] | None:
    """Return the mean of unit vectors as factors of them, or None if they cancel.

    Args:
        cosine_UU: dots of the unit vectors with one another.
        max_iter: most steps.
        tol: length of T under which it has converged.
    """
    share = 1 / len(cosine_UU)
    mean_U = np.full(len(cosine_UU), share)
    length = _length(cosine_UU, mean_U)
    if length < tol:
        return None
    mean_U /= length
    for _ in range(max_iter):
        dots_U = np.clip(cosine_UU @ mean_U, -1, 1)
        sine_U = np.sqrt(1 - dots_U * dots_U)
        is_bent = sine_U > _SMALLEST_SINE
        # A / sin A is 1 at angle 0; an opposite vector is left out.
        arcs_U = np.where(dots_U > 0, 1.0, 0.0)
        np.divide(np.arccos(dots_U), sine_U, out=arcs_U, where=is_bent)
        step_U = share * (arcs_U - (arcs_U @ dots_U) * mean_U)
        length = _length(cosine_UU, step_U)
        if length < tol:
            break
        mean_U = np.cos(length) * mean_U + np.sin(length) / length * step_U
        mean_U /= _length(cosine_UU, mean_U)
    return mean_U


def prepare(settings: Settings) -> Prepare:
    """Measure the dots of the models over the whole tensor."""
    summaries = yield Measure(collect=collect_dots, arguments={"of": "models"})
    max_iter, tol = settings.shared["max_iter"], settings.shared["tol"]
    assert isinstance(max_iter, int) and isinstance(tol, (int, float))
    return coefficients(gram_matrix(summaries, len(settings.models)), max_iter, tol)


def _length(cosine_UU: NDArray[np.float64], factors_U: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.maximum(0.0, factors_U @ cosine_UU @ factors_U)))


KARCHER = Method(
    name="karcher",
    merge=karcher,
    prepare=prepare,
    parameters=(
        Parameter(name="max_iter", kind=int, default=10, minimum=1, doc="most steps of the iteration"),
        Parameter(
            name="tol",
            default=1e-5,
            minimum=0,
            exclusive_minimum=True,
            doc="length of a step under which the mean has converged",
        ),
    ),
    source="doi:10.1002/cpa.3160300502",
)
