"""What the recipe asks of the vocabulary: whose tokens, and whose rows for single tokens.

This is the wish as written; building a tokenizer and rows from it is done elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from raymerge.cluster.model_ref import ModelRef


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenPolicy:
    """Where the embedding row of one token comes from."""

    source: ModelRef | Literal["zero"] | None = None
    """The model whose row is used, "zero" for a row of zeros, None for the general rule."""
    token: str | None = None
    """Take the row of this token of `source` instead of the token's own row."""
    token_id: int | None = None
    """The same by number; at most one of `token` and `token_id` is set."""
    force: bool = False
    """Use this row for every model, also for those that have the token."""

    def to_mapping(self) -> dict[str, Any]:
        """Return what a recipe would hold."""
        mapping: dict[str, Any] = {"force": True} if self.force else {}
        if self.source == "zero":
            mapping["source"] = {"kind": "zero"}
        elif isinstance(self.source, ModelRef) and (self.token is not None or self.token_id is not None):
            row = {"token": self.token} if self.token is not None else {"token_id": self.token_id}
            mapping["source"] = {"kind": "model_token", "model": self.source.to_value(), **row}
        elif isinstance(self.source, ModelRef):
            mapping["source"] = self.source.to_value()
        return mapping


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerPolicy:
    """The vocabulary of the output."""

    source: ModelRef | Literal["union", "base"] = "union"
    """All tokens of all models, those of the base, or those of one model."""
    tokens: Mapping[str, TokenPolicy] = field(default_factory=dict)
    """Rules for single tokens; a token that no model has is added."""
    pad_to_multiple_of: int | None = None
    """The number of rows is raised to a multiple of this."""

    def models(self) -> tuple[ModelRef, ...]:
        """Return the models that the policy names, in the order of the file."""
        named = [self.source, *(each.source for each in self.tokens.values())]
        return tuple(dict.fromkeys(each for each in named if isinstance(each, ModelRef)))

    def to_mapping(self) -> dict[str, Any]:
        """Return what a recipe would hold."""
        source = self.source.to_value() if isinstance(self.source, ModelRef) else self.source
        mapping: dict[str, Any] = {"source": source}
        if self.tokens:
            mapping["tokens"] = {name: each.to_mapping() for name, each in self.tokens.items()}
        if self.pad_to_multiple_of is not None:
            mapping["pad_to_multiple_of"] = self.pad_to_multiple_of
        return mapping
