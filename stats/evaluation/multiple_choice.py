"""Multiple choice: the answer is the choice to which the language model gives the highest likelihood."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from raymerge.stats.evaluation import metrics
from raymerge.stats.evaluation.language import LanguageEncoder, TokenSequence, log_likelihoods
from raymerge.stats.evaluation.prepared import PreparedTask, cut_by_tokens, finite
from raymerge.stats.evaluation.prompts import prompts_of
from raymerge.stats.evaluation.rows import Table, read_table_of, template_columns
from raymerge.stats.evaluation.scores import Estimate, Scores
from raymerge.stats.evaluation.task_spec import ModelKind, Split, TaskSpec

if TYPE_CHECKING:
    from raymerge.stats.evaluation.resident import ResidentModel


@dataclass(frozen=True, kw_only=True, slots=True)
class MultipleChoice(TaskSpec):
    """Choose by log p(delimiter + choice | prompt), and by the same divided by the choice's characters.

    These are acc and acc_norm of lm-evaluation-harness, tokenised and cut as there.
    """

    kind: ClassVar[str] = "multiple_choice"
    prompt: str = "{text}"
    """What stands before the choices: text with columns in braces, such as "Q: {question}\\nA:"."""
    choices_column: str | None = None
    """Column of the choices: a list of texts, or {text: [...], label: [...]}."""
    choices: tuple[str, ...] | None = None
    """The choices of every row, where they are not in a column."""
    label_column: str = "label"
    """Which choice is right: its number from 0, its label, or its text."""
    delimiter: str = " "
    """Stands between prompt and choice."""
    max_length: int | None = None
    """Longest sequence in tokens [the model's limit, at most 2,048]; longer ones lose their beginning."""

    def __post_init__(self) -> None:
        TaskSpec.__post_init__(self)
        if (self.choices is None) == (self.choices_column is None):
            raise self.error(
                "choices_column", "give either the column of the choices, or `choices` for all rows."
            )
        if self.choices is not None and len(self.choices) < 2:
            raise self.error("choices", f"{len(self.choices)} is no choice; give at least two.")
        template_columns(self, "prompt", self.prompt)

    @property
    def model_kind(self) -> ModelKind:
        """Run the language model."""
        return "language_model"

    def metric_names(self) -> tuple[str, ...]:
        """Return acc and acc_norm."""
        return ("accuracy", "accuracy_norm")

    def prepare(self, split: Split, model_folder: str) -> PreparedChoices:
        """Tokenise prompts and choices; see `TaskSpec.prepare`."""
        columns = [*template_columns(self, "prompt", self.prompt), self.label_column]
        columns += [self.choices_column] if self.choices_column else []
        table = read_table_of(self, split, columns)
        return PreparedChoices(self, split, table, LanguageEncoder(self, model_folder, self.max_length))


class PreparedChoices(PreparedTask):
    """Prompts, each with its choices."""

    task: MultipleChoice

    def __init__(self, task: MultipleChoice, split: Split, table: Table, encoder: LanguageEncoder) -> None:
        """Tokenise every choice after its prompt."""
        self._encoder = encoder
        self._choices: list[list[TokenSequence]] = []
        self._characters: list[list[int]] = []
        self._gold: list[int] = []
        for i, prompt in enumerate(prompts_of(task, table, task.prompt)):
            texts, labels = _choices(task, table, i)
            self._choices.append([encoder.pair(prompt, task.delimiter + text) for text in texts])
            if empty := [
                text for text, each in zip(texts, self._choices[-1], strict=True) if not each.num_targets
            ]:
                raise task.error(
                    "choices_column", f"{table.place(i)}: the choice {empty[0]!r} has no token of its own."
                )
            self._characters.append([max(len(text), 1) for text in texts])
            self._gold.append(_gold(task, table, i, texts, labels))
        widths = [max(len(each.ids) for each in choices) for choices in self._choices]
        counts = [len({each.ids[:-1] for each in choices}) for choices in self._choices]
        batches = cut_by_tokens(widths, task.batch_tokens, counts)
        super().__init__(task, split, batches, [*table.remarks, *encoder.remarks()])

    def _content(self) -> object:
        choices = [[(each.ids, each.num_targets) for each in choices] for choices in self._choices]
        return [choices, self._characters, self._gold]

    def _score_batch(self, model: ResidentModel, batch: Sequence[int]) -> Scores:
        sequences = [each for i in batch for each in self._choices[i]]
        found = finite(
            self.task,
            log_likelihoods(
                model.module(self.task), sequences, pad_id=self._encoder.pad_id, device=model.device
            ),
        )
        chosen, chosen_norm = [], []
        begin = 0
        for i in batch:
            end = begin + len(self._choices[i])
            chosen.append(int(np.argmax(found[begin:end])))
            chosen_norm.append(
                int(np.argmax(found[begin:end] / np.array(self._characters[i], dtype=np.float64)))
            )
            begin = end
        gold_B = np.array([self._gold[i] for i in batch])
        return {
            "chosen": np.array(chosen, dtype=np.int32),
            "correct": np.array(chosen) == gold_B,
            "correct_norm": np.array(chosen_norm) == gold_B,
        }

    def _summarise(self, scores: Scores) -> dict[str, Estimate]:
        return {
            "accuracy": metrics.mean(scores["correct"]),
            "accuracy_norm": metrics.mean(scores["correct_norm"]),
        }


def _choices(task: MultipleChoice, table: Table, index: int) -> tuple[Sequence[str], Sequence[Any]]:
    """Return the texts of a row's choices, and their labels if they have any."""
    value: Any = task.choices if task.choices_column is None else table.columns[task.choices_column][index]
    labels: Sequence[Any] = ()
    if isinstance(value, Mapping):
        value, labels = value.get("text"), value.get("label") or ()
    if (
        not isinstance(value, list | tuple)
        or len(value) < 2
        or not all(isinstance(each, str) for each in value)
    ):
        raise task.error(
            "choices_column",
            f"{table.place(index)} holds {value!r} in {task.choices_column!r}; two texts or more must stand there.",
        )
    return value, labels


def _gold(task: MultipleChoice, table: Table, index: int, texts: Sequence[str], labels: Sequence[Any]) -> int:
    label = table.columns[task.label_column][index]
    for known in (labels, texts):
        if label in known:
            return list(known).index(label)
    if isinstance(label, str) and label.isdigit():
        label = int(label)
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(texts):
        return label
    if isinstance(label, str) and len(label) == 1 and 0 <= ord(label) - ord("A") < len(texts):
        return ord(label) - ord("A")
    raise task.error(
        "label_column",
        f"{table.place(index)} has the answer {label!r}; it has {len(texts)} choices: {list(texts)}.",
    )
