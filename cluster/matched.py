"""What matching finds out, as values: models with their headers, and what each output tensor is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from raymerge.merge_actors.checkpoint.adapted import adapted
from raymerge.merge_actors.checkpoint.adapter import Adapter, LowRank
from raymerge.merge_actors.checkpoint.folder import Checkpoint
from raymerge.merge_actors.checkpoint.header import TensorInfo
from raymerge.merge_actors.methods.interface import Settings
from raymerge.merge_actors.task import RowRun


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model of the campaign with its headers."""

    key: str
    """`ModelRef.key`: the name in messages and in random streams."""
    checkpoint: Checkpoint
    adapter: Adapter | None = None

    @property
    def merged(self) -> Checkpoint:
        """The model with its adapter, as one checkpoint."""
        return self.checkpoint if self.adapter is None else adapted(self.checkpoint, self.adapter)


@dataclass(frozen=True, slots=True)
class Statistic:
    """A model's statistic for one tensor: the Gram matrix of its inputs, or its Fisher information."""

    info: TensorInfo
    """A packed triangle, or a tensor of the parameter's own shape."""
    num_rows: tuple[int, ...] = (0,)
    """Rows that a Gram matrix sums over; of fused experts a number, and a triangle, for each."""
    in_features: int = 0
    is_transposed: bool = False
    """Is the parameter (or each expert of it) stored (in, out)?"""


@dataclass(frozen=True, slots=True)
class Operand:
    """One model's tensor as an input of a merge."""

    model: str
    """Key of the model."""
    info: TensorInfo
    low_rank: LowRank | None = None
    row_runs: tuple[RowRun, ...] | None = None
    """Which of its rows make which rows of the output's tensor, if not each its own."""
    num_rows: int = 0
    """Rows of the output's tensor, where there are `row_runs`."""
    fill_weight: float = 1.0
    """Share in the mean that rows are filled with which other models lack."""
    statistic: Statistic | None = None
    """What was measured about the model for this tensor, if the method uses it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedTensor:
    """One tensor of the output and what it is made of."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    method: str
    """Key of the registry, or "copy"."""
    settings: Settings
    base: Operand | None
    models: tuple[Operand, ...]
    """In canonical order where the method is symmetric."""
    stream_names: tuple[str, ...]
    """Names of the models' random streams; a model listed twice has two."""
    note: str = ""
    """Why it is not merged as the recipe says; empty if it is."""
    coverage: Literal["", "measured", "excluded", "fallback"] = ""
    """Of a method that merges by statistics: merged by them; not, though it might be; not, for want of them.
    Empty for tensors that no statistics belong to."""

    @property
    def operands(self) -> tuple[Operand, ...]:
        """The base, if there is one, and the models."""
        return self.models if self.base is None else (self.base, *self.models)
