"""Decide which row of which model makes which row of the output's vocabulary.

Pure but for reading the small tokenizer files: policies, token ids and headers in, runs of
rows out. Writing a tokenizer that has the planned ids is `tokenizer_files.py`; rows that a
model lacks are filled by the worker (the base's row, else the mean over the models that have it).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from raymerge.cluster.recipe import Recipe
from raymerge.cluster.remarks import as_note
from raymerge.cluster.tokenizer_policy import TokenizerPolicy
from raymerge.cluster.tokenizer_tokens import has_tokenizer, tokenizer_folder
from raymerge.cluster.vocabulary_rows import (
    BorrowedRow,
    ModelRows,
    coalesce,
    find_counterpart,
    is_vocabulary_tensor,
    require_rows,
)
from raymerge.cluster.vocabulary_tokens import plan_tokens
from raymerge.merge_actors.checkpoint.header import TensorInfo
from raymerge.merge_actors.errors import MismatchError
from raymerge.merge_actors.task import ForeignRows, RowRun

if TYPE_CHECKING:
    from raymerge.cluster.matched import LoadedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """The vocabulary of an output: its size, its tokens, and the rows of every model in it."""

    num_rows: int
    """Rows of the output's embeddings."""
    rows: Mapping[str, ModelRows]
    """By `ModelRef.key`."""
    models: Mapping[str, LoadedModel] = field(repr=False, compare=False)
    """By `ModelRef.key`: where borrowed rows are looked up."""
    tokenizer_model: str
    """Key of the model whose tokenizer files are written."""
    token_ids: Mapping[str, int] | None = None
    """The planned id of every token; None if the tokenizer is written as it is."""
    added: Mapping[str, str | None] = field(default_factory=dict)
    """Tokens that the tokenizer lacks, in the order of their ids -> key of the model that has
    them, or None for a token that the recipe makes up."""
    remarks: tuple[str, ...] = ()
    """What the user should know about it."""

    def row_runs(self, model_key: str, info: TensorInfo) -> tuple[RowRun, ...] | None:
        """Return which rows of a model's tensor make the rows of the output's.

        Args:
            model_key: `ModelRef.key` of the model.
            info: one of its tensors.

        Returns:
            ascending runs, without rows that have to be filled; None for a tensor that is
            no vocabulary tensor, and where every row stays in its place.

        Raises:
            MismatchError: a borrowed row does not exist or does not fit.
        """
        rows = self.rows.get(model_key)
        if rows is None or not is_vocabulary_tensor(info, rows.num_rows) or rows.is_identity(self.num_rows):
            return None
        if not rows.borrowed:
            return rows.runs
        borrowed = [
            RowRun(row.to, row.source, 1, self._foreign(row, model_key, info)) for row in rows.borrowed
        ]
        return tuple(sorted((*rows.runs, *borrowed), key=lambda run: run.to))

    def _foreign(self, row: BorrowedRow, model_key: str, info: TensorInfo) -> ForeignRows:
        if row.model is None:
            return ForeignRows()
        model = self.models[row.model]
        found = find_counterpart(model, info.name)
        if found is None or found.shape[1:] != info.shape[1:] or row.source >= found.shape[0]:
            has = f"of shape {list(found.shape)}" if found else "absent"
            raise MismatchError(
                f"row {row.source} of tensor {info.name} of model {row.model} cannot be used for row "
                f"{row.to} of {model_key}: there the tensor is {has}, here {list(info.shape)}; name another "
                "source for the token"
            )
        if model.adapter is not None and found.name in model.adapter.pairs:
            raise MismatchError(
                f"tensor {found.name} of model {row.model} is changed by its adapter, so no single rows can "
                "be borrowed from it; name the model without the adapter as the token's source, or merge "
                "the adapter into it first"
            )
        return ForeignRows(found.file, found.begin, found.dtype)


def plan_vocabulary(recipe: Recipe, models: Mapping[str, LoadedModel]) -> Vocabulary | None:
    """Plan the vocabulary that a recipe asks for.

    Args:
        recipe: its `tokenizer` or `vocabulary` says what is wanted.
        models: by `ModelRef.key`; all models of the recipe, its donor, and those that
            `recipe.tokenizer` names.

    Returns:
        None if the recipe asks for nothing: then all vocabularies have to agree.

    Raises:
        RecipeError: the wishes contradict each other or name a token that is nowhere.
        MismatchError: a model has no embedding.
        CheckpointError: a tokenizer is absent or cannot be read.
    """
    policy = recipe.tokenizer
    if recipe.vocabulary in ("pad", "truncate"):
        if policy is not None:
            raise recipe.origin.error(
                "vocabulary",
                f"is {recipe.vocabulary}, which counts rows, but 'tokenizer' asks for tokens; keep one.",
            )
        return _plan_by_row(recipe, models)
    if policy is None and recipe.vocabulary is None:
        return None
    if policy is None:
        policy = TokenizerPolicy(source="base" if recipe.vocabulary == "base" else "union")
    elif recipe.vocabulary not in (None, policy.source):
        raise recipe.origin.error(
            "vocabulary",
            f"is {recipe.vocabulary}, but the source of 'tokenizer' is {policy.source}; keep one.",
        )
    plan = plan_tokens(recipe, policy, models)
    is_changed = bool(plan.added)
    return Vocabulary(
        num_rows=plan.num_rows,
        rows=plan.rows,
        models=models,
        tokenizer_model=plan.tokenizer_model,
        token_ids=plan.token_ids if is_changed else None,
        added=plan.added,
        remarks=plan.remarks,
    )


def _plan_by_row(recipe: Recipe, models: Mapping[str, LoadedModel]) -> Vocabulary:
    """Plan the policies "pad" and "truncate": a row is the same token in every model."""
    counts = {ref.key: require_rows(models[ref.key]) for ref in recipe.all_models()}
    num_rows = max(counts.values()) if recipe.vocabulary == "pad" else min(counts.values())
    fitting = [key for key, count in counts.items() if count == num_rows]
    donor = recipe.donor.key
    chosen = next(
        (key for key in [donor, *fitting] if key in fitting and has_tokenizer(tokenizer_folder(models[key]))),
        donor,
    )
    remarks = [as_note(f"vocabulary of {num_rows:,} rows")]
    for key, count in counts.items():
        if count < num_rows:
            remarks.append(
                f"rows [{count:,}, {num_rows:,}) of {key} are filled from the models that have them"
            )
        elif count > num_rows:
            remarks.append(f"rows [{num_rows:,}, {count:,}) of {key} are left out")
    if chosen != donor:
        remarks.append(f"the tokenizer is that of {chosen}, which has as many rows")
    return Vocabulary(
        num_rows=num_rows,
        rows={
            key: ModelRows(count, coalesce((row, row) for row in range(min(count, num_rows))))
            for key, count in counts.items()
        },
        models=models,
        tokenizer_model=chosen,
        remarks=tuple(remarks),
    )
