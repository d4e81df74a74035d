"""The merge worker: reads the pieces of a task, merges them, writes them.

A plain class; `ray_worker.py` puts it into a Ray actor and the in-process backend calls it
directly. A task passes three phases, each on its own resources: *read* (storage -> the
lane's buffers), *merge* (the device), *write* (buffers -> storage). `merge` may be called from
as many threads as there are lanes, and then one task's reading overlaps the merging of the
one before and the writing of the one before that. Tasks are idempotent: they overwrite their
own ranges of preallocated files. On a CPU what the compiled kernels can do they do, and torch
is imported when something else comes.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from raymerge.merge_actors.checkpoint.hub import locate
from raymerge.merge_actors.checksum import checksum_chunk_bytes, piece_checksum
from raymerge.merge_actors.chunks import CHUNK_BYTES, chunks_of, join_reports
from raymerge.merge_actors.directions import Direction
from raymerge.merge_actors.dtypes import NARROW, element_bytes, torch_dtype
from raymerge.merge_actors.errors import CheckpointError, ClusterError, NotFiniteError, OutputError
from raymerge.merge_actors.files import Files, allow_many_files
from raymerge.merge_actors.host_input import HostInput
from raymerge.merge_actors.inputs import aligned, arena_bytes, read_inputs
from raymerge.merge_actors.kernels.build import Kernels, load_kernels
from raymerge.merge_actors.kernels.fused import FusedSlice, NotFinite, fused_slice
from raymerge.merge_actors.lane import Lane
from raymerge.merge_actors.methods import METHODS, SPARSIFIERS
from raymerge.merge_actors.methods.interface import Summary
from raymerge.merge_actors.methods.prepare import TensorState, needs_preparation
from raymerge.merge_actors.methods.slices import Measurable, TensorSlice, prepare_slices
from raymerge.merge_actors.narrowing import beyond_warning, count_beyond, saturates
from raymerge.merge_actors.nonfinite import (
    count_nonfinite,
    hides_nonfinite,
    holds_only_finite,
    write_one_nan,
)
from raymerge.merge_actors.outputs import OutputBatch, output_batches
from raymerge.merge_actors.run_memory import RunMemory
from raymerge.merge_actors.solving import Solving, report_solve
from raymerge.merge_actors.squares import sum_squares
from raymerge.merge_actors.storage.folders import exists
from raymerge.merge_actors.storage.retry import with_retries
from raymerge.merge_actors.storage.staged_outputs import StagedOutputs
from raymerge.merge_actors.storage.storage_files import StorageFiles
from raymerge.merge_actors.storage.store import store_of
from raymerge.merge_actors.storage.uris import is_remote
from raymerge.merge_actors.task import (
    FileTask,
    Job,
    MeasureReport,
    MeasureTask,
    MergeTask,
    Piece,
    PieceReport,
    RunContext,
    SolveTask,
    TaskReport,
)
from raymerge.merge_actors.torch_threads import borrow_threads, return_threads

if TYPE_CHECKING:
    import torch

#: Tasks of one worker that are under way at once: one is read while another is merged.
NUM_LANES = 2
#: A chunk is never cut smaller than this many times, however often memory ran out.
_MOST_HALVINGS = 4
#: Bytes of one input in a chunk on a GPU: launches and copies want it long.
_CUDA_CHUNK_BYTES = 256 << 20
#: The same where an input comes over the network: all ranges of a task are in flight together.
_REMOTE_CHUNK_BYTES = 256 << 20


class Figures(NamedTuple):
    """What a merged piece holds."""

    sum_squares: float
    """Before the values are rounded to the output dtype."""
    num_nonfinite: int
    """After it."""


class _Stopwatch:
    """Seconds by phase, in turns."""

    def __init__(self) -> None:
        self.seconds = {"read": 0.0, "merge": 0.0, "write": 0.0}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Put the time since the last lap down to a phase."""
        now = time.perf_counter()
        self.seconds[phase] += now - self._last
        self._last = now


class MergeWorker:
    """Merges slices on one device."""

    def __init__(
        self,
        context: RunContext,
        files: Files | None = None,
        gpu: int = 0,
        memory: RunMemory | None = None,
    ) -> None:
        """Make a worker for a run.

        Args:
            context: of the run.
            files: shared by the workers of one process.
            gpu: which of the GPUs that this process sees, if the run is on GPUs.
            memory: what earlier runs found out about the same models, where many runs are alike.
        """
        self.context = context
        self._memory = memory
        allow_many_files()
        is_cpu = context.device == "cpu"
        self._files: Files = files or StorageFiles(context.stage)
        self._lanes: queue.SimpleQueue[Lane] = queue.SimpleQueue()
        for _ in range(1 if context.thrift else NUM_LANES):
            self._lanes.put(Lane("cpu" if is_cpu else "cuda", gpu))
        self._kernels = load_kernels() if is_cpu else Kernels(None)
        # A CPU's cores are shared by the lanes: merging two tasks at once would only thrash
        # the cache. On a GPU each lane has a stream of its own.
        self._chunk_bytes = (CHUNK_BYTES if is_cpu else _CUDA_CHUNK_BYTES) >> min(
            context.thrift, _MOST_HALVINGS
        )
        self._prepared: dict[int, bool] = {}
        self._merging: threading.Lock | None = threading.Lock() if is_cpu else None
        self._importing = threading.Lock()
        self._has_borrowed_threads = False

    def begin(self, context: RunContext) -> None:
        """Become the worker of another run on the same device, with the buffers that are there."""
        self.context = context
        self._prepared = {}

    def check(self) -> str:
        """Check that this node sees every path and bucket of the run; return the node's host name.

        Models from the Hub that are not where the driver has them are fetched, once per node.

        Raises:
            ClusterError: a path is missing here, or a store refuses this node.
            CheckpointError: the Hub does not give a model to this node.
        """
        host = os.uname().nodename
        for model in self.context.hub_models:
            if not os.path.exists(model.folder):
                self._files.move(model.folder, os.path.realpath(locate(model.path, model.revision)))
        for path in self.context.visible_paths:
            if is_remote(path):
                _check_reachable(host, path)
            elif not os.path.exists(path):
                raise ClusterError(
                    f"node {host} does not see {path}; inputs and output must lie on a file system "
                    "that every node mounts at the same path, or in an object store"
                )
        for uri in self.context.writable_folders:
            _check_writable(host, uri)
        return host

    def make_files(self, task: FileTask, states: Mapping[int, TensorState]) -> TaskReport:
        """Make files and upload them.

        Raises:
            RaymergeError: as for `merge` and `solve`, or the store does not take a file.
        """
        outputs = StagedOutputs(self._files, task.files, self.context.stage)
        try:
            reports = [
                self.solve(part, outputs)
                if isinstance(part, SolveTask)
                else self.merge(part, states, outputs)
                for part in task.parts
            ]
            started = time.perf_counter()
            outputs.upload()
            upload_seconds = time.perf_counter() - started
        finally:
            outputs.close()
        return TaskReport(
            number=task.number,
            pieces=join_reports([piece for report in reports for piece in report.pieces]),
            read_bytes=task.read_bytes,
            write_bytes=task.write_bytes,
            read_seconds=sum(report.read_seconds for report in reports),
            merge_seconds=sum(report.merge_seconds for report in reports),
            write_seconds=sum(report.write_seconds for report in reports) + upload_seconds,
            warnings=tuple(dict.fromkeys(line for report in reports for line in report.warnings)),
            fetched_bytes=sum(report.fetched_bytes for report in reports),
        )

    def merge(
        self, task: MergeTask, states: Mapping[int, TensorState], outputs: Files | None = None
    ) -> TaskReport:
        """Carry out a merge task.

        Args:
            task: what to read, merge and write.
            states: the whole-tensor states that `task.states` names.
            outputs: where to write; None writes where inputs are read.

        Raises:
            NotFiniteError: an input holds NaN or infinity and that is not allowed.
            CheckpointError: an input cannot be read.
            OutputError: the output cannot be written.
        """
        lane = self._lanes.get()
        reports: list[PieceReport] = []
        warnings = [self._kernels.remark] if self._kernels.remark else []
        watch = _Stopwatch()
        chunk_bytes = _REMOTE_CHUNK_BYTES if _reads_remote(task.pieces) else self._chunk_bytes
        try:
            for chunk in chunks_of(task.pieces, self._must_stay_whole, chunk_bytes):
                inputs = read_inputs(chunk, self._files, lane.host_arena(arena_bytes(chunk)))
                watch.lap("read")
                for batch in output_batches(chunk):
                    merged = self._merge_batch(chunk, batch, inputs, states, lane, warnings)
                    watch.lap("merge")
                    reports += [self._write_piece(*one, outputs or self._files) for one in merged]
                    watch.lap("write")
        finally:
            self._lanes.put(lane)
        return TaskReport(
            number=task.number,
            pieces=join_reports(reports),
            read_bytes=task.read_bytes,
            write_bytes=task.write_bytes,
            read_seconds=watch.seconds["read"],
            merge_seconds=watch.seconds["merge"],
            write_seconds=watch.seconds["write"],
            warnings=(*warnings, *self._files.remarks()),
            fetched_bytes=self._files.take_fetched_bytes(),
        )

    def _must_stay_whole(self, piece: Piece) -> bool:
        """Return whether this worker itself has to measure a tensor of the piece first."""
        return piece.is_whole and any(self._needs_preparation(job.settings) for job in piece.jobs)

    def _needs_preparation(self, number: int) -> bool:
        if number not in self._prepared:
            name, settings = self.context.settings[number]
            self._prepared[number] = name != "copy" and needs_preparation(
                METHODS[name], settings, SPARSIFIERS
            )
        return self._prepared[number]

    def _merge_batch(
        self,
        pieces: Sequence[Piece],
        batch: OutputBatch,
        inputs: Sequence[Sequence[HostInput]],
        states: Mapping[int, TensorState],
        lane: Lane,
        warnings: list[str],
    ) -> list[tuple[Piece, Job, memoryview, Figures]]:
        """Merge some jobs of a task; returns each with its output's bytes in host memory."""
        merged: list[tuple[Piece, Job, memoryview, Figures]] = []
        lane.make_output(batch.num_bytes)
        with lane.computing(self._merging):
            at = 0
            for number, jobs in batch.jobs:
                piece, on_device = pieces[number], None
                for job in jobs:
                    num_bytes = piece.num_elements * element_bytes(job.dtype)
                    offset = job.offset + piece.begin * element_bytes(job.dtype)
                    memory = self._files.output(job.file, offset, num_bytes)
                    data = lane.host_output(at, num_bytes) if memory is None else memory
                    out = HostInput(data, job.dtype)
                    state = TensorState() if job.state is None else states[job.state]
                    figures = self._merge_on_host(piece, job, inputs[number], state, out)
                    if figures is None:
                        with self._eagerly():
                            on_device = on_device or lane.to_device(inputs[number])
                            is_on_host = self._merging is not None
                            out_P = out.tensor() if is_on_host else lane.output(at, num_bytes, job.dtype)
                            figures = self._merge_piece(piece, job, on_device, state, lane, out_P, warnings)
                    merged.append((piece, job, out.data.data, figures))
                    at += aligned(num_bytes)
            lane.fetch_output(at)
        return merged

    def solve(self, task: SolveTask, outputs: Files | None = None) -> TaskReport:
        """Carry out a solve task, writing to `outputs` if given.

        Raises:
            NotFiniteError: a Gram or a weight holds NaN or infinity.
        """
        import torch

        lane = self._lanes.get()
        reports, warnings = [], []
        watch = _Stopwatch()
        settings = [self.context.settings[each.settings] for each in task.sets]
        known = self._memory.sums if self._memory else None
        solving = Solving(task, settings, self._files, lane.device, known)
        try:
            for number, each in enumerate(task.sets):
                with lane.computing(self._merging), self._eagerly():
                    merged, factor = solving.solve(number)
                watch.lap("merge")
                for job, matrix in zip(each.jobs, merged, strict=True):
                    if num_beyond := count_beyond(matrix, job.dtype):
                        warnings.append(beyond_warning(num_beyond, job.tensor, job.dtype))
                    data = matrix.to(torch_dtype(job.dtype)).cpu().reshape(-1).view(torch.uint8).numpy().data
                    (outputs or self._files).write_from(job.file, job.offset, data)
                    reports.append(report_solve(each.recipe, job, matrix, data, factor))
                watch.lap("write")
        finally:
            self._lanes.put(lane)
        return TaskReport(
            number=task.number,
            pieces=tuple(reports),
            read_bytes=task.read_bytes,
            write_bytes=task.write_bytes,
            read_seconds=0.0,
            merge_seconds=watch.seconds["merge"],
            write_seconds=watch.seconds["write"],
            warnings=(*warnings, *self._files.remarks()),
            fetched_bytes=self._files.take_fetched_bytes(),
        )

    def measure(self, task: MeasureTask) -> MeasureReport:
        """Answer one round of questions about one slice of a tensor."""
        lane = self._lanes.get()
        try:
            started = time.perf_counter()
            inputs = read_inputs([task.piece], self._files, lane.host_arena(arena_bytes([task.piece])))[0]
            read = time.perf_counter()
            with lane.computing(self._merging):
                summaries = self._measure(task, inputs, lane)
            return MeasureReport(
                state=task.state,
                begin=task.piece.begin,
                summaries=summaries,
                read_bytes=task.read_bytes,
                read_seconds=read - started,
                merge_seconds=time.perf_counter() - read,
                fetched_bytes=self._files.take_fetched_bytes(),
            )
        finally:
            self._lanes.put(lane)

    def gpu_peak_bytes(self) -> int | None:
        """Return the most GPU memory that this process has held so far; None on a CPU."""
        if self.context.device == "cpu":
            return None
        import torch

        return int(torch.cuda.max_memory_allocated())

    def close(self) -> None:
        """Close the worker's files, and give torch's threads back."""
        self._files.close()
        with self._importing:
            if self._has_borrowed_threads:
                return_threads()
                self._has_borrowed_threads = False

    @contextlib.contextmanager
    def _eagerly(self) -> Iterator[None]:
        """Compute with torch, which is imported when it is first needed."""
        import torch

        with self._importing:
            if not self._has_borrowed_threads:
                borrow_threads(self.context.num_threads)
                self._has_borrowed_threads = True
        with torch.inference_mode():
            yield

    def _measure(self, task: MeasureTask, inputs: Sequence[HostInput], lane: Lane) -> tuple[Summary, ...]:
        """Answer a round of questions, by the kernels if they can."""
        measures, state = task.round.measures, task.round.state
        fused = self._fused(task.piece, task.piece.jobs[0], inputs)
        if fused is not None:
            with contextlib.suppress(NotFinite):
                return tuple(fused.measure(each, state) for each in measures)
        with self._eagerly():
            piece_slice = self._slice(task.piece, task.piece.jobs[0], lane.to_device(inputs), lane)
            return tuple(piece_slice.measure(each, state) for each in measures)

    def _fused(self, piece: Piece, job: Job, inputs: Sequence[HostInput]) -> FusedSlice | None:
        """Return a job's slice for the kernels, or None if they do not have its method."""
        if self._kernels.library is None or job.statistics:
            return None
        name, settings = self.context.settings[job.settings]
        return fused_slice(
            library=self._kernels.library,
            method=METHODS[name],
            settings=settings,
            sparsifiers=SPARSIFIERS,
            shape=piece.shape,
            begin=piece.begin,
            base=None if job.base is None else inputs[job.base],
            models=[inputs[i] for i in job.models],
            keys=job.keys,
            out_dtype=job.dtype,
        )

    def _slice(self, piece: Piece, job: Job, inputs: list[torch.Tensor], lane: Lane) -> TensorSlice:
        name, settings = self.context.settings[job.settings]
        return TensorSlice(
            method=METHODS[name],
            settings=settings,
            sparsifiers=SPARSIFIERS,
            shape=piece.shape,
            begin=piece.begin,
            base_P=None if job.base is None else inputs[job.base],
            models_P=[inputs[i] for i in job.models],
            statistics_P=[inputs[i] for i in job.statistics] or None,
            keys=job.keys,
            pool=lane.pool,
        )

    def _merge_on_host(
        self, piece: Piece, job: Job, inputs: Sequence[HostInput], state: TensorState, out: HostInput
    ) -> Figures | None:
        """Copy or merge one job of a piece without torch; None if that cannot be, or not by this worker."""
        if self._merging is None:
            return None  # on a GPU
        if self.context.settings[job.settings][0] == "copy":
            out.data[:] = inputs[job.models[0]].data
            return Figures(0.0, 0)
        fused = self._fused(piece, job, inputs)
        if fused is None:
            return None
        direction = self._direction(piece, job, fused, state)
        try:
            if direction is not None and direction.is_known:
                unit_squares = fused.merge(state, out.data, out.dtype, direction.values, is_known=True)
            else:
                if piece.is_whole:
                    state = self._prepare(piece, job, fused, state)
                values = None if direction is None else direction.values
                unit_squares = fused.merge(state, out.data, out.dtype, values)
                if direction is not None:
                    direction.formed()
        except NotFinite:
            return None
        if job.dtype in NARROW and not holds_only_finite(out):
            return None
        return Figures(sum(unit_squares.tolist()), 0)

    def _direction(self, piece: Piece, job: Job, fused: FusedSlice, state: TensorState) -> Direction | None:
        """Return what lambda multiplies, from an earlier run or to be kept for later ones."""
        if self._memory is None:
            return None
        return self._memory.directions.find(piece, job, fused.method, fused.settings, fused.formula, state)

    def _prepare(self, piece: Piece, job: Job, whole: Measurable, state: TensorState) -> TensorState:
        """Measure a tensor that is here whole, as far as nothing is known of it."""
        if self._memory is None:
            return prepare_slices([whole], state)
        known = self._memory.states
        tensor = [(piece, job)]
        recalled = known.recall(tensor, whole.method, whole.settings, state)
        found = prepare_slices([whole], recalled)
        known.keep(tensor, whole.method, whole.settings, found, recalled)
        return found

    def _merge_piece(
        self,
        piece: Piece,
        job: Job,
        inputs: list[torch.Tensor],
        state: TensorState,
        lane: Lane,
        out_P: torch.Tensor,
        warnings: list[str],
    ) -> Figures:
        """Merge one job of a piece into `out_P` by the eager formulas and say what came out."""
        name, settings = self.context.settings[job.settings]
        if name == "copy":
            out_P.copy_(inputs[job.models[0]])
            return Figures(0.0, 0)
        comes_of_inputs = False
        if hides_nonfinite(METHODS[name], settings):
            comes_of_inputs = self._check_inputs(piece, job, inputs, warnings)
        merging = self._slice(piece, job, inputs, lane)
        if piece.is_whole:
            state = self._prepare(piece, job, merging, state)
        total_squares, num_nonfinite, num_beyond = 0.0, 0, 0
        for at, merged_P in merging.merged_blocks(state):
            stored_P = out_P[at : at + merged_P.numel()].copy_(merged_P)
            squares = sum_squares(merged_P)
            if squares - squares != 0:  # NaN or infinity: in the block, or in the sum alone
                found = count_nonfinite(merged_P)
                if found and num_nonfinite == 0:
                    comes_of_inputs = self._check_inputs(piece, job, inputs, warnings)
                num_nonfinite += found
                write_one_nan(stored_P, merged_P)
                squares = sum_squares(merged_P.double().nan_to_num_(0, 0, 0))
            total_squares += squares
            num_beyond += count_beyond(merged_P, job.dtype)
        if num_nonfinite and not comes_of_inputs:
            warnings.append(
                f"{num_nonfinite:,} values of tensor {job.tensor} became NaN or infinite, though no input is; "
                "choose smaller weights, or ones that do not cancel"
            )
        if num_beyond:
            warnings.append(beyond_warning(num_beyond, job.tensor, job.dtype))
            num_nonfinite += 0 if saturates(job.dtype) else num_beyond
        return Figures(total_squares, num_nonfinite)

    def _write_piece(
        self, piece: Piece, job: Job, data: memoryview, figures: Figures, files: Files
    ) -> PieceReport:
        first_byte = piece.begin * element_bytes(job.dtype)
        files.write_from(job.file, job.offset + first_byte, data)
        return PieceReport(
            recipe=job.recipe,
            tensor=job.tensor,
            checksum=piece_checksum(data, first_byte, checksum_chunk_bytes(piece.shape, job.dtype)),
            sum_squares=figures.sum_squares,
            num_nonfinite=figures.num_nonfinite,
        )

    def _check_inputs(self, piece: Piece, job: Job, inputs: list[torch.Tensor], warnings: list[str]) -> bool:
        """Name the inputs that hold NaN or infinity: an error, or a warning if they are allowed.

        Returns:
            whether there are any.
        """
        is_any = False
        for index in (*job.models, *(() if job.base is None else (job.base,))):
            found = count_nonfinite(inputs[index])
            if not found:
                continue
            read = piece.reads[index]
            message = (
                f"tensor {read.tensor} of model {read.model} holds {found:,} NaN or infinite values in elements "
                f"[{piece.begin:,}, {piece.end:,})"
            )
            if not self.context.allow_nan:
                error = NotFiniteError(f"{message}; mend the model, or merge it as it is with --allow-nan")
                error.recipe = job.recipe
                raise error
            is_any = True
            if message not in warnings:
                warnings.append(message)
        return is_any


def _reads_remote(pieces: Sequence[Piece]) -> bool:
    return any(is_remote(read.file) for piece in pieces for read in piece.reads)


def _check_reachable(host: str, uri: str) -> None:
    try:
        is_there = exists(uri)
    except CheckpointError as error:
        raise ClusterError(f"node {host} does not reach {uri}: {error}") from error
    if not is_there:
        raise ClusterError(
            f"node {host} does not see {uri}; check the endpoint and the credentials of that node's environment"
        )


def _check_writable(host: str, folder: str) -> None:
    """Write a small object: a node may be allowed to read a bucket and not to write it."""
    uri = f"{folder}/node-{host}"
    try:
        with_retries(
            lambda: store_of(uri).write(uri, [host.encode()], blocks_in_flight=1), f"write {uri}", OutputError
        )
    except OutputError as error:
        raise ClusterError(f"node {host} cannot write under {folder}: {error}") from error
