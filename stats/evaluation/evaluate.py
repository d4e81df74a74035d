"""Prepare tasks, check them before any merge, and score a checkpoint on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from raymerge.merge_actors.checkpoint.folder import Checkpoint
from raymerge.stats.evaluation.parts import ModelNeeds
from raymerge.stats.evaluation.prepared import PreparedTask
from raymerge.stats.evaluation.resident import ResidentModel, load_resident, resident_of
from raymerge.stats.evaluation.scores import Estimate, Scores
from raymerge.stats.evaluation.task_spec import Split, TaskSpec
from raymerge.stats.evaluation.tasks import EvaluationSpec

if TYPE_CHECKING:
    import torch


def prepare_task(task: TaskSpec, split: Split, model_folder: str) -> PreparedTask:
    """Read the data of a task's split and tokenise them, once for all models.

    Args:
        task: the task.
        split: which of its data.
        model_folder: config.json and tokenizer of the models to score; no weights are read.

    Raises:
        RecipeError: the data do not fit the task, its head or the model.
        CheckpointError: the folder has no tokenizer or config.
    """
    return task.prepare(split, model_folder)


def expect_fit(
    evaluation: EvaluationSpec,
    model_folder: str,
    shapes: Mapping[str, Sequence[int]] | None = None,
    *,
    splits: Sequence[Split] = ("validation",),
) -> tuple[str, ...]:
    """Check before any merge that every task can be scored: data, columns, labels, heads, tensors.

    Args:
        evaluation: the tasks.
        model_folder: config.json and tokenizer of the models to score.
        shapes: of the merged tensors by name, tied ones under all names; None to check no tensors.
        splits: which data have to be there.

    Returns:
        remarks for the user.

    Raises:
        RecipeError: naming the key of the task that does not fit, and why.
        CheckpointError: a head or the model's config or tokenizer cannot be read.
        MismatchError: a head is of another size than the merged models.
    """
    remarks: list[str] = []
    resident = ResidentModel(evaluation.tasks, model_folder)
    if shapes is not None:
        resident.check(shapes)
    for task in evaluation.tasks:
        for split in splits:
            remarks += prepare_task(task, split, model_folder).remarks
    return tuple(remarks)


def evaluate_checkpoint(
    checkpoint: Checkpoint,
    evaluation: EvaluationSpec,
    split: Split = "validation",
    *,
    devices: Sequence[str] = ("cpu",),
) -> tuple[dict[str, Estimate], dict[str, Scores]]:
    """Score a checkpoint on disk.

    Args:
        checkpoint: its headers.
        evaluation: the tasks.
        split: which of their data.
        devices: where the model runs; spread over all of them.

    Returns:
        metrics by "task.metric"; and the scores per example by task.
    """
    prepared = [prepare_task(task, split, checkpoint.folder) for task in evaluation.tasks]
    resident = load_resident(
        checkpoint, evaluation.tasks, devices=devices, dtype=evaluation_dtype(evaluation.dtype)
    )
    found: dict[str, Estimate] = {}
    scores: dict[str, Scores] = {}
    for task in prepared:
        scores[task.task.name] = task.score(resident)
        for metric, estimate in task.summarise(scores[task.task.name]).items():
            found[f"{task.task.name}.{metric}"] = estimate
    return found, scores


def needs_of_checkpoint(checkpoint: Checkpoint, evaluation: EvaluationSpec) -> ModelNeeds:
    """Say what a checkpoint on disk takes of devices' memory while it is scored, from its headers.

    Raises:
        RecipeError: its tensors do not make the model that some task runs.
        MismatchError: a tensor has another shape than the model's parameter.
    """
    model, stored = resident_of(checkpoint, evaluation.tasks, dtype=evaluation_dtype(evaluation.dtype))
    return model.needs(stored)


def evaluation_dtype(name: str | None) -> torch.dtype | None:
    """Return torch's dtype of an `evaluate:` section; None for that of the merged tensors."""
    import torch

    if name is None:
        return None
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found
