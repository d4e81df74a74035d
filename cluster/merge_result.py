"""What a merge did, for the command line and for Python."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from raymerge.cluster.totals import Totals


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeResult:
    """What a merge did."""

    outputs: tuple[str, ...]
    """Folder of each merged recipe's checkpoint, in the order of the recipes."""
    totals: Totals
    """Work of this run; tasks that an earlier run had finished are not in it."""
    num_tasks: int
    """Tasks of the whole plan."""
    num_resumed: int
    """Tasks that were found finished."""
    seconds: float
    device: str
    num_workers: int
    remarks: tuple[str, ...]
    """What the user should know: ineffective keys, copied tensors, NaN that was let through."""
    failed: Mapping[str, str] = field(default_factory=dict)
    """Why a recipe was not merged, by its name: of several recipes, some may fail."""

    def to_mapping(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return dataclasses.asdict(self)
