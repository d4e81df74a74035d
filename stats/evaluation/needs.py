"""Estimate what evaluating a model takes of a device's memory: its weights, and room for activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raymerge.stats.evaluation.parts import ModelNeeds
from raymerge.stats.evaluation.placement import WeightBytes
from raymerge.stats.evaluation.structures import Structure
from raymerge.stats.evaluation.task_spec import TaskSpec

#: Tensors as wide as a block's widest matrix that a forward pass holds at a time.
_LIVE_ACTIVATIONS = 4
#: Longest sequence of a task of lm-evaluation-harness that does not say.
_HARNESS_LENGTH = 2048


def needs_of(
    structures: Sequence[Structure], tasks: Sequence[TaskSpec], weights: WeightBytes, dtype: Any
) -> ModelNeeds:
    """Say what models need while tasks run on them.

    Args:
        structures: the models.
        tasks: by which batches are as large as they are.
        weights: of the models.
        dtype: torch's, in which they run.
    """
    tokens = max(map(_tokens, tasks))
    width = max(map(_widest, structures))
    vocabulary = max((_vocabulary(each) for each in structures if _gives_logits(tasks)), default=0)
    return ModelNeeds(
        home_weights=weights.home,
        block_weights=weights.blocks,
        idle_weights=sum(weights.idle.values()),
        home_activations=tokens * vocabulary * (dtype.itemsize + 4),  # once more, in float32
        block_activations=_LIVE_ACTIVATIONS * width * tokens * dtype.itemsize,
        cache_of_block=max(map(_key_width, structures)) * 2 * dtype.itemsize * _generated_tokens(tasks),
        dtype=str(dtype).removeprefix("torch."),
    )


def _tokens(task: TaskSpec) -> int:
    """Return the tokens of a task's largest batch; a sequence that is longer is a batch alone."""
    longest = getattr(task, "max_length", None)
    num_sequences: int | None = getattr(task, "batch_sequences", None)  # of the harness
    if num_sequences is not None:
        return num_sequences * (longest or _HARNESS_LENGTH)
    return max(task.batch_tokens, longest or 0)


def _generated_tokens(tasks: Sequence[TaskSpec]) -> int:
    return max((_tokens(task) for task in tasks if task.kind in ("generation", "harness")), default=0)


def _gives_logits(tasks: Sequence[TaskSpec]) -> bool:
    """Tell whether some task wants logits of every token."""
    return any(task.model_kind == "language_model" and task.kind != "generation" for task in tasks)


def _widest(structure: Structure) -> int:
    matrices = [parameter.shape[-2:] for parameter in structure.module.parameters() if parameter.ndim > 1]
    vocabulary = _vocabulary(structure)  # of embeddings; their other side counts
    return max((side for shape in matrices for side in shape if side != vocabulary), default=0)


def _vocabulary(structure: Structure) -> int:
    return int(getattr(structure.module.config.get_text_config(), "vocab_size", None) or 0)


def _key_width(structure: Structure) -> int:
    """Return the width of a token's keys in a block, by the names that configs have for it."""
    config = structure.module.config.get_text_config()
    hidden = int(getattr(config, "hidden_size", None) or 0)
    num_heads = getattr(config, "num_attention_heads", None)
    num_kept = getattr(config, "num_key_value_heads", None) or num_heads
    head_width = getattr(config, "head_dim", None) or (hidden // num_heads if num_heads else 0)
    return int(num_kept * head_width) if num_kept and head_width else hidden
