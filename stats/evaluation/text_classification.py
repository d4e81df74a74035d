"""Text classification and regression with the head of a named checkpoint on the merged encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from raymerge.stats.evaluation import metrics
from raymerge.stats.evaluation.labels import LabelMap, is_regression
from raymerge.stats.evaluation.prepared import PreparedTask, cut_by_tokens, finite
from raymerge.stats.evaluation.rows import Table, check_text, numbers_of, read_table_of
from raymerge.stats.evaluation.scores import Estimate, Scores
from raymerge.stats.evaluation.structures import head_config
from raymerge.stats.evaluation.task_spec import ModelKind, Split, TaskSpec
from raymerge.stats.evaluation.texts import TextEncoder

if TYPE_CHECKING:
    from raymerge.stats.evaluation.resident import ResidentModel


@dataclass(frozen=True, kw_only=True, slots=True)
class TextClassification(TaskSpec):
    """Predict the class (or the number) of a text or a pair of texts."""

    kind: ClassVar[str] = "text_classification"
    head: str | None = None
    """Checkpoint whose head is used [the merged models' own]."""
    text_column: str = "text"
    text_pair_column: str | None = None
    label_column: str = "label"
    labels: Mapping[str, Any] | None = None
    """Label of the data -> class of the head (name or number), where they differ."""
    regression: bool = False
    """The head yields one number."""
    max_length: int | None = None
    """Longer texts are cut [the model's limit, at most 512]."""

    @property
    def model_kind(self) -> ModelKind:
        """Run the model with a head for whole texts."""
        return "sequence_classifier"

    def metric_names(self) -> tuple[str, ...]:
        """Return what a classifier or a regressor is measured by."""
        return ("pearson", "spearman", "mse") if self.regression else ("accuracy", "f1_macro", "matthews")

    def prepare(self, split: Split, model_folder: str) -> PreparedClassification:
        """Tokenise the texts; see `TaskSpec.prepare`."""
        columns = [self.text_column, *([self.text_pair_column] if self.text_pair_column else [])]
        table = read_table_of(self, split, [*columns, self.label_column])
        for column in columns:
            check_text(self, table, column)
        return PreparedClassification(self, split, table, model_folder)


class PreparedClassification(PreparedTask):
    """Texts with their classes."""

    task: TextClassification

    def __init__(self, task: TextClassification, split: Split, table: Table, model_folder: str) -> None:
        """Tokenise the rows and check their labels."""
        self._gold_N = _labels(task, table, head_config(task.head or model_folder))
        self._encoder = TextEncoder(task, model_folder, task.max_length)
        pairs = table.columns[task.text_pair_column] if task.text_pair_column else [None] * len(table)
        self._encodings = [
            self._encoder.encode(text, pair)
            for text, pair in zip(table.columns[task.text_column], pairs, strict=True)
        ]
        widths = [len(encoding["input_ids"]) for encoding in self._encodings]
        remarks = [*table.remarks, *self._encoder.remarks()]
        super().__init__(task, split, cut_by_tokens(widths, task.batch_tokens), remarks)

    def _content(self) -> object:
        return [self._encodings, self._gold_N.tolist()]

    def _score_batch(self, model: ResidentModel, batch: Sequence[int]) -> Scores:
        module = model.module(self.task)
        inputs = self._encoder.tensors([self._encodings[i] for i in batch], model.device)
        if module.config.pad_token_id is None:  # decoders find the last token by what is not padding
            module.config.pad_token_id = self._encoder.pad_id
        logits_BK = finite(self.task, module(**inputs).logits.float())
        if self.task.regression:
            return {"predicted": logits_BK[:, 0], "gold": self._gold_N[list(batch)]}
        predicted_B = logits_BK.argmax(1)
        return {
            "predicted": predicted_B.astype(np.int32),
            "gold": self._gold_N[list(batch)],
            "correct": predicted_B == self._gold_N[list(batch)],
        }

    def _summarise(self, scores: Scores) -> dict[str, Estimate]:
        predicted_N, gold_N = scores["predicted"], scores["gold"]
        if self.task.regression:
            squares_N = (predicted_N.astype(np.float64) - gold_N.astype(np.float64)) ** 2
            return {
                "pearson": metrics.pearson(predicted_N, gold_N),
                "spearman": metrics.spearman(predicted_N, gold_N),
                "mse": metrics.mean(squares_N),
            }
        return {
            "accuracy": metrics.mean(scores["correct"]),
            "f1_macro": metrics.macro_f1(predicted_N, gold_N),
            "matthews": metrics.matthews(predicted_N, gold_N),
        }


def _labels(task: TextClassification, table: Table, config: Mapping[str, Any]) -> Any:
    """Return the labels as numbers of classes, or as numbers."""
    given = table.columns[task.label_column]
    if config.get("problem_type") == "multi_label_classification":
        raise task.error("head", "it gives several labels to a text; a head that chooses one is needed.")
    if is_regression(config) != task.regression:
        kind = "yields one number" if is_regression(config) else "yields classes"
        raise task.error(
            "regression",
            f"{task.regression}, but the head of {task.head or 'the models'} {kind}; change the one or the other.",
        )
    if not task.regression:
        names = LabelMap(task, config, task.labels)
        return np.array(
            [names.number(label, table.place(i)) for i, label in enumerate(given)], dtype=np.int32
        )
    return numbers_of(task, table, task.label_column)
