"""Write the tokenizer of an output: copied from one model, or extended to the planned tokens.

An extended tokenizer is written as tokenizer.json alone, because vocab.txt, merges.txt or a
sentencepiece model beside it would still say the old thing; it is then opened with transformers
and every token's id compared with the plan.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

from raymerge.cluster.tokenizer_extension import extend_tokenizer
from raymerge.cluster.tokenizer_tokens import (
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
    has_tokenizer,
    load_tokenizer,
    tokenizer_folder,
)
from raymerge.cluster.vocabulary import Vocabulary
from raymerge.merge_actors.checkpoint.files import read_json
from raymerge.merge_actors.errors import OutputError

if TYPE_CHECKING:
    from raymerge.cluster.matched import LoadedModel

#: What holds the tokens, besides tokenizer.json.
_TOKEN_FILES = ("vocab.*", "merges.txt", "*.model", "*.tiktoken", "added_tokens.json", "tekken.json")
_OTHER_FILES = (
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenization_*.py",
)
_TEMPLATE_FOLDERS = ("additional_chat_templates", "chat_templates")
#: Keys of tokenizer_config.json that name files of whoever saved it.
_PATH_KEYS = ("name_or_path", "tokenizer_file", "special_tokens_map_file", "vocab_file", "merges_file")


def write_tokenizer(
    folder: str, source: LoadedModel, vocabulary: Vocabulary | None, models: Mapping[str, LoadedModel]
) -> list[str]:
    """Write the tokenizer files of an output; config.json has to be there.

    Args:
        folder: where to.
        source: the model whose tokenizer it is.
        vocabulary: tokens to add; None to copy.
        models: by `ModelRef.key`.

    Returns:
        remarks for the user.

    Raises:
        CheckpointError: a tokenizer cannot be read.
        OutputError: transformers gives a token of the written tokenizer another id than planned.
    """
    origin = tokenizer_folder(source)
    if not has_tokenizer(origin):
        return [f"no tokenizer written: {source.key} has none"]
    is_extended = vocabulary is not None and bool(vocabulary.added)
    _copy(origin, folder, (*_OTHER_FILES,) if is_extended else (TOKENIZER_JSON, *_TOKEN_FILES, *_OTHER_FILES))
    config_path = os.path.join(origin, TOKENIZER_CONFIG)
    config = read_json(config_path) if os.path.exists(config_path) else {}
    if vocabulary is not None and is_extended:
        assert vocabulary.token_ids is not None
        others = {
            key: _tokenizer_json(models[key]) for key in dict.fromkeys(vocabulary.added.values()) if key
        }
        extended = extend_tokenizer(_tokenizer_json(source), vocabulary.token_ids, vocabulary.added, others)
        write_json(os.path.join(folder, TOKENIZER_JSON), extended)
        _describe_added(config, extended, vocabulary.added)
    if config:
        write_json(
            os.path.join(folder, TOKENIZER_CONFIG),
            {key: value for key, value in config.items() if key not in _PATH_KEYS},
        )
    if vocabulary is not None and vocabulary.token_ids is not None:
        _check(folder, vocabulary.token_ids)
    return []


def write_json(path: str, value: Mapping[str, Any]) -> None:
    """Write a JSON file as transformers does: two spaces, readable text."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")


def _copy(origin: str, folder: str, patterns: tuple[str, ...]) -> None:
    for name in sorted(os.listdir(origin)):
        path = os.path.join(origin, name)
        if os.path.isfile(path) and any(fnmatch(name, pattern) for pattern in patterns):
            shutil.copyfile(path, os.path.join(folder, name))
    for name in _TEMPLATE_FOLDERS:
        if os.path.isdir(os.path.join(origin, name)):
            os.makedirs(os.path.join(folder, name), exist_ok=True)
            _copy(os.path.join(origin, name), os.path.join(folder, name), ("*.jinja",))


def _tokenizer_json(model: LoadedModel) -> dict[str, Any]:
    """Return a model's tokenizer.json, made by transformers if the model has only older files."""
    origin = tokenizer_folder(model)
    path = os.path.join(origin, TOKENIZER_JSON)
    if os.path.exists(path):
        found = read_json(path)
    else:
        found = json.loads(load_tokenizer(origin).backend_tokenizer.to_str())
    return {**found, "added_tokens": found.get("added_tokens") or []}


def _describe_added(config: dict[str, Any], tokenizer: Mapping[str, Any], added: Mapping[str, Any]) -> None:
    """Repeat new added tokens in tokenizer_config.json where it lists them at all."""
    listed = config.get("added_tokens_decoder")
    if not isinstance(listed, dict):
        return
    for entry in tokenizer["added_tokens"]:
        if entry["content"] in added:
            listed[str(entry["id"])] = {key: value for key, value in entry.items() if key != "id"}


def _check(folder: str, token_ids: Mapping[str, int]) -> None:
    """Compare the ids that transformers gives with those planned."""
    written = load_tokenizer(folder).get_vocab()
    wrong = [token for token, number in token_ids.items() if written.get(token) != number]
    if wrong:
        token = wrong[0]
        raise OutputError(
            f"the tokenizer cannot be extended: transformers gives {token!r} the id {written.get(token)} and "
            f"not {token_ids[token]} ({len(wrong):,} of {len(token_ids):,} tokens differ); take the tokens "
            "of one model with `tokenizer: base`"
        )
