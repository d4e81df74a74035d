"""Score one checkpoint on the tasks of a file, in this process: `raymerge evaluate`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from raymerge.cluster.connect import Device, choose_device, local_resources
from raymerge.cluster.evaluator_gpus import Node, choose_gpus, visible_gpu_bytes
from raymerge.cluster.model_ref import parse_model
from raymerge.cluster.yaml_source import read_documents
from raymerge.merge_actors.checkpoint.folder import open_checkpoint
from raymerge.merge_actors.checkpoint.hub import locate
from raymerge.merge_actors.errors import RecipeError
from raymerge.stats.evaluation.evaluate import evaluate_checkpoint, expect_fit, needs_of_checkpoint
from raymerge.stats.evaluation.scores import Estimate, Scores, as_plain
from raymerge.stats.evaluation.task_spec import SPLITS, Split
from raymerge.stats.evaluation.tasks import EvaluationSpec, parse_evaluation
from raymerge.stats.own_code import code_remark

if TYPE_CHECKING:
    from raymerge.merge_actors.checkpoint.folder import Checkpoint

#: A file, or the section itself.
Evaluation = str | os.PathLike[str] | Mapping[str, Any] | Sequence[Any] | EvaluationSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationResult:
    """What a model scored."""

    model: str
    """As it was given."""
    split: Split
    metrics: dict[str, Estimate]
    """By "task.metric", in the order of the file."""
    scores: dict[str, Scores]
    """Arrays of one row per example by task, sorted by example: two models' can be compared in pairs."""
    seconds: float

    def to_mapping(self) -> dict[str, Any]:
        """Return all but the scores as JSON values."""
        return {
            "model": self.model,
            "split": self.split,
            "metrics": as_plain(self.metrics),
            "examples": {name: len(scores["example"]) for name, scores in self.scores.items()},
            "seconds": self.seconds,
        }


def evaluate(
    model: str,
    evaluation: Evaluation,
    *,
    split: Split = "validation",
    device: Device = "auto",
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    on_remark: Callable[[str], None] = lambda line: None,
) -> EvaluationResult:
    """Score a checkpoint.

    Args:
        model: folder or Hub id, path[@revision].
        evaluation: a YAML file with an `evaluate:` section (of a grid, say) or with its keys; or the section.
        split: "validation" or "test".
        device: where the model runs; one that is too large for a GPU is spread over several.
        allow_pickle: read PyTorch .bin files, weights only.
        trust_remote_code: run code of the checkpoint where transformers has no class of its own.
        on_remark: gets sentences for the user.

    Raises:
        RaymergeError: with one sentence for the user.
    """
    started = time.monotonic()
    checkpoint, spec = check_evaluation(
        model,
        evaluation,
        split=split,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
        on_remark=on_remark,
    )
    metrics, scores = evaluate_checkpoint(checkpoint, spec, split, devices=_devices(checkpoint, spec, device))
    return EvaluationResult(
        model=model, split=split, metrics=metrics, scores=scores, seconds=time.monotonic() - started
    )


def check_evaluation(
    model: str,
    evaluation: Evaluation,
    *,
    split: Split,
    allow_pickle: bool,
    trust_remote_code: bool,
    on_remark: Callable[[str], None] = lambda line: None,
) -> tuple[Checkpoint, EvaluationSpec]:
    """Check that a model can be scored on tasks, as `evaluate` would; return both as they were opened.

    Raises:
        RaymergeError: with one sentence for the user.
    """
    if split not in SPLITS:
        raise RecipeError(f"the split {split!r} is none of {', '.join(SPLITS)}.")
    spec = evaluation if isinstance(evaluation, EvaluationSpec) else read_evaluation(evaluation)
    spec = _with_data(spec, split, on_remark).trusting(trust_remote_code)
    checkpoint = _open(model, allow_pickle)
    if trust_remote_code and (line := code_remark(checkpoint.folder)):
        on_remark(line)
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    shapes |= {alias: shapes[name] for alias, name in checkpoint.tied.items()}
    for line in expect_fit(spec, checkpoint.folder, shapes, splits=(split,)):
        on_remark(line)
    return checkpoint, spec


def read_evaluation(source: str | os.PathLike[str] | Mapping[str, Any] | Sequence[Any]) -> EvaluationSpec:
    """Read the tasks of a file or of plain values.

    Raises:
        RecipeError: the file is not one YAML document, or its tasks break a rule.
    """
    value: Any = source
    if isinstance(source, str | os.PathLike):
        documents = read_documents(source)
        if len(documents) != 1:
            raise RecipeError(f"{os.fspath(source)} holds {len(documents)} documents; one is needed.")
        value = documents[0].value
    if isinstance(value, Mapping) and "evaluate" in value:
        value = value["evaluate"]
    return parse_evaluation(value)


def save_scores(path: str, scores: Mapping[str, Scores]) -> None:
    """Write scores as a NumPy archive: an array "task.quantity" for each."""
    import numpy as np

    arrays: dict[str, Any] = {
        f"{task}.{name}": array for task, found in scores.items() for name, array in found.items()
    }
    np.savez_compressed(path, **arrays)


def _with_data(spec: EvaluationSpec, split: Split, on_remark: Callable[[str], None]) -> EvaluationSpec:
    """Leave out the tasks without test data when these are scored, as a grid does."""
    if split == "validation":
        return spec
    kept = tuple(task for task in spec.tasks if task.test is not None)
    if not kept:
        raise RecipeError("no task has test data; give one a `test:`, or score the validation split.")
    if len(kept) < len(spec.tasks):
        left_out = ", ".join(task.name for task in spec.tasks if task.test is None)
        on_remark(f"without test data, and so left out: {left_out}")
    return replace(spec, tasks=kept)


def _devices(checkpoint: Checkpoint, spec: EvaluationSpec, device: Device) -> tuple[str, ...]:
    """Return the CPU, or as few of this machine's GPUs as hold the model."""
    num_cpus, num_gpus = local_resources()
    if choose_device(device, num_gpus) == "cpu":
        return ("cpu",)
    node = Node(num_cpus, num_gpus, visible_gpu_bytes())
    return tuple(
        f"cuda:{i}" for i in range(int(choose_gpus([node], None, needs_of_checkpoint(checkpoint, spec))))
    )


def _open(model: str, allow_pickle: bool) -> Checkpoint:
    ref = parse_model(model)
    if ref.adapter is not None:
        raise RecipeError(
            f"{ref.key!r} has an adapter; merge it into its base first (raymerge merge, passthrough)."
        )
    return open_checkpoint(
        locate(ref.path, ref.revision, allow_pickle=allow_pickle), allow_pickle=allow_pickle
    )
