"""One run of `raymerge stats`: plan, layer groups, repetition, journal, manifest.

Phases, for each layer group: every worker runs its shards and sums; the driver compares what they
saw; every statistic is added up at the worker that owns it, which writes it; the driver journals
the group. A finished group is on disk; whatever goes wrong repeats only the group under way.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from raymerge.cluster.activation_group import ActivationGroup, WorkersLost
from raymerge.cluster.run_folder import STATISTICS_JOURNAL_NAME, RunFolder
from raymerge.cluster.statistics_entries import (
    combine,
    expected_tensors,
    fisher_entries,
    gram_entries,
    prefix_entries,
)
from raymerge.cluster.statistics_options import StatisticsOptions, StatisticsProgress
from raymerge.merge_actors.checkpoint.folder import Checkpoint
from raymerge.merge_actors.errors import ClusterError, OutputError, RecipeError
from raymerge.stats.batches import shards_of
from raymerge.stats.block_passes import needed_outputs
from raymerge.stats.boundary_files import remove_boundaries
from raymerge.stats.layer_groups import GroupPlan, LayerGroup, plan_groups
from raymerge.stats.measure_job import Description, GroupReport, MeasureJob, PassSettings
from raymerge.stats.statistics_file import FORMAT_VERSION, write_json

#: Losses of a worker that a run survives.
_MOST_LOSSES = 5
#: Name of the output in the run folder.
OUTPUT = "statistics"


def journal_path(folder: RunFolder) -> str:
    """Return where a run notes what it has finished."""
    return os.path.join(folder.path, STATISTICS_JOURNAL_NAME)


@dataclass(slots=True)
class StatisticsRun:
    """One run: the plan, the journal, the workers."""

    options: StatisticsOptions
    checkpoint: Checkpoint
    folder: RunFolder
    job: MeasureJob
    group: ActivationGroup
    on_remark: Callable[[str], None]
    on_progress: Callable[[StatisticsProgress], None]
    journal: dict[str, Any] = field(default_factory=dict)
    """What lies on disk: the run's identity, settings of its passes, finished groups."""
    description: Description = field(init=False)
    plan: GroupPlan = field(init=False)
    _losses: int = 0
    _num_tokens: int = 0
    """That the workers had passed when they were last asked, since they were started."""
    _pass_seconds: float = 0.0
    """Of the last pass over the data."""

    def prepare(self) -> None:
        """Start the workers, learn what the model is, plan; take up an earlier run if asked to."""
        try:
            self.group.start(self.job)
            [self.description] = self._call("describe", [()])
        except WorkersLost as lost:
            raise ClusterError(f"a worker died before it could begin: {lost}; see Ray's logs.") from lost
        for line in self.description.remarks:
            self.on_remark(line)
        if self.options.resume and os.path.exists(journal_path(self.folder)):
            self._resume()
        else:
            self.folder.clear()
            self._plan()
            self._start_over("" if self.job.kind == "fisher" else self.description.batching)

    def measure(self) -> None:
        """Run every layer group that is not finished."""
        while (number := len(self.journal["groups"])) < len(self.plan.groups):
            try:
                self._measure_group(self.plan.groups[number])
            except WorkersLost as lost:
                self._losses += 1
                if self._losses > _MOST_LOSSES:
                    raise ClusterError(
                        f"workers died too often, the last one with: {lost}; see Ray's logs, and use a smaller "
                        "--memory-gib or --batch-tokens if memory ran out."
                    ) from lost
                self.on_remark(f"a worker was lost ({lost}); layer group {number} starts again")
                self.group.start(self.job)
                self._num_tokens = 0

    def _measure_group(self, group: LayerGroup) -> None:
        """Run one layer group once; on success it is in the journal."""
        settings = PassSettings(
            batching=self.journal["batching"] or "single",
            separate=frozenset(self.journal["separate"]),
            is_streamed=self.plan.is_streamed,
        )
        num_workers = self.group.num_workers
        arguments = [
            (group, tuple(shards_of(rank, num_workers, self.description.num_shards)), settings)
            for rank in range(num_workers)
        ]
        started = time.monotonic()
        reports: list[GroupReport] = self._call("accumulate", arguments, group)
        self._pass_seconds = time.monotonic() - started
        findings = combine(reports)
        if findings.needs_batching is not None:
            self._start_over(findings.needs_batching)
            return
        if findings.needs_separate:
            self.journal["separate"] = sorted({*self.journal["separate"], *findings.needs_separate})
            return
        if not findings.num_tokens:
            raise RecipeError(
                f"the tokenizer makes no token of any row of the data {self.job.data.source!r}."
            )
        make_entries = fisher_entries if self.job.kind == "fisher" else gram_entries
        entries, modules = make_entries(self.description, group, findings, num_workers)
        earlier, prefixes = prefix_entries(
            self.description, group, findings, num_workers, self.job.data.samples_at
        )
        entries = [*earlier, *entries]
        names = [
            os.path.join("out", OUTPUT, f"{self.job.kind}-{group.number:05d}-{rank:05d}.safetensors")
            for rank in range(num_workers)
        ]
        os.makedirs(self.folder.output(OUTPUT), exist_ok=True)
        files = self._call("write", [(entries, name, findings.num_examples) for name in names])
        if self.job.kind == "fisher":
            for squares in self._call("sum_squares", [()] * num_workers):
                for tensor, square in squares.items():
                    modules[tensor]["sum_squares"] = square
        self._finish(group, modules, prefixes, [os.path.basename(file) for file in files if file], reports)

    def _finish(
        self,
        group: LayerGroup,
        modules: dict[str, Any],
        prefixes: dict[str, Any],
        files: list[str],
        reports: list[GroupReport],
    ) -> None:
        """Journal a group, and drop cached activations that no later group begins from."""
        self.journal["groups"].append(
            {
                "modules": modules,
                "prefixes": prefixes,
                "files": files,
                "num_tokens": sum(report.num_tokens for report in reports),
                "num_examples": sum(report.num_examples for report in reports),
                "num_truncated": sum(report.num_truncated for report in reports),
                "pass_seconds": self._pass_seconds,
                "forward_seconds": sum(report.forward_seconds for report in reports),
                "forward_operations": sum(report.forward_operations for report in reports),
                "update_seconds": sum(report.update_seconds for report in reports),
                "update_operations": sum(report.update_operations for report in reports),
            }
        )
        write_json(journal_path(self.folder), self.journal)
        if (num_truncated := self.journal["groups"][-1]["num_truncated"]) and group.number == 0:
            self.on_remark(
                f"{num_truncated:,} texts are longer than {self.description.max_length:,} tokens and were cut there"
            )
        keep = () if group.is_last else needed_outputs(self.description.maps.blocks, group.end)
        remove_boundaries(self.folder.path, keep)

    def _plan(self) -> None:
        budget = self.options.memory_gib
        if budget is not None:
            budget_bytes = int(budget * 2**30)
        else:  # workers on CPUs share their machine's memory; how many there are on each is not known
            sharers = self.group.num_workers if self.job.device == "cpu" else 1
            budget_bytes = self.description.memory_bytes // sharers
        name = "--memory-gib" if budget is not None else "the memory of a worker"
        self.plan = plan_groups(self.description.needs, budget_bytes, name)
        if self.plan.is_streamed and self.job.kind == "fisher":
            raise RecipeError(
                "Fisher needs the whole model in a worker's memory, "
                f"{sum(self.description.needs.block_weights) / 2**30:.3g} GiB and more; raise --memory-gib."
            )

    def _start_over(self, batching: str) -> None:
        """Begin a journal without finished groups."""
        remove_boundaries(self.folder.path, ())
        self.journal = {
            "run": self._identity(),
            "groups_end": [group.end for group in self.plan.groups],
            "is_streamed": self.plan.is_streamed,
            "peak_bytes": self.plan.peak_bytes,
            "batching": batching,
            "separate": [],
            "groups": [],
        }
        write_json(journal_path(self.folder), self.journal)

    def _resume(self) -> None:
        with open(journal_path(self.folder), encoding="utf-8") as stream:
            self.journal = json.load(stream)
        if self.journal.get("run") != self._identity():
            raise OutputError(
                f"the unfinished run in {self.folder.path} measured another model, data or settings; run with the "
                "same ones to resume, or with --overwrite to start anew."
            )
        ends = self.journal["groups_end"]
        groups = tuple(
            LayerGroup(number=number, begin=begin, end=end, is_last=number == len(ends) - 1)
            for number, (begin, end) in enumerate(zip([0, *ends], ends, strict=False))
        )
        self.plan = GroupPlan(
            groups=groups, is_streamed=self.journal["is_streamed"], peak_bytes=self.journal["peak_bytes"]
        )

    def _identity(self) -> dict[str, Any]:
        """Return what must be equal for two runs to give the same statistics."""
        return {
            "model": self.checkpoint.fingerprint,
            "tokenizer": self.description.tokenizer_fingerprint,
            "data": self.description.data_fingerprint,
            "kind": self.job.kind,
            "estimator": self.job.estimator if self.job.kind == "fisher" else None,
            "dtype": self.description.compute_dtype,
            "batch_tokens": self.job.data.batch_tokens,
            **({"code": dict(self.description.code)} if self.description.code else {}),
        }

    def _call(
        self, method: str, arguments: list[tuple[Any, ...]], group: LayerGroup | None = None
    ) -> list[Any]:
        """Call the workers and pass on their progress."""
        known = self.journal["groups"][0]["num_tokens"] if self.journal.get("groups") else None
        before, begin = self._num_tokens, time.monotonic()

        def on_tokens(num_tokens: int) -> None:
            """Turn the count of tokens into progress."""
            self._num_tokens = num_tokens
            if group is None:
                return
            passed = num_tokens - before
            self.on_progress(
                StatisticsProgress(
                    group=group.number,
                    num_groups=len(self.plan.groups),
                    num_tokens=passed,
                    group_tokens=known,
                    tokens_per_second=passed / max(time.monotonic() - begin, 1e-9),
                    pids=tuple(getattr(self.group, "pids", ())),
                )
            )

        return self.group.call(method, arguments, on_tokens)

    def manifest(self) -> dict[str, Any]:
        """Return the manifest of the finished run, and remark on what the data did not determine."""
        groups, description = self.journal["groups"], self.description
        modules = {name: entry for each in groups for name, entry in each["modules"].items()}
        expected = expected_tensors(description)
        self._remark_on_rank(modules)
        return {
            "format_version": FORMAT_VERSION,
            "kind": self.job.kind,
            "model": {"path": self.checkpoint.path, "fingerprint": self.checkpoint.fingerprint},
            **({"code": dict(description.code)} if description.code else {}),
            "tokenizer_fingerprint": description.tokenizer_fingerprint,
            "data": self.job.data.to_mapping()
            | {"fingerprint": description.data_fingerprint, "max_length": description.max_length},
            "settings": {
                "estimator": self.job.estimator if self.job.kind == "fisher" else None,
                "compute_dtype": description.compute_dtype,
                "batching": self.journal["batching"],
            },
            "num_tokens": groups[0]["num_tokens"],
            "num_examples": groups[0]["num_examples"],
            "num_truncated": max(each["num_truncated"] for each in groups),
            "coverage": {
                "linear_maps": list(expected),
                "uncovered": [name for name in expected if name not in modules],
                "tied": list(description.maps.tied),
            },
            "timing": _timing(groups),
            "modules": modules,
            **self._prefixes(groups),
            "files": [file for each in groups for file in each["files"]],
        }

    def _prefixes(self, groups: list[dict[str, Any]]) -> dict[str, Any]:
        """Return what the manifest says about fewer samples."""
        if not self.job.data.samples_at:
            return {}
        return {
            "prefixes": {
                samples: {
                    "num_tokens": found["num_tokens"],
                    "num_examples": found["num_examples"],
                    "modules": {
                        name: row
                        for each in groups
                        for name, row in each["prefixes"][samples]["modules"].items()
                    },
                }
                for samples, found in groups[0]["prefixes"].items()
            }
        }

    def _remark_on_rank(self, modules: dict[str, dict[str, Any]]) -> None:
        """Say which Grams have fewer rows than columns."""
        if self.job.kind != "gram":
            return
        short = []
        for name, entry in modules.items():
            rows = entry["num_rows"]
            if (min(rows) if isinstance(rows, list) else rows) < entry["in_features"]:
                short.append(name)
        if short:
            self.on_remark(
                f"{len(short):,} of {len(modules):,} weights saw fewer inputs than they have input features, "
                f"{short[0]} for one: their Gram matrices are rank deficient; merge with alpha below 1, or "
                "measure more data"
            )


def _timing(groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Sum up the timed shards: rates of the linear maps' forward pass and of the Gram updates."""
    sums = {
        key: sum(each[key] for each in groups)
        for key in (
            "pass_seconds",
            "forward_seconds",
            "forward_operations",
            "update_seconds",
            "update_operations",
        )
    }
    return sums | {
        "forward_tflops": sums["forward_operations"] / max(sums["forward_seconds"], 1e-9) / 1e12,
        "update_tflops": sums["update_operations"] / max(sums["update_seconds"], 1e-9) / 1e12,
    }
