"""Measure one stage of a RegMean++ merge: who runs what, and the statistics that come of it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from raymerge.cluster.activation_group import ActivationGroup
from raymerge.cluster.heads import is_head_tensor
from raymerge.cluster.regmean_plus_plan import partial_statistics
from raymerge.cluster.regmean_plus_state import RunState
from raymerge.cluster.statistics_entries import GroupFindings, combine, gram_entries
from raymerge.merge_actors.checkpoint.header import TensorInfo
from raymerge.merge_actors.errors import MismatchError, RecipeError
from raymerge.stats.batches import shards_of
from raymerge.stats.layer_groups import LayerGroup
from raymerge.stats.linear_maps import LinearMap, ModelMaps
from raymerge.stats.measure_job import Entry, PassSettings
from raymerge.stats.regmean_plus_stages import Candidate, Stage, StageReport, StageWork
from raymerge.stats.statistics_file import Statistics, read_modules

_Members = dict[int, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What the passes of a stage found."""

    statistics: tuple[Statistics, ...]
    """Of each candidate."""
    used: frozenset[str]
    """Tensors outside the blocks that were used."""
    done: tuple[str, ...]
    """Parameters of linear maps outside the blocks that were measured."""


@dataclass(slots=True, kw_only=True)
class StageMeasurer:
    """The passes of a run."""

    passes: ActivationGroup
    candidates: Sequence[Candidate]
    folders: Sequence[str]
    """Work folder of each candidate."""
    stages: Sequence[Stage]
    state: RunState

    @property
    def maps(self) -> ModelMaps:
        """Return the linear maps, which are the same in every candidate."""
        return self.candidates[0].description.maps

    def measure(self, stage: Stage, merged: Mapping[str, TensorInfo]) -> Measured:
        """Run every candidate's data through a stage and collect its Grams.

        With more workers than candidates each candidate's shards are shared by several; with fewer, some
        candidates wait for the next round.

        Args:
            stage: which.
            merged: where the tensors of all earlier stages stand in the output.

        Raises:
            RaymergeError: with one sentence for the user.
            WorkersLost: a worker died.
        """
        statistics: dict[int, Statistics] = {}
        used: frozenset[str] = frozenset()
        for members in _rounds(len(self.candidates), self.passes.num_workers):
            findings, seen = self._run_round(stage, members, merged)
            used |= seen
            statistics |= self._write_round(stage, members, findings)
        measured = {name for each in statistics.values() for name in each.modules}
        done = tuple(
            each.parameter
            for each in self.maps.maps
            if each.block is None and any(tensor in measured for tensor in each.tensors)
        )
        in_order = tuple(statistics[number] for number in range(len(self.candidates)))
        return Measured(statistics=in_order, used=used, done=done)

    def _run_round(
        self, stage: Stage, members: _Members, merged: Mapping[str, TensorInfo]
    ) -> tuple[dict[int, GroupFindings], frozenset[str]]:
        """Run some candidates, again and again until batches and shared inputs are right."""
        while True:
            work = {
                rank: self._work(candidate, rank, ranks, merged)
                for candidate, ranks in members.items()
                for rank in ranks
            }
            reports = self._call(stage, work)
            findings = {
                candidate: combine([reports[rank].grams for rank in ranks])
                for candidate, ranks in members.items()
            }
            separate = frozenset().union(*(found.needs_separate for found in findings.values()))
            self.state.separate = sorted({*self.state.separate, *separate})
            rebatched = [candidate for candidate, found in findings.items() if found.needs_batching]
            for candidate in rebatched:
                self._rebatch(candidate, findings[candidate], stage, merged)
            if separate or rebatched:
                continue
            for candidate, found in findings.items():
                if not found.num_tokens:
                    raise RecipeError(
                        f"the tokenizer makes no token of any row of the data of {self.folders[candidate]}."
                    )
                self.state.num_tokens[candidate] = found.num_tokens
            return findings, frozenset().union(*(report.used for report in reports.values()))

    def _rebatch(
        self, candidate: int, findings: GroupFindings, stage: Stage, merged: Mapping[str, TensorInfo]
    ) -> None:
        """Cut a candidate's data into other batches, and run them through what is merged already."""
        assert findings.needs_batching is not None
        self.state.batching[candidate] = findings.needs_batching
        everyone = tuple(range(self.passes.num_workers))
        for earlier in self.stages[: stage.number]:
            if earlier.begin == earlier.num_pushed:
                continue
            work = {rank: self._work(candidate, rank, everyone, merged) for rank in everyone}
            again = {rank: dataclasses.replace(each, measures=False) for rank, each in work.items()}
            self._call(earlier, again)

    def _work(
        self, candidate: int, rank: int, ranks: tuple[int, ...], merged: Mapping[str, TensorInfo]
    ) -> StageWork:
        num_shards = self.candidates[candidate].description.num_shards
        return StageWork(
            candidate=candidate,
            shards=tuple(shards_of(ranks.index(rank), len(ranks), num_shards)),
            settings=PassSettings(
                batching=self.state.batching[candidate],
                separate=frozenset(self.state.separate),
                is_streamed=True,
            ),
            merged=merged,
            done=self.state.done,
        )

    def _call(self, stage: Stage, work: Mapping[int, StageWork]) -> dict[int, StageReport]:
        arguments = [(stage, work[rank]) for rank in sorted(work)]
        return dict(enumerate(self.passes.call("measure", arguments, lambda _: None)))

    def _write_round(
        self, stage: Stage, members: _Members, findings: Mapping[int, GroupFindings]
    ) -> dict[int, Statistics]:
        """Have the Grams of a round written, and read their headers."""
        num_blocks = len(self.maps.blocks)
        begin, end = (num_blocks, num_blocks) if stage.block is None else (stage.block, stage.block + 1)
        group = LayerGroup(number=stage.number, begin=begin, end=end, is_last=stage.block is None)
        arguments: dict[int, tuple[int, list[Entry], str, tuple[int, ...]]] = {}
        rows = {}
        for candidate, ranks in members.items():
            description = self.candidates[candidate].description
            left = tuple(each for each in description.maps.maps if each.parameter not in self.state.done)
            description = dataclasses.replace(
                description, maps=dataclasses.replace(description.maps, maps=left)
            )
            entries, rows[candidate] = gram_entries(description, group, findings[candidate], len(ranks))
            entries = [dataclasses.replace(entry, owner=ranks[entry.owner]) for entry in entries]
            for rank in ranks:
                file = f"gram-{stage.number:05d}-{rank:05d}.safetensors"
                arguments[rank] = (candidate, entries, file, ranks)
        files = self.passes.call("write", [arguments[rank] for rank in sorted(arguments)], lambda _: None)
        found = {}
        for candidate, ranks in members.items():
            names = [os.path.basename(files[rank]) for rank in ranks if files[rank]]
            modules = read_modules(self.folders[candidate], names, rows[candidate], "gram")
            found[candidate] = partial_statistics(
                self.folders[candidate], modules, self._expected(stage, modules)
            )
        return found

    def _expected(self, stage: Stage, modules: Collection[str]) -> list[str]:
        """Return the tensors that a stage should have measured: what a lead-in runs shows only as it runs."""
        left = [each for each in self.maps.maps if each.block == stage.block]
        names = [name for each in left if each.parameter not in self.state.done for name in each.tensors]
        return [name for name in names if stage.kind != "lead_in" or name in modules]


def same_layers(names: Sequence[str], candidates: Sequence[Candidate]) -> None:
    """Check that all candidates have the same layers; classification heads may have other labels.

    Raises:
        MismatchError: they do not.
    """
    first = candidates[0].description.maps
    for name, candidate in zip(names, candidates, strict=True):
        maps = candidate.description.maps
        if maps.blocks != first.blocks or _without_labels(maps.maps) != _without_labels(first.maps):
            raise MismatchError(
                f"{names[0]} has {len(first.blocks)} layers with {len(first.maps)} linear maps and {name} has "
                f"{len(maps.blocks)} with {len(maps.maps)}, or they differ in names or shapes; regmean_plus goes "
                "through all models layer by layer, so they must be built alike."
            )


def _without_labels(maps: Sequence[LinearMap]) -> list[LinearMap]:
    """Return maps in which a head's number of labels does not count: `heads` of the recipe says what becomes of it."""
    return [
        dataclasses.replace(each, out_features=0) if is_head_tensor(each.tensors[0]) else each
        for each in maps
    ]


def _rounds(num_candidates: int, num_workers: int) -> Iterator[_Members]:
    """Yield which workers take which candidate, round by round; in each every worker has a candidate."""
    for begin in range(0, num_candidates, num_workers):
        chunk = range(begin, min(begin + num_workers, num_candidates))
        yield {
            candidate: tuple(rank for rank in range(num_workers) if rank % len(chunk) == candidate - begin)
            for candidate in chunk
        }
