"""A worker of RegMean++: runs candidates' data through the merged layers and sums what the next layer sees.

A plain class, like `ActivationWorker`, whose passes and sums it shares. A model is loaded a block at a
time: merged blocks from the output's files, the block that is measured from the candidate's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from raymerge.merge_actors.errors import CheckpointError, ClusterError
from raymerge.stats.activation_worker import gram_totals
from raymerge.stats.batches import Batch
from raymerge.stats.describe_model import describe
from raymerge.stats.exchange import Exchange, Members, NoExchange, TorchExchange, join_store, make_store
from raymerge.stats.gram_accumulator import GramAccumulator
from raymerge.stats.gram_pass import accumulate_grams
from raymerge.stats.input_capture import NeedsSeparation
from raymerge.stats.masked_rows import NeedsBatching
from raymerge.stats.measure_job import Entry, GroupReport, MeasureJob
from raymerge.stats.measured_model import MeasuredModel
from raymerge.stats.model_loading import BlockLoader
from raymerge.stats.regmean_plus_stages import Candidate, Stage, StageReport, StageWork, stage_span
from raymerge.stats.statistics_file import Written, write_statistics_file


@dataclass(frozen=True, kw_only=True, slots=True)
class RegMeanPlusJob:
    """What is merged, the same for all workers."""

    candidates: tuple[MeasureJob, ...]
    """Each with a work folder of its own."""

    @property
    def device(self) -> str:
        """Return where the models run."""
        return self.candidates[0].device


class CandidateModel(MeasuredModel):
    """A candidate, which notes the tensors outside its blocks that the first batch of a pass uses."""

    way_out = "merge by regmean, which can hold a model whole"

    def __init__(self, job: MeasureJob, count_tokens: Callable[[int], None]) -> None:
        super().__init__(job, count_tokens)
        self.used: set[str] = set()
        self._must_watch = False

    def begin_pass(self) -> None:
        """Watch the next batch."""
        self.used, self._must_watch = set(), True

    def streamed(self) -> BlockLoader:
        """Return the loader of the model, built now if it is not there."""
        self.load(is_streamed=True)
        assert self.loader is not None
        return self.loader

    def forward(self, batch: Batch) -> None:
        """Run a batch as far as the pass wants it."""
        if not self._must_watch:
            super().forward(batch)
            return
        # A subclass of torch's, which the driver does without.
        from raymerge.stats.parameter_use import ParameterUse

        watch = ParameterUse(self.streamed().outside())
        with watch:
            super().forward(batch)
        self.used, self._must_watch = watch.used, False


class RegMeanPlusWorker:
    """One worker of a group. Not safe for two instructions at a time; `num_tokens` may be read at any time."""

    def __init__(self, job: RegMeanPlusJob, rank: int = 0) -> None:
        self.job, self.rank = job, rank
        self.num_tokens = 0
        """Tokens that have passed since the worker was made."""
        self.exchange: Exchange = NoExchange()
        self._candidates: dict[int, CandidateModel] = {}
        self._sums: GramAccumulator | None = None

    def open_store(self, host: str, num_workers: int) -> int:
        """Open the meeting place of the group on this node; return its port."""
        self._store = make_store(host, num_workers)
        return int(self._store.port)

    def join(self, host: str, port: int, num_workers: int) -> None:
        """Join the group of processes; returns when all have."""
        store = self._store if self.rank == 0 else join_store(host, port, num_workers)
        self.exchange = TorchExchange(self.rank, num_workers, store, self.job.device)

    def describe(self, candidates: Sequence[int]) -> list[Candidate]:
        """Say what some candidates and their data are.

        Raises:
            RaymergeError: the model or the data cannot be measured.
            ClusterError: the worker does not see the work folder.
        """
        return [self._describe(number) for number in candidates]

    def measure(self, stage: Stage, work: StageWork) -> StageReport:
        """Run a candidate's shards through a stage and sum the Grams of its linear maps.

        Whatever was summed before is dropped, so a repeated instruction counts nothing twice.

        Raises:
            NotFiniteError: an activation is NaN or infinite.
        """
        import torch

        model = self._open(work.candidate)
        loader = model.streamed()
        loader.use(work.merged)
        self._sums = None
        span = stage_span(stage, model.maps, work.done, measures=work.measures)
        model.begin_pass()
        try:
            with torch.no_grad():
                report, self._sums = accumulate_grams(model, span, work.shards, work.settings)
        except NeedsSeparation as found:
            return StageReport(grams=GroupReport(needs_separate=found.parameters))
        except NeedsBatching as found:
            return StageReport(grams=GroupReport(needs_batching=found.batching))
        return StageReport(grams=report, used=frozenset(model.used))

    def write(self, candidate: int, entries: Sequence[Entry], file: str, members: Members) -> str | None:
        """Complete a candidate's Grams with the other members and write those that this worker owns.

        Args:
            candidate: whose they are.
            entries: of the whole stage, the same for every member.
            file: name of this worker's file in the candidate's work folder.
            members: the workers that had shards of the candidate.

        Returns:
            the path of the file, or None if the worker owns nothing.
        """
        assert self._sums is not None
        totals = gram_totals(self._sums, entries, self.rank, self.exchange, members)
        mine = [entry for entry in entries if entry.owner == self.rank]
        path = os.path.join(self.job.candidates[candidate].work_folder, file)
        written = [
            Written(key=key, shape=shape, parts=(next(totals) for _ in entry.parts))
            for entry in mine
            for key, shape in entry.tensors
        ]
        if written:
            write_statistics_file(path, written)
        for _ in totals:
            raise AssertionError("an owned statistic was not written")
        self._sums = None
        return path if written else None

    def _describe(self, number: int) -> Candidate:
        job = self.job.candidates[number]
        if not os.path.isdir(job.work_folder):
            raise ClusterError(
                f"a worker does not see {job.work_folder}; regmean_plus needs a folder that every node shares."
            )
        model = self._open(number)
        description = describe(job, model.checkpoint, model.data)
        loader = model.streamed()
        if not model.maps.blocks:
            raise CheckpointError(
                f"{model.checkpoint.path} has no repeated layers, so regmean_plus cannot go layer by layer; "
                "use regmean."
            )
        return Candidate(
            description=description,
            block_tensors=tuple(tuple(loader.tensors_of(block)) for block in model.maps.blocks),
        )

    def _open(self, number: int) -> CandidateModel:
        if number not in self._candidates:
            self._candidates[number] = CandidateModel(self.job.candidates[number], self._count)
        return self._candidates[number]

    def _count(self, num_tokens: int) -> None:
        self.num_tokens += num_tokens
