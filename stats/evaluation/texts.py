"""Tokenise texts for encoders and classifiers, and lay batches of them into tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from raymerge.stats.batches import Side, pad
from raymerge.stats.calibration_data import length_limit, load_tokenizer
from raymerge.stats.evaluation.structures import head_config
from raymerge.stats.evaluation.task_spec import TaskSpec

if TYPE_CHECKING:
    import torch

_DEFAULT_MAX_LENGTH = 512


class TextEncoder:
    """The tokenizer of a task with its longest length; counts what it cut."""

    def __init__(
        self,
        task: TaskSpec,
        model_folder: str,
        max_length: int | None,
        *,
        default_length: int = _DEFAULT_MAX_LENGTH,
    ) -> None:
        """Load the tokenizer.

        Raises:
            RecipeError: `max_length` is more than the model takes.
            CheckpointError: the folder has no tokenizer.
        """
        self._task = task
        self.tokenizer = load_tokenizer(model_folder, trust_code=task.trust_remote_code)
        limit = length_limit(head_config(model_folder), self.tokenizer)
        if max_length is not None and limit is not None and max_length > limit:
            raise task.error("max_length", f"{max_length:,}, but the model takes at most {limit:,} tokens.")
        self.max_length = max_length or min(limit or default_length, default_length)
        self.num_cut = 0
        pad_id = self.tokenizer.pad_token_id
        self.pad_id: int = pad_id if pad_id is not None else self.tokenizer.eos_token_id or 0

    def encode(self, text: str, pair: str | None = None) -> Mapping[str, Any]:
        """Tokenise a text or a pair, with the model's special tokens, cut at the longest length."""
        whole = self.tokenizer(text, pair)
        if len(whole["input_ids"]) <= self.max_length:
            return _plain(whole)
        self.num_cut += 1
        return _plain(self.tokenizer(text, pair, truncation=True, max_length=self.max_length))

    def remarks(self) -> list[str]:
        """Say what was cut."""
        if not self.num_cut:
            return []
        return [
            f"{self._task.name}: {self.num_cut:,} texts are longer than {self.max_length:,} tokens and were cut"
        ]

    def tensors(
        self, encodings: Sequence[Mapping[str, Any]], device: str, side: Side = "right"
    ) -> dict[str, torch.Tensor]:
        """Return the arguments of the model's forward for a batch."""
        ids, mask = pad([encoding["input_ids"] for encoding in encodings], self.pad_id, side)
        inputs = {"input_ids": ids, "attention_mask": mask.long()}
        if "token_type_ids" in encodings[0]:
            inputs["token_type_ids"] = pad([each["token_type_ids"] for each in encodings], 0, side)[0]
        return {name: tensor.to(device) for name, tensor in inputs.items()}


def _plain(encoding: Mapping[str, Any]) -> dict[str, Any]:
    return {name: encoding[name] for name in ("input_ids", "token_type_ids") if name in encoding}
