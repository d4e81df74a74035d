"""Turn matched tensors into tasks: a pure function of headers and limits.

The parameter space is cut in three steps. Output tensors that share an input (the same tensor
in several recipes, or one layer stacked twice) form a *group*, so that each input is read once
for all of them. A group larger than a slice is cut into pieces at unit boundaries. Small
pieces are packed, in the order of their place on disk, into tasks of about one slice. A tensor
whose method needs a quantity of the whole tensor is measured by the worker if it is one piece;
if it was cut, its *state* is gathered by the driver in rounds of measure tasks first.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from raymerge.cluster.matched import MergedTensor
from raymerge.cluster.model_wide import measured_together
from raymerge.cluster.plan_buffers import buffer_bytes
from raymerge.cluster.plan_files import tasks_by_file
from raymerge.cluster.plan_reads import disk_place, group_by_input, reads_of
from raymerge.cluster.plan_solves import plan_solves
from raymerge.cluster.recipe import Recipe
from raymerge.merge_actors.checkpoint.layout import Layout
from raymerge.merge_actors.dtypes import element_bytes
from raymerge.merge_actors.methods import METHODS, SPARSIFIERS
from raymerge.merge_actors.methods.block import unit_elements
from raymerge.merge_actors.methods.interface import Settings
from raymerge.merge_actors.methods.prepare import needs_preparation
from raymerge.merge_actors.methods.slices import split_of
from raymerge.merge_actors.randomness import stream_key
from raymerge.merge_actors.storage.uris import is_remote
from raymerge.merge_actors.task import (
    FileTask,
    Job,
    MergeTask,
    OutputObject,
    Piece,
    Read,
    SolveTask,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipePlan:
    """One recipe with its matched tensors and the layout of its output."""

    recipe: Recipe
    tensors: tuple[MergedTensor, ...]
    layout: Layout
    folder: str
    """Where its files are being written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StatePlan:
    """A state that the driver gathers before some merge tasks can start."""

    number: int
    settings: int
    """Index into `Plan.settings`."""
    num_elements: int
    """Elements of what is measured: a tensor, or all merged tensors of a recipe."""
    pieces: tuple[Piece, ...]
    """What to measure, in order; each holds the one job that asks."""
    is_model_wide: bool = False
    known: int | None = None
    """Number of the model-wide state that comes first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All there is to do, in the order of the disk."""

    recipes: tuple[RecipePlan, ...]
    settings: tuple[tuple[str, Settings], ...]
    states: tuple[StatePlan, ...]
    tasks: tuple[MergeTask | SolveTask | FileTask, ...]
    slice_bytes: int

    @property
    def read_bytes(self) -> int:
        """Bytes that the merge tasks read: each input slice once for all recipes."""
        return sum(task.read_bytes for task in self.tasks)

    @property
    def write_bytes(self) -> int:
        """Bytes of all output tensors."""
        return sum(task.write_bytes for task in self.tasks)

    def input_folders(self) -> set[str]:
        """Return every folder that tasks read from: models, adapters, converted pickles, statistics."""
        files: set[str] = set()
        for task in self._parts():
            if isinstance(task, SolveTask):
                files.update(gram.file for gram in task.grams)
                reads = [job.all_reads for job in task.jobs]
            else:
                reads = [piece.reads for piece in task.pieces]
            for read in itertools.chain.from_iterable(reads):
                files.add(read.file)
                if read.low_rank is not None:
                    files.update((read.low_rank.a_file, read.low_rank.b_file))
        return {os.path.dirname(file) for file in files}

    @property
    def largest_task_bytes(self) -> int:
        """Bytes of buffers, inputs and outputs, that the largest task needs."""
        return max((buffer_bytes(task) for task in self.tasks), default=0)

    def _parts(self) -> Iterator[MergeTask | SolveTask]:
        for task in self.tasks:
            if isinstance(task, FileTask):
                yield from task.parts
            else:
                yield task


def make_plan(recipes: Sequence[RecipePlan], *, slice_bytes: int) -> Plan:
    """Cut a campaign into tasks.

    Args:
        recipes: what to make and where it goes.
        slice_bytes: bytes of one input that a piece holds at most; a single unit (a row, or
            65,536 elements) is never cut.
    """
    return _Planner(recipes, slice_bytes).plan()


class _Planner:
    def __init__(self, recipes: Sequence[RecipePlan], slice_bytes: int) -> None:
        self.recipes, self.slice_bytes = recipes, slice_bytes
        self.settings: list[tuple[str, Settings]] = []
        self.states: list[StatePlan] = []
        self._setting_numbers: dict[tuple[str, int], int] = {}
        self._model_wide: dict[int, int] = {}
        self._needs: dict[int, bool] = {}
        self._splits: dict[int, str] = {}
        self._places = [_output_places(recipe) for recipe in recipes]

    def plan(self) -> Plan:
        """Cut everything, in the order of the disk."""
        for number, recipe in enumerate(self.recipes):
            self._plan_model_wide(number, recipe)
        tensors = [recipe.tensors for recipe in self.recipes]
        groups = group_by_input(tensors)  # what is solved for stands apart, in `plan_solves`
        groups.sort(key=lambda group: disk_place(self._tensor(group[0])))
        pieces: list[tuple[Piece, tuple[int, ...]]] = []
        for group in groups:
            pieces += self._cut(group)
        seeds = [recipe.recipe.seed for recipe in self.recipes]
        solves = plan_solves(tensors, self._places, seeds, self._intern)
        tasks = self._numbered(self._grouped([*self._pack(pieces), *solves]))
        return Plan(
            recipes=tuple(self.recipes),
            settings=tuple(self.settings),
            states=tuple(self.states),
            tasks=tasks,
            slice_bytes=self.slice_bytes,
        )

    def _grouped(self, tasks: Sequence[MergeTask | SolveTask]) -> Sequence[MergeTask | SolveTask | FileTask]:
        """Make one task of all that fill an output file, where files go to an object store."""
        objects = {
            f"{recipe.folder}/{file.name}": OutputObject(
                f"{recipe.folder}/{file.name}", file.header, file.num_bytes
            )
            for recipe in self.recipes
            if is_remote(recipe.folder)
            for file in recipe.layout.files
        }
        return tasks_by_file(tasks, objects) if objects else tasks

    def _numbered(
        self, tasks: Sequence[MergeTask | SolveTask | FileTask]
    ) -> tuple[MergeTask | SolveTask | FileTask, ...]:
        return tuple(dataclasses.replace(task, number=number) for number, task in enumerate(tasks))

    def _tensor(self, key: tuple[int, int]) -> MergedTensor:
        return self.recipes[key[0]].tensors[key[1]]

    def _cut(self, group: Sequence[tuple[int, int]]) -> list[tuple[Piece, tuple[int, ...]]]:
        """Cut a group into pieces; returns each with the states that it waits for."""
        members = [(recipe, self._tensor((recipe, index))) for recipe, index in group]
        reads, places = reads_of([tensor for _, tensor in members])
        shape = members[0][1].shape
        total = math.prod(shape)
        step = self._step(members, reads, total)
        is_cut = step < total
        jobs, waits = [], []
        keys: dict[tuple[int, str, str], int] = {}
        for number, tensor in members:
            setting = self._intern(tensor)
            state = self._model_wide.get(number) if tensor.method in METHODS else None
            if is_cut and self._must_prepare(setting):
                state = self._plan_state(number, tensor, setting, step, known=state)
            if state is not None:
                waits.append(state)
            jobs.append(self._job(number, tensor, setting, places, state, keys))
        edges = [*range(0, total, step), total] if total else [0, 0]
        return [
            (Piece(shape=shape, begin=begin, end=end, reads=reads, jobs=tuple(jobs)), tuple(waits))
            for begin, end in itertools.pairwise(edges)
        ]

    def _step(self, members: Sequence[tuple[int, MergedTensor]], reads: Sequence[Read], total: int) -> int:
        """Return the elements of a piece: as many whole units of every job as fit a slice."""
        shape = members[0][1].shape
        splits = {"elementwise"} | {self._split(self._intern(tensor)) for _, tensor in members}
        if any(read.low_rank or read.row_runs for read in reads):
            splits.add("rowwise")
        granularity = math.lcm(*(unit_elements(shape, split) for split in splits))
        widest = max(element_bytes(read.dtype) for read in reads)
        step = max(1, self.slice_bytes // (widest * granularity)) * granularity
        return min(step, max(1, total))

    def _job(
        self,
        number: int,
        tensor: MergedTensor,
        setting: int,
        places: Mapping[int, int],
        state: int | None,
        keys: dict[tuple[int, str, str], int],
    ) -> Job:
        """Return a job; `keys` keeps the keys of random streams for other recipes with the same seed."""
        seed = self.recipes[number].recipe.seed
        for name in tensor.stream_names:
            if (seed, name, tensor.name) not in keys:
                keys[seed, name, tensor.name] = stream_key(seed, name, tensor.name)
        file, offset = self._places[number][tensor.name]
        return Job(
            recipe=number,
            tensor=tensor.name,
            settings=setting,
            base=None if tensor.base is None else places[id(tensor.base)],
            models=tuple([places[id(operand)] for operand in tensor.models]),
            statistics=tuple(places[id(o.statistic)] for o in tensor.models if o.statistic is not None),
            keys=tuple([keys[seed, name, tensor.name] for name in tensor.stream_names]),
            file=file,
            offset=offset,
            dtype=tensor.dtype,
            state=state,
        )

    def _plan_state(
        self, number: int, tensor: MergedTensor, setting: int, step: int, known: int | None
    ) -> int:
        """Plan the measuring of one tensor that was cut; its pieces read only what its job needs."""
        pieces = self._measure_pieces(number, tensor, setting, step)
        total = math.prod(tensor.shape)
        self.states.append(
            StatePlan(
                number=len(self.states), settings=setting, num_elements=total, pieces=pieces, known=known
            )
        )
        return len(self.states) - 1

    def _plan_model_wide(self, number: int, recipe: RecipePlan) -> None:
        """Plan the one state of a recipe that is measured over all its tensors."""
        pieces: list[Piece] = []
        setting, total = -1, 0
        for tensor in measured_together(recipe.recipe.name, recipe.tensors):
            setting = self._intern(tensor)
            reads, _ = reads_of([tensor])
            elements = math.prod(tensor.shape)
            pieces += self._measure_pieces(
                number, tensor, setting, self._step([(number, tensor)], reads, elements)
            )
            total += elements
        if pieces:
            self._model_wide[number] = len(self.states)
            self.states.append(
                StatePlan(
                    number=len(self.states),
                    settings=setting,
                    num_elements=total,
                    pieces=tuple(pieces),
                    is_model_wide=True,
                )
            )

    def _measure_pieces(
        self, number: int, tensor: MergedTensor, setting: int, step: int
    ) -> tuple[Piece, ...]:
        reads, places = reads_of([tensor])
        job = self._job(number, tensor, setting, places, None, {})
        total = math.prod(tensor.shape)
        return tuple(
            Piece(shape=tensor.shape, begin=begin, end=min(begin + step, total), reads=reads, jobs=(job,))
            for begin in range(0, total, step)
        )

    def _intern(self, tensor: MergedTensor) -> int:
        key = (tensor.method, id(tensor.settings))
        if key not in self._setting_numbers:
            self._setting_numbers[key] = len(self.settings)
            self.settings.append((tensor.method, tensor.settings))
        return self._setting_numbers[key]

    def _split(self, setting: int) -> str:
        if setting not in self._splits:
            name, settings = self.settings[setting]
            self._splits[setting] = (
                "elementwise" if name == "copy" else split_of(METHODS[name], settings, SPARSIFIERS)
            )
        return self._splits[setting]

    def _must_prepare(self, setting: int) -> bool:
        if setting not in self._needs:
            name, settings = self.settings[setting]
            self._needs[setting] = name != "copy" and needs_preparation(METHODS[name], settings, SPARSIFIERS)
        return self._needs[setting]

    def _pack(self, pieces: Sequence[tuple[Piece, tuple[int, ...]]]) -> Iterator[MergeTask]:
        """Pack neighbours on disk into tasks of about one slice per input."""
        packed: list[Piece] = []
        waits: set[int] = set()
        filled = number = 0
        for piece, states in pieces:
            amount = max(piece.num_elements * element_bytes(read.dtype) for read in piece.reads)
            if packed and filled + amount > self.slice_bytes:
                yield MergeTask(number=number, pieces=tuple(packed), states=tuple(sorted(waits)))
                packed, waits, filled, number = [], set(), 0, number + 1
            packed.append(piece)
            waits.update(states)
            filled += amount
        if packed:
            yield MergeTask(number=number, pieces=tuple(packed), states=tuple(sorted(waits)))


def _output_places(plan: RecipePlan) -> Mapping[str, tuple[str, int]]:
    """Return file and first byte of every output tensor of a recipe."""
    return {
        name: (f"{plan.folder}/{file.name}", begin)
        for file in plan.layout.files
        for name, (begin, _) in file.tensors.items()
    }
