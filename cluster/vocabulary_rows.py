"""Find the tensors that have one row per token, and say how rows of one vocabulary become rows of another."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raymerge.cluster.layers import split_layer
from raymerge.merge_actors.checkpoint.header import TensorInfo
from raymerge.merge_actors.dtypes import is_float
from raymerge.merge_actors.errors import MismatchError
from raymerge.merge_actors.task import RowRun

if TYPE_CHECKING:
    from raymerge.cluster.matched import LoadedModel

#: Embeddings, output layers and their biases, as architectures name them, outside the layers ...
_VOCABULARY_TENSOR = re.compile(
    r"(?:.*\.)?(?:embed_tokens|word_embeddings?|wte|shared|embed|embed_in|embeddings?|tok_embeddings|tokens_embed"
    r"|token_embeddings?|lm_head|embed_out|output|output_projection|proj_out|vocab_projector|generator_lm_head"
    r"|lm_head\.decoder|lm_head\.out_proj|head|pred_layer\.proj|predictions(?:\.decoder)?|decoder)\.(?:weight|bias)"
)
#: ... and in them: layers that predict several tokens ahead have an embedding and a head each.
_VOCABULARY_REST = re.compile(r"(?:.*\.)?(?:embed_tokens|lm_head|shared_head\.head)\.(?:weight|bias)")
#: Output layers, which a config may tie to the embedding.
_HEAD = re.compile(
    r"(?:.*\.)?(?:lm_head(?:\.decoder|\.out_proj)?|embed_out|output_projection|proj_out|vocab_projector"
    r"|generator_lm_head|predictions\.decoder)\.weight"
)
_SUB_CONFIGS = ("text_config", "language_config", "llm_config", "thinker_config", "decoder")


@dataclass(frozen=True, slots=True)
class BorrowedRow:
    """One row of the output that comes from another model's tensor, or is zero."""

    to: int
    model: str | None
    """Key of the model; None for a row of zeros."""
    source: int = 0


@dataclass(frozen=True, slots=True)
class ModelRows:
    """How the rows of one model become rows of the output."""

    num_rows: int
    """Rows of the model's own embedding."""
    runs: tuple[RowRun, ...]
    """Its own rows, ascending by `to`."""
    borrowed: tuple[BorrowedRow, ...] = ()
    """Rows from elsewhere, ascending by `to`."""

    def is_identity(self, num_rows: int) -> bool:
        """Return whether every row stays where it is."""
        own = (RowRun(0, 0, num_rows),) if num_rows else ()
        return self.num_rows == num_rows and self.runs == own and not self.borrowed


def is_vocabulary_tensor(info: TensorInfo, num_rows: int) -> bool:
    """Return whether a tensor has one row per token of a vocabulary of `num_rows`."""
    if len(info.shape) not in (1, 2) or info.shape[0] != num_rows or not is_float(info.dtype):
        return False
    layer = split_layer(info.name)
    if layer is not None:
        return _VOCABULARY_REST.fullmatch(layer.rest) is not None
    return _VOCABULARY_TENSOR.fullmatch(info.name) is not None


def is_head(name: str) -> bool:
    """Return whether a tensor outside the layers is an output layer over the vocabulary."""
    return split_layer(name) is None and _HEAD.fullmatch(name) is not None


def tensors_of(model: LoadedModel) -> dict[str, TensorInfo]:
    """Return a model's tensors as its adapter leaves them."""
    full = model.adapter.full if model.adapter else {}
    return {**model.checkpoint.tensors, **full}


def num_rows_of(model: LoadedModel) -> int | None:
    """Return the rows of a model's embeddings: config.json's vocab_size where a tensor has as many."""
    matrices = [
        info
        for info in tensors_of(model).values()
        if len(info.shape) == 2 and is_vocabulary_tensor(info, info.shape[0])
    ]
    # An embedding is what counts; "output" and "decoder" may be names of other things.
    embeddings = [info for info in matrices if any(part in info.name for part in ("emb", "wte", "shared"))]
    counts = [info.shape[0] for info in embeddings or matrices]
    stated = stated_vocab_size(model.checkpoint.config)
    return stated if stated in counts else max(counts, default=None)


def require_rows(model: LoadedModel) -> int:
    """Return the rows of a model's embeddings.

    Raises:
        MismatchError: it has none.
    """
    num_rows = num_rows_of(model)
    if num_rows is None:
        raise MismatchError(
            f"model {model.key} has no tensor with a row per token (embed_tokens, lm_head, ...), "
            "so there is no vocabulary to change; remove 'tokenizer' and 'vocabulary' from the recipe"
        )
    return num_rows


def stated_vocab_size(config: Mapping[str, object]) -> int | None:
    """Return the vocab_size that a config.json states, for the text model where there are several."""
    for part in (config, *(config.get(key) for key in _SUB_CONFIGS)):
        if isinstance(part, Mapping) and isinstance(part.get("vocab_size"), int):
            return int(part["vocab_size"])
    return None


def find_counterpart(model: LoadedModel, name: str) -> TensorInfo | None:
    """Return the tensor that plays the part of a vocabulary tensor `name` in a model.

    A head that is stored nowhere because it is tied is the embedding.
    """
    tensors = tensors_of(model)
    info = tensors.get(model.checkpoint.tied.get(name, name))
    is_tied = model.checkpoint.config.get("tie_word_embeddings", True) is not False
    num_rows = num_rows_of(model)
    if info is not None or not is_tied or not name.endswith(".weight") or num_rows is None:
        return info
    stored = (each for each in tensors.values() if is_vocabulary_tensor(each, num_rows))
    return next((each for each in stored if len(each.shape) == 2), None)


def coalesce(pairs: Iterable[tuple[int, int]], replaced: frozenset[int] = frozenset()) -> tuple[RowRun, ...]:
    """Join (output row, own row) pairs, ascending by output row, into runs.

    Args:
        pairs: rows that the model has.
        replaced: output rows that the fill replaces.
    """
    runs: list[RowRun] = []
    begin = source = count = 0
    is_replaced = False
    for to, own in pairs:
        if count and to == begin + count and own == source + count and (to in replaced) == is_replaced:
            count += 1
            continue
        if count:
            runs.append(RowRun(begin, source, count, is_replaced=is_replaced))
        begin, source, count, is_replaced = to, own, 1, to in replaced
    if count:
        runs.append(RowRun(begin, source, count, is_replaced=is_replaced))
    return tuple(runs)


def round_up(num_rows: int, multiple: int | None) -> int:
    """Return the number of rows, raised to a multiple."""
    return math.ceil(num_rows / multiple) * multiple if multiple else num_rows
