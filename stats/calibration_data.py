"""Turn rows into tokenised examples in fixed logical shards.

The number of shards and what is in each depends on the data alone, never on the number of
workers: a shard is the unit of assignment, of repetition and of summation.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

from raymerge.merge_actors.errors import CheckpointError, RecipeError
from raymerge.stats.data_rows import DataSpec, Rows, read_rows
from raymerge.stats.own_code import load_with_code

#: Most shards that a calibration set is cut into.
NUM_SHARDS = 32
_DEFAULT_MAX_LENGTH = 512
#: A tokenizer that knows no limit has a "very large integer" as its limit.
_NO_LIMIT = 10**9
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageSource:
    """An image as it is stored."""

    path: str | None = None
    data: bytes | None = None
    """Compressed; None if it is a file of its own."""

    def read(self) -> bytes:
        """Return the compressed bytes.

        Raises:
            RecipeError: the file cannot be read.
        """
        if self.data is not None:
            return self.data
        assert self.path is not None
        try:
            with open(self.path, "rb") as stream:
                return stream.read()
        except OSError as error:
            raise RecipeError(f"cannot read the image {self.path}: {error.strerror}") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One tokenised input."""

    number: int
    """Of its row (of the first row of a packed example) among the rows that are used."""
    input_ids: tuple[int, ...]
    token_type_ids: tuple[int, ...] | None = None
    target_ids: tuple[int, ...] | None = None
    """What the decoder of an encoder-decoder reads, without its start token."""
    label: int | None = None
    image: ImageSource | None = None
    """Of a vision model, instead of the tokens."""
    num_positions: int = 0
    """About how many rows an image has in the model."""

    @property
    def num_tokens(self) -> int:
        """Count the tokens, those of the decoder included; of an image, its positions."""
        return self.num_positions or len(self.input_ids) + len(self.target_ids or ())


class CalibrationData:
    """The calibration set of one model: rows, tokenizer, shards."""

    def __init__(
        self, spec: DataSpec, model_folder: str, config: Mapping[str, Any], *, trust_code: bool = False
    ) -> None:
        """Read the rows and the tokenizer.

        Args:
            spec: which data.
            model_folder: where the tokenizer is.
            config: the model's config.json.
            trust_code: run code of the tokenizer where transformers has no class of its own.

        Raises:
            RecipeError: the data do not fit the model or cannot be read.
            CheckpointError: the model has no tokenizer.
        """
        self.spec = spec
        self.rows: Rows = read_rows(spec)
        self._shards = cut_shards(self.rows.tier_ends)
        self._tokenizer = load_tokenizer(model_folder, trust_code=trust_code)
        self._config = config
        self.max_length = self._checked_length()
        self.is_encoder_decoder = bool(config.get("is_encoder_decoder"))
        self._label_numbers = label_numbers(spec, self.rows.labels, config)
        if spec.chat_template and not getattr(self._tokenizer, "chat_template", None):
            raise RecipeError(
                f"the tokenizer of {model_folder} has no chat template; leave out chat_template, or add one."
            )
        self.num_truncated = 0
        self.pad_id: int = self._tokenizer.pad_token_id or 0

    @property
    def num_shards(self) -> int:
        """Count the logical shards."""
        return len(self._shards)

    def tier(self, number: int) -> int:
        """Return which of the numbers of samples a shard is first part of."""
        return self._shards[number][1]

    def shard(self, number: int) -> list[Example]:
        """Tokenise one shard; rows that the tokenizer makes nothing of are left out."""
        rows = self._shards[number][0]
        examples = self._packed(rows) if self.spec.packed else [self._example(i) for i in rows]
        return [each for each in examples if each.input_ids and each.target_ids != ()]

    def data_fingerprint(self) -> str:
        """Return 128 bits in hex over the rows and whatever changes the examples made of them."""
        digest = xxhash.xxh3_128()
        settings = {key: value for key, value in self.spec.to_mapping().items() if key in _FINGERPRINTED}
        digest.update(json.dumps(settings | {"max_length": self.max_length}, sort_keys=True).encode())
        for column in (self.rows.texts, self.rows.pairs, self.rows.labels):
            digest.update(b"\0column")
            for value in column or ():
                digest.update(json.dumps(value, sort_keys=True, default=str).encode() + b"\0")
        return digest.hexdigest()

    def _example(self, number: int) -> Example:
        text = self._text(number)
        pair = self.rows.pairs[number] if self.rows.pairs else None
        target_ids = None
        if self.is_encoder_decoder:
            target_ids = tuple(self._tokens(text if pair is None else pair)["input_ids"])
            pair = None
        found = self._tokens(text, pair)
        types = found.get("token_type_ids") if pair else None
        return Example(
            number=number,
            input_ids=tuple(found["input_ids"]),
            token_type_ids=None if types is None else tuple(types),
            target_ids=target_ids,
            label=self._label_numbers[number] if self._label_numbers else None,
        )

    def _tokens(self, text: str, pair: str | None = None) -> Any:
        options: dict[str, Any] = {"add_special_tokens": not self.spec.chat_template}
        found = self._tokenizer(text, pair, **options)
        if len(found["input_ids"]) <= self.max_length:
            return found
        self.num_truncated += 1
        return self._tokenizer(text, pair, truncation=True, max_length=self.max_length, **options)

    def _text(self, number: int) -> str:
        text = self.rows.texts[number]
        if not self.spec.chat_template:
            assert isinstance(text, str)
            return text
        try:
            rendered = self._tokenizer.apply_chat_template(text, tokenize=False)
        except Exception as error:  # the template is code of the checkpoint and raises what it likes
            raise RecipeError(
                f"the chat template cannot render row {number} of {self.spec.source!r}: {error}"
            ) from error
        assert isinstance(rendered, str)
        return rendered

    def _packed(self, rows: range) -> list[Example]:
        """Join the texts of a shard, an end-of-text token between them, and cut them evenly."""
        end_id = self._tokenizer.eos_token_id
        joined: list[int] = []
        first_rows: list[int] = []
        for number in rows:
            ids = self._tokenizer(self._text(number), add_special_tokens=False)["input_ids"]
            ids = [*ids, *([] if end_id is None else [end_id])]
            joined += ids
            first_rows += [number] * len(ids)
        return [
            Example(number=first_rows[begin], input_ids=tuple(joined[begin : begin + self.max_length]))
            for begin in range(0, len(joined), self.max_length)
        ]

    def _checked_length(self) -> int:
        limit = length_limit(self._config, self._tokenizer)
        asked = self.spec.max_length
        if asked is not None and limit is not None and asked > limit:
            raise RecipeError(
                f"max_length is {asked:,}, but the model takes at most {limit:,} tokens; give {limit} or less."
            )
        return asked or min(limit or _DEFAULT_MAX_LENGTH, _DEFAULT_MAX_LENGTH)


def label_numbers(
    spec: DataSpec, labels: Sequence[Any] | None, config: Mapping[str, Any]
) -> list[int] | None:
    """Map labels to the numbers of the model's classes.

    Raises:
        RecipeError: the head has no such class.
    """
    if labels is None:
        return None
    names = {str(key): int(value) for key, value in (config.get("label2id") or {}).items()}
    num_labels = len(config.get("id2label") or {}) or int(config.get("num_labels") or 2)
    numbers = []
    for row, label in enumerate(labels):
        number = names.get(label, -1) if isinstance(label, str) else _whole(label)
        if not 0 <= number < num_labels:
            known = f" ({', '.join(list(names)[:8])})" if names else ""
            raise RecipeError(
                f"row {row} of {spec.source!r} has the label {label!r} in {spec.label_column!r}; "
                f"the model's head has {num_labels} classes{known}: the data belong to another head."
            )
        numbers.append(number)
    return numbers


def _whole(label: Any) -> int:
    """Return a label that is a whole number as one; -1 for any other value."""
    is_whole = isinstance(label, int) or (isinstance(label, float) and label.is_integer())
    return int(label) if is_whole else -1


def cut_shards(tier_ends: Sequence[int]) -> list[tuple[range, int]]:
    """Cut the rows of each tier into at most `NUM_SHARDS` shards; returns rows and tier of each."""
    shards = []
    for tier, (first, last) in enumerate(itertools.pairwise((0, *tier_ends))):
        num_shards = min(NUM_SHARDS, last - first)
        edges = [first + (last - first) * i // num_shards for i in range(num_shards + 1)]
        shards += [(range(begin, end), tier) for begin, end in itertools.pairwise(edges)]
    return shards


#: Fields of DataSpec that the rows do not show and that change examples.
_FINGERPRINTED = {"chat_template", "packed"}


def load_tokenizer(model_folder: str, *, trust_code: bool = False) -> Any:
    """Load a model's tokenizer.

    Args:
        model_folder: where it is.
        trust_code: run code of the folder where transformers has no class of its own.

    Raises:
        CheckpointError: the folder has none, or it needs code that is not trusted.
    """
    from transformers import AutoTokenizer

    if not any(os.path.exists(os.path.join(model_folder, name)) for name in _TOKENIZER_FILES):
        raise CheckpointError(
            f"the model {model_folder} has no tokenizer ({', '.join(_TOKENIZER_FILES[:3])}, ...); "
            "copy the files of its base model's tokenizer into the folder."
        )
    try:
        return load_with_code(
            lambda runs: AutoTokenizer.from_pretrained(model_folder, trust_remote_code=runs),
            model_folder,
            trust_code=trust_code,
        )
    except CheckpointError:
        raise
    except Exception as error:  # transformers raises whatever its readers of old formats raise
        raise CheckpointError(f"the tokenizer of {model_folder} cannot be loaded: {error}") from error


def tokenizer_fingerprint(model_folder: str) -> str:
    """Return 128 bits in hex over the bytes of a model's tokenizer files."""
    digest = xxhash.xxh3_128()
    for name in (*_TOKENIZER_FILES, "tokenizer_config.json", "chat_template.jinja"):
        path = os.path.join(model_folder, name)
        if os.path.exists(path):
            with open(path, "rb") as stream:
                digest.update(name.encode() + stream.read())
    return digest.hexdigest()


def length_limit(config: Mapping[str, Any], tokenizer: Any) -> int | None:
    """Return the most tokens that a model takes; None if nothing says so (relative positions)."""
    text_config = config.get("text_config")
    config = text_config if isinstance(text_config, Mapping) else config
    positions = next(
        (config[key] for key in ("max_position_embeddings", "n_positions") if config.get(key)), None
    )
    if config.get("model_type") in ("t5", "mt5", "umt5", "longt5"):
        positions = None  # relative positions: n_positions is what it was trained with
    elif positions and config.get("model_type") in _POSITIONS_AFTER_PADDING:
        positions -= int(config.get("pad_token_id") or 0) + 1
    limits = [int(limit) for limit in (positions, tokenizer.model_max_length) if limit and limit < _NO_LIMIT]
    return min(limits, default=None)


#: Their first position has the number pad_token_id + 1.
_POSITIONS_AFTER_PADDING = ("roberta", "xlm-roberta", "camembert", "longformer", "xlm-roberta-xl")
