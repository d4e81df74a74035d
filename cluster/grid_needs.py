"""What evaluating the points of a grid takes of GPUs' memory, from headers alone."""

from __future__ import annotations

from raymerge.cluster.evaluator_folders import ModelFolders
from raymerge.cluster.grid_plan import GridPlan
from raymerge.stats.evaluation.evaluate import evaluation_dtype
from raymerge.stats.evaluation.parts import ModelNeeds
from raymerge.stats.evaluation.resident import ResidentModel


def needs_of_grid(plan: GridPlan) -> ModelNeeds:
    """Say what the largest merged model of a grid takes while its tasks run.

    Raises:
        RaymergeError: the merged tensors do not make the model that some task runs.
    """
    evaluation = plan.spec.evaluation
    (merged,) = plan.largest.plan.recipes
    folders = ModelFolders()
    try:
        model = ResidentModel(
            evaluation.tasks,
            folders.folder_of(plan.largest).path,
            dtype=evaluation_dtype(evaluation.dtype),
        )
        return model.needs({tensor.name: (tensor.dtype, tensor.shape) for tensor in merged.tensors})
    finally:
        folders.remove()
