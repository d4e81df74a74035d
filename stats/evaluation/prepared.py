"""A task whose data are read and tokenised: what an evaluator scores models with, batch by batch.

Batches are cut by tokens from the data alone and stand in a fixed random order, so that the first
ones are a fair sample (pruning looks at them) and no metric depends on who scored which.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from raymerge.stats.evaluation.scores import EXAMPLE, Estimate, Scores, concatenate
from raymerge.stats.evaluation.task_spec import EvaluationError, Split, TaskSpec

if TYPE_CHECKING:
    import torch

    from raymerge.stats.evaluation.resident import ResidentModel

#: Of the order of batches: fixed, so that a growing number of batches is the same data in every run.
_ORDER_SEED = 0


class PreparedTask(ABC):
    """A task, the tokenised examples of one split, and the batches that they are scored in."""

    def __init__(
        self, task: TaskSpec, split: Split, batches: Sequence[Sequence[int]], remarks: Sequence[str] = ()
    ) -> None:
        """Take the batches: numbers of examples, each in one of them."""
        self.task, self.split = task, split
        self.batches = tuple(tuple(batch) for batch in batches)
        self.remarks = tuple(remarks)
        """Sentences for the user."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of what `summarise` returns, the main one first."""
        return self.task.metric_names()

    @property
    def fingerprint(self) -> str:
        """128 bits in hex over the tokenised examples and their labels."""
        text = json.dumps(self._content(), default=str, separators=(",", ":"))
        return xxhash.xxh3_128_hexdigest(text.encode())

    @property
    def num_batches(self) -> int:
        """Count the batches."""
        return len(self.batches)

    @property
    def num_examples(self) -> int:
        """Count the examples of all batches."""
        return sum(map(len, self.batches))

    def score(self, model: ResidentModel, begin_batch: int = 0, end_batch: int | None = None) -> Scores:
        """Score the examples of some batches.

        Args:
            model: holds the parameters; it was made for this task among others.
            begin_batch: first batch.
            end_batch: batch after the last one; None for all that follow.

        Raises:
            EvaluationError: the task cannot score this model.
        """
        import torch

        parts = []
        with torch.inference_mode():
            for batch in self.batches[begin_batch:end_batch]:
                part = self._score_batch(model, batch)
                parts.append({**part, EXAMPLE: np.asarray(batch, dtype=np.int64)})
        return concatenate(parts)

    def summarise(self, scores: Scores) -> dict[str, Estimate]:
        """Make metrics of the scores of some or all examples.

        Args:
            scores: of `score`, or several of them after `scores.concatenate`.
        """
        order = np.argsort(scores[EXAMPLE], kind="stable")
        return self._summarise({name: array[order] for name, array in scores.items()})

    @abstractmethod
    def _score_batch(self, model: ResidentModel, batch: Sequence[int]) -> Scores:
        """Score the examples of a batch; the arrays have one row each."""

    @abstractmethod
    def _content(self) -> object:
        """Return what is scored, as JSON values."""

    @abstractmethod
    def _summarise(self, scores: Scores) -> dict[str, Estimate]:
        """Make metrics of scores that are sorted by example."""


def cut_by_tokens(
    widths: Sequence[int], batch_tokens: int, num_sequences: Sequence[int] | None = None
) -> list[tuple[int, ...]]:
    """Cut examples into batches of like length, in a fixed random order.

    Args:
        widths: tokens of each example's longest sequence.
        batch_tokens: the most tokens of a batch, padding included; an example that has more is alone.
        num_sequences: of each example; None for one each.
    """
    counts = num_sequences or [1] * len(widths)
    order = sorted(range(len(widths)), key=lambda i: (-widths[i], i))
    batches: list[tuple[int, ...]] = []
    current: list[int] = []
    num = 0
    for i in order:
        if current and (num + counts[i]) * widths[current[0]] > batch_tokens:
            batches.append(tuple(current))
            current, num = [], 0
        current.append(i)
        num += counts[i]
    if current:
        batches.append(tuple(current))
    return [batches[i] for i in np.random.default_rng(_ORDER_SEED).permutation(len(batches))]


def finite(task: TaskSpec, values: torch.Tensor) -> Any:
    """Return the numbers of a small tensor as float64.

    Raises:
        EvaluationError: one is NaN or infinite, so that no metric would mean anything.
    """
    array = values.detach().to("cpu").double().numpy()
    if not np.isfinite(array).all():
        raise EvaluationError(
            f"{task.name}: the model's outputs hold NaN or infinity; its weights overflowed or the merge left "
            "the region where the model works (a larger evaluation dtype tells which)."
        )
    return array
