"""What a RegMean++ run knows of itself, on disk: which stages are finished, and how passes treat the models."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from raymerge.cluster.journal import Journal
from raymerge.merge_actors.errors import OutputError
from raymerge.stats.masked_rows import Batching
from raymerge.stats.regmean_plus_stages import Candidate
from raymerge.stats.statistics_file import write_json

_NAME = "state.json"


@dataclass(slots=True, kw_only=True)
class RunState:
    """Read when a run is resumed, written after every stage."""

    path: str
    identity: list[dict[str, str]]
    """Of each candidate: what must be equal for a resumed run."""
    batching: list[Batching]
    """Of each candidate."""
    separate: list[str] = field(default_factory=list)
    """Parameters that must not share another's statistics."""
    num_tokens: list[int] = field(default_factory=list)
    """Of each candidate's data."""
    measure_seconds: float = 0.0
    stages: list[dict[str, Any]] = field(default_factory=list)
    """Finished ones: `tensors` that were merged; those `measured`, of each candidate; parameters outside the
    blocks that are `done`; `num_tasks` up to and with the stage."""

    @classmethod
    def open(cls, folder: str, candidates: Sequence[Candidate], journal: Journal) -> RunState:
        """Take up the state of an unfinished run, or begin one.

        Stages count as finished if all their tasks are in the journal; of the one under way nothing is kept.

        Raises:
            OutputError: the data or tokenizers have changed since.
        """
        path = os.path.join(folder, _NAME)
        identity = [_identity(each) for each in candidates]
        fresh = cls(
            path=path,
            identity=identity,
            batching=[each.description.batching for each in candidates],
            num_tokens=[0] * len(candidates),
        )
        if not os.path.exists(path) or not journal.done:
            journal.done.clear()
            return fresh
        with open(path, encoding="utf-8") as stream:
            found = cls(path=path, **json.load(stream))
        if found.identity != identity:
            raise OutputError(
                f"the unfinished run in {os.path.dirname(folder)} measured other data or tokenizers; run with the "
                "same ones to resume, or with --overwrite to start anew."
            )
        if any(number not in journal.done for number in range(found.num_tasks)):
            journal.done.clear()
            return fresh
        for number in [number for number in journal.done if number >= found.num_tasks]:
            del journal.done[number]
        return found

    @property
    def num_tasks(self) -> int:
        """Return the number of merge tasks of the finished stages."""
        return int(self.stages[-1]["num_tasks"]) if self.stages else 0

    @property
    def merged(self) -> frozenset[str]:
        """Return the tensors that are merged."""
        return frozenset(name for stage in self.stages for name in stage["tensors"])

    def measured(self, candidate: int) -> frozenset[str]:
        """Return the tensors whose inputs were measured."""
        return frozenset(name for stage in self.stages for name in stage["measured"][candidate])

    @property
    def done(self) -> frozenset[str]:
        """Return the parameters of linear maps outside the blocks that have been measured."""
        return frozenset(name for stage in self.stages for name in stage["done"])

    def finish_stage(
        self,
        tensors: Sequence[str],
        measured: Sequence[Collection[str]],
        done: Sequence[str],
        num_tasks: int,
    ) -> None:
        """Note a stage whose tensors are on disk."""
        self.stages.append(
            {
                "tensors": [*tensors],
                "measured": [[*names] for names in measured],
                "done": [*done],
                "num_tasks": self.num_tasks + num_tasks,
            }
        )
        names = ("identity", "batching", "separate", "num_tokens", "measure_seconds", "stages")
        write_json(self.path, {name: getattr(self, name) for name in names})


def _identity(candidate: Candidate) -> dict[str, str]:
    found = candidate.description
    return {
        "data": found.data_fingerprint,
        "tokenizer": found.tokenizer_fingerprint,
        "dtype": found.compute_dtype,
        **({"code": json.dumps(dict(found.code), sort_keys=True)} if found.code else {}),
    }
