"""What the driver tells activation workers, and what they tell it: small frozen values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from raymerge.stats.data_rows import DataSpec
from raymerge.stats.fisher_accumulator import Estimator
from raymerge.stats.layer_groups import Needs
from raymerge.stats.linear_maps import ModelMaps
from raymerge.stats.masked_rows import Batching


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasureJob:
    """What is measured, the same for all workers."""

    model: str
    """Local folder or Hub id."""
    revision: str | None
    adapter: str | None = None
    """Local folder or Hub id of an adapter that is added to the model."""
    adapter_revision: str | None = None
    allow_pickle: bool
    trust_remote_code: bool = False
    """Run code of the checkpoint where transformers has no class of its own."""
    kind: Literal["gram", "fisher"]
    data: DataSpec
    estimator: Estimator
    """Of Fisher."""
    device: Literal["cpu", "cuda"]
    threads: int
    """Of torch in a worker on a CPU."""
    work_folder: str
    """Where statistics and cached activations go; every worker sees it."""
    padding_side: Literal["right", "left"] = "right"


@dataclass(frozen=True, kw_only=True, slots=True)
class Description:
    """A model and its data as a worker sees them."""

    maps: ModelMaps
    parameters: Mapping[str, tuple[tuple[str, tuple[int, ...]], ...]]
    """For Fisher: parameter -> its tensors in the checkpoint, with their shapes."""
    parameter_blocks: Mapping[str, int | None]
    """For Fisher: parameter -> number of its block."""
    needs: Needs
    memory_bytes: int
    """What the worker may use if nothing else is said."""
    num_shards: int
    num_rows: int
    """Rows of the data that are used."""
    max_length: int
    data_fingerprint: str
    tokenizer_fingerprint: str
    compute_dtype: str
    batching: Batching
    """The way to begin with."""
    remarks: tuple[str, ...]
    code: Mapping[str, str] = field(default_factory=dict)
    """Of a model that runs code of its own: file -> digest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PassSettings:
    """How a pass treats the model, found out as it goes."""

    batching: Batching
    separate: frozenset[str] = frozenset()
    """Parameters of linear maps that must not share another's statistics."""
    is_streamed: bool = False


@dataclass(frozen=True, slots=True)
class TierCounts:
    """What was seen in the shards of one tier."""

    num_rows: Mapping[tuple[str, int], int] = field(default_factory=dict)
    num_tokens: int = 0
    num_examples: int = 0

    def plus(self, other: TierCounts, sign: int = 1) -> TierCounts:
        """Return the sum of two."""
        keys = [*self.num_rows, *(key for key in other.num_rows if key not in self.num_rows)]
        return TierCounts(
            {key: self.num_rows.get(key, 0) + sign * other.num_rows.get(key, 0) for key in keys},
            self.num_tokens + sign * other.num_tokens,
            self.num_examples + sign * other.num_examples,
        )

    def minus(self, other: TierCounts) -> TierCounts:
        """Return the difference of two."""
        return self.plus(other, -1)


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupReport:
    """What a worker saw in its shards of one layer group."""

    needs_batching: Batching | None = None
    """Set when the pass has to be repeated with other batches; nothing else counts then."""
    needs_separate: frozenset[str] = frozenset()
    """Set when the pass has to be repeated with these on their own; nothing else counts then."""
    leaders: Mapping[str, str] = field(default_factory=dict)
    """Parameter -> the parameter whose statistics it shares."""
    num_rows: Mapping[tuple[str, int], int] = field(default_factory=dict)
    """(parameter, expert) -> rows."""
    num_calls: Mapping[str, int] = field(default_factory=dict)
    num_tokens: int = 0
    num_examples: int = 0
    tiers: Mapping[int, TierCounts] = field(default_factory=dict)
    """Of Grams: rows, tokens and examples by tier (see `DataSpec.samples_at`)."""
    num_truncated: int = 0
    forward_seconds: float = 0.0
    """Of the timed shard, updates left out."""
    update_seconds: float = 0.0
    """Of the Gram updates in the timed shard."""
    update_operations: int = 0
    forward_operations: int = 0
    """Of the linear maps of the group in the timed shard."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A statistic that one worker completes and writes."""

    parameter: str
    """Whose sums they are."""
    parts: tuple[int, ...]
    """Numbers of the experts that are summed, (0,) for anything else."""
    in_features: int
    """0 for Fisher."""
    tensors: tuple[tuple[str, tuple[int, ...]], ...]
    """Name and shape of the tensors on disk: one, or of Fisher one per tensor of the checkpoint."""
    owner: int
    """Number of the worker."""
    tier: int | None = None
    """Sum the shards up to this tier; None for all."""
