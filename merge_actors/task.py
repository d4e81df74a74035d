"""Instructions to a merge worker and its answers: frozen, picklable, without a tensor in them.

A *piece* is elements [begin, end) of one or more output tensors that are made of the same
input tensors; its reads serve every job in it, so a campaign reads each slice once. A *task*
is a few pieces, about one slice's worth of bytes per source.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from raymerge.merge_actors.dtypes import element_bytes
from raymerge.merge_actors.methods.interface import Settings, Summary
from raymerge.merge_actors.methods.prepare import Round


@dataclass(frozen=True, slots=True)
class LowRankRead:
    """A low-rank update to add to the rows that are read: scale * B @ A."""

    a_file: str
    a_offset: int
    b_file: str
    b_offset: int
    dtype: str
    rank: int
    scale: float
    is_transposed: bool
    """The weight is stored (in, out), as GPT-2's Conv1D does: add (B @ A) transposed."""
    num_rows: int | None = None
    """Rows of the model's tensor where its vocabulary differs from the output's."""


@dataclass(frozen=True, slots=True)
class ForeignRows:
    """A tensor of another model that single rows are borrowed from; no file: rows of zeros."""

    file: str = ""
    offset: int = 0
    """Offset in the file of the tensor's first element."""
    dtype: str = "F32"


@dataclass(frozen=True, slots=True)
class RowRun:
    """Rows [to, to + count) of a piece's tensor come from rows [source, source + count)."""

    to: int
    source: int
    count: int
    foreign: ForeignRows | None = None
    """Where the rows stand if not in the tensor that is read."""
    is_replaced: bool = False
    """The rows count for what missing rows are filled with, and are then filled themselves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """One input tensor of a piece; the element range is the piece's own."""

    model: str
    """Key of the model, for messages."""
    tensor: str
    file: str
    offset: int
    """Offset in the file of the tensor's first element (not of the piece's)."""
    dtype: str
    low_rank: LowRankRead | None = None
    row_runs: tuple[RowRun, ...] | None = None
    """For a vocabulary that differs: which rows of the file make the rows of the tensor;
    rows in no run are filled from the base, else from the mean of the models that have them."""
    fill_weight: float = 1.0
    """The model's share in that mean."""

    def shifted(self, num_elements: int) -> Read:
        """Return the read of a part that begins so many elements after the tensor's first."""
        if not num_elements:
            return self
        assert self.low_rank is None and self.row_runs is None, self.tensor
        return replace(self, offset=self.offset + num_elements * element_bytes(self.dtype))


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Make the piece's elements of one output tensor of one recipe."""

    recipe: int
    tensor: str
    settings: int
    """Index into `RunContext.settings`."""
    base: int | None
    """Index into the piece's reads."""
    models: tuple[int, ...]
    """Indices into the piece's reads."""
    statistics: tuple[int, ...] = ()
    """Indices into the piece's reads of the models' statistics, where the method uses them."""
    keys: tuple[int, ...]
    """Key of each model's random stream for this tensor."""
    file: str
    offset: int
    """Offset in the output file of the tensor's first element (not of the piece's)."""
    dtype: str
    state: int | None = None
    """Number of the state that the driver supplies: complete for a tensor that was cut, the
    model-wide part for a whole one; None if the worker finds everything itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Elements [begin, end) of a group of tensors that share inputs and shape."""

    shape: tuple[int, ...]
    begin: int
    end: int
    reads: tuple[Read, ...]
    jobs: tuple[Job, ...]

    @property
    def num_elements(self) -> int:
        """Elements of each tensor in this piece."""
        return self.end - self.begin

    @property
    def is_whole(self) -> bool:
        """Is this all of its tensors? Then the worker itself can measure them."""
        return self.num_elements == math.prod(self.shape)

    @property
    def read_bytes(self) -> int:
        """Bytes that this piece reads, each input once."""
        return sum(self.num_elements * element_bytes(read.dtype) for read in self.reads)

    @property
    def write_bytes(self) -> int:
        """Bytes that this piece writes, over all recipes."""
        return sum(self.num_elements * element_bytes(job.dtype) for job in self.jobs)


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeTask:
    """Read the pieces, merge them, write them."""

    number: int
    pieces: tuple[Piece, ...]
    states: tuple[int, ...] = ()
    """Whole-tensor states that must be known before the task can start."""

    @property
    def read_bytes(self) -> int:
        """Bytes that the task reads."""
        return sum(piece.read_bytes for piece in self.pieces)

    @property
    def write_bytes(self) -> int:
        """Bytes that the task writes."""
        return sum(piece.write_bytes for piece in self.pieces)


@dataclass(frozen=True, slots=True, kw_only=True)
class GramRead:
    """A packed Gram matrix of one model's inputs: float32, row-major upper triangle."""

    model: str
    """Key of the model, for messages."""
    tensor: str
    """A tensor whose input it is, for messages."""
    file: str
    offset: int
    in_features: int
    num_rows: int
    """How many inputs were summed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SolveJob:
    """One matrix to solve for, a tensor or an expert's part of one; all of its rows are made by one task."""

    tensor: str
    shape: tuple[int, int]
    reads: tuple[Read, ...]
    """One per model."""
    base: Read | None = None
    """Of the base, where models are sparsified before they are solved for: a step thins a model's delta from it."""
    keys: tuple[int, ...] = ()
    """Key of each model's random stream for this matrix, where models are sparsified."""
    is_transposed: bool
    """Stored (in, out), as GPT-2's Conv1D."""
    file: str
    offset: int
    """Offset in the output file of the matrix's first element."""
    dtype: str
    first_byte: int
    """Offset of the matrix in its tensor: a multiple of `chunk_bytes`."""
    chunk_bytes: int
    """Chunk length of the tensor's checksum."""

    @property
    def num_elements(self) -> int:
        """Elements of the matrix."""
        return math.prod(self.shape)

    @property
    def all_reads(self) -> tuple[Read, ...]:
        """The models' reads, then the base's where there is one."""
        return self.reads if self.base is None else (*self.reads, self.base)


@dataclass(frozen=True, slots=True)
class SolveSet:
    """Matrices of one recipe that share an input, under one setting (of an alpha grid: one alpha)."""

    recipe: int
    settings: int
    """Index into `RunContext.settings`."""
    jobs: tuple[SolveJob, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SolveTask:
    """Factorise the Gram matrices of one input and solve for the matrices that share it."""

    number: int
    grams: tuple[GramRead, ...]
    """One per model."""
    sets: tuple[SolveSet, ...]
    """One after the other; with several, Grams and weights are read once and kept."""
    states: tuple[int, ...] = ()
    """A solve waits for nothing."""

    @property
    def jobs(self) -> tuple[SolveJob, ...]:
        """Return all matrices."""
        return tuple(job for each in self.sets for job in each.jobs)

    @property
    def read_bytes(self) -> int:
        """Bytes that the task reads; for a single set each Gram once to factorise and once for the right-hand sides."""
        grams = sum(2 * gram.in_features * (gram.in_features + 1) for gram in self.grams)
        distinct = {job.all_reads: job.num_elements for job in self.jobs}
        weights = sum(
            count * element_bytes(read.dtype) for reads, count in distinct.items() for read in reads
        )
        return grams * (2 if len(self.sets) == 1 else 1) + weights

    @property
    def write_bytes(self) -> int:
        """Bytes that the task writes."""
        return sum(job.num_elements * element_bytes(job.dtype) for job in self.jobs)


@dataclass(frozen=True, slots=True)
class OutputObject:
    """A file of an output in an object store."""

    uri: str
    header: bytes
    """Its first bytes."""
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FileTask:
    """Make whole files of outputs in an object store, and upload them: all on one worker."""

    number: int
    parts: tuple[MergeTask | SolveTask, ...]
    """Done one after the other; together they fill the files."""
    files: tuple[OutputObject, ...]
    states: tuple[int, ...] = ()
    """Whole-tensor states that must be known before the task can start."""

    @property
    def read_bytes(self) -> int:
        """Bytes that the task reads."""
        return sum(part.read_bytes for part in self.parts)

    @property
    def write_bytes(self) -> int:
        """Bytes that the task writes."""
        return sum(part.write_bytes for part in self.parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureTask:
    """Read one piece and answer one round of questions of one job."""

    state: int
    piece: Piece
    """Holds the one job that asks, and the reads it needs."""
    round: Round
    number: int = -1

    @property
    def read_bytes(self) -> int:
        """Bytes that the task reads."""
        return self.piece.read_bytes

    @property
    def write_bytes(self) -> int:
        """A measurement writes nothing."""
        return 0


@dataclass(frozen=True, slots=True)
class HubModel:
    """A model of the Hub, and where the driver has it."""

    path: str
    revision: str | None
    folder: str
    """On the driver's node; the reads of a task name files in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunContext:
    """What every worker of a run knows."""

    run_id: str
    settings: tuple[tuple[str, Settings], ...]
    """(method name, settings) that jobs refer to by index."""
    device: str
    """Either "cpu" or "cuda"."""
    num_threads: int
    """Threads of a worker's own arithmetic."""
    allow_nan: bool = False
    visible_paths: tuple[str, ...] = ()
    """Files and folders that every worker must be able to see."""
    hub_models: tuple[HubModel, ...] = ()
    """Models from the Hub: a node that has no copy fetches its own, once."""
    writable_folders: tuple[str, ...] = ()
    """URIs under which every worker must be able to write."""
    stage: str | None = None
    """Folder on each node's own disk for ranges of remote inputs, and for outputs before their upload."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Of the driver; a worker with others is refused."""
    thrift: int = 0
    """How often memory ran out so far: from the first time on a worker has one task under way and not two,
    and each time it takes half as much of an input at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PieceReport:
    """What came out of one job of one piece, or of one solve."""

    recipe: int
    tensor: str
    checksum: int
    """Sum modulo 2^64 of the checksums of the piece's chunks; adds up over pieces."""
    sum_squares: float
    num_nonfinite: int
    figures: Mapping[str, float] = field(default_factory=dict)
    """What else is worth keeping: condition number and rank of a solve."""

    def plus(self, other: PieceReport) -> PieceReport:
        """Return the report on this part of a tensor and another together."""
        return PieceReport(
            recipe=self.recipe,
            tensor=self.tensor,
            checksum=(self.checksum + other.checksum) % (1 << 64),
            sum_squares=self.sum_squares + other.sum_squares,
            num_nonfinite=self.num_nonfinite + other.num_nonfinite,
            figures=self.figures,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskReport:
    """A worker's answer to a merge task."""

    number: int
    pieces: tuple[PieceReport, ...]
    read_bytes: int
    write_bytes: int
    read_seconds: float
    merge_seconds: float
    write_seconds: float
    warnings: tuple[str, ...] = ()
    fetched_bytes: int = 0
    """Bytes that came from object stores since the worker's last report."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureReport:
    """A worker's answer to a measure task: one summary per measure of the round."""

    state: int
    begin: int
    summaries: tuple[Summary, ...]
    read_bytes: int
    read_seconds: float
    merge_seconds: float
    fetched_bytes: int = 0
    """Bytes that came from object stores since the worker's last report."""
