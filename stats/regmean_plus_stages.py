"""The order in which RegMean++ merges a model: stage by stage, each fed by what is merged already.

A model is run through as tokens -> lead-in -> blocks -> (lead-in -> blocks) -> tail. A lead-in is what runs
before the first block of a stack (embeddings; in an encoder-decoder, again between encoder and decoder); the
tail is what runs after the last block (norm, pooler, head). What stands outside the blocks belongs to the
stage in which it is first used, which shows when that stage runs.

Each stage runs one block that is merged already and keeps its output, and after it what is to be measured, with
each candidate's own weights:

    lead-in 0      tokens -> [own embeddings]
    block 0        tokens -> merged embeddings -> [own block 0]
    block 1        tokens -> merged embeddings -> merged block 0, kept -> [own block 1]
    block 2        kept after block 0 -> merged block 1, kept -> [own block 2]
    ...
    tail           kept after block n - 2 -> merged block n - 1 -> [own norm and head]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from raymerge.merge_actors.checkpoint.header import TensorInfo
from raymerge.stats.block_passes import kept_outputs, stack_of
from raymerge.stats.gram_pass import Span
from raymerge.stats.linear_maps import ModelMaps
from raymerge.stats.measure_job import Description, GroupReport, PassSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """Layers that are merged together."""

    number: int
    kind: Literal["lead_in", "block", "tail"]
    begin: int
    """First block that runs; blocks [begin, num_pushed) are merged ones, whose outputs are kept."""
    num_pushed: int
    end: int | None
    """Stop after block end - 1 (a lead-in: before block end); None to run to the model's end."""

    @property
    def block(self) -> int | None:
        """Return the block that is measured and merged; None if that stands outside the blocks."""
        return self.num_pushed if self.kind == "block" else None

    def label(self, num_blocks: int) -> str:
        """Return what a person calls it."""
        if self.block is not None:
            return f"layer {self.block + 1} of {num_blocks}"
        return "embeddings" if self.kind == "lead_in" else "final layers"


def stages_of(blocks: Sequence[str]) -> tuple[Stage, ...]:
    """Return the stages of a model, in order."""
    stages: list[Stage] = []
    num_pushed = 0  # blocks whose merged outputs an earlier stage has kept
    for i, block in enumerate(blocks):
        if i == 0 or stack_of(blocks[i - 1]) != stack_of(block):
            stages.append(Stage(number=len(stages), kind="lead_in", begin=num_pushed, num_pushed=i, end=i))
            num_pushed = i
        stages.append(Stage(number=len(stages), kind="block", begin=num_pushed, num_pushed=i, end=i + 1))
        num_pushed = i
    last = len(blocks)
    stages.append(Stage(number=len(stages), kind="tail", begin=num_pushed, num_pushed=last, end=None))
    return tuple(stages)


def stage_span(stage: Stage, maps: ModelMaps, done: frozenset[str], *, measures: bool) -> Span:
    """Return the pass of a stage.

    Args:
        stage: which.
        maps: of the model.
        done: parameters of linear maps outside the blocks that an earlier stage has measured.
        measures: sum Grams; if not, only the merged blocks' outputs are wanted.
    """
    keep = tuple(kept_outputs(maps.blocks, stage.begin, stage.num_pushed)) if stage.end is not None else ()
    wanted = tuple(each for each in maps.maps if each.block == stage.block and each.parameter not in done)
    if not measures:
        return Span(begin=stage.begin, end=stage.num_pushed, maps=(), keep=keep)
    is_lead_in = stage.kind == "lead_in"
    return Span(begin=stage.begin, end=stage.end, maps=wanted, keep=keep, stops_before=is_lead_in)


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A model that is merged, as a worker sees it with its data."""

    description: Description
    block_tensors: tuple[tuple[str, ...], ...]
    """Per block, the tensors that its parameters are read from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageWork:
    """What one worker does for one candidate in a stage."""

    candidate: int
    shards: tuple[int, ...]
    settings: PassSettings
    merged: Mapping[str, TensorInfo]
    """Where the merged tensors of all earlier stages stand, by name."""
    done: frozenset[str] = frozenset()
    """Parameters of linear maps outside the blocks that an earlier stage has measured."""
    measures: bool = True
    """False to repeat an earlier stage for its outputs alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageReport:
    """What one worker saw of one candidate in a stage."""

    grams: GroupReport
    used: frozenset[str] = field(default_factory=frozenset)
    """Tensors outside the blocks that were used."""
