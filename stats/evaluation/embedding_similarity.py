"""Embedding similarity: the cosine of two texts' embeddings against what people think of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from raymerge.stats.evaluation import metrics
from raymerge.stats.evaluation.prepared import PreparedTask, cut_by_tokens, finite
from raymerge.stats.evaluation.rows import Table, check_text, numbers_of, read_table_of
from raymerge.stats.evaluation.scores import Estimate, Scores
from raymerge.stats.evaluation.task_spec import ModelKind, Split, TaskSpec
from raymerge.stats.evaluation.texts import TextEncoder

if TYPE_CHECKING:
    import torch

    from raymerge.stats.evaluation.resident import ResidentModel

Pooling = Literal["mean", "cls", "last"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingSimilarity(TaskSpec):
    """Embed pairs of texts and correlate their cosines with a number."""

    kind: ClassVar[str] = "embedding_similarity"
    text_column: str = "text"
    text_pair_column: str = "text_pair"
    label_column: str = "score"
    """How alike the two texts are; any scale."""
    pooling: Pooling = "mean"
    """An embedding is the mean of the last layer's states, or that of the first or last token."""
    max_length: int | None = None
    """Longer texts are cut [the model's limit, at most 512]."""

    @property
    def model_kind(self) -> ModelKind:
        """Run the model without a head."""
        return "encoder"

    def metric_names(self) -> tuple[str, ...]:
        """Return the correlation of ranks, and of numbers."""
        return ("spearman", "pearson")

    def prepare(self, split: Split, model_folder: str) -> PreparedPairs:
        """Tokenise the texts; see `TaskSpec.prepare`."""
        table = read_table_of(self, split, [self.text_column, self.text_pair_column, self.label_column])
        check_text(self, table, self.text_column)
        check_text(self, table, self.text_pair_column)
        return PreparedPairs(self, split, table, model_folder)


class PreparedPairs(PreparedTask):
    """Pairs of texts with a number each."""

    task: EmbeddingSimilarity

    def __init__(self, task: EmbeddingSimilarity, split: Split, table: Table, model_folder: str) -> None:
        """Tokenise both texts of every row."""
        self._gold_N = numbers_of(task, table, task.label_column)
        self._encoder = TextEncoder(task, model_folder, task.max_length)
        self._encodings = [
            tuple(
                self._encoder.encode(table.columns[name][i])
                for name in (task.text_column, task.text_pair_column)
            )
            for i in range(len(table))
        ]
        widths = [max(len(each["input_ids"]) for each in pair) for pair in self._encodings]
        batches = cut_by_tokens(widths, task.batch_tokens, [2] * len(widths))
        super().__init__(task, split, batches, [*table.remarks, *self._encoder.remarks()])

    def _content(self) -> object:
        return [self._encodings, self._gold_N.tolist()]

    def _score_batch(self, model: ResidentModel, batch: Sequence[int]) -> Scores:
        import torch

        texts = [self._encodings[i][side] for side in (0, 1) for i in batch]
        inputs = self._encoder.tensors(texts, model.device)
        states_BTD = model.module(self.task)(**inputs).last_hidden_state.float()
        embedded_BD = pool(states_BTD, inputs["attention_mask"], self.task.pooling)
        cosine_B = torch.nn.functional.cosine_similarity(embedded_BD[: len(batch)], embedded_BD[len(batch) :])
        return {"cosine": finite(self.task, cosine_B), "gold": self._gold_N[list(batch)]}

    def _summarise(self, scores: Scores) -> dict[str, Estimate]:
        return {
            "spearman": metrics.spearman(scores["cosine"], scores["gold"]),
            "pearson": metrics.pearson(scores["cosine"], scores["gold"]),
        }


def pool(states_BTD: torch.Tensor, mask_BT: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """Make one vector of the states of each text; padding, on the right, does not count."""
    if pooling == "cls":
        return states_BTD[:, 0]
    if pooling == "last":
        rows: Any = np.arange(len(states_BTD))
        return states_BTD[rows, mask_BT.sum(1) - 1]
    weights_BT1 = mask_BT[..., None].to(states_BTD.dtype)
    return (states_BTD * weights_BT1).sum(1) / weights_BT1.sum(1)
