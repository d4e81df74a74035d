"""Recipes of a campaign that fail while the others go on: whom an error is to blame on, and tasks without them.

A model that cannot be read or holds NaN is the misfortune of the recipes that use it. Tasks are shared between
recipes, since each input is read once for all of them; so what fails is taken out of every task. Pure functions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

from raymerge.cluster.plan import Plan
from raymerge.cluster.worker_group import Instruction
from raymerge.merge_actors.errors import CheckpointError, RaymergeError, RecipeError
from raymerge.merge_actors.task import FileTask, MeasureTask, MergeTask, Piece, SolveTask, TaskReport


def is_of_a_recipe(error: BaseException) -> bool:
    """Return whether an error comes of a recipe and its models, and not of the output or the cluster."""
    return isinstance(error, RecipeError | CheckpointError)


def recipes_of(task: Instruction) -> frozenset[int]:
    """Return the recipes that a task works for."""
    if isinstance(task, FileTask):
        return frozenset(recipe for part in task.parts for recipe in recipes_of(part))
    if isinstance(task, SolveTask):
        return frozenset(each.recipe for each in task.sets)
    pieces = (task.piece,) if isinstance(task, MeasureTask) else task.pieces
    return frozenset(job.recipe for piece in pieces for job in piece.jobs)


def recipes_to_blame(task: Instruction, error: BaseException) -> frozenset[int]:
    """Return the recipes that a task failed for; none if it is nobody's fault, or nobody knows whose."""
    if not is_of_a_recipe(error):
        return frozenset()
    assert isinstance(error, RaymergeError)
    recipes = recipes_of(task)
    if len(recipes) == 1:
        return recipes
    if error.recipe is not None:
        return frozenset({error.recipe})
    if isinstance(task, SolveTask):  # they share the Gram matrices, if not all of the weights
        readers = frozenset(
            each.recipe
            for each in task.sets
            if any(error.path == read.file for job in each.jobs for read in job.all_reads)
        )
        return readers or recipes
    if error.path is not None:
        return frozenset(job for piece in _pieces(task) for job in _readers(piece, error.path))
    return frozenset()


def without(task: Instruction, dropped: Collection[int]) -> Instruction | None:
    """Return a task without what it does for some recipes; None if that is all."""
    recipes = recipes_of(task)
    if recipes.isdisjoint(dropped):
        return task
    if recipes <= set(dropped):
        return None
    if isinstance(task, FileTask):
        parts = [part for each in task.parts if (part := without(each, dropped)) is not None]
        kept = tuple(part for part in parts if isinstance(part, MergeTask | SolveTask))
        written = {
            job.file
            for part in kept
            for jobs in (
                [part.jobs] if isinstance(part, SolveTask) else [piece.jobs for piece in part.pieces]
            )
            for job in jobs
        }
        return dataclasses.replace(
            task,
            parts=kept,
            files=tuple(file for file in task.files if file.uri in written),
            states=tuple(sorted({state for part in kept for state in part.states})),
        )
    if isinstance(task, SolveTask):
        return dataclasses.replace(task, sets=tuple(each for each in task.sets if each.recipe not in dropped))
    assert isinstance(task, MergeTask), task  # a measurement works for one recipe
    pieces = tuple(_piece_without(piece, dropped) for piece in task.pieces)
    pieces = tuple(piece for piece in pieces if piece.jobs)
    states = {job.state for piece in pieces for job in piece.jobs if job.state is not None}
    return dataclasses.replace(task, pieces=pieces, states=tuple(sorted(states)))


def recipes_left_out(plan: Plan, done: Mapping[int, TaskReport]) -> frozenset[int]:
    """Return the recipes that an earlier run had given up: tasks that are done were done without them."""
    left_out: set[int] = set()
    for task in plan.tasks:
        if task.number in done:
            left_out |= recipes_of(task) - {piece.recipe for piece in done[task.number].pieces}
    return frozenset(left_out)


def _pieces(task: Instruction) -> tuple[Piece, ...]:
    if isinstance(task, FileTask):
        return tuple(piece for part in task.parts for piece in _pieces(part))
    if isinstance(task, SolveTask):
        return ()
    return (task.piece,) if isinstance(task, MeasureTask) else task.pieces


def _readers(piece: Piece, path: str) -> set[int]:
    """Return the recipes whose jobs read a file."""
    numbers = {
        number
        for number, read in enumerate(piece.reads)
        if path == read.file
        or (read.low_rank is not None and path in (read.low_rank.a_file, read.low_rank.b_file))
        or any(run.foreign is not None and run.foreign.file == path for run in read.row_runs or ())
    }
    return {job.recipe for job in piece.jobs if numbers & {job.base, *job.models, *job.statistics}}


def _piece_without(piece: Piece, dropped: Collection[int]) -> Piece:
    """Return a piece with the jobs of other recipes, and what those read."""
    jobs = [job for job in piece.jobs if job.recipe not in dropped]
    if any(read.row_runs is not None for read in piece.reads):
        return dataclasses.replace(piece, jobs=tuple(jobs))  # rows are filled from all reads together
    used = sorted({i for job in jobs for i in (job.base, *job.models, *job.statistics) if i is not None})
    place = {old: new for new, old in enumerate(used)}
    return dataclasses.replace(
        piece,
        reads=tuple(piece.reads[i] for i in used),
        jobs=tuple(
            dataclasses.replace(
                job,
                base=None if job.base is None else place[job.base],
                models=tuple(place[i] for i in job.models),
                statistics=tuple(place[i] for i in job.statistics),
            )
            for job in jobs
        ),
    )
