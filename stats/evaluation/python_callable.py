"""A task of the user's own: a Python callable (model, tokenizer, context) -> metrics."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import xxhash

from raymerge.merge_actors.errors import RecipeError
from raymerge.stats.calibration_data import load_tokenizer
from raymerge.stats.evaluation import metrics as formulas
from raymerge.stats.evaluation.prepared import PreparedTask
from raymerge.stats.evaluation.rows import Table, read_table_of
from raymerge.stats.evaluation.scores import EXAMPLE, Estimate, Scores
from raymerge.stats.evaluation.task_spec import EvaluationError, ModelKind, Split, TaskSpec

if TYPE_CHECKING:
    from raymerge.stats.evaluation.resident import ResidentModel

#: Before the name of a metric that is one number, not one per example.
_WHOLE = "whole:"


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskContext:
    """What a callable is told beside the model and its tokenizer."""

    name: str
    """Of the task."""
    split: Split
    """Whose rows are scored: "validation" while models are compared, "test" for the chosen ones."""
    rows: Sequence[Mapping[str, Any]]
    """The rows of the split's data, chosen by `samples`; empty where the task names no data."""
    options: Mapping[str, Any]
    """`options` of the task."""
    device: str
    """Where the model is, and inputs have to be."""
    seed: int
    """`seed` of the task; the only one that should be used."""


Scorer = Callable[[Any, Any, TaskContext], Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class PythonTask(TaskSpec):
    """Call a function of the user's with each model."""

    kind: ClassVar[str] = "python"
    needs_data: ClassVar[bool] = False
    takes_encoder_decoder: ClassVar[bool] = True
    shares_model: ClassVar[bool] = False

    callable: str
    """"module:function"; with `file`, "function" is enough."""
    file: str | None = None
    """Python file that holds the function [module is imported]."""
    model: ModelKind = "language_model"
    """Which model the function is given."""
    head: str | None = None
    """Checkpoint whose head is used, for a classifier [the merged models' own]."""
    metrics: tuple[str, ...] = ("score",)
    """Names of the metrics that the function returns, the main one first."""
    lower_is_better: tuple[str, ...] = ()
    """Those of which a smaller value is a better model."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Handed to the function as they are."""

    def __post_init__(self) -> None:
        TaskSpec.__post_init__(self)
        if not self.metrics:
            raise self.error("metrics", "empty; name what the function returns.")
        if unknown := [name for name in self.lower_is_better if name not in self.metrics]:
            raise self.error(
                "lower_is_better", f"{unknown[0]!r} is none of the metrics {', '.join(self.metrics)}."
            )
        if self.file is None and ":" not in self.callable:
            raise self.error(
                "callable", f"{self.callable!r} names no module; write module:function, or give `file`."
            )

    @property
    def model_kind(self) -> ModelKind:
        """Run the model that the task names."""
        return self.model

    def metric_names(self) -> tuple[str, ...]:
        """Return the metrics that the file names."""
        return self.metrics

    def higher_is_better(self, metric: str) -> bool:
        """Tell by what the file says."""
        return metric not in self.lower_is_better

    def prepare(self, split: Split, model_folder: str) -> PreparedCallable:
        """Import the function and read the rows; see `TaskSpec.prepare`."""
        scorer = load_callable(self)
        given = self.validation if split == "validation" else self.test
        table = None
        if given is not None or self.validation is not None or self.test is not None:
            table = read_table_of(self, split, [], all_columns=True)
        return PreparedCallable(self, split, table, scorer, model_folder)


class PreparedCallable(PreparedTask):
    """A function, and the rows that it scores; one batch."""

    task: PythonTask

    def __init__(
        self, task: PythonTask, split: Split, table: Table | None, scorer: Scorer, model_folder: str
    ) -> None:
        """Take the function."""
        self._scorer = scorer
        self._tokenizer = load_tokenizer(model_folder, trust_code=task.trust_remote_code)
        self._rows = tuple(table.row(i) for i in range(len(table))) if table else ()
        super().__init__(task, split, [(0,)], table.remarks if table else ())

    def _content(self) -> object:
        return list(self._rows)

    def score(self, model: ResidentModel, begin_batch: int = 0, end_batch: int | None = None) -> Scores:
        """Call the function; see `PreparedTask.score`. There is one batch."""
        import torch

        context = TaskContext(
            name=self.task.name,
            split=self.split,
            rows=self._rows,
            options=self.task.options,
            device=model.device,
            seed=self.task.seed,
        )
        module = model.module(self.task)
        try:
            with torch.no_grad():
                returned = self._scorer(module, self._tokenizer, context)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # whatever it raises, sys.exit() too, fails this point and no other
            raise EvaluationError(
                f"{self.task.name}: {self.task.callable} raised {type(error).__name__}: {error}\n"
                f"{''.join(traceback.format_exception(type(error), error, _after_ours(error)))}"
            ) from error
        finally:
            module.eval()
        return self._arrays(returned)

    def _arrays(self, returned: Any) -> Scores:
        """Check what the function returned: a number or one per example for each metric."""
        names = self.task.metrics
        found = dict(returned) if isinstance(returned, Mapping) else {names[0]: returned}
        if sorted(map(str, found)) != sorted(names):
            raise self._wrong(
                f"returned the metrics {', '.join(map(str, found))}, but the task names {', '.join(names)}"
            )
        arrays: dict[str, Any] = {}
        for name, value in found.items():
            if value is None or isinstance(value, str | bytes | Mapping):
                raise self._wrong(f"returned {value!r} for {name}; a number or a list of numbers is needed")
            try:
                arrays[name] = np.asarray(
                    value.tolist() if hasattr(value, "tolist") else value, dtype=np.float64
                )
            except (TypeError, ValueError):
                raise self._wrong(
                    f"returned {value!r} for {name}; a number or a list of numbers is needed"
                ) from None
        lengths = {len(array) for array in arrays.values() if array.ndim == 1}
        if len(lengths) > 1 or any(array.ndim > 1 or not array.size for array in arrays.values()):
            shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
            raise self._wrong(
                f"returned arrays of the shapes {shapes}; one number per example is needed, as many for all"
            )
        num = lengths.pop() if lengths else 1
        scores: Scores = {
            name if array.ndim else _WHOLE + name: array if array.ndim else np.full(num, float(array))
            for name, array in arrays.items()
        }
        return {**scores, EXAMPLE: np.arange(num, dtype=np.int64)}

    def _wrong(self, what: str) -> EvaluationError:
        return EvaluationError(f"{self.task.name}: {self.task.callable} {what}.")

    def _score_batch(self, model: ResidentModel, batch: Sequence[int]) -> Scores:
        raise AssertionError("score() calls the function itself")

    def _summarise(self, scores: Scores) -> dict[str, Estimate]:
        found = {}
        for name in self.task.metrics:
            if name in scores:
                found[name] = formulas.mean(scores[name])
            else:
                found[name] = Estimate(float(scores[_WHOLE + name][0]), float("nan"))
        return found


def load_callable(task: PythonTask) -> Scorer:
    """Import the function of a task.

    Raises:
        RecipeError: there is no such module, file or function, or importing it fails.
    """
    module_name, _, function = task.callable.rpartition(":")
    try:
        module = _from_file(task.file) if task.file else importlib.import_module(module_name)
        found: Any = module
        for part in function.split("."):
            found = getattr(found, part)
    except RecipeError:
        raise
    except Exception as error:  # the module is the user's code
        raise task.error(
            "callable", f"{task.callable!r} cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    if not callable(found):
        raise task.error(
            "callable", f"{task.callable!r} is a {type(found).__name__}; a function must stand there."
        )
    scorer: Scorer = found
    return scorer


def _from_file(file: str) -> Any:
    """Import a file under a name of its own, anew if it has changed."""
    with open(file, "rb") as stream:
        digest = xxhash.xxh3_64_hexdigest(stream.read())
    stem = os.path.splitext(os.path.basename(file))[0]
    name = f"raymerge_task_{stem}_{digest}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        if spec is None or spec.loader is None:
            raise ImportError(f"{file} is no Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses and pickle look their module up
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _after_ours(error: BaseException) -> Any:
    """Return the traceback from the user's function on."""
    return error.__traceback__.tb_next if error.__traceback__ else None
