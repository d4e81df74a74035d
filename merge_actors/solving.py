"""Solve one task of a method that merges matrices whole: read Grams and weights, solve, report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, overload

from raymerge.merge_actors.checksum import piece_checksum
from raymerge.merge_actors.errors import NotFiniteError
from raymerge.merge_actors.files import Files
from raymerge.merge_actors.inputs import read_pieces
from raymerge.merge_actors.methods.gram_matrix import triangle_elements
from raymerge.merge_actors.methods.interface import Settings
from raymerge.merge_actors.methods.positive_definite import FactorReport
from raymerge.merge_actors.methods.regmean_solve import GramSums, InputGram
from raymerge.merge_actors.nonfinite import count_nonfinite
from raymerge.merge_actors.task import GramRead, Piece, PieceReport, SolveJob, SolveTask

if TYPE_CHECKING:
    import torch


class Solving:
    """One solve task under way: the Grams are read one at a time, the weights job by job."""

    def __init__(self, task: SolveTask, settings: Settings, files: Files, device: torch.device) -> None:
        self.task, self.settings, self.files, self.device = task, settings, files, device
        self._factor: FactorReport | None = None

    def solve(self) -> list[torch.Tensor]:
        """Return the merged matrices, one per job, float32 or float64, in the stored layout."""
        shared = self.settings.shared
        weights = [float(model["weight"] or 0) for model in self.settings.models]
        alpha = float(shared["alpha"] or 0)
        grams = _GramsOnDisk(self.task.grams, self.files, self.device)
        factor = GramSums(grams, weights, str(shared["normalize"])).factor(alpha)
        self._factor = factor.report
        merged: dict[tuple[str, int], torch.Tensor] = {}
        for is_transposed in sorted({job.is_transposed for job in self.task.jobs}):
            jobs = [job for job in self.task.jobs if job.is_transposed == is_transposed]
            found = factor.merge([self._weights(job) for job in jobs], is_transposed=is_transposed)
            merged |= {(job.tensor, job.first_byte): matrix for job, matrix in zip(jobs, found, strict=True)}
        return [merged[job.tensor, job.first_byte] for job in self.task.jobs]

    def report(self, job: SolveJob, matrix: torch.Tensor, data: memoryview) -> PieceReport:
        """Return what came out of a job, `data` being the bytes that were written."""
        assert self._factor is not None
        return PieceReport(
            recipe=self.task.recipe,
            tensor=job.tensor,
            checksum=piece_checksum(data, job.first_byte, job.chunk_bytes),
            sum_squares=float(matrix.double().square().sum()),
            num_nonfinite=count_nonfinite(matrix.reshape(-1)),
            figures={
                "condition": float(f"{self._factor.condition:.3g}"),
                "rank": self._factor.rank,
                "num_dead_inputs": self._factor.num_dead,
                "jitter": self._factor.jitter,
            },
        )

    def _weights(self, job: SolveJob) -> list[torch.Tensor]:
        """Read one matrix of every model."""
        import torch

        piece = Piece(shape=job.shape, begin=0, end=job.num_elements, reads=job.reads, jobs=())
        arena_P = torch.empty(piece.read_bytes + 64 * len(job.reads), dtype=torch.uint8)
        inputs = read_pieces([piece], self.files, arena_P)[0]
        for read, tensor_P in zip(job.reads, inputs, strict=True):
            if count_nonfinite(tensor_P):
                raise NotFiniteError(
                    f"tensor {read.tensor} of model {read.model} holds NaN or infinite values; mend the model"
                )
        return [tensor_P.view(job.shape).to(self.device) for tensor_P in inputs]


class _GramsOnDisk(Sequence[InputGram]):
    """The models' Gram matrices, read when asked for and not kept."""

    def __init__(self, reads: Sequence[GramRead], files: Files, device: torch.device) -> None:
        self._reads, self._files, self._device = reads, files, device

    def __len__(self) -> int:
        return len(self._reads)

    @overload
    def __getitem__(self, index: int) -> InputGram: ...
    @overload
    def __getitem__(self, index: slice) -> list[InputGram]: ...
    def __getitem__(self, index: int | slice) -> InputGram | list[InputGram]:
        import torch

        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        read = self._reads[index]
        packed_T = torch.empty(triangle_elements(read.in_features), dtype=torch.float32)
        self._files.read_into(read.file, read.offset, packed_T.view(torch.uint8).numpy().data)
        return InputGram(
            gram=packed_T.to(self._device), num_rows=read.num_rows, name=f"model {read.model}, {read.tensor}"
        )
