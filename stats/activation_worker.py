"""A worker that runs data through a model and sums what it sees: a plain class.

It takes instructions from the driver: describe the model, accumulate a layer group over some
shards, complete and write the statistics that it owns. Between groups hidden states lie on disk,
one file per block and shard, so that a later group (of this worker or another) begins there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from raymerge.merge_actors.checkpoint.folder import Checkpoint, open_checkpoint
from raymerge.merge_actors.checkpoint.hub import locate
from raymerge.merge_actors.errors import ClusterError, MismatchError, NotFiniteError
from raymerge.stats.batches import Batch, batch_tensors, cut_batches
from raymerge.stats.block_passes import BlockPass, Form, StopHere, kept_outputs, needed_outputs, stack_of
from raymerge.stats.boundary_files import read_boundary, write_boundary
from raymerge.stats.calibration_data import CalibrationData, Example
from raymerge.stats.describe_model import describe
from raymerge.stats.exchange import Exchange, NoExchange
from raymerge.stats.fisher_accumulator import FisherAccumulator, check_estimator
from raymerge.stats.gram_accumulator import GramAccumulator, synchronize
from raymerge.stats.input_capture import InputCapture, Key, NeedsSeparation
from raymerge.stats.layer_groups import LayerGroup
from raymerge.stats.linear_maps import LinearMap, ModelMaps, find_linear_maps
from raymerge.stats.masked_rows import NeedsBatching
from raymerge.stats.measure_job import Description, Entry, GroupReport, MeasureJob, PassSettings
from raymerge.stats.model_loading import BlockLoader, load_whole, skeleton
from raymerge.stats.statistics_file import Written, write_statistics_file

if TYPE_CHECKING:
    import torch


class ActivationWorker:
    """One worker of a group. Not safe for two instructions at a time; `num_tokens` may be read at any time."""

    def __init__(self, job: MeasureJob, rank: int = 0) -> None:
        self.job, self.rank = job, rank
        self.num_tokens = 0
        """Tokens that have passed since the worker was made."""
        self.exchange: Exchange = NoExchange()
        self._checkpoint: Checkpoint | None = None
        self._data: CalibrationData | None = None
        self._examples: dict[int, list[Example]] = {}
        self._maps: ModelMaps | None = None
        self._model: Any = None
        self._loader: BlockLoader | None = None
        self._grams: GramAccumulator | None = None
        self._fisher: FisherAccumulator | None = None

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
        self._open()
        assert self._checkpoint is not None and self._data is not None
        if self.job.kind == "fisher":
            has_labels = self._data.rows.labels is not None
            check_estimator(self.job.estimator, self._checkpoint.config, has_labels=has_labels)
        return describe(self.job, self._checkpoint, self._data)

    def accumulate(self, group: LayerGroup, shards: Sequence[int], settings: PassSettings) -> GroupReport:
        """Run shards through the model and sum the statistics of a layer group.

        Whatever was summed before is dropped, so a repeated instruction counts nothing twice.

        Raises:
            NotFiniteError: an activation is NaN or infinite.
        """
        import torch

        self._open()
        self._load(settings)
        self._grams = self._fisher = None
        with torch.no_grad():
            try:
                if self.job.kind == "fisher":
                    return self._accumulate_fisher(group, shards)
                return self._accumulate_grams(group, shards, settings)
            except NeedsSeparation as found:
                return GroupReport(group=group, needs_separate=found.parameters)
            except NeedsBatching as found:
                return GroupReport(group=group, needs_batching=found.batching)
            finally:
                self._unload(group)

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
        written = [
            Written(key=key, shape=shape, parts=_take(totals, max(1, len(entry.parts) // len(entry.tensors))))
            for entry in mine
            for key, shape in entry.tensors
        ]
        if written:
            write_statistics_file(os.path.join(self.job.work_folder, file), written)
        for _ in totals:
            raise AssertionError("an owned statistic was not written")
        self._grams = self._fisher = None
        return file if written else None

    def _totals(self, entries: Sequence[Entry], num_examples: int) -> Iterator[torch.Tensor]:
        """Reduce every entry in order and yield the values of those that are owned."""
        for entry in entries:
            for part in entry.parts:
                if self._fisher is not None:
                    total = self._fisher.total(entry.parameter)
                else:
                    assert self._grams is not None
                    total = self._grams.total((entry.parameter, part), entry.in_features)
                self.exchange.reduce(total, entry.owner)
                if entry.owner == self.rank:
                    if self._fisher is None:
                        yield total
                    else:
                        yield from self._fisher_tensors(entry, total / num_examples)
                if self._fisher is not None:
                    self._fisher.forget(entry.parameter)
                elif self._grams is not None:
                    self._grams.forget((entry.parameter, part))

    def _fisher_tensors(self, entry: Entry, mean: torch.Tensor) -> Iterator[torch.Tensor]:
        """Give a parameter's Fisher the form of the checkpoint's tensors."""
        shaped = mean.reshape(self._model.get_parameter(entry.parameter).shape)
        if len(entry.tensors) == 1:
            yield shaped
            return
        from transformers.core_model_loading import revert_weight_conversion

        converted = revert_weight_conversion(self._model, {entry.parameter: shaped})
        for key, _ in entry.tensors:
            yield converted[key]

    def _open(self) -> None:
        if self._checkpoint is not None:
            return
        import torch

        if self.job.device == "cpu":
            torch.set_num_threads(self.job.threads)
        else:
            torch.backends.cuda.matmul.allow_tf32 = False
        folder = locate(self.job.model, self.job.revision, allow_pickle=self.job.allow_pickle)
        checkpoint = open_checkpoint(folder, allow_pickle=self.job.allow_pickle)
        self._data = CalibrationData(self.job.data, checkpoint.folder, checkpoint.config)
        self._checkpoint = checkpoint

    def _load(self, settings: PassSettings) -> None:
        """Bring the model to the device, whole or only what stands outside its blocks."""
        if self._model is not None:
            return
        assert self._checkpoint is not None
        names = {**self._checkpoint.tensors, **self._checkpoint.tied}
        if settings.is_streamed:
            self._model = skeleton(self._checkpoint)
            self._maps = find_linear_maps(self._model, names)
            self._loader = BlockLoader(self._model, self._checkpoint, self._maps.blocks, self.job.device)
        else:
            self._model, _ = load_whole(self._checkpoint, self.job.device)
            self._maps = find_linear_maps(self._model, names)

    def _unload(self, group: LayerGroup) -> None:
        if self._loader is not None and self._maps is not None:
            for block in self._maps.blocks:
                self._loader.release(block)

    def _accumulate_grams(
        self, group: LayerGroup, shards: Sequence[int], settings: PassSettings
    ) -> GroupReport:
        assert self._maps is not None
        maps = maps_of(self._maps.maps, group)
        grams = GramAccumulator(self.job.device)
        capture = InputCapture(self._model, maps, grams.add, settings.separate)
        shard_pass = self._prepare_pass(group, shards)
        num_tokens = num_examples = 0
        seconds = 0.0
        timed_calls: dict[Key, int] = {}
        damaged: tuple[Key, int] | None = None
        try:
            for position, shard in enumerate(shards):
                grams.is_timed = position == 0
                begin = time.perf_counter()
                tokens, examples = self._run_shard(shard, group, settings, shard_pass, capture)
                if position == 0:
                    synchronize(self.job.device)
                    seconds = time.perf_counter() - begin - grams.seconds
                    timed_calls = dict(capture.num_rows)
                if (key := next(grams.non_finite(), None)) is not None:
                    damaged = key, shard
                    break
                grams.end_shard()
                num_tokens, num_examples = num_tokens + tokens, num_examples + examples
        finally:
            capture.close()
            if shard_pass is not None:
                shard_pass.close()
        if damaged is not None:
            raise self._non_finite(*damaged)
        self._grams = grams
        sizes = {each.parameter: each.in_features * each.out_features for each in maps}
        return GroupReport(
            group=group,
            leaders=capture.leaders,
            num_rows=dict(capture.num_rows),
            num_calls=dict(capture.num_calls),
            num_tokens=num_tokens,
            num_examples=num_examples,
            num_truncated=self._data.num_truncated if self._data else 0,
            forward_seconds=seconds,
            update_seconds=grams.seconds,
            update_operations=grams.num_operations,
            forward_operations=sum(2 * rows * sizes[key[0]] for key, rows in timed_calls.items()),
        )

    def _prepare_pass(self, group: LayerGroup, shards: Sequence[int]) -> BlockPass | None:
        """Set the model up for a group: passthroughs before it, a stop after it, its blocks loaded."""
        assert self._maps is not None
        blocks = self._maps.blocks
        forms: dict[str, Form] = {}
        if shards and group.begin > 0:
            forms = read_boundary(self.job.work_folder, group.begin - 1, shards[0])[1]
        if self._loader is not None:
            for i, block in enumerate(blocks):
                is_first = i == 0 or stack_of(blocks[i - 1]) != stack_of(block)
                is_run_again = (
                    is_first
                    and i < group.begin
                    and stack_of(block) in forms
                    and forms[stack_of(block)].has_more
                )
                if group.begin <= i < group.end or is_run_again:
                    self._loader.load(block)
        if not shards:
            return None
        keep = [] if group.is_last else kept_outputs(blocks, group.begin, group.end)
        end = None if group.is_last else group.end
        return BlockPass(
            self._model, blocks, group.begin, end, from_cache=group.begin > 0, forms=forms, keep=keep
        )

    def _run_shard(
        self,
        shard: int,
        group: LayerGroup,
        settings: PassSettings,
        shard_pass: BlockPass | None,
        capture: InputCapture,
    ) -> tuple[int, int]:
        """Run one shard; returns its tokens and examples."""
        assert shard_pass is not None and self._data is not None and self._maps is not None
        blocks, folder = self._maps.blocks, self.job.work_folder
        cached = {
            i: read_boundary(folder, i, shard)[0]
            for i in (needed_outputs(blocks, group.begin) if group.begin else ())
        }
        kept: dict[int, list[torch.Tensor]] = {}
        num_tokens = num_examples = 0
        for number, examples in enumerate(
            cut_batches(self._shard(shard), settings.batching, self.job.data.batch_tokens)
        ):
            batch = self._tensors(examples)
            capture.begin(batch)
            shard_pass.begin({i: states[number].to(self.job.device) for i, states in cached.items()})
            self._forward(batch)
            capture.end()
            for i, output in shard_pass.outputs.items():
                kept.setdefault(i, []).append(output.cpu())
            num_tokens += batch.num_tokens
            num_examples += len(examples)
            self.num_tokens += batch.num_tokens
        for i, outputs in kept.items():
            write_boundary(folder, i, shard, outputs, shard_pass.forms)
        return num_tokens, num_examples

    def _forward(self, batch: Batch) -> None:
        try:
            self._model(**batch.inputs)
        except StopHere:
            pass
        except IndexError as error:
            numbers = ", ".join(str(each.number) for each in batch.examples[:5])
            raise MismatchError(
                f"the model cannot take samples {numbers}: {error}; its tokenizer may not be its own."
            ) from error

    def _shard(self, number: int) -> list[Example]:
        assert self._data is not None
        if number not in self._examples:
            self._examples[number] = self._data.shard(number)
        return self._examples[number]

    def _tensors(self, examples: Sequence[Example]) -> Batch:
        assert self._data is not None
        config = self._model.config
        start_id = None
        if self._data.is_encoder_decoder and not type(self._model).__name__.endswith("Classification"):
            start_id = getattr(config, "decoder_start_token_id", None)
            start_id = self._data.pad_id if start_id is None else start_id
        return batch_tensors(
            examples,
            pad_id=self._data.pad_id,
            start_id=start_id,
            device=self.job.device,
            side=self.job.padding_side,
        )

    def _non_finite(self, key: Key, shard: int) -> NotFiniteError:
        """Name the layer and sample that gave NaN or infinity, from single examples if the model is whole."""
        assert self._maps is not None
        layer = next(each.label for each in self._maps.maps if each.parameter == key[0])
        sample = f"one of the samples {self._shard(shard)[0].number} to {self._shard(shard)[-1].number}"
        found = self._first_non_finite(shard) if self._loader is None else None
        if found is not None:
            layer, sample = found[0], f"sample {found[1]}"
        return NotFiniteError(
            f"the input of {layer} is NaN or infinite for {sample}; the model overflows there or its weights are "
            "damaged: leave the sample out, or use a wider dtype."
        )

    def _first_non_finite(self, shard: int) -> tuple[str, int] | None:
        assert self._maps is not None
        labels = {each.parameter: each.label for each in self._maps.maps}
        seen: list[str] = []

        def check(key: Key, rows_RI: torch.Tensor, weight: int) -> None:
            if not seen and not bool(rows_RI.isfinite().all()):
                seen.append(labels[key[0]])

        for example in self._shard(shard):
            batch = self._tensors([example])
            capture = InputCapture(self._model, self._maps.maps, check, labels)
            capture.begin(batch)
            self._forward(batch)
            capture.close()
            if seen:
                return seen[0], example.number
        return None

    def _accumulate_fisher(self, group: LayerGroup, shards: Sequence[int]) -> GroupReport:
        assert self._data is not None
        wanted = [
            name
            for name, _ in self._model.named_parameters()
            if in_group(block_number(name, self._maps.blocks if self._maps else ()), group)
        ]
        fisher = FisherAccumulator(self._model, wanted, self.job.estimator)
        num_tokens = num_examples = 0
        begin = time.perf_counter()
        for shard in shards:
            for example in self._shard(shard):
                batch = self._tensors([example])
                fisher.add(batch)
                num_tokens += batch.num_tokens
                num_examples += 1
                self.num_tokens += batch.num_tokens
            fisher.end_shard()
        self._model.requires_grad_(False)
        self._fisher = fisher
        return GroupReport(
            group=group,
            num_tokens=num_tokens,
            num_examples=num_examples,
            num_truncated=self._data.num_truncated,
            forward_seconds=time.perf_counter() - begin,
        )


def maps_of(maps: Sequence[LinearMap], group: LayerGroup) -> list[LinearMap]:
    """Return the linear maps that a group measures."""
    return [each for each in maps if in_group(each.block, group)]


def in_group(block: int | None, group: LayerGroup) -> bool:
    """Return whether a group measures what stands in a block, or outside of all (None)."""
    return group.is_last if block is None else group.begin <= block < group.end


def block_number(name: str, blocks: Sequence[str]) -> int | None:
    """Return the number of the block that a parameter belongs to."""
    return next((i for i, block in enumerate(blocks) if name.startswith(block + ".")), None)


def _take(values: Iterator[torch.Tensor], count: int) -> Iterator[torch.Tensor]:
    for _ in range(count):
        yield next(values)
