"""What a method or a sparsifier asks of the compiled kernels, as numbers.

The kernels (merge_actors/kernels) do a few formulas in one pass. A method that has one says so
in its own file, beside the eager formula, which stays the reference and has the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from raymerge.merge_actors.methods.selection import Cut


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelStep:
    """Which elements of a model's delta stay; the others become 0."""

    kind: Literal["zero", "random", "largest", "not largest"]
    """None, those with a small random word, the largest, or all but the largest."""
    limit: int = 0
    """Of "random": words below it stay (`randomness.keep_limit`)."""
    cut: Cut | None = None
    """Of "largest" and "not largest": where the largest end."""
    factor: float = 1.0
    """On what stays."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelFormula:
    """How the models become one."""

    kind: Literal["sum", "sum agreeing", "average"]
    """`consensus.sum_task_vectors`, `consensus.sum_agreeing`, `averages.linear`."""
    weights: tuple[float, ...]
    scale: float = 1.0
    """On the merged task vector."""
    divisor: float = 1.0
    """Of an average."""
    is_mean: bool = False
    """Of "sum agreeing": divide by the weights that count, ..."""
    least_divisor: float = 0.0
    """... by no less than this; or, if it is 0, ..."""
    cancelled: float = 0.0
    """... by 1 where they sum to no more than this: they have cancelled."""


def keep_step(cut: Cut) -> tuple[KernelStep, ...]:
    """Return the step that keeps the largest; none where everything is kept."""
    if cut.keeps_none:
        return (KernelStep(kind="zero"),)
    return () if cut.value == 0 else (KernelStep(kind="largest", cut=cut),)
