"""Factorise sums of Gram matrices so that ill-conditioned ones still solve well.

A is scaled to a unit diagonal (Jacobi), s A s with s = diag(A)^-1/2, which takes out what
comes from features of different size. Then Cholesky, in steps, each taken only if the one
before does not do:

1. float32, kept if the condition number is at most 2^12: an error of about 5e-9 times that;
2. float64, kept if it is at most 2^24;
3. float64 with a ridge ("jitter") on the unit diagonal, 2^-22 of the greatest eigenvalue and
   tenfold more until it succeeds. Grams are kept in float32, so directions weaker than that
   are rounding, and the ridge keeps the solution small along them.

A feature whose diagonal is 0 was never active: its row and column are 0, and so is its solution.

Shape letters: I in features, R rows, T elements of a packed triangle.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raymerge.merge_actors.errors import CheckpointError
from raymerge.merge_actors.methods.gram_matrix import packed_diagonal, unpack_upper

if TYPE_CHECKING:
    import torch

#: A float32 factor is kept up to this condition number.
GREATEST_FLOAT32_CONDITION = 2.0**12
#: A float64 factor is kept without jitter up to this condition number.
GREATEST_CONDITION = 2.0**24
#: The first jitter, as a share of the greatest eigenvalue: above the rounding of float32 Grams.
_FIRST_JITTER = 2.0**-22
#: A greater jitter than this share says that the matrix is no sum of Grams at all.
_LAST_JITTER = 2.0**-7
_POWER_STEPS = 30
#: Columns of the identity that are solved at once to count directions.
_PROBES = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class FactorReport:
    """What was found while a matrix was factorised."""

    in_features: int
    num_dead: int
    """Features with a zero diagonal: never active in any model's data."""
    condition: float
    """Estimated condition number of the scaled matrix with its jitter: a lower bound, rarely off by a factor
    of 2."""
    rank: int
    """Directions that the data determine: the live features, or sum l / (l + jitter) over eigenvalues l
    (rounded) if jitter was needed."""
    jitter: float
    """Ridge on the scaled matrix, whose diagonal is 1; 0 if none was needed."""
    is_float64: bool
    """Was float32 too narrow?"""


class Factor:
    """The Cholesky factor of a scaled matrix A; solves X A = B for the rows of B."""

    def __init__(self, lower_II: torch.Tensor, scale_I: torch.Tensor, report: FactorReport) -> None:
        self.lower_II = lower_II
        self.scale_I = scale_I
        self.report = report

    @property
    def dtype(self) -> torch.dtype:
        """The dtype to compute right-hand sides in."""
        return self.lower_II.dtype

    @property
    def device(self) -> torch.device:
        """Where the factor lies."""
        return self.lower_II.device

    def solve_rows(self, rows_RI: torch.Tensor) -> torch.Tensor:
        """Return X with X A = B for each row of B; 0 where the feature is dead.

        Args:
            rows_RI: B, in the factor's dtype and on its device.
        """
        import torch

        return torch.cholesky_solve((rows_RI * self.scale_I).T, self.lower_II).T * self.scale_I


def factorise(triangle_T: torch.Tensor, in_features: int, name: str = "the statistics") -> Factor:
    """Factorise a symmetric positive semidefinite matrix.

    Args:
        triangle_T: its packed upper triangle, float64, any device.
        in_features: I.
        name: what an error calls the matrix.

    Returns:
        The factor, in float32 if that is precise enough, else in float64.

    Raises:
        CheckpointError: the matrix is far from positive semidefinite.
    """
    import torch

    diagonal_I = packed_diagonal(triangle_T, in_features)
    is_dead_I = diagonal_I == 0
    scale_I = diagonal_I.masked_fill(is_dead_I, 1).rsqrt()
    attempt = None
    if (
        torch.get_float32_matmul_precision() == "highest"
    ):  # else float32 products are those of TF32 or bfloat16
        attempt = _attempt(triangle_T, scale_I, is_dead_I, torch.float32)
    if attempt is None or not attempt.condition <= GREATEST_FLOAT32_CONDITION:
        attempt = None  # gives its matrices back before the wide ones are made
        attempt = _attempt(triangle_T, scale_I, is_dead_I, torch.float64)
    lower_II, condition, jitter = attempt.lower_II, attempt.condition, 0.0
    if lower_II.dtype == torch.float64 and not condition <= GREATEST_CONDITION:
        lower_II, jitter = _with_jitter(attempt.scaled_II, attempt.top, name)
        condition = (attempt.top + jitter) * _greatest_inverse(lower_II)
    num_dead = int(is_dead_I.sum())
    report = FactorReport(
        in_features=in_features,
        num_dead=num_dead,
        condition=condition,
        rank=(_count_directions(lower_II, jitter) if jitter else in_features) - num_dead,
        jitter=jitter,
        is_float64=lower_II.dtype == torch.float64,
    )
    return Factor(lower_II, scale_I.to(lower_II.dtype), report)


@dataclass(frozen=True, slots=True)
class _Attempt:
    """A factorisation without jitter."""

    scaled_II: torch.Tensor
    lower_II: torch.Tensor
    top: float
    """Greatest eigenvalue of the scaled matrix."""
    condition: float
    """Infinity if Cholesky failed."""


def _attempt(
    triangle_T: torch.Tensor, scale_I: torch.Tensor, is_dead_I: torch.Tensor, dtype: torch.dtype
) -> _Attempt:
    """Factorise s A s in `dtype`, with 1 on the diagonal of dead features too."""
    import torch

    narrow_I = scale_I.to(dtype)
    scaled_II = unpack_upper(triangle_T, len(scale_I), dtype)
    scaled_II.mul_(narrow_I).mul_(narrow_I.unsqueeze(1))
    scaled_II.diagonal().masked_fill_(is_dead_I, 1)
    lower_II, failed = torch.linalg.cholesky_ex(scaled_II)
    top = _greatest_eigenvalue(scaled_II.matmul, scaled_II)
    condition = math.inf if int(failed) else top * _greatest_inverse(lower_II)
    return _Attempt(scaled_II, lower_II, top, condition)


def _with_jitter(scaled_II: torch.Tensor, top: float, name: str) -> tuple[torch.Tensor, float]:
    """Raise the diagonal, tenfold each time, until Cholesky succeeds."""
    import torch

    share, jitter = _FIRST_JITTER, 0.0
    while share <= _LAST_JITTER:
        scaled_II.diagonal().add_(share * top - jitter)
        jitter = share * top
        lower_II, failed = torch.linalg.cholesky_ex(scaled_II)
        if not int(failed):
            return lower_II, jitter
        share *= 10
    raise CheckpointError(
        f"{name}: the sum of the Gram matrices is not positive semidefinite even with {jitter:.2g} added to its "
        "unit diagonal, so these are no Gram matrices; compute the statistics again."
    )


def _greatest_eigenvalue(apply: Callable[[torch.Tensor], torch.Tensor], like_II: torch.Tensor) -> float:
    """Return the greatest eigenvalue of a positive matrix by power iteration from a fixed vector."""
    import torch

    start = torch.randn(len(like_II), 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    vector = start.to(like_II)
    for _ in range(_POWER_STEPS):
        vector = apply(vector / vector.norm())
    return float(vector.norm())


def _greatest_inverse(lower_II: torch.Tensor) -> float:
    """Return 1 over the least eigenvalue."""
    import torch

    return _greatest_eigenvalue(lambda vector: torch.cholesky_solve(vector, lower_II), lower_II)


def _count_directions(lower_II: torch.Tensor, jitter: float) -> int:
    """Return sum l / (l + jitter) = I - jitter |L^-1|_F^2 over the eigenvalues l, rounded."""
    import torch

    in_features, total = lower_II.shape[0], 0.0
    for begin in range(0, in_features, _PROBES):
        # L^-1 is lower triangular: its columns [begin, end) need the rows from begin on only.
        probe = torch.eye(
            in_features - begin,
            min(_PROBES, in_features - begin),
            dtype=lower_II.dtype,
            device=lower_II.device,
        )
        solved = torch.linalg.solve_triangular(lower_II[begin:, begin:], probe, upper=False)
        total += float(solved.square().sum())
    return round(in_features - jitter * total)
