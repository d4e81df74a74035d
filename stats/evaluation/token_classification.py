"""Token classification with the head of a named checkpoint: entities, parts of speech."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from raymerge.stats.evaluation import metrics
from raymerge.stats.evaluation.entities import all_entity_labels, count_entities
from raymerge.stats.evaluation.labels import LabelMap
from raymerge.stats.evaluation.prepared import PreparedTask, cut_by_tokens, finite
from raymerge.stats.evaluation.rows import Table, check_text, read_table_of
from raymerge.stats.evaluation.scores import Estimate, Scores
from raymerge.stats.evaluation.structures import head_config
from raymerge.stats.evaluation.task_spec import ModelKind, Split, TaskSpec
from raymerge.stats.evaluation.texts import TextEncoder

if TYPE_CHECKING:
    from raymerge.stats.evaluation.resident import ResidentModel

_CUT_OFF = -1


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenClassification(TaskSpec):
    """Predict the label of every word; that of its first token counts."""

    kind: ClassVar[str] = "token_classification"
    head: str | None = None
    """Checkpoint whose head is used [the merged models' own]."""
    text_column: str = "tokens"
    """The words: a list of texts."""
    label_column: str = "labels"
    """The label of each word: a list of names or numbers of classes."""
    labels: Mapping[str, Any] | None = None
    """Label of the data -> class of the head (name or number), where they differ."""
    entities: bool = True
    """Labels mark entities (B-PER, I-PER, O): count whole entities."""
    max_length: int | None = None
    """Longer texts are cut [the model's limit, at most 512]; words that are cut off count as O, or as wrong."""

    @property
    def model_kind(self) -> ModelKind:
        """Run the model with a head for each token."""
        return "token_classifier"

    def metric_names(self) -> tuple[str, ...]:
        """Return F1 over entities (micro), precision, recall, and the accuracy over words."""
        return ("f1", "precision", "recall", "accuracy") if self.entities else ("accuracy",)

    def prepare(self, split: Split, model_folder: str) -> PreparedTokens:
        """Tokenise the words; see `TaskSpec.prepare`."""
        table = read_table_of(self, split, [self.text_column, self.label_column])
        check_text(self, table, self.text_column, list)
        check_text(self, table, self.label_column, list)
        return PreparedTokens(self, split, table, model_folder)


class PreparedTokens(PreparedTask):
    """Words with their labels."""

    task: TokenClassification

    def __init__(self, task: TokenClassification, split: Split, table: Table, model_folder: str) -> None:
        """Tokenise the rows and check their labels."""
        self._names = LabelMap(task, head_config(task.head or model_folder), task.labels)
        if task.entities and not all_entity_labels(self._names.names):
            raise task.error(
                "entities",
                f"the head's labels ({', '.join(self._names.names[:6])}) do not mark entities; set it to false.",
            )
        self._encoder = TextEncoder(task, model_folder, task.max_length)
        if not self._encoder.tokenizer.is_fast:
            raise task.error(
                "kind", f"the tokenizer of {model_folder} cannot tell which word a token belongs to."
            )
        self._gold: list[list[int]] = []
        self._encodings: list[dict[str, Any]] = []
        self._places: list[list[int]] = []
        for i, (words, labels) in enumerate(
            zip(table.columns[task.text_column], table.columns[task.label_column], strict=True)
        ):
            if len(words) != len(labels) or not words:
                raise task.error("", f"{table.place(i)} has {len(words)} words and {len(labels)} labels.")
            self._gold.append([self._names.number(label, table.place(i)) for label in labels])
            encoding, places = self._encode(words)
            self._encodings.append(encoding)
            self._places.append(places)
        widths = [len(encoding["input_ids"]) for encoding in self._encodings]
        remarks = [*table.remarks, *self._encoder.remarks()]
        super().__init__(task, split, cut_by_tokens(widths, task.batch_tokens), remarks)

    def _encode(self, words: Sequence[str]) -> tuple[dict[str, Any], list[int]]:
        """Tokenise words; return too where each one's first token stands."""
        encoder = self._encoder
        encoding = encoder.tokenizer(
            list(words), is_split_into_words=True, truncation=True, max_length=encoder.max_length
        )
        places = [_CUT_OFF] * len(words)
        for token, word in enumerate(encoding.word_ids()):
            if word is not None and places[word] == _CUT_OFF:
                places[word] = token
        encoder.num_cut += places[-1] == _CUT_OFF
        return {name: encoding[name] for name in ("input_ids", "token_type_ids") if name in encoding}, places

    def _content(self) -> object:
        return [self._encodings, self._places, self._gold]

    def _score_batch(self, model: ResidentModel, batch: Sequence[int]) -> Scores:
        inputs = self._encoder.tensors([self._encodings[i] for i in batch], model.device)
        logits_BTK = model.module(self.task)(**inputs).logits.float()
        mask_BT = inputs["attention_mask"].bool()
        finite(self.task, logits_BTK[mask_BT].sum())
        predicted_BT = logits_BTK.argmax(2).cpu().numpy()
        rows = [self._score_example(i, predicted_BT[row]) for row, i in enumerate(batch)]
        names = ("found", "predicted", "gold", "correct", "words")
        return {
            name: np.array([row[column] for row in rows], dtype=np.int32) for column, name in enumerate(names)
        }

    def _score_example(self, example: int, predicted_T: Any) -> tuple[int, ...]:
        """Count entities in both, predicted, true; right words, words."""
        places, gold = self._places[example], self._gold[example]
        predicted = [_CUT_OFF if place == _CUT_OFF else int(predicted_T[place]) for place in places]
        counts = (0, 0, 0)
        if self.task.entities:
            names = self._names.names
            outside = [names[each] if each != _CUT_OFF else "O" for each in predicted]
            counts = count_entities(outside, [names[each] for each in gold])
        right = sum(
            each == true or (each == _CUT_OFF and self.task.entities and self._names.names[true] == "O")
            for each, true in zip(predicted, gold, strict=True)
        )
        return (*counts, right, len(gold))

    def _summarise(self, scores: Scores) -> dict[str, Estimate]:
        found = {"accuracy": metrics.ratio(scores["correct"], scores["words"])}
        if self.task.entities:
            hits, predicted, gold = (scores[name].astype(np.int64) for name in ("found", "predicted", "gold"))
            found["f1"] = metrics.ratio(2 * hits, predicted + gold)
            found["precision"] = metrics.ratio(hits, predicted)
            found["recall"] = metrics.ratio(hits, gold)
        return {name: found[name] for name in self.task.metric_names()}
