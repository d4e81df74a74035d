"""Loss and perplexity of a causal language model, per token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from raymerge.stats.evaluation import metrics
from raymerge.stats.evaluation.chat import render
from raymerge.stats.evaluation.language import LanguageEncoder, TokenSequence, log_likelihoods
from raymerge.stats.evaluation.prepared import PreparedTask, cut_by_tokens, finite
from raymerge.stats.evaluation.rows import Table, check_text, read_table_of
from raymerge.stats.evaluation.scores import Estimate, Scores
from raymerge.stats.evaluation.task_spec import ModelKind, Split, TaskSpec

if TYPE_CHECKING:
    from raymerge.stats.evaluation.resident import ResidentModel


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss(TaskSpec):
    """Predict each token of texts from those before it: sum of -log p over all tokens / number of tokens.

    A text's first token is predicted from nothing and does not count, as in transformers' own loss.
    """

    kind: ClassVar[str] = "loss"
    text_column: str = "text"
    prompt_column: str | None = None
    """Text that stands before and does not count."""
    chat_template: bool = False
    """The text column holds conversations: lists of {role, content}."""
    packed: bool = False
    """Join all texts, an end-of-text token after each, and cut them evenly at `max_length`."""
    max_length: int | None = None
    """Longest sequence in tokens [the model's limit, at most 2,048]; longer texts are cut."""

    def __post_init__(self) -> None:
        TaskSpec.__post_init__(self)
        if self.prompt_column and (self.packed or self.chat_template):
            other = "packed" if self.packed else "chat_template"
            raise self.error(other, "goes with texts that have no prompt_column; leave one of the two out.")

    @property
    def model_kind(self) -> ModelKind:
        """Run the language model."""
        return "language_model"

    def metric_names(self) -> tuple[str, ...]:
        """Return the loss in nats per token, and its exponential."""
        return ("loss", "perplexity")

    def prepare(self, split: Split, model_folder: str) -> PreparedLoss:
        """Tokenise the texts; see `TaskSpec.prepare`."""
        table = read_table_of(
            self, split, [self.text_column, *([self.prompt_column] if self.prompt_column else [])]
        )
        check_text(self, table, self.text_column, list if self.chat_template else str)
        if self.prompt_column:
            check_text(self, table, self.prompt_column)
        encoder = LanguageEncoder(self, model_folder, self.max_length)
        found = _packed(self, table, encoder) if self.packed else _documents(self, table, encoder)
        kept = [sequence for sequence in found if sequence.num_targets > 0]
        if not kept:
            raise self.error(split, "no text has two tokens or more, so there is nothing to predict.")
        remarks = [*table.remarks, *encoder.remarks()]
        if len(kept) < len(found):
            remarks.append(f"{self.name}: {len(found) - len(kept):,} texts of a single token are left out")
        return PreparedLoss(self, split, kept, encoder, remarks)


class PreparedLoss(PreparedTask):
    """Token sequences."""

    task: Loss

    def __init__(
        self,
        task: Loss,
        split: Split,
        sequences: Sequence[TokenSequence],
        encoder: LanguageEncoder,
        remarks: Sequence[str],
    ) -> None:
        """Cut the sequences into batches."""
        self.sequences, self._encoder = tuple(sequences), encoder
        widths = [len(sequence.ids) for sequence in sequences]
        super().__init__(task, split, cut_by_tokens(widths, task.batch_tokens), remarks)

    def _content(self) -> object:
        return [(sequence.ids, sequence.num_targets) for sequence in self.sequences]

    def _score_batch(self, model: ResidentModel, batch: Sequence[int]) -> Scores:
        sequences = [self.sequences[i] for i in batch]
        found_B = log_likelihoods(
            model.module(self.task), sequences, pad_id=self._encoder.pad_id, device=model.device
        )
        return {
            "nll": -finite(self.task, found_B),
            "tokens": np.array([sequence.num_targets for sequence in sequences], dtype=np.int64),
        }

    def _summarise(self, scores: Scores) -> dict[str, Estimate]:
        loss = metrics.ratio(scores["nll"], scores["tokens"])
        return {"loss": loss, "perplexity": metrics.exponential(loss)}


def _documents(task: Loss, table: Table, encoder: LanguageEncoder) -> list[TokenSequence]:
    found = []
    for i, text in enumerate(table.columns[task.text_column]):
        if task.prompt_column:
            found.append(encoder.pair(table.columns[task.prompt_column][i], text))
            continue
        if task.chat_template:
            ids = encoder.plain_ids(render(task, encoder.tokenizer, text, table.place(i)))
        else:
            ids = encoder.tokenizer(text)["input_ids"]
        encoder.num_cut += len(ids) > encoder.max_length
        kept = tuple(ids[: encoder.max_length])
        found.append(TokenSequence(kept, max(len(kept) - 1, 0)))
    return found


def _packed(task: Loss, table: Table, encoder: LanguageEncoder) -> list[TokenSequence]:
    end_id = encoder.tokenizer.eos_token_id
    joined: list[int] = []
    for i, text in enumerate(table.columns[task.text_column]):
        rendered = render(task, encoder.tokenizer, text, table.place(i)) if task.chat_template else text
        joined += encoder.plain_ids(rendered)
        joined += [] if end_id is None else [end_id]
    cuts = range(0, len(joined), encoder.max_length)
    pieces = [tuple(joined[begin : begin + encoder.max_length]) for begin in cuts]
    return [TokenSequence(piece, len(piece) - 1) for piece in pieces]
