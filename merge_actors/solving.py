"""Solve one task of a method that merges matrices whole: read Grams and weights, solve, report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, overload

from raymerge.merge_actors.checksum import piece_checksum
from raymerge.merge_actors.errors import NotFiniteError
from raymerge.merge_actors.files import Files
from raymerge.merge_actors.inputs import read_pieces
from raymerge.merge_actors.known_sums import KnownSums
from raymerge.merge_actors.methods import METHODS, SPARSIFIERS
from raymerge.merge_actors.methods.block import Pool
from raymerge.merge_actors.methods.gram_matrix import triangle_elements
from raymerge.merge_actors.methods.interface import Method, Settings
from raymerge.merge_actors.methods.positive_definite import FactorReport
from raymerge.merge_actors.methods.regmean_solve import GramSums, InputGram
from raymerge.merge_actors.methods.slices import TensorSlice, prepare_slices
from raymerge.merge_actors.nonfinite import count_nonfinite
from raymerge.merge_actors.task import GramRead, Piece, PieceReport, SolveJob, SolveTask

if TYPE_CHECKING:
    import torch


class Solving:
    """One solve task under way: the Grams are read one at a time, the weights job by job.

    With several sets both are kept when they are read; each set has the same bytes as if it were alone.
    """

    def __init__(
        self,
        task: SolveTask,
        settings: Sequence[tuple[str, Settings]],
        files: Files,
        device: torch.device,
        known: KnownSums | None = None,
    ) -> None:
        """Prepare a task.

        Args:
            task: what to solve for.
            settings: name of the method and parameters of each set of the task.
            files: to read from.
            device: where to solve.
            known: sums of earlier runs.
        """
        self._known = known
        self.task, self.files, self.device = task, files, device
        self._settings = settings
        is_shared = len(task.sets) > 1
        self._grams = _GramsOnDisk(task.grams, files, device, keeps=is_shared)
        self._kept_weights: dict[object, list[torch.Tensor]] | None = {} if is_shared else None
        self._sums: dict[tuple[tuple[float, ...], str], GramSums] = {}

    def solve(self, number: int) -> tuple[list[torch.Tensor], FactorReport]:
        """Return the merged matrices of a set, float32 or float64, in the stored layout, and how it went."""
        try:
            return self._solve(number)
        except NotFiniteError as error:
            error.recipe = self.task.sets[number].recipe
            raise

    def _solve(self, number: int) -> tuple[list[torch.Tensor], FactorReport]:
        method, settings = self._settings[number]
        shared, jobs = settings.shared, self.task.sets[number].jobs
        weights = tuple(float(model["weight"] or 0) for model in settings.models)
        normalize = str(shared["normalize"])
        if (weights, normalize) not in self._sums:
            self._sums = {(weights, normalize): self._add_up(weights, normalize)}
        factor = self._sums[weights, normalize].factor(float(shared["alpha"] or 0))
        merged: dict[tuple[str, int], torch.Tensor] = {}
        for is_transposed in sorted({job.is_transposed for job in jobs}):
            alike = [job for job in jobs if job.is_transposed == is_transposed]
            models = [self._weights(job, method, settings) for job in alike]
            found = factor.merge(models, is_transposed=is_transposed)
            merged |= {(job.tensor, job.first_byte): matrix for job, matrix in zip(alike, found, strict=True)}
        return [merged[job.tensor, job.first_byte] for job in jobs], factor.report

    def _add_up(self, weights: tuple[float, ...], normalize: str) -> GramSums:
        if self._known is None:
            return GramSums(self._grams, weights, normalize)
        key = (self.task.grams, weights, normalize, self.device)
        return self._known.get(key, lambda: GramSums(self._grams, weights, normalize))

    def _weights(self, job: SolveJob, method: str, settings: Settings) -> list[torch.Tensor]:
        """Return one matrix of every model, sparsified where the recipe says so."""
        if self._kept_weights is None:
            return self._read_weights(job, method, settings)
        steps = None if job.base is None else repr([model.get("sparsify") for model in settings.models])
        key = (job.all_reads, job.keys, steps)
        if key not in self._kept_weights:
            self._kept_weights[key] = self._read_weights(job, method, settings)
        return self._kept_weights[key]

    def _read_weights(self, job: SolveJob, method: str, settings: Settings) -> list[torch.Tensor]:
        import torch

        piece = Piece(shape=job.shape, begin=0, end=job.num_elements, reads=job.all_reads, jobs=())
        arena_P = torch.empty(piece.read_bytes + 64 * len(piece.reads), dtype=torch.uint8)
        inputs = read_pieces([piece], self.files, arena_P)[0]
        for read, tensor_P in zip(piece.reads, inputs, strict=True):
            if count_nonfinite(tensor_P):
                raise NotFiniteError(
                    f"tensor {read.tensor} of model {read.model} holds NaN or infinite values; mend the model"
                )
        on_device = [tensor_P.to(self.device) for tensor_P in inputs]
        if job.base is not None:
            *models, base_P = on_device
            on_device = sparsify_matrix(METHODS[method], settings, job, models, base_P)
        return [tensor_P.view(job.shape) for tensor_P in on_device]


def sparsify_matrix(
    method: Method, settings: Settings, job: SolveJob, models: Sequence[torch.Tensor], base_P: torch.Tensor
) -> list[torch.Tensor]:
    """Put the recipe's sparsifying steps before a solve: base + step(model - base) for each model.

    Args:
        method: the method that solves.
        settings: for this matrix.
        job: the matrix; its keys are those of the random steps.
        models: one flat tensor each, any float dtype.
        base_P: the base's, flat.

    Returns:
        The models' elements in the compute dtype, flat, in the order of `models`.
    """
    import torch

    matrix = TensorSlice(
        method=method,
        settings=settings,
        sparsifiers=SPARSIFIERS,
        shape=job.shape,
        begin=0,
        base_P=base_P,
        models_P=models,
        keys=job.keys,
        pool=Pool(base_P.device),
    )
    parts: list[list[torch.Tensor]] = [[] for _ in models]
    for block in matrix.blocks(prepare_slices([matrix])):
        for i, of_model in enumerate(parts):
            of_model.append(block.model(i).reshape(-1).clone())
    return [torch.cat(of_model) for of_model in parts]


def report_solve(
    recipe: int, job: SolveJob, matrix: torch.Tensor, data: memoryview, factor: FactorReport
) -> PieceReport:
    """Return what came out of a job, `data` being the bytes that were written."""
    return PieceReport(
        recipe=recipe,
        tensor=job.tensor,
        checksum=piece_checksum(data, job.first_byte, job.chunk_bytes),
        sum_squares=float(matrix.double().square().sum()),
        num_nonfinite=count_nonfinite(matrix.reshape(-1)),
        figures={
            "condition": float(f"{factor.condition:.3g}"),
            "rank": factor.rank,
            "num_dead_inputs": factor.num_dead,
            "jitter": factor.jitter,
        },
    )


class _GramsOnDisk(Sequence[InputGram]):
    """The models' Gram matrices, read when asked for."""

    def __init__(self, reads: Sequence[GramRead], files: Files, device: torch.device, *, keeps: bool) -> None:
        self._reads, self._files, self._device = reads, files, device
        self._kept: dict[int, InputGram] | None = {} if keeps else None

    def __len__(self) -> int:
        return len(self._reads)

    @overload
    def __getitem__(self, index: int) -> InputGram: ...
    @overload
    def __getitem__(self, index: slice) -> list[InputGram]: ...
    def __getitem__(self, index: int | slice) -> InputGram | list[InputGram]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if self._kept is None:
            return self._read(index)
        if index not in self._kept:
            self._kept[index] = self._read(index)
        return self._kept[index]

    def _read(self, index: int) -> InputGram:
        import torch

        read = self._reads[index]
        packed_T = torch.empty(triangle_elements(read.in_features), dtype=torch.float32)
        self._files.read_into(read.file, read.offset, packed_T.view(torch.uint8).numpy().data)
        return InputGram(
            gram=packed_T.to(self._device), num_rows=read.num_rows, name=f"model {read.model}, {read.tensor}"
        )
