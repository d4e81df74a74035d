"""The `evaluate:` section of a file: its tasks, read and checked before any model is opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from raymerge.merge_actors.errors import RecipeError
from raymerge.stats.evaluation.embedding_similarity import EmbeddingSimilarity
from raymerge.stats.evaluation.generation import Generation
from raymerge.stats.evaluation.harness import HarnessTask
from raymerge.stats.evaluation.loss import Loss
from raymerge.stats.evaluation.multiple_choice import MultipleChoice
from raymerge.stats.evaluation.python_callable import PythonTask
from raymerge.stats.evaluation.spec_reader import closest, read_fields
from raymerge.stats.evaluation.task_spec import TaskSpec
from raymerge.stats.evaluation.text_classification import TextClassification
from raymerge.stats.evaluation.token_classification import TokenClassification

#: kind -> what a task of the kind may say.
TASKS: dict[str, type[TaskSpec]] = {
    "loss": Loss,
    "multiple_choice": MultipleChoice,
    "generation": Generation,
    "text_classification": TextClassification,
    "token_classification": TokenClassification,
    "embedding_similarity": EmbeddingSimilarity,
    "harness": HarnessTask,
    "python": PythonTask,
}

_DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationSpec:
    """A whole `evaluate:` section."""

    tasks: tuple[TaskSpec, ...]
    """At least one, names unique."""
    dtype: str | None = None
    """Type of parameters and activations, such as "float32"; None for that of the merged tensors."""
    batch_tokens: int = 4096
    """Tokens of a batch where the task does not say."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of all metrics, "task.metric", in the order of the tasks."""
        return tuple(f"{task.name}.{metric}" for task in self.tasks for metric in task.metric_names())

    def higher_is_better(self, metric: str) -> bool:
        """Tell whether a larger value of a metric, "task.metric", is a better model."""
        name, _, last = metric.rpartition(".")
        return self.task(name).higher_is_better(last)

    def task(self, name: str) -> TaskSpec:
        """Return a task by its name."""
        return next(task for task in self.tasks if task.name == name)

    def trusting(self, trust_remote_code: bool) -> EvaluationSpec:
        """Return the section with leave to run code of the models, or without."""
        return replace(
            self, tasks=tuple(replace(each, trust_remote_code=trust_remote_code) for each in self.tasks)
        )

    def to_mapping(self) -> dict[str, Any]:
        """Return everything that metrics depend on as JSON values, defaults included."""
        return {
            "dtype": self.dtype,
            "batch_tokens": self.batch_tokens,
            "tasks": [task.to_mapping() for task in self.tasks],
        }


def parse_evaluation(value: Any, where: str = "evaluate") -> EvaluationSpec:
    """Read an `evaluate:` section from plain values.

    Local paths become absolute ones, so that workers elsewhere find them.

    Args:
        value: the mapping; a list is its tasks.
        where: key path of the section, for errors.

    Raises:
        RecipeError: with the key path: an unknown kind, key or metric, a value of the wrong type.
    """
    value = {"tasks": value} if isinstance(value, list | tuple) else value
    if not isinstance(value, Mapping):
        raise RecipeError(f"{where}: {value!r} is no mapping; write `{where}: {{tasks: [...]}}`.")
    known = ("dtype", "batch_tokens", "tasks")
    for key in value:
        if key not in known:
            raise RecipeError(f"{where}.{key}: unknown key; known: {', '.join(known)}{closest(key, known)}.")
    dtype, batch_tokens = value.get("dtype"), value.get("batch_tokens", 4096)
    if dtype is not None and dtype not in _DTYPES:
        raise RecipeError(
            f"{where}.dtype: {dtype!r} is none of {', '.join(_DTYPES)}{closest(dtype, _DTYPES)}."
        )
    if isinstance(batch_tokens, bool) or not isinstance(batch_tokens, int) or batch_tokens < 1:
        raise RecipeError(f"{where}.batch_tokens: {batch_tokens!r} is no number of tokens; give 1 or more.")
    tasks = value.get("tasks")
    if not isinstance(tasks, Sequence) or isinstance(tasks, str) or not tasks:
        raise RecipeError(f"{where}.tasks: a list of at least one task must stand here.")
    parsed = tuple(
        _parse_task(task, f"{where}.tasks[{number}]", batch_tokens) for number, task in enumerate(tasks)
    )
    for number, task in enumerate(parsed):
        if any(task.name == other.name for other in parsed[:number]):
            raise RecipeError(f"{where}.tasks[{number}].name: two tasks are named {task.name!r}; rename one.")
    return EvaluationSpec(tasks=parsed, dtype=dtype, batch_tokens=batch_tokens)


def metric_names(task: TaskSpec) -> tuple[str, ...]:
    """Return the metrics that a task yields, known before any model; the main one first."""
    return task.metric_names()


def _parse_task(value: Any, where: str, batch_tokens: int) -> TaskSpec:
    if not isinstance(value, Mapping):
        raise RecipeError(f"{where}: {value!r} is no task; write {{name: ..., kind: ..., validation: ...}}.")
    kind = value.get("kind")
    if kind not in TASKS:
        what = "missing" if kind is None else f"unknown kind {kind!r}"
        raise RecipeError(f"{where}.kind: {what}; known: {', '.join(TASKS)}{closest(kind, TASKS)}.")
    given = {key: each for key, each in value.items() if key != "kind"}
    return TASKS[kind](
        **read_fields(TASKS[kind], {"name": kind, "batch_tokens": batch_tokens, **given}, where), where=where
    )
