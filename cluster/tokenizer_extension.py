"""Add tokens to a tokenizer.json, as plain data: no library, no files.

A token that was an added token where it comes from becomes one here, with its properties. A
token of another model's own vocabulary goes into this model's vocabulary, with its merges (BPE)
or its score (Unigram), so that text can produce it; as an added token it would be cut out of the
middle of words.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

#: What a token is that the recipe makes up: matched as it stands, left out by skip_special_tokens.
_NEW_TOKEN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
#: Below every score of a Unigram vocabulary, in nats: never chosen where another cut exists.
_PENALTY = 10.0


def extend_tokenizer(
    tokenizer: Mapping[str, Any],
    ids: Mapping[str, int],
    added: Mapping[str, str | None],
    others: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Return a tokenizer.json with more tokens.

    Args:
        tokenizer: the tokenizer.json to extend.
        ids: id of every token, those of `added` included.
        added: token -> the model it comes from, None for a new one; ascending by id.
        others: tokenizer.json of those models.
    """
    properties = {
        key: {each["content"]: each for each in other["added_tokens"]} for key, other in others.items()
    }
    regular: dict[str, list[str]] = {}
    entries = [dict(each) for each in tokenizer.get("added_tokens") or []]
    for token, key in added.items():
        known = properties.get(key or "", {}).get(token)
        if key is not None and known is None:
            regular.setdefault(key, []).append(token)
        else:
            entries.append({**_NEW_TOKEN, **(known or {}), "id": ids[token], "content": token})
    extended = {**tokenizer, "added_tokens": entries}
    if regular:
        # Ids of added tokens count on from the size of the model's vocabulary, unless it has them.
        in_model = [
            *(each["content"] for each in entries),
            *(t for tokens in regular.values() for t in tokens),
        ]
        models = {key: others[key]["model"] for key in regular}
        extended["model"] = _extend_model(tokenizer["model"], in_model, ids, regular, models)
    return extended


def _extend_model(
    model: Mapping[str, Any],
    in_model: Iterable[str],
    ids: Mapping[str, int],
    regular: Mapping[str, list[str]],
    others: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):
        return {**model, "vocab": _extend_unigram(vocabulary, in_model, ids, regular, others)}
    combined = {**vocabulary, **{token: ids[token] for token in in_model}}
    extended = {**model, "vocab": dict(sorted(combined.items(), key=lambda item: item[1]))}
    if "merges" in model:
        extended["merges"] = _extend_merges(model["merges"], combined, regular, others)
    return extended


def _extend_unigram(
    vocabulary: list[Any],
    in_model: Iterable[str],
    ids: Mapping[str, int],
    regular: Mapping[str, list[str]],
    others: Mapping[str, Mapping[str, Any]],
) -> list[list[Any]]:
    """Append tokens with the score they have elsewhere; a token's id is its place in the list."""
    lowest = min((score for _, score in vocabulary), default=0.0) - _PENALTY
    scores: dict[str, float] = {}
    for key, tokens in regular.items():
        theirs = others[key]["vocab"]
        if isinstance(theirs, list):
            known = {token: score for token, score in theirs}
            scores |= {token: known[token] for token in tokens}
    at = {number: token for number, (token, _) in enumerate(vocabulary)}
    at |= {ids[token]: token for token in in_model}
    ours = {token: score for token, score in vocabulary}
    return [[at[number], ours.get(at[number], scores.get(at[number], lowest))] for number in sorted(at)]


def _extend_merges(
    merges: list[Any],
    vocabulary: Mapping[str, int],
    regular: Mapping[str, list[str]],
    others: Mapping[str, Mapping[str, Any]],
) -> list[Any]:
    """Append the merges that make the new tokens: after all others, so they cut nothing differently."""
    as_text = bool(merges) and isinstance(merges[0], str)
    extended = list(merges)
    for key, tokens in regular.items():
        wanted = set(tokens)
        for merge in others[key].get("merges") or []:
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            if left + right in wanted and left in vocabulary and right in vocabulary:
                extended.append(f"{left} {right}" if as_text else [left, right])
    return extended
