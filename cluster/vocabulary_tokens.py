"""Plan a vocabulary token by token: the ids of the output, and every model's row for each.

The tokenizer's own tokens keep their ids. Tokens that only other models have follow, in the
order of the models and of their ids. Rows that belong to no token (embeddings are often longer
than their tokenizer) stay in their place, in every model whose row of that number has no
token either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raymerge.cluster.model_ref import ModelRef
from raymerge.cluster.origin import did_you_mean
from raymerge.cluster.recipe import Recipe
from raymerge.cluster.remarks import as_note
from raymerge.cluster.tokenizer_policy import TokenizerPolicy, TokenPolicy
from raymerge.cluster.tokenizer_tokens import read_token_ids
from raymerge.cluster.vocabulary_rows import BorrowedRow, ModelRows, coalesce, require_rows, round_up
from raymerge.merge_actors.errors import CheckpointError
from raymerge.merge_actors.wording import some_of

if TYPE_CHECKING:
    from raymerge.cluster.matched import LoadedModel

#: A model that has fewer of its tokens in the output is remarked upon.
_FEW_FRACTION = 0.5


@dataclass(frozen=True, slots=True)
class TokenPlan:
    """The vocabulary of an output, by token."""

    num_rows: int
    token_ids: Mapping[str, int]
    """Id of every token in the output."""
    added: Mapping[str, str | None]
    """Tokens that the tokenizer lacks -> the model that has them; None for made-up ones."""
    rows: Mapping[str, ModelRows]
    """By `ModelRef.key`, for the models that are merged."""
    tokenizer_model: str
    remarks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Tokens:
    """The tokens of one model."""

    ids: Mapping[str, int]
    num_rows: int
    """Rows of its embedding: a token with a larger id has none."""

    def row(self, token: str) -> int | None:
        found = self.ids.get(token)
        return found if found is not None and found < self.num_rows else None


def plan_tokens(recipe: Recipe, policy: TokenizerPolicy, models: Mapping[str, LoadedModel]) -> TokenPlan:
    """Plan the policies "union", "base" and "the tokens of one model".

    Raises:
        RecipeError: a rule for a token names a model or a token that is not there.
        CheckpointError: a tokenizer is absent or cannot be read.
    """
    source = policy.source.key if isinstance(policy.source, ModelRef) else recipe.donor.key
    merged = [ref.key for ref in recipe.all_models()]
    wanted = dict.fromkeys([source, *merged, *(ref.key for ref in policy.models())])
    tokens, remarks = _read_all(list(wanted), source, models)
    ids = dict(tokens[source].ids)
    added: dict[str, str | None] = {}
    if policy.source == "union":
        for key in merged:
            for token in sorted(tokens[key].ids, key=tokens[key].ids.__getitem__):
                if token not in ids and token not in added and tokens[key].row(token) is not None:
                    added[token] = key
    for token, rule in policy.tokens.items():
        if token not in ids and token not in added:
            added[token] = _origin_of(token, rule, merged, tokens)
    first = max(ids.values(), default=-1) + 1
    ids |= {token: first + number for number, token in enumerate(added)}
    num_rows = round_up(
        max(tokens[source].num_rows, first + len(added) if added else 0), policy.pad_to_multiple_of
    )
    borrowed, replaced = _apply_rules(recipe, policy, ids, merged, tokens)
    rows = {key: _rows_of(key, tokens[key], ids, num_rows, borrowed, replaced) for key in merged}
    remarks += _remarks(source, num_rows, added, ids, {key: tokens[key] for key in merged})
    return TokenPlan(num_rows, ids, added, rows, source, tuple(remarks))


def _read_all(
    keys: Sequence[str], source: str, models: Mapping[str, LoadedModel]
) -> tuple[dict[str, _Tokens], list[str]]:
    """Read the tokens of some models; one without a tokenizer may have that of `source`."""
    tokens: dict[str, _Tokens] = {}
    remarks = []
    for key in keys:  # `source` comes first
        num_rows = require_rows(models[key])
        ids = read_token_ids(models[key])
        if ids is None:
            if source not in tokens or num_rows != tokens[source].num_rows:
                raise CheckpointError(
                    f"model {key} has no tokenizer files in {models[key].checkpoint.folder}, which the "
                    "output's vocabulary needs; add them, or merge with `vocabulary: pad` or `truncate`, "
                    "which need none"
                )
            ids = dict(tokens[source].ids)
            remarks.append(
                f"{key} has no tokenizer; it is taken to have that of {source}, as it has as many rows"
            )
        tokens[key] = _Tokens(ids, num_rows)
    return tokens, remarks


def _origin_of(
    token: str, rule: TokenPolicy, merged: Sequence[str], tokens: Mapping[str, _Tokens]
) -> str | None:
    """Return the model that a token comes from which the tokenizer does not have."""
    named = [rule.source.key] if isinstance(rule.source, ModelRef) and rule.token is None else []
    return next((key for key in [*named, *merged] if tokens[key].row(token) is not None), None)


#: token's id -> where its row comes from, and whether that holds for models that have the token.
_Borrowed = Mapping[int, tuple[str | None, int, bool]]


def _apply_rules(
    recipe: Recipe,
    policy: TokenizerPolicy,
    ids: Mapping[str, int],
    merged: Sequence[str],
    tokens: Mapping[str, _Tokens],
) -> tuple[_Borrowed, frozenset[int]]:
    """Return the rows that the rules for single tokens borrow, and those that the fill replaces."""
    borrowed: dict[int, tuple[str | None, int, bool]] = {}
    replaced = set()
    for token, rule in policy.tokens.items():
        key = f"tokenizer.tokens.{token}"
        if rule.source == "zero":
            borrowed[ids[token]] = (None, 0, rule.force)
        elif isinstance(rule.source, ModelRef):
            row = _source_row(recipe, key, token, rule, tokens[rule.source.key])
            borrowed[ids[token]] = (rule.source.key, row, rule.force)
        elif all(tokens[model].row(token) is None for model in merged):
            raise recipe.origin.error(
                key,
                "is a token that no model has; say where its row comes from: source: {kind: zero}, or "
                "{kind: model_token, model: ..., token: ...}.",
            )
        elif rule.force:
            replaced.add(ids[token])
    return borrowed, frozenset(replaced)


def _source_row(recipe: Recipe, key: str, token: str, rule: TokenPolicy, tokens: _Tokens) -> int:
    if rule.token_id is not None:
        if not 0 <= rule.token_id < tokens.num_rows:
            raise recipe.origin.error(
                f"{key}.source.token_id",
                f"is {rule.token_id}; {rule.source} has rows [0, {tokens.num_rows:,}).",
            )
        return rule.token_id
    wanted = token if rule.token is None else rule.token
    row = tokens.row(wanted)
    if row is None:
        near = did_you_mean(wanted, (each for each in tokens.ids if abs(len(each) - len(wanted)) < 4))
        raise recipe.origin.error(f"{key}.source", f"is {rule.source}, which has no token {wanted!r}{near}.")
    return row


def _rows_of(
    key: str,
    tokens: _Tokens,
    ids: Mapping[str, int],
    num_rows: int,
    borrowed: _Borrowed,
    replaced: frozenset[int],
) -> ModelRows:
    """Map the rows of one model."""
    token_at = {number: token for token, number in ids.items()}
    has_token = set(tokens.ids.values())
    own: dict[int, int] = {}
    elsewhere: list[BorrowedRow] = []
    for row in range(num_rows):
        token = token_at.get(row)
        if token is not None:
            found = tokens.row(token)
        else:
            found = row if row < tokens.num_rows and row not in has_token else None
        if row in borrowed and (found is None or borrowed[row][2]):
            model, source, _ = borrowed[row]
            if model != key:
                elsewhere.append(BorrowedRow(row, model, source))
                continue
            found = source
        if found is not None:
            own[row] = found
    return ModelRows(tokens.num_rows, coalesce(own.items(), replaced), tuple(elsewhere))


def _remarks(
    source: str,
    num_rows: int,
    added: Mapping[str, str | None],
    ids: Mapping[str, int],
    merged: Mapping[str, _Tokens],
) -> list[str]:
    """Say what becomes of the vocabulary."""
    remarks = [f"vocabulary of {num_rows:,} rows: the {len(ids) - len(added):,} tokens of {source}"]
    if added:
        remarks[0] += f" and {len(added):,} added ({some_of(list(added))})"
    for key, tokens in merged.items():
        known = sum(1 for token in tokens.ids if token in ids)
        if tokens.ids and known < _FEW_FRACTION * len(tokens.ids):
            remarks.append(f"only {known:,} of the {len(tokens.ids):,} tokens of {key} are in the output")
        had = sum(1 for token in ids if tokens.row(token) is not None)
        if had < _FEW_FRACTION * len(ids):
            remarks.append(
                f"{key} has only {had:,} of the output's {len(ids):,} tokens; the other rows are filled"
            )
    return [as_note(remarks[0]), *remarks[1:]]
