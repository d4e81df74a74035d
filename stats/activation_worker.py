"""A worker that runs data through a model and sums what it sees: a plain class.

It takes instructions from the driver: describe the model, accumulate a layer group over some
shards, complete and write the statistics that it owns.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from raymerge.merge_actors.errors import ClusterError
from raymerge.stats.describe_model import describe
from raymerge.stats.exchange import Exchange, Members, NoExchange
from raymerge.stats.fisher_accumulator import FisherAccumulator, check_estimator
from raymerge.stats.gram_accumulator import GramAccumulator
from raymerge.stats.gram_pass import accumulate_grams, span_of
from raymerge.stats.input_capture import NeedsSeparation
from raymerge.stats.layer_groups import LayerGroup, in_group
from raymerge.stats.linear_maps import block_of
from raymerge.stats.masked_rows import NeedsBatching
from raymerge.stats.measure_job import Description, Entry, GroupReport, MeasureJob, PassSettings
from raymerge.stats.measured_model import MeasuredModel
from raymerge.stats.statistics_file import Written, write_statistics_file

if TYPE_CHECKING:
    import torch

#: Squares are summed by so many elements at a time.
_SUMMED_ELEMENTS = 1 << 20


class ActivationWorker:
    """One worker of a group. Not safe for two instructions at a time; `num_tokens` may be read at any time."""

    def __init__(self, job: MeasureJob, rank: int = 0) -> None:
        self.job, self.rank = job, rank
        self.num_tokens = 0
        """Tokens that have passed since the worker was made."""
        self.exchange: Exchange = NoExchange()
        self._measured: MeasuredModel | None = None
        self._sums: GramAccumulator | FisherAccumulator | None = None
        self._sum_squares: dict[str, float] = {}

    def describe(self) -> Description:
        """Read headers, tokenizer and rows, and say what the model is.

        Raises:
            RaymergeError: the model or the data cannot be measured.
            ClusterError: the worker does not see the work folder.
        """
        if not os.path.isdir(self.job.work_folder):
            raise ClusterError(
                f"a worker does not see {self.job.work_folder}; statistics need a folder that every node shares."
            )
        measured = self._open()
        if self.job.kind == "fisher":
            has_labels = measured.data.rows.labels is not None
            check_estimator(self.job.estimator, measured.checkpoint.config, has_labels=has_labels)
        return describe(self.job, measured.checkpoint, measured.data)

    def accumulate(self, group: LayerGroup, shards: Sequence[int], settings: PassSettings) -> GroupReport:
        """Run shards through the model and sum the statistics of a layer group.

        Whatever was summed before is dropped, so a repeated instruction counts nothing twice.

        Raises:
            NotFiniteError: an activation is NaN or infinite.
        """
        import torch

        measured = self._open()
        measured.load(is_streamed=settings.is_streamed)
        self._sums = None
        try:
            with torch.no_grad():
                if self.job.kind == "fisher":
                    return self._accumulate_fisher(measured, group, shards)
                report, self._sums = accumulate_grams(measured, span_of(measured, group), shards, settings)
                return report
        except NeedsSeparation as found:
            return GroupReport(needs_separate=found.parameters)
        except NeedsBatching as found:
            return GroupReport(needs_batching=found.batching)

    def write(self, entries: Sequence[Entry], file: str, num_examples: int) -> str | None:
        """Complete statistics with the other workers and write those that this worker owns.

        Phases: for every entry, in order, all workers hand their sum to its owner, which writes
        the total and frees it before the next; a worker never holds more than it summed.

        Args:
            entries: of the whole group, the same for every worker.
            file: name of this worker's file.
            num_examples: in all shards, by which Fisher is divided.

        Returns:
            the name of the file, or None if the worker owns nothing.
        """
        totals = self._totals(entries, num_examples)
        mine = [entry for entry in entries if entry.owner == self.rank]
        self._sum_squares = {}
        written = []
        for entry in mine:
            for key, shape in entry.tensors:
                parts = _take(totals, max(1, len(entry.parts) // len(entry.tensors)))
                if self.job.kind == "fisher":
                    parts = self._squared(key, parts)
                written.append(Written(key=key, shape=shape, parts=parts))
        if written:
            write_statistics_file(os.path.join(self.job.work_folder, file), written)
        for _ in totals:
            raise AssertionError("an owned statistic was not written")
        self._sums = None
        return file if written else None

    def sum_squares(self) -> dict[str, float]:
        """Return the sum of squares of every Fisher that the last `write` wrote: its scale over the model."""
        return self._sum_squares

    def _squared(self, key: str, parts: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Note the sum of squares of what passes, of the values as they are stored."""
        sums = []
        for part in parts:
            stored_P = part.float().cpu().reshape(-1)
            # numpy adds in one order, whatever the number of threads.
            for begin in range(0, stored_P.numel(), _SUMMED_ELEMENTS):
                chunk_P = stored_P[begin : begin + _SUMMED_ELEMENTS]
                sums.append(float(np.square(chunk_P.double().numpy()).sum()))
            yield stored_P
        self._sum_squares[key] = math.fsum(sums)

    def _totals(self, entries: Sequence[Entry], num_examples: int) -> Iterator[torch.Tensor]:
        """Reduce every entry in order and yield the values of those that are owned."""
        sums = self._sums
        assert sums is not None
        if isinstance(sums, GramAccumulator):
            yield from gram_totals(sums, entries, self.rank, self.exchange)
            return
        for entry in entries:
            total = sums.total(entry.parameter)
            self.exchange.reduce(total, entry.owner)
            if entry.owner == self.rank:
                yield from self._fisher_tensors(entry, total / num_examples)
            sums.forget(entry.parameter)

    def _fisher_tensors(self, entry: Entry, mean: torch.Tensor) -> Iterator[torch.Tensor]:
        """Give a parameter's Fisher the form of the checkpoint's tensors."""
        model = self._open().model
        shaped = mean.reshape(model.get_parameter(entry.parameter).shape)
        if len(entry.tensors) == 1:
            yield shaped
            return
        from transformers.core_model_loading import revert_weight_conversion

        converted = revert_weight_conversion(model, {entry.parameter: shaped})
        for key, _ in entry.tensors:
            yield converted[key]

    def _open(self) -> MeasuredModel:
        if self._measured is None:
            self._measured = MeasuredModel(self.job, self._count)
        return self._measured

    def _count(self, num_tokens: int) -> None:
        self.num_tokens += num_tokens

    def _accumulate_fisher(
        self, measured: MeasuredModel, group: LayerGroup, shards: Sequence[int]
    ) -> GroupReport:
        blocks = measured.maps.blocks
        wanted = [
            name for name, _ in measured.model.named_parameters() if in_group(block_of(name, blocks), group)
        ]
        fisher = FisherAccumulator(measured.model, wanted, self.job.estimator)
        num_tokens = num_examples = 0
        begin = time.perf_counter()
        for shard in shards:
            for example in measured.shard(shard):
                batch = measured.batch([example])
                fisher.add(batch)
                num_tokens += batch.num_tokens
                num_examples += 1
                self._count(batch.num_tokens)
            fisher.end_shard()
        measured.model.requires_grad_(False)
        self._sums = fisher
        return GroupReport(
            num_tokens=num_tokens,
            num_examples=num_examples,
            num_truncated=measured.data.num_truncated,
            forward_seconds=time.perf_counter() - begin,
        )


def gram_totals(
    sums: GramAccumulator,
    entries: Sequence[Entry],
    rank: int,
    exchange: Exchange,
    members: Members | None = None,
) -> Iterator[torch.Tensor]:
    """Reduce Grams in order, and yield those that a worker owns, each before the next is summed."""
    for entry in entries:
        for part in entry.parts:
            total = sums.total((entry.parameter, part), entry.in_features, entry.tier)
            exchange.reduce(total, entry.owner, members)
            if entry.owner == rank:
                yield total
            if entry.tier is None:  # what is summed up to a tier comes before what is summed over all
                sums.forget((entry.parameter, part))


def _take(values: Iterator[torch.Tensor], count: int) -> Iterator[torch.Tensor]:
    for _ in range(count):
        yield next(values)
