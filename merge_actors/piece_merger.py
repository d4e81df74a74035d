"""Merge one job of a piece: by the compiled kernels where they have its method, else by the eager formulas.

Inputs and output are memory that others have read and will write; nothing here opens a file. What a piece holds
(`Figures`) is found while it is merged. Both ways give the same bits; the eager formulas know every method and
dtype, and say what is wrong with NaN and infinity.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from raymerge.merge_actors.directions import Direction
from raymerge.merge_actors.dtypes import NARROW
from raymerge.merge_actors.errors import NotFiniteError
from raymerge.merge_actors.host_input import HostInput
from raymerge.merge_actors.kernels.build import Kernels
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
from raymerge.merge_actors.run_memory import RunMemory
from raymerge.merge_actors.squares import sum_squares
from raymerge.merge_actors.task import Job, MeasureTask, Piece, RunContext
from raymerge.merge_actors.torch_threads import TorchThreads

if TYPE_CHECKING:
    import torch


class Figures(NamedTuple):
    """What a merged piece holds."""

    sum_squares: float
    """Before the values are rounded to the output dtype."""
    num_nonfinite: int
    """After it."""


class PieceMerger:
    """The arithmetic of a worker in one run."""

    def __init__(
        self, context: RunContext, kernels: Kernels, threads: TorchThreads, memory: RunMemory | None
    ) -> None:
        """Take a run.

        Args:
            context: of the run.
            kernels: of this node; those of a worker on a GPU are none.
            threads: for the eager formulas.
            memory: what earlier runs found out about the same models.
        """
        self._context, self._kernels, self._threads, self._memory = context, kernels, threads, memory
        self._is_on_host = context.device == "cpu"
        #: number of settings -> do they ask for measures of the whole tensor?
        self._prepared: dict[int, bool] = {}

    def must_stay_whole(self, piece: Piece) -> bool:
        """Return whether a tensor of the piece has to be measured here first, all of it."""
        return piece.is_whole and any(self._needs_preparation(job.settings) for job in piece.jobs)

    def _needs_preparation(self, number: int) -> bool:
        if number not in self._prepared:
            name, settings = self._context.settings[number]
            self._prepared[number] = name != "copy" and needs_preparation(
                METHODS[name], settings, SPARSIFIERS
            )
        return self._prepared[number]

    def merge_on_host(
        self, piece: Piece, job: Job, inputs: Sequence[HostInput], state: TensorState, out: HostInput
    ) -> Figures | None:
        """Copy or merge one job of a piece without torch; None if that cannot be, or not by this worker."""
        if not self._is_on_host:
            return None
        if self._context.settings[job.settings][0] == "copy":
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

    def merge_eagerly(
        self,
        piece: Piece,
        job: Job,
        inputs: list[torch.Tensor],
        state: TensorState,
        lane: Lane,
        out_P: torch.Tensor,
        warnings: list[str],
    ) -> Figures:
        """Merge one job of a piece into `out_P` by the eager formulas, inside `TorchThreads.computing`."""
        name, settings = self._context.settings[job.settings]
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

    def measure(self, task: MeasureTask, inputs: Sequence[HostInput], lane: Lane) -> tuple[Summary, ...]:
        """Answer a round of questions, by the kernels if they can."""
        measures, state = task.round.measures, task.round.state
        fused = self._fused(task.piece, task.piece.jobs[0], inputs)
        if fused is not None:
            with contextlib.suppress(NotFinite):
                return tuple(fused.measure(each, state) for each in measures)
        with self._threads.computing(self._context.num_threads):
            piece_slice = self._slice(task.piece, task.piece.jobs[0], lane.to_device(inputs), lane)
            return tuple(piece_slice.measure(each, state) for each in measures)

    def _fused(self, piece: Piece, job: Job, inputs: Sequence[HostInput]) -> FusedSlice | None:
        """Return a job's slice for the kernels, or None if they do not have its method."""
        if self._kernels.library is None or job.statistics:
            return None
        name, settings = self._context.settings[job.settings]
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
        name, settings = self._context.settings[job.settings]
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
            if not self._context.allow_nan:
                error = NotFiniteError(f"{message}; mend the model, or merge it as it is with --allow-nan")
                error.recipe = job.recipe
                raise error
            is_any = True
            if message not in warnings:
                warnings.append(message)
        return is_any
