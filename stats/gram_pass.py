"""One pass over a worker's shards that sums the Grams of some linear maps.

Between passes hidden states lie on disk, one file per block and shard, so that a later pass (of
this worker or another) begins there.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raymerge.merge_actors.errors import NotFiniteError
from raymerge.stats.batches import Batch, cut_batches
from raymerge.stats.block_passes import BlockPass, Form, kept_outputs, needed_outputs, stack_of
from raymerge.stats.boundary_files import read_boundary, write_boundary
from raymerge.stats.first_non_finite import FirstNonFinite
from raymerge.stats.gram_accumulator import GramAccumulator, synchronize
from raymerge.stats.input_capture import InputCapture, Key
from raymerge.stats.layer_groups import LayerGroup, in_group
from raymerge.stats.linear_maps import LinearMap
from raymerge.stats.measure_job import GroupReport, PassSettings, TierCounts
from raymerge.stats.measured_model import MeasuredModel

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """What one pass runs, measures and keeps."""

    begin: int
    """First block that runs; if it is not 0, from the hidden states that were kept before it."""
    end: int | None
    """Stop after block end - 1; None to run to the model's end."""
    maps: tuple[LinearMap, ...]
    """Whose inputs are summed."""
    keep: tuple[int, ...]
    """Blocks whose outputs are kept on disk."""
    stops_before: bool = False
    """Run on to the call of block `end`, through what stands between the blocks."""


def span_of(measured: MeasuredModel, group: LayerGroup) -> Span:
    """Return the pass that measures a layer group."""
    blocks = measured.maps.blocks
    return Span(
        begin=group.begin,
        end=None if group.is_last else group.end,
        maps=tuple(each for each in measured.maps.maps if in_group(each.block, group)),
        keep=() if group.is_last else tuple(kept_outputs(blocks, group.begin, group.end)),
    )


def accumulate_grams(
    measured: MeasuredModel, span: Span, shards: Sequence[int], settings: PassSettings
) -> tuple[GroupReport, GramAccumulator]:
    """Run shards and sum what the linear maps of a span see.

    Raises:
        NotFiniteError: an activation is NaN or infinite.
        NeedsSeparation: maps were taken to share an input and do not.
        NeedsBatching: the shards must be cut into other batches.
    """
    one_pass = _GramPass(measured, span, settings)
    try:
        one_pass.run(shards)
    finally:
        one_pass.close()
    return one_pass.report(), one_pass.grams


class _GramPass:
    """The hooks and sums of one pass."""

    def __init__(self, measured: MeasuredModel, span: Span, settings: PassSettings) -> None:
        self.grams = GramAccumulator(measured.job.device)
        self._measured, self._span, self._settings = measured, span, settings
        self._capture = InputCapture(measured.model, span.maps, self.grams.add, settings.separate)
        self._blocks: BlockPass | None = None
        self._num_tokens = self._num_examples = 0
        self._forward_seconds = 0.0
        self._timed_rows: dict[Key, int] = {}
        self._tiers: dict[int, TierCounts] = {}
        self._counted = TierCounts()

    def run(self, shards: Sequence[int]) -> None:
        """Run the shards; the first one is timed."""
        if not shards:
            return
        self._blocks = self._set_up_blocks(shards[0])
        for shard in shards:
            self.grams.is_timed = shard == shards[0]
            begin = time.perf_counter()
            self._run_shard(shard, self._blocks)
            if self.grams.is_timed:
                synchronize(self._measured.job.device)
                self._forward_seconds = time.perf_counter() - begin - self.grams.seconds
                self._timed_rows = dict(self._capture.num_rows)
            if (key := next(self.grams.non_finite(), None)) is not None:
                raise self._non_finite(key, shard, self._blocks)
            tier = self._measured.data.tier(shard)
            self.grams.end_shard(tier)
            self._count(tier)

    def _count(self, tier: int) -> None:
        """Put down what was seen since the last call to a tier."""
        so_far = TierCounts(dict(self._capture.num_rows), self._num_tokens, self._num_examples)
        passed = so_far.minus(self._counted)
        self._tiers[tier] = self._tiers[tier].plus(passed) if tier in self._tiers else passed
        self._counted = so_far

    def close(self) -> None:
        """Give the model back as it was."""
        self._capture.close()
        if self._blocks is not None:
            self._blocks.close()
        if self._measured.loader is not None:
            for block in self._measured.maps.blocks:
                self._measured.loader.release(block)

    def report(self) -> GroupReport:
        """Say what was seen."""
        sizes = {each.parameter: each.in_features * each.out_features for each in self._span.maps}
        return GroupReport(
            leaders=self._capture.leaders,
            num_rows=dict(self._capture.num_rows),
            num_calls=dict(self._capture.num_calls),
            num_tokens=self._num_tokens,
            num_examples=self._num_examples,
            tiers=self._tiers,
            num_truncated=self._measured.data.num_truncated,
            forward_seconds=self._forward_seconds,
            update_seconds=self.grams.seconds,
            update_operations=self.grams.num_operations,
            forward_operations=sum(2 * rows * sizes[key[0]] for key, rows in self._timed_rows.items()),
        )

    def _set_up_blocks(self, shard: int) -> BlockPass:
        """Set the model up: passthroughs before the span, a stop after it, its own blocks loaded."""
        measured, span = self._measured, self._span
        blocks = measured.maps.blocks
        end = len(blocks) if span.end is None else span.end
        forms: dict[str, Form] = {}
        if span.begin > 0:
            forms = read_boundary(measured.job.work_folder, span.begin - 1, shard)[1]
        for i, block in enumerate(blocks if measured.loader is not None else ()):
            is_first = i == 0 or stack_of(blocks[i - 1]) != stack_of(block)
            form = forms.get(stack_of(block))
            runs_again = is_first and i < span.begin and form is not None and form.has_more
            if measured.loader is not None and (span.begin <= i < end or runs_again):
                measured.loader.load(block)
        return BlockPass(
            measured.model,
            blocks,
            span.begin,
            span.end,
            from_cache=span.begin > 0,
            forms=forms,
            keep=span.keep,
            stops_before=span.stops_before,
        )

    def _run_shard(self, shard: int, blocks: BlockPass) -> None:
        measured = self._measured
        kept: dict[int, list[torch.Tensor]] = {}
        for batch in self._batches(shard, blocks):
            self._capture.begin(batch)
            measured.forward(batch)
            self._capture.end()
            for i, output in blocks.outputs.items():
                kept.setdefault(i, []).append(output.cpu())
            self._num_tokens += batch.num_tokens
            self._num_examples += len(batch.examples)
            measured.count_tokens(batch.num_tokens)
        for i, outputs in kept.items():
            write_boundary(measured.job.work_folder, i, shard, outputs, blocks.forms)

    def _batches(self, shard: int, blocks: BlockPass) -> Iterator[Batch]:
        """Yield the batches of a shard, with the hidden states from which their pass begins in place."""
        measured = self._measured
        folder, device = measured.job.work_folder, measured.job.device
        needed = needed_outputs(measured.maps.blocks, self._span.begin)
        cached = {i: read_boundary(folder, i, shard)[0] for i in needed}
        batches = cut_batches(measured.shard(shard), self._settings.batching, measured.job.data.batch_tokens)
        for number, examples in enumerate(batches):
            blocks.begin({i: states[number].to(device) for i, states in cached.items()})
            yield measured.batch(examples)

    def _non_finite(self, key: Key, shard: int, blocks: BlockPass) -> NotFiniteError:
        """Run a shard again and name the first layer and sample that saw NaN or infinity."""
        self._capture.close()
        with FirstNonFinite(self._measured.model, self._span.maps) as first:
            for batch in self._batches(shard, blocks):
                first.begin(batch)
                self._measured.forward(batch)
                if first.layer:
                    break
        examples = self._measured.shard(shard)
        layer = first.layer or next(each.label for each in self._span.maps if each.parameter == key[0])
        sample = first.sample or f"one of the samples {examples[0].number} to {examples[-1].number}"
        return NotFiniteError(
            f"the input of {layer} is NaN or infinite for {sample}; the model overflows there or its weights are "
            "damaged: leave the sample out, or use a wider dtype."
        )
