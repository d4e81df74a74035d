"""The merge worker: reads the pieces of a task, merges them, writes them.

A plain class; `ray_worker.py` puts it into a Ray actor and the in-process backend calls it
directly. A task passes three phases, each on its own resources: *read* (storage -> the
lane's buffers), *merge* (the device), *write* (buffers -> storage). `merge` may be called from
as many threads as there are lanes, and then one task's reading overlaps the merging of the
one before and the writing of the one before that. Tasks are idempotent: they overwrite their
own ranges of preallocated files. Here is who holds which buffer when; the arithmetic of a piece
is in `piece_merger.py`, that of the solves in `solving.py`.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Mapping, Sequence

from raymerge.merge_actors.checksum import checksum_chunk_bytes, piece_checksum
from raymerge.merge_actors.chunks import CHUNK_BYTES, chunks_of, join_reports
from raymerge.merge_actors.dtypes import element_bytes, torch_dtype
from raymerge.merge_actors.files import Files, allow_many_files
from raymerge.merge_actors.host_input import HostInput
from raymerge.merge_actors.inputs import aligned, arena_bytes, read_inputs
from raymerge.merge_actors.kernels.build import Kernels, load_kernels
from raymerge.merge_actors.lane import Lane
from raymerge.merge_actors.methods.prepare import TensorState
from raymerge.merge_actors.narrowing import beyond_warning, count_beyond
from raymerge.merge_actors.node_check import check_node
from raymerge.merge_actors.outputs import OutputBatch, output_batches
from raymerge.merge_actors.piece_merger import Figures, PieceMerger
from raymerge.merge_actors.run_memory import RunMemory
from raymerge.merge_actors.solving import Solving, report_solve
from raymerge.merge_actors.storage.staged_outputs import StagedOutputs
from raymerge.merge_actors.storage.storage_files import StorageFiles
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
from raymerge.merge_actors.torch_threads import TorchThreads

#: Tasks of one worker that are under way at once: one is read while another is merged.
NUM_LANES = 2
#: A chunk is never cut smaller than this many times, however often memory ran out.
_MOST_HALVINGS = 4
#: Bytes of one input in a chunk on a GPU: launches and copies want it long.
_CUDA_CHUNK_BYTES = 256 << 20
#: The same where an input comes over the network: all ranges of a task are in flight together.
_REMOTE_CHUNK_BYTES = 256 << 20


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
        self._merging: threading.Lock | None = threading.Lock() if is_cpu else None
        self._threads = TorchThreads()
        self._merger = PieceMerger(context, self._kernels, self._threads, memory)

    def begin(self, context: RunContext) -> None:
        """Become the worker of another run on the same device, with the buffers that are there."""
        self.context = context
        self._merger = PieceMerger(context, self._kernels, self._threads, self._memory)

    def check(self) -> str:
        """Check that this node sees every path and bucket of the run; return the node's host name.

        Raises:
            RaymergeError: see `check_node`.
        """
        return check_node(self.context, self._files)

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
            for chunk in chunks_of(task.pieces, self._merger.must_stay_whole, chunk_bytes):
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
                    figures = self._merger.merge_on_host(piece, job, inputs[number], state, out)
                    if figures is None:
                        with self._threads.computing(self.context.num_threads):
                            on_device = on_device or lane.to_device(inputs[number])
                            is_on_host = self._merging is not None
                            out_P = out.tensor() if is_on_host else lane.output(at, num_bytes, job.dtype)
                            figures = self._merger.merge_eagerly(
                                piece, job, on_device, state, lane, out_P, warnings
                            )
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
                with lane.computing(self._merging), self._threads.computing(self.context.num_threads):
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
                summaries = self._merger.measure(task, inputs, lane)
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

    def close(self) -> None:
        """Close the worker's files, and give torch's threads back."""
        self._files.close()
        self._threads.give_back()

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


def _reads_remote(pieces: Sequence[Piece]) -> bool:
    return any(is_remote(read.file) for piece in pieces for read in piece.reads)
