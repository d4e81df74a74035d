"""Tokenise contexts and continuations for language models, and measure how likely continuations are.

Shapes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raymerge.stats.batches import Side, pad
from raymerge.stats.evaluation.task_spec import TaskSpec
from raymerge.stats.evaluation.texts import TextEncoder

if TYPE_CHECKING:
    import torch

#: Longest sequence where neither the task nor the model says.
DEFAULT_MAX_LENGTH = 2048


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """Tokens of which the last ones are predicted."""

    ids: tuple[int, ...]
    num_targets: int
    """Predicted are ids[-num_targets:]; at least one token stands before them."""


class LanguageEncoder(TextEncoder):
    """The tokenizer of a task for a language model."""

    def __init__(self, task: TaskSpec, model_folder: str, max_length: int | None) -> None:
        """Load the tokenizer; see `TextEncoder`."""
        super().__init__(task, model_folder, max_length, default_length=DEFAULT_MAX_LENGTH)

    def pair(self, context: str, continuation: str) -> TokenSequence:
        """Tokenise a continuation after its context as lm-evaluation-harness does (0.4.13, `_encode_pair`).

        Spaces at the end of the context go over to the continuation; both are tokenised as one text, and
        what is beyond the context's own tokens is the continuation's. An empty context is one token:
        beginning of text, or end of text. What is too long loses its beginning.
        """
        num_spaces = len(context) - len(context.rstrip())
        if num_spaces:
            context, continuation = context[:-num_spaces], context[-num_spaces:] + continuation
        if context:
            before = self._ids(context)
            after = self._ids(context + continuation)[len(before) :]
        else:
            before, after = self._after_nothing(continuation)
        ids = [*before, *after][-(self.max_length + 1) :]
        self.num_cut += len(before) + len(after) > len(ids)
        return TokenSequence(tuple(ids), min(len(after), len(ids) - 1))

    def _after_nothing(self, continuation: str) -> tuple[list[int], list[int]]:
        ids = self.plain_ids(continuation)
        first = self._first_id()
        if first is None or ids[:1] == [first]:
            return ids[:1], ids[1:]
        return [first], ids

    def _first_id(self) -> int | None:
        bos: int | None = self.tokenizer.bos_token_id
        end: int | None = self.tokenizer.eos_token_id
        return end if bos is None else bos

    def _ids(self, text: str) -> list[int]:
        first = self._first_id()
        if first is not None and text.startswith(str(self.tokenizer.decode([first]))):
            return self.plain_ids(text)
        return list(self.tokenizer(text)["input_ids"])

    def plain_ids(self, text: str) -> list[int]:
        """Tokenise without special tokens."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def log_likelihoods(
    module: Any, sequences: Sequence[TokenSequence], *, pad_id: int, device: str, side: Side = "right"
) -> torch.Tensor:
    """Sum log p(token | tokens before it) over the targets of each sequence.

    Sequences that differ in their last token alone share a forward pass.

    Args:
        module: a causal language model of transformers.
        sequences: of one batch.
        pad_id: what stands where no token is.
        device: where the model runs.
        side: where padding goes; the result is the same up to rounding.

    Returns:
        (B,) float64, on the CPU.
    """
    import torch

    inputs = list(dict.fromkeys(sequence.ids[:-1] for sequence in sequences))
    row_of = {ids: row for row, ids in enumerate(inputs)}
    ids_BT, mask_BT = pad(inputs, pad_id, side)
    width = ids_BT.shape[1]
    spans = []  # of each sequence: where the logits of its targets stand
    for sequence in sequences:
        end = width if side == "left" else len(sequence.ids) - 1
        spans.append((end - sequence.num_targets, end))
    begin = min(first for first, _ in spans)
    arguments: dict[str, Any] = {}
    if begin and _can_skip_logits(module):
        arguments["logits_to_keep"] = torch.arange(begin, width, device=device)
    else:
        begin = 0
    if side == "left":
        arguments["position_ids"] = (mask_BT.long().cumsum(1) - 1).clamp(min=0).to(device)
    logits_BTV = module(
        input_ids=ids_BT.to(device), attention_mask=mask_BT.long().to(device), use_cache=False, **arguments
    ).logits
    sums = []
    for sequence, (first, end) in zip(sequences, spans, strict=True):
        logits_TV = logits_BTV[row_of[sequence.ids[:-1]], first - begin : end - begin].float()
        targets_T = torch.tensor(sequence.ids[-sequence.num_targets :], device=logits_TV.device)
        chosen_T = logits_TV.gather(1, targets_T[:, None])[:, 0]
        sums.append((chosen_T - logits_TV.logsumexp(1)).double().sum())
    return torch.stack(sums).cpu()


def _can_skip_logits(module: Any) -> bool:
    return "logits_to_keep" in inspect.signature(module.forward).parameters
