"""An evaluator: merges the points of a grid in memory and scores them there.

It holds the model's structure once. A point is planned like any other merge and carried out by the same
workers, only that their files are memory (`MemoryFiles`); so its weights have the bits that
`raymerge merge` of the same recipe writes. A plain class: `evaluator_group.py` runs it on threads of a process,
`evaluator_ray.py` in Ray actors.

A point takes two steps, `merge` and `score`: between them the driver may find that another point had
the same weights. With two slots the next point is merged while one is scored.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import xxhash

from raymerge.cluster.campaign import is_sequential, plan_wave, read_recipes
from raymerge.cluster.controller import Controller
from raymerge.cluster.evaluator_folders import ModelFolder, ModelFolders
from raymerge.cluster.evaluator_slot import ModelSlot
from raymerge.cluster.evaluator_workers import ResidentGroup
from raymerge.cluster.grid_points import fingerprint
from raymerge.cluster.in_flight import InFlight
from raymerge.cluster.journal import Journal
from raymerge.cluster.opened import OpenedInputs
from raymerge.cluster.options import MergeOptions
from raymerge.cluster.plan import Plan
from raymerge.merge_actors.directions import Directions
from raymerge.merge_actors.errors import RecipeError
from raymerge.merge_actors.host_memory import available_bytes
from raymerge.merge_actors.known_states import KnownStates
from raymerge.merge_actors.known_sums import KnownSums
from raymerge.merge_actors.mapped_sources import MappedSources
from raymerge.merge_actors.memory_files import MemoryFiles
from raymerge.merge_actors.methods import SPARSIFIERS
from raymerge.merge_actors.run_memory import RunMemory
from raymerge.merge_actors.task import HubModel, PieceReport, RunContext, TaskReport
from raymerge.stats.evaluation.evaluate import prepare_task
from raymerge.stats.evaluation.parts import COMFORTABLE_SHARE
from raymerge.stats.evaluation.prepared import PreparedTask
from raymerge.stats.evaluation.task_spec import Split
from raymerge.stats.evaluation.tasks import EvaluationSpec

#: Share of the memory that is free at the start that sources may fill; models and activations need the rest.
_SOURCES_SHARE = 0.5
#: Shares that merged task vectors and sums of Gram matrices may fill.
_DIRECTIONS_SHARE, _SUMS_SHARE = 0.25, 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluatorJob:
    """What all evaluators of a run know."""

    evaluation: EvaluationSpec
    merge: MergeOptions
    """How points are planned: slices, seed, what inputs are allowed."""
    device: str
    """"cpu" or "cuda"."""
    num_threads: int
    """Threads that merge, and that run batches."""
    num_slots: int = 1
    """Models held at a time: with two, one is merged while the other is scored."""
    num_devices: int = 1
    """GPUs that a model is spread over; on CPUs a model in several parts takes the same road."""
    share: float = 1.0
    """Share of the node's memory, or of the GPU, that is this evaluator's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeReport:
    """What merging a point did."""

    digest: str
    """Of config, tokenizer and every merged byte: points with one digest are one model."""
    recipe_fingerprint: str
    seed: int
    seconds: float
    bytes_read: int
    """Bytes that came from the disk, or its cache, for this point: 0 once the sources are in memory."""
    counters: Mapping[str, int] = field(default_factory=dict)
    """What was taken over from earlier points, and how much of the sources is in memory or on the device."""
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreReport:
    """What scoring a point, or the first part of its batches, did."""

    metrics: Mapping[str, tuple[float, float]]
    """Value and standard error by "task.metric", over all batches scored so far."""
    num_forward_passes: int
    seconds: float


class Evaluator:
    """Merges and scores points, one at a time in each slot."""

    def __init__(self, job: EvaluatorJob, number: int = 0) -> None:
        """Take the job; sources are mapped and structures built when points ask for them.

        Args:
            job: of all evaluators.
            number: among those that see the same GPUs: each takes its own.
        """
        import torch

        # Every operation runs on one thread, and threads run whole tasks and batches: no result
        # depends on how many there are.
        torch.set_num_threads(1)
        self._job = job
        devices = _devices(job, number)
        gpus = [] if job.device == "cpu" else [torch.device(device).index for device in devices]
        self._sources = _sources(job, devices)
        self._files = MemoryFiles(self._sources)
        self._memory = RunMemory(
            states=KnownStates(SPARSIFIERS),
            directions=Directions(SPARSIFIERS, int(available_bytes() * _DIRECTIONS_SHARE * job.share)),
            sums=KnownSums(int(available_bytes() * _SUMS_SHARE * job.share)),
        )
        self._group = ResidentGroup(job.num_threads, self._files, gpus, self._memory)
        self._threads = ThreadPoolExecutor(
            job.num_threads if job.device == "cpu" else 1, thread_name_prefix="score"
        )
        self._opened = OpenedInputs()
        self._folders = ModelFolders()
        self._slots = [ModelSlot(slot, job.evaluation, self._files, devices) for slot in range(job.num_slots)]
        self._folder_of_slot: dict[int, ModelFolder] = {}
        self._prepared: dict[tuple[str, Split], list[PreparedTask]] = {}
        self._merging, self._preparing = threading.Lock(), threading.Lock()

    def merge(self, slot: int, recipe: Mapping[str, Any], group: str | None = None) -> MergeReport:
        """Merge a point into a slot.

        Args:
            slot: which.
            recipe: plain values.
            group: name of the points that differ from this one in lambda alone, if there are others.

        Raises:
            RaymergeError: recipe or models are wrong, or do not make the model that some task runs.
        """
        with self._merging:
            started, read_before = time.monotonic(), self._files.bytes_read
            reused_before = self._memory.counters()
            self._memory.directions.begin(group)
            (found,), remarks = self._read(recipe)
            model = self._slots[slot]
            wave = plan_wave([found], {found.name: model.folder}, self._job.merge, {}, self._opened)
            if wave.missing:
                raise RecipeError(
                    f"{wave.missing[0].key} has not been measured; an evaluator merges by statistics that are there"
                )
            folder = self._folders.folder_of(wave)
            model.make_ready(wave, folder)
            journal = _Reports("", "")
            self._carry_out(wave.plan, wave.hub_models, journal)
            model.refresh()
            self._folder_of_slot[slot] = folder
            warnings = [line for report in journal.done.values() for line in report.warnings]
            mapping = {name: value for name, value in found.to_mapping().items() if name != "name"}
            return MergeReport(
                digest=journal.digest(folder.fingerprint),
                recipe_fingerprint=fingerprint(mapping),
                seed=found.seed,
                seconds=time.monotonic() - started,
                bytes_read=self._files.bytes_read - read_before,
                counters={
                    **{name: count - reused_before[name] for name, count in self._memory.counters().items()},
                    "resident_bytes": self._sources.num_bytes,
                    "device_bytes": self._sources.num_device_bytes,
                },
                remarks=tuple(dict.fromkeys([*remarks, *wave.remarks, *warnings])),
            )

    def score(self, slot: int, split: Split, fraction: float = 1.0) -> ScoreReport:
        """Score what a slot holds on the first batches of every task.

        Args:
            slot: which.
            split: "validation" or "test".
            fraction: share of each task's batches; those that were scored for a smaller share are kept.

        Raises:
            RaymergeError: a task cannot score this model.
        """
        started = time.monotonic()
        tasks = self._tasks(self._folder_of_slot[slot], split)
        metrics, num_passes = self._slots[slot].score(tasks, fraction, self._threads)
        return ScoreReport(
            metrics={name: (each.value, each.standard_error) for name, each in metrics.items()},
            num_forward_passes=num_passes,
            seconds=time.monotonic() - started,
        )

    def tensors(self, slot: int) -> Mapping[str, Any]:
        """Return the merged tensors of a slot by name."""
        return self._slots[slot].tensors

    def close(self) -> None:
        """End threads, close files, delete temporary folders."""
        self._group.close()
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._folders.remove()

    def _read(self, recipe: Mapping[str, Any]) -> tuple[list[Any], list[str]]:
        recipes, remarks = read_recipes([recipe], self._job.merge)
        if len(recipes) != 1:
            raise RecipeError(
                f"a point of a grid is one recipe, not {len(recipes)}; write it as one document"
            )
        if is_sequential(recipes[0]):
            raise RecipeError(
                f"{recipes[0].merge_method} measures models while it merges them, which a grid does not do; merge it "
                "by itself, with raymerge merge"
            )
        return recipes, remarks

    def _carry_out(self, plan: Plan, hub_models: tuple[HubModel, ...], journal: _Reports) -> None:
        context = RunContext(
            run_id="",
            settings=plan.settings,
            device=self._job.device,
            num_threads=1,
            allow_nan=self._job.merge.allow_nan,
            hub_models=hub_models,
        )
        with self._running(context):
            # The workers share one machine, so that none is slow by itself: a clock that stands still.
            in_flight = InFlight(clock=lambda: 0.0)
            Controller(plan, self._group, journal, in_flight=in_flight, known=self._memory.states).run()

    @contextlib.contextmanager
    def _running(self, context: RunContext) -> Iterator[None]:
        self._group.start(context)
        try:
            yield
        except BaseException:
            self._group.drop()
            raise

    def _tasks(self, folder: ModelFolder, split: Split) -> list[PreparedTask]:
        """Return the tasks with their data tokenised, once for all points of one structure."""
        with self._preparing:
            key = (folder.fingerprint, split)
            if key not in self._prepared:
                self._prepared[key] = [
                    prepare_task(task, split, folder.path)
                    for task in self._job.evaluation.tasks
                    if split == "validation" or task.test is not None
                ]
            return self._prepared[key]


class _Reports(Journal):
    """A journal that keeps its reports in memory: a point is done again whole."""

    def add(self, report: TaskReport) -> None:
        """Keep a report."""
        self.done[report.number] = report

    def digest(self, start: str) -> str:
        """Return 128 bits in hex over `start` and the checksum of every tensor."""
        checksums: dict[str, int] = {}
        for piece in self._pieces():
            checksums[piece.tensor] = (checksums.get(piece.tensor, 0) + piece.checksum) % (1 << 64)
        return xxhash.xxh3_128_hexdigest(repr((start, sorted(checksums.items()))).encode())

    def _pieces(self) -> Iterator[PieceReport]:
        return (piece for report in self.done.values() for piece in report.pieces)


def _devices(job: EvaluatorJob, number: int) -> tuple[str, ...]:
    """Return the devices of an evaluator: as many GPUs as it has, or the one that it shares."""
    if job.device == "cpu":
        return ("cpu",) * job.num_devices
    import torch

    first = number * job.num_devices if job.num_devices > 1 else int(number * job.share + 1e-9)
    num_gpus = torch.cuda.device_count()
    return tuple(f"cuda:{(first + i) % num_gpus}" for i in range(job.num_devices))


def _sources(job: EvaluatorJob, devices: Sequence[str]) -> MappedSources:
    """Make the place for sources, bounded by the memory that is free now, and on GPUs when a file comes."""
    if job.device == "cpu":
        return MappedSources(source_budget_bytes())
    import torch

    totals = {device: torch.cuda.mem_get_info(device)[1] for device in devices}

    def room_of(device: str) -> int:
        return int(torch.cuda.mem_get_info(device)[0] - totals[device] * COMFORTABLE_SHARE)

    budgets = {device: int(total * job.share * _SOURCES_SHARE) for device, total in totals.items()}
    return MappedSources(source_budget_bytes(), device_budgets=budgets, room_of=room_of)


def source_budget_bytes() -> int:
    """Return how much of this machine's memory sources may fill; the evaluators on it share their pages."""
    return int(available_bytes() * _SOURCES_SHARE)
