"""What a person can ask of `raymerge stats`, and what is shown on the way."""

from __future__ import annotations

from dataclasses import dataclass

from raymerge.cluster.connect import Device
from raymerge.merge_actors.errors import RecipeError
from raymerge.stats.data_rows import DataSpec
from raymerge.stats.fisher_accumulator import Estimator
from raymerge.stats.statistics_file import StatisticsKind


@dataclass(frozen=True, kw_only=True, slots=True)
class StatisticsOptions:
    """What is measured and where."""

    kind: StatisticsKind
    data: DataSpec
    estimator: Estimator = "expected"
    """Of Fisher."""
    workers: int | None = None
    device: Device = "auto"
    memory_gib: float | None = None
    """What a worker may use for weights, statistics and activations [most of a GPU, half of a machine]."""
    address: str | None = None
    in_process: bool = False
    resume: bool = False
    overwrite: bool = False
    allow_pickle: bool = False
    trust_remote_code: bool = False
    """Run code of the checkpoint where transformers has no class of its own."""

    def __post_init__(self) -> None:
        if self.data.samples_at and self.kind != "gram":
            raise RecipeError(
                f"--samples-at keeps Gram matrices on the way, but --kind is {self.kind}; give --samples instead."
            )


@dataclass(frozen=True, slots=True)
class StatisticsProgress:
    """Where a run stands."""

    group: int
    """Number of the layer group under way, from 0."""
    num_groups: int
    num_tokens: int
    """Tokens that have passed in this group."""
    group_tokens: int | None
    """Tokens of the whole data, once they are known."""
    tokens_per_second: float
    pids: tuple[int, ...]
    """Processes of the workers; empty if they are threads."""
