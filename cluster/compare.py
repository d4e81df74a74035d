"""Say whether checkpoints belong together, from headers and small files alone.

What two checkpoints have in common is not said; `compare_headers` lists where they differ:
tensor sets, shapes, dtypes, vocabularies and the settings of config.json that change what a
network computes.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from raymerge.cluster.layers import main_stacks
from raymerge.cluster.matched import LoadedModel
from raymerge.cluster.vocabulary_rows import num_rows_of
from raymerge.merge_actors.checkpoint.folder import Checkpoint
from raymerge.merge_actors.checkpoint.header import TensorInfo
from raymerge.merge_actors.errors import CheckpointError
from raymerge.merge_actors.wording import counted, some_of

#: Settings of config.json that change what a network computes, by their last name.
_CONFIG_KEYS = frozenset(
    """architectures model_type hidden_size n_embd d_model intermediate_size n_inner d_ff
    num_hidden_layers n_layer num_layers num_attention_heads n_head num_heads num_key_value_heads
    head_dim d_kv vocab_size type_vocab_size max_position_embeddings n_positions sliding_window
    position_embedding_type
    tie_word_embeddings rope_theta rope_type type factor partial_rotary_factor
    rms_norm_eps layer_norm_eps layer_norm_epsilon hidden_act hidden_activation activation_function
    attention_bias mlp_bias num_experts num_local_experts n_routed_experts num_experts_per_tok
    moe_intermediate_size quant_method bits""".split()
)
#: Old configs hold rope_theta at the top, newer ones in one of these.
_ROPE_KEYS = ("rope_scaling", "rope_parameters")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSummary:
    """What a checkpoint holds, from headers alone."""

    model: str
    """As the user named it."""
    folder: str
    architecture: str
    """The classes that config.json names, else its model_type, else "unknown"."""
    num_layers: int
    """Of the main stack; 0 if no layer is found."""
    num_tensors: int
    num_parameters: int
    """Tied tensors count once."""
    num_bytes: int
    dtypes: Mapping[str, int]
    """Parameters of each dtype, most first."""
    vocabulary_rows: int | None
    """Rows of the embeddings; None if there are none."""
    tied: Mapping[str, str]
    """alias -> tensor, for tensors that the file holds twice."""
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Difference:
    """One way in which a model differs from another, beside its values."""

    kind: Literal["tensors", "shapes", "dtypes", "vocabulary", "tokenizer", "config"]
    text: str


def summarize(model: str, checkpoint: Checkpoint) -> ModelSummary:
    """Describe a checkpoint."""
    config = checkpoint.config
    dtypes: Counter[str] = Counter()
    for info in checkpoint.tensors.values():
        dtypes[info.dtype] += info.num_elements
    return ModelSummary(
        model=model,
        folder=checkpoint.folder,
        architecture=", ".join(config.get("architectures") or []) or str(config.get("model_type", "unknown")),
        num_layers=max(main_stacks(checkpoint.tensors, config).values(), default=0),
        num_tensors=len(checkpoint.tensors),
        num_parameters=checkpoint.num_parameters,
        num_bytes=checkpoint.num_bytes,
        dtypes=dict(dtypes.most_common()),
        vocabulary_rows=num_rows_of(LoadedModel(model, checkpoint)),
        tied=checkpoint.tied,
        fingerprint=checkpoint.fingerprint,
    )


def find_tensor(checkpoint: Checkpoint, name: str) -> TensorInfo | None:
    """Return a tensor by its name or by an alias of it."""
    return checkpoint.tensors.get(checkpoint.tied.get(name, name))


def compare_headers(first: str, one: Checkpoint, second: str, other: Checkpoint) -> list[Difference]:
    """List the differences of two checkpoints, except those of values.

    Args:
        first: name of `one` in the texts.
        one: the base, or the earlier model.
        second: name of `other` in the texts.
        other: the model that is compared with it.
    """
    found = _compare_tensor_sets(first, one, second, other)
    pairs = [(info, find_tensor(other, name)) for name, info in one.tensors.items()]
    common = [(left, right) for left, right in pairs if right is not None]
    shapes = [(left, right) for left, right in common if left.shape != right.shape]
    if shapes:
        left, right = shapes[0]
        found.append(
            Difference(
                "shapes",
                f"{_tensors(len(shapes))} of another shape, such as {left.name}: {list(left.shape)} in "
                f"{first}, {list(right.shape)} in {second}",
            )
        )
    dtypes = Counter((left.dtype, right.dtype) for left, right in common if left.dtype != right.dtype)
    for (left_dtype, right_dtype), count in dtypes.most_common():
        text = f"{_tensors(count)} of another dtype: {left_dtype} in {first}, {right_dtype} in {second}"
        found.append(Difference("dtypes", text))
    return (
        found + _compare_vocabularies(first, one, second, other) + _compare_configs(first, one, second, other)
    )


def _compare_tensor_sets(first: str, one: Checkpoint, second: str, other: Checkpoint) -> list[Difference]:
    # Aliases are left out: a tied head may be stored in one of the models only.
    found = []
    for has, lacks, left, right in ((first, second, one, other), (second, first, other, one)):
        names = [name for name in left.tensors if name not in right.tensors and name not in right.tied]
        if names:
            found.append(
                Difference(
                    "tensors", f"{_tensors(len(names))} only in {has}, not in {lacks}: {some_of(names)}"
                )
            )
    return found


def _compare_vocabularies(first: str, one: Checkpoint, second: str, other: Checkpoint) -> list[Difference]:
    found = []
    rows, other_rows = num_rows_of(LoadedModel(first, one)), num_rows_of(LoadedModel(second, other))
    if rows != other_rows and rows is not None and other_rows is not None:
        text = f"embeddings have {rows:,} rows in {first}, {other_rows:,} in {second}"
        found.append(Difference("vocabulary", text))
    tokens, other_tokens = read_vocabulary(one.folder), read_vocabulary(other.folder)
    if tokens is None or other_tokens is None or tokens == other_tokens:
        return found
    parts = []
    for name, mine, others in ((first, tokens, other_tokens), (second, other_tokens, tokens)):
        only = [token for token in mine if token not in others]
        if only:
            parts.append(
                f"{counted(len(only), 'token')} only in {name} ({some_of([repr(token) for token in only])})"
            )
    moved = [token for token, number in tokens.items() if other_tokens.get(token, number) != number]
    if moved:
        example = f"{moved[0]!r} is {tokens[moved[0]]} and {other_tokens[moved[0]]}"
        parts.append(f"{counted(len(moved), 'token')} with another id ({example})")
    return [*found, Difference("tokenizer", "; ".join(parts))]


def read_vocabulary(folder: str) -> dict[str, int] | None:
    """Return the id of every token in tokenizer.json; None if there is no such file.

    Raises:
        CheckpointError: the file is not a tokenizer's.
    """
    path = os.path.join(folder, "tokenizer.json")
    if not os.path.exists(path):
        return None
    try:
        with open(path, encoding="utf-8") as stream:
            content = json.load(stream)
        vocabulary = content["model"]["vocab"]
        # Unigram models list [token, score] pairs in the order of their ids.
        tokens = (
            {pair[0]: i for i, pair in enumerate(vocabulary)}
            if isinstance(vocabulary, list)
            else dict(vocabulary)
        )
        return tokens | {token["content"]: token["id"] for token in content.get("added_tokens") or []}
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path} is not a readable tokenizer ({reason}); download it again.") from error


def _compare_configs(first: str, one: Checkpoint, second: str, other: Checkpoint) -> list[Difference]:
    """Compare the settings that both configs state; what only one states is the writer's version."""
    settings, others = _settings(one.config), _settings(other.config)
    return [
        Difference("config", f"{key} is {value!r} in {first}, {others[key]!r} in {second}")
        for key, value in settings.items()
        if key in others and others[key] != value
    ]


def _settings(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= _settings(value, prefix if key in _ROPE_KEYS else f"{prefix}{key}.")
        elif key in _CONFIG_KEYS and value is not None:
            found[prefix + key] = value
    return found


def _tensors(count: int) -> str:
    return counted(count, "tensor")
