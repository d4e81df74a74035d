"""One model in an evaluator's memory: the tensors that points are merged into, and the models that run on them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, wait
from typing import TYPE_CHECKING, Any

from raymerge.cluster.campaign import PlannedWave
from raymerge.cluster.evaluator_folders import ModelFolder
from raymerge.cluster.progress import gib
from raymerge.merge_actors.dtypes import element_bytes
from raymerge.merge_actors.errors import RaymergeError
from raymerge.merge_actors.memory_files import MemoryFiles
from raymerge.stats.evaluation.evaluate import evaluation_dtype
from raymerge.stats.evaluation.parts import COMFORTABLE_SHARE
from raymerge.stats.evaluation.prepared import PreparedTask
from raymerge.stats.evaluation.resident import ResidentModel
from raymerge.stats.evaluation.scores import Estimate, Scores, concatenate
from raymerge.stats.evaluation.tasks import EvaluationSpec

if TYPE_CHECKING:
    import torch


class NoRoomError(RaymergeError):
    """A device has no room for the model, or for another one beside that which is there."""


class ModelSlot:
    """A model that is rewritten in place point after point; built anew when points need another structure."""

    def __init__(
        self, number: int, evaluation: EvaluationSpec, files: MemoryFiles, devices: Sequence[str]
    ) -> None:
        """Make a slot without a model.

        Args:
            number: of the slot; 0 is the one that an evaluator cannot do without.
            evaluation: the tasks.
            files: of the evaluator.
            devices: which the model is spread over.
        """
        self._number = number
        self.folder = f"memory:{number}"
        """Output folder in the plans of the points that are merged here."""
        self._evaluation, self._files, self._devices = evaluation, files, tuple(devices)
        self._model: ResidentModel | None = None
        self._tensors: Mapping[str, torch.Tensor] = {}
        self._structure = ""
        self._calls = itertools.count()
        self._scores: dict[tuple[str, str], list[Scores]] = {}

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """The merged tensors by name, valid after a merge."""
        return self._tensors

    def make_ready(self, wave: PlannedWave, folder: ModelFolder) -> None:
        """Have memory and structure for a point before it is merged.

        Raises:
            RaymergeError: the merged tensors do not make the model that some task runs.
        """
        self._scores.clear()
        if self._structure == folder.fingerprint:
            return
        self._structure, self._model = "", None
        (plan,) = wave.plan.recipes
        shapes = {tensor.name: (tensor.dtype, tensor.shape) for tensor in plan.tensors}
        model = ResidentModel(
            self._evaluation.tasks,
            folder.path,
            devices=self._devices,
            dtype=evaluation_dtype(self._evaluation.dtype),
        )
        device_of = model.place(shapes)
        self._tensors = {}  # what was there is freed before the new memory is taken
        self._files.drop(self.folder)
        self._expect_room(shapes, device_of)
        self._tensors = self._files.lay_out(self.folder, plan.layout, shapes, self._devices, device_of)
        model.bind(self._tensors)
        for module in {id(each): each for each in map(model.module, self._evaluation.tasks)}.values():
            module.register_forward_pre_hook(self._count)
        self._model, self._structure = model, folder.fingerprint

    def _expect_room(
        self, shapes: Mapping[str, tuple[str, tuple[int, ...]]], device_of: Mapping[str, int]
    ) -> None:
        """Refuse a model that does not fit, and a second one where it would leave too little for activations."""
        if self._devices[0] == "cpu":
            return
        import torch

        needed = [0] * len(self._devices)
        for name, (dtype, shape) in shapes.items():
            needed[device_of[name]] += math.prod(shape) * element_bytes(dtype)
        torch.cuda.empty_cache()
        for device, num_bytes in zip(self._devices, needed, strict=True):
            free_bytes, total_bytes = torch.cuda.mem_get_info(device)
            if num_bytes + (total_bytes * COMFORTABLE_SHARE if self._number else 0) > free_bytes:
                raise NoRoomError(
                    f"{gib(num_bytes)} of the merged model do not fit the {gib(free_bytes)} that are free on "
                    f"{device}; give an evaluator more than {len(self._devices)} GPUs (--gpus-per-evaluator)"
                )

    def refresh(self) -> None:
        """Bring the model up to date with the merged tensors."""
        assert self._model is not None
        self._model.refresh()

    def score(
        self, tasks: Sequence[PreparedTask], fraction: float, threads: Executor
    ) -> tuple[dict[str, Estimate], int]:
        """Score the first batches of every task that are not scored yet.

        A batch runs on one thread, several batches side by side: so a metric does not depend on the number
        of threads, which would change the order in which a matrix product adds up.

        Args:
            tasks: prepared for this slot's structure.
            fraction: of each task's batches.
            threads: where batches run.

        Returns:
            metrics over all batches up to there by "task.metric", and the number of forward passes.
        """
        model = self._model
        assert model is not None
        before = next(self._calls)
        under_way = []
        for task in tasks:
            done = self._scores.setdefault((task.task.name, task.split), [])
            end = min(task.num_batches, max(1, math.ceil(fraction * task.num_batches - 1e-9)))
            for batch in range(len(done), end):
                under_way.append((done, threads.submit(task.score, model, batch, batch + 1)))
        try:
            for done, future in under_way:
                done.append(future.result())
        finally:
            for _, future in under_way:
                future.cancel()
            wait([future for _, future in under_way])
        metrics: dict[str, Estimate] = {}
        for task in tasks:
            joined = concatenate(self._scores[task.task.name, task.split])
            for name, estimate in task.summarise(joined).items():
                metrics[f"{task.task.name}.{name}"] = estimate
        return metrics, next(self._calls) - before - 1

    def _count(self, module: Any, inputs: Any) -> None:
        del module, inputs
        next(self._calls)
