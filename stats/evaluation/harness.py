"""A task of lm-evaluation-harness by its name, on the resident model. Needs the extra `harness`.

The harness makes prompts, runs its own wrapper of transformers models around ours, and judges answers; its values per
document are kept and pooled here. Verified with lm_eval 0.4.13.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from raymerge.stats.data_rows import choose
from raymerge.stats.evaluation import metrics as formulas
from raymerge.stats.evaluation.prepared import PreparedTask
from raymerge.stats.evaluation.scores import Estimate, Scores
from raymerge.stats.evaluation.task_spec import EvaluationError, ModelKind, Split, TaskSpec

if TYPE_CHECKING:
    from raymerge.stats.evaluation.resident import ResidentModel

#: Of the harness' own metrics those of which a smaller value is better.
_LOSSES = (
    "perplexity",
    "word_perplexity",
    "byte_perplexity",
    "bits_per_byte",
    "brier_score",
    "ter",
    "mse",
    "loss",
)
#: The harness draws few-shot examples by this seed unless told otherwise.
_FEWSHOT_SEED = 1234
#: A task of the harness keeps its requests in itself, so that two threads cannot run it.
_ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True, kw_only=True, slots=True)
class HarnessTask(TaskSpec):
    """Run a task or a group of lm-evaluation-harness; documents of a group count alike."""

    kind: ClassVar[str] = "harness"
    needs_data: ClassVar[bool] = False
    takes_encoder_decoder: ClassVar[bool] = True
    shares_model: ClassVar[bool] = False

    task: str
    """Its name there: a task, a group or a tag."""
    include: str | None = None
    """Folder of further task files."""
    metrics: tuple[str, ...] = ("acc",)
    """Its metrics that are kept, the main one first; "exact_match,strict-match" names a filter too."""
    lower_is_better: tuple[str, ...] = ()
    """Those of which a smaller value is a better model, besides perplexities and the like."""
    num_fewshot: int | None = None
    """Examples before each question [the task's]."""
    chat_template: bool = False
    """Lay prompts into the models' chat template."""
    batch_sequences: int = 8
    """Sequences of a forward pass."""
    batch_documents: int = 64
    """Documents that are handed to the harness at once."""
    max_length: int | None = None
    """Longest sequence in tokens [the model's limit]."""

    def __post_init__(self) -> None:
        TaskSpec.__post_init__(self)
        if not self.metrics:
            raise self.error("metrics", "empty; name metrics of the task.")
        for key in ("batch_sequences", "batch_documents"):
            if getattr(self, key) < 1:
                raise self.error(key, f"{getattr(self, key)} is too few; it must be at least 1.")
        for split, given in (("validation", self.validation), ("test", self.test)):
            if given is not None and not isinstance(given, str):
                raise self.error(
                    split, "of a task of the harness this is the name of a split, such as train."
                )
        if self.validation is not None and self.validation == self.test:
            raise self.error(
                "test", f"{self.test!r} is the split of `validation`, by which models are chosen."
            )

    @property
    def model_kind(self) -> ModelKind:
        """Run the language model."""
        return "language_model"

    def metric_names(self) -> tuple[str, ...]:
        """Return the metrics that the file names."""
        return self.metrics

    def higher_is_better(self, metric: str) -> bool:
        """Tell by the name, as the harness does, and by what the file says."""
        return metric not in self.lower_is_better and metric.partition(",")[0] not in _LOSSES

    def prepare(self, split: Split, model_folder: str) -> PreparedHarness:
        """Load the task and its documents; see `TaskSpec.prepare`."""
        return PreparedHarness(self, split, model_folder)


@dataclass(slots=True)
class _Loaded:
    """Tasks of the harness with the documents that are scored."""

    tasks: dict[str, Any]
    """Name -> its task object."""
    documents: list[tuple[str, int]] = field(default_factory=list)
    """Task and number of each document."""


class PreparedHarness(PreparedTask):
    """Documents of one or several tasks of the harness."""

    task: HarnessTask

    def __init__(self, task: HarnessTask, split: Split, model_folder: str) -> None:
        """Load the tasks."""
        self._loaded = _load(task, split)
        num = len(self._loaded.documents)
        order = np.random.default_rng(0).permutation(num)
        step = task.batch_documents
        super().__init__(task, split, [sorted(order[i : i + step].tolist()) for i in range(0, num, step)])

    def _content(self) -> object:
        documents = {name: each.eval_docs for name, each in self._loaded.tasks.items()}
        return [(name, number, documents[name][number]) for name, number in self._loaded.documents]

    def _score_batch(self, model: ResidentModel, batch: Sequence[int]) -> Scores:
        from lm_eval.evaluator import evaluate

        wanted = [self._loaded.documents[i] for i in batch]
        names = list(dict.fromkeys(name for name, _ in wanted))
        numbers = {name: [number for each, number in wanted if each == name] for name in names}
        with _ONE_AT_A_TIME:
            found = evaluate(
                lm=self._language_model(model),
                task_dict={"tasks": {name: self._loaded.tasks[name] for name in names}, "groups": {}},
                samples=numbers,
                bootstrap_iters=0,
                log_samples=True,
                apply_chat_template=self.task.chat_template,
                fewshot_as_multiturn=self.task.chat_template,
            )
        values: dict[str, dict[tuple[str, int], Any]] = {metric: {} for metric in self.task.metrics}
        for name in names:
            for sample in found["samples"][name]:
                for metric in self.task.metrics:
                    key, _, wanted_filter = metric.partition(",")
                    place = name, sample["doc_id"]
                    if key in sample and wanted_filter in ("", sample["filter"]):
                        values[metric].setdefault(place, sample[key])
        return {metric: _column(self.task, metric, wanted, values[metric]) for metric in self.task.metrics}

    def _language_model(self, model: ResidentModel) -> Any:
        """Return the harness' wrapper around the resident model; it is kept from batch to batch."""
        from lm_eval.models.huggingface import HFLM

        if self.task.name not in model.companions:
            module = model.module(self.task)
            model.companions[self.task.name] = HFLM(
                pretrained=module,
                tokenizer=model.tokenizer,
                backend="seq2seq" if module.config.is_encoder_decoder else "causal",
                batch_size=self.task.batch_sequences,
                max_length=self.task.max_length,
            )
        return model.companions[self.task.name]

    def _summarise(self, scores: Scores) -> dict[str, Estimate]:
        found = {}
        first = next(iter(self._loaded.tasks.values()))
        for metric in self.task.metrics:
            values = scores[metric]
            aggregation = first.aggregation()[metric.partition(",")[0]]
            if getattr(aggregation, "__name__", "") == "mean" and values.dtype != object:
                found[metric] = formulas.mean(values)
            else:
                found[metric] = _aggregate(aggregation, values)
        return found


def _aggregate(aggregation: Callable[[list[Any]], float], values: NDArray[Any]) -> Estimate:
    def of_rows(rows: NDArray[np.intp]) -> float:
        return float(aggregation([_item(values[i]) for i in rows]))

    return formulas.bootstrap(len(values), of_rows)


def _column(
    task: HarnessTask, metric: str, documents: Sequence[tuple[str, int]], found: Mapping[tuple[str, int], Any]
) -> NDArray[np.generic]:
    """Lay a metric's values into an array: numbers, or whatever the harness aggregates, as objects."""
    missing = [place for place in documents if place not in found]
    if missing:
        raise EvaluationError(f"{task.name}: {missing[0][0]} yields no {metric!r} for a document.")
    values = [found[place] for place in documents]
    if all(isinstance(value, int | float | np.number | np.bool_) for value in values):
        return np.array(values, dtype=np.float64)
    column = np.empty(len(values), dtype=object)
    column[:] = values
    return column


def _item(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _load(task: HarnessTask, split: Split) -> _Loaded:
    """Load the task, its documents of one split, and check its metrics.

    Raises:
        RecipeError: the harness is not installed, or has no such task, split or metric.
    """
    try:
        manager = _manager(task.include)
    except ImportError as error:
        raise task.error(
            "kind", f"lm-evaluation-harness cannot be imported ({error}); pip install 'raymerge[harness]'."
        ) from error
    try:
        loaded = _Loaded(tasks=dict(manager.load([task.task])["tasks"]))
    except KeyError as error:
        raise task.error("task", f"lm-evaluation-harness has no task, group or tag {task.task!r}.") from error
    except Exception as error:  # its data sets come from the Hub, and fail in many ways
        raise task.error(
            "task", f"lm-evaluation-harness cannot load {task.task!r}: {type(error).__name__}: {error}"
        ) from error
    for name, each in loaded.tasks.items():
        _check_metrics(task, name, each)
        _choose_split(task, split, name, each)
        if task.num_fewshot is not None or each.get_config("num_fewshot") is None:
            each.set_config(key="num_fewshot", value=task.num_fewshot or 0)
        each.set_fewshot_seed(seed=_FEWSHOT_SEED)
        loaded.documents += [(name, number) for number in range(len(each.eval_docs))]
    if task.samples is not None and task.samples < len(loaded.documents):
        everything = range(len(loaded.documents))
        kept = (
            everything[: task.samples]
            if task.take == "first"
            else choose(everything, task.samples, task.seed)
        )
        loaded.documents = [loaded.documents[i] for i in kept]
    return loaded


@functools.lru_cache(maxsize=4)
def _manager(include: str | None) -> Any:
    """Return the harness' list of its tasks; making it takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include)


def _check_metrics(task: HarnessTask, name: str, harness_task: Any) -> None:
    known = harness_task.higher_is_better()
    for metric in task.metrics:
        key = metric.partition(",")[0]
        if key not in harness_task.aggregation():
            raise task.error(
                "metrics", f"the task {name!r} has no metric {key!r}; it has {', '.join(known)}."
            )
        if known.get(key) is not None and known[key] != task.higher_is_better(metric):
            better = "higher" if known[key] else "lower"
            raise task.error(
                "lower_is_better", f"of the task {name!r} a {better} {key} is better; say so here."
            )


def _choose_split(task: HarnessTask, split: Split, name: str, harness_task: Any) -> None:
    """Make the harness evaluate on our split: it takes its test documents wherever there are any."""
    given = task.validation if split == "validation" else task.test
    if given is not None:
        if given not in harness_task.dataset:
            splits = ", ".join(harness_task.dataset)
            raise task.error(split, f"the data of {name!r} have no split {given!r}; they have {splits}.")
        harness_task.config.validation_split = given
    has_own = harness_task.has_validation_docs() if split == "validation" else harness_task.has_test_docs()
    if given is None and not has_own:
        raise task.error(
            split, f"the task {name!r} has no {split} split; name one of its data's (`{split}: train`, say)."
        )
    if given is not None or split == "validation":
        harness_task.has_test_docs = lambda: False
        harness_task.has_validation_docs = lambda: True
