"""Read the tokens of a model and their ids from its tokenizer files.

tokenizer.json is read as the JSON that it is, which needs no library and takes little time;
only a model without one is opened with transformers, from local files, never with code of the
model's own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from raymerge.cluster.vocabulary_rows import is_vocabulary_tensor
from raymerge.merge_actors.checkpoint.files import read_json
from raymerge.merge_actors.errors import CheckpointError

if TYPE_CHECKING:
    from raymerge.cluster.matched import LoadedModel

TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
#: Files that hold the tokens of models without a tokenizer.json.
_SLOW_FILES = (
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "sentencepiece.model",
    "tiktoken.model",
    "tekken.json",
)


def has_tokenizer(folder: str) -> bool:
    """Return whether a folder holds a tokenizer."""
    return any(os.path.exists(os.path.join(folder, name)) for name in (TOKENIZER_JSON, *_SLOW_FILES))


def tokenizer_folder(model: LoadedModel) -> str:
    """Return the folder with a model's tokenizer: the adapter's, if the adapter brings its own embedding."""
    adapter = model.adapter
    if adapter is None or not has_tokenizer(adapter.folder):
        return model.checkpoint.folder
    changes = any(len(t.shape) == 2 and is_vocabulary_tensor(t, t.shape[0]) for t in adapter.full.values())
    return adapter.folder if changes else model.checkpoint.folder


def read_token_ids(model: LoadedModel) -> dict[str, int] | None:
    """Return the id of every token of a model; None if the model has no tokenizer.

    Raises:
        CheckpointError: the tokenizer files are not to be understood.
    """
    folder = tokenizer_folder(model)
    if os.path.exists(os.path.join(folder, TOKENIZER_JSON)):
        return json_token_ids(read_json(os.path.join(folder, TOKENIZER_JSON)), folder)
    if not has_tokenizer(folder):
        return None
    vocabulary = load_tokenizer(folder).get_vocab()
    return {str(token): int(number) for token, number in vocabulary.items()}


def json_token_ids(tokenizer: Mapping[str, Any], folder: str) -> dict[str, int]:
    """Return the ids that a tokenizer.json gives: those of its model, then the added tokens.

    Raises:
        CheckpointError: it is no tokenizer.
    """
    vocabulary = (tokenizer.get("model") or {}).get("vocab")
    if isinstance(vocabulary, Mapping):
        ids = {str(token): int(number) for token, number in vocabulary.items()}
    elif isinstance(vocabulary, list):
        ids = {str(token): number for number, (token, _) in enumerate(vocabulary)}
    else:
        raise CheckpointError(
            f"{os.path.join(folder, TOKENIZER_JSON)} holds no vocabulary under model.vocab; save the "
            "tokenizer again or merge with `vocabulary: pad` or `truncate`, which need none."
        )
    for token in tokenizer.get("added_tokens") or []:
        ids[token["content"]] = int(token["id"])
    return ids


def load_tokenizer(folder: str) -> Any:
    """Open the tokenizer of a local folder with transformers.

    Raises:
        CheckpointError: transformers cannot open it.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError, TypeError, AttributeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"transformers cannot open the tokenizer in {folder}: {reason}; save it again as "
            "tokenizer.json, or merge with `vocabulary: pad` or `truncate`, which need none."
        ) from error
