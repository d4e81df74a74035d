"""Say what checkpoints hold and whether they belong together, before somebody merges them.

`inspect` measures everything, or a stated share of it; `quick_check` is the part of it that a
merge can afford: a few MiB of each model, and words only where something looks wrong.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raymerge.cluster.compare import (
    Difference,
    ModelSummary,
    compare_headers,
    find_tensor,
    summarize,
)
from raymerge.cluster.measure import (
    QUANTILES,
    DeltaFigures,
    Selection,
    TensorDelta,
    is_matrix,
    measure,
    select_tensors,
    spread_strips,
)
from raymerge.cluster.model_ref import parse_model
from raymerge.cluster.parallel import num_usable_threads
from raymerge.merge_actors.checkpoint.folder import Checkpoint, open_checkpoint
from raymerge.merge_actors.checkpoint.hub import locate
from raymerge.merge_actors.dtypes import is_float
from raymerge.merge_actors.errors import RecipeError
from raymerge.merge_actors.wording import counted
from raymerge.stats.delta import QUANTILE_RELATIVE_ERROR, Agreement
from raymerge.stats.verdict import SFT_MAGNITUDE, SFT_QUANTILE, Judgement, MatrixRow, judge

if TYPE_CHECKING:
    from raymerge.cluster.matched import LoadedModel
    from raymerge.cluster.recipe import Recipe

#: With less than this share of the base's parameters in common there is nothing to judge.
_COMPARABLE_FRACTION = 0.5
#: What `quick_check` reads of each model: at most 48 x 4 x 8,192 elements, 3 MiB in bfloat16.
_QUICK_TENSORS = 48
_QUICK_STRIPS = 4
_QUICK_STRIP_ELEMENTS = 1 << 13


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A model against its base, or against another model where no base is given."""

    base: str
    model: str
    verdict: str
    """identical, SFT-sized deltas, continued pretraining, different backbone, or different architecture."""
    reason: str
    """The figures and limits that the verdict rests on."""
    differences: tuple[Difference, ...]
    """Where the two differ beside their values; empty if they belong together."""
    num_elements: int
    """Elements compared."""
    num_nonfinite: int
    """Elements left out because one of the two is NaN or infinite there."""
    norm: float
    """||delta||, of what was compared."""
    relative_norm: float
    """||delta|| / ||base||."""
    cosine: float
    """Between the weights of both."""
    equal_fraction: float
    """Share of exactly equal elements."""
    quantiles: tuple[float, ...]
    """Of |delta| at the fractions 0.5, 0.9, 0.99, 0.999; the error is under 1 percent."""
    max_magnitude: float
    matrix_magnitude: float
    """The 0.9 quantile of |delta| over matrices."""
    matrix_relative_norm: float
    """Median over the matrices."""
    matrix_cosine: float
    """Median over the matrices."""
    tensors: tuple[TensorDelta, ...]
    """The same for each tensor, in the order of the base's files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskVectorPair:
    """How the deltas of two models from one base agree."""

    first: str
    second: str
    cosine: float
    """NaN if one of the models did not move."""
    both_moved_fraction: float
    """Share of elements that both models moved."""
    conflict_fraction: float
    """Of those, the share that moved in opposite directions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What some checkpoints hold and how they differ."""

    models: tuple[ModelSummary, ...]
    """The base first, if there is one."""
    base: str | None
    sample: float | None
    """Share of each large tensor that was read; None if all was."""
    comparisons: tuple[Comparison, ...]
    """Each model with the base; without a base, each model with each later one."""
    pairs: tuple[TaskVectorPair, ...]
    """Task vectors of every two models; empty without a base."""
    read_bytes: int
    remarks: tuple[str, ...]

    def to_mapping(self) -> dict[str, Any]:
        """Return plain values for JSON; what is not a finite number becomes None."""
        mapping = dataclasses.asdict(self)
        mapping["quantile_fractions"] = list(QUANTILES)
        mapping["quantile_relative_error"] = QUANTILE_RELATIVE_ERROR
        plain: dict[str, Any] = _plain(mapping)
        return plain


def inspect(
    models: Sequence[str],
    base: str | None = None,
    *,
    sample: float | None = None,
    allow_pickle: bool = False,
) -> Inspection:
    """Describe checkpoints and compare them with their base, or with each other.

    Args:
        models: folders or Hub ids, path[@revision].
        base: the model that they were trained from.
        sample: read only this share, in (0, 1], of each large tensor; None reads everything.
        allow_pickle: read PyTorch `.bin` files, weights only.

    Raises:
        RaymergeError: a model cannot be read, or an argument breaks a rule.
    """
    if not models:
        raise RecipeError("no model to inspect; name at least one folder or Hub id")
    if sample is not None and not 0 < sample <= 1:
        raise RecipeError(f"sample is {sample}; it must be in (0, 1]: the share of each tensor to read")
    names = [*([base] if base is not None else []), *models]
    checkpoints = [_open(name, allow_pickle=allow_pickle) for name in names]
    if base is not None:
        comparisons = [(0, index) for index in range(1, len(names))]
        pairs = list(itertools.combinations(range(len(comparisons)), 2))
    else:
        comparisons, pairs = list(itertools.combinations(range(len(names)), 2)), []
    selections = select_tensors(checkpoints, sample) if comparisons else []
    measured = measure(selections, comparisons, pairs, num_usable_threads())
    return Inspection(
        models=tuple(summarize(*pair) for pair in zip(names, checkpoints, strict=True)),
        base=base,
        sample=sample,
        comparisons=tuple(
            _comparison(names[i], checkpoints[i], names[j], checkpoints[j], figures)
            for (i, j), figures in zip(comparisons, measured.deltas, strict=True)
        ),
        pairs=tuple(
            _pair(names[comparisons[i][1]], names[comparisons[j][1]], agreement)
            for (i, j), agreement in zip(pairs, measured.agreements, strict=True)
        ),
        read_bytes=measured.read_bytes,
        remarks=tuple(_remarks(names, checkpoints, base)),
    )


def quick_check(recipes: Sequence[Recipe], models: Mapping[str, LoadedModel]) -> list[str]:
    """Look at samples of the models of some recipes and say what does not look like a sensible merge.

    At most 3 MiB of each model (in bfloat16) are read for each base, however many recipes use it.
    Models with an adapter are left out: what an adapter adds is small by construction. Without a
    base, models are only asked whether they are of one origin.

    Args:
        recipes: what is to be merged.
        models: by `ModelRef.key`; at least all models of the recipes.

    Returns:
        remarks for the user; none for models with SFT-sized deltas.
    """
    compared: dict[tuple[str, bool], dict[str, None]] = {}
    for recipe in recipes:
        donor = recipe.donor.key
        if recipe.merge_method != "passthrough" and models[donor].adapter is None:
            keys = compared.setdefault((donor, recipe.base_model is not None), {donor: None})
            keys |= dict.fromkeys(ref.key for ref in recipe.all_models() if models[ref.key].adapter is None)
    remarks: list[str] = []
    for (_, has_base), keys in compared.items():
        # The same model may be listed twice, or once more as its own base.
        unique = {models[key].checkpoint.folder: key for key in reversed(keys)}
        kept = {key: models[key].checkpoint for key in keys if key in unique.values()}
        if len(kept) > 1:
            remarks += sampled_remarks(kept, has_base=has_base)
    return list(dict.fromkeys(remarks))


def sampled_remarks(checkpoints: Mapping[str, Checkpoint], *, has_base: bool) -> list[str]:
    """Compare samples of matrices with those of the first checkpoint, and word what is unusual.

    Args:
        checkpoints: by the name to use in remarks; the base, or any other model, first.
        has_base: is the first the base? If not, nothing is said about the size of deltas.
    """
    names, opened = list(checkpoints), list(checkpoints.values())
    selections = _quick_selections(opened)
    comparisons = [(0, index) for index in range(1, len(names))]
    measured = measure(selections, comparisons, [], num_usable_threads())
    remarks = []
    for name, figures in zip(names[1:], measured.deltas, strict=True):
        if figures.matrices.num_elements:
            judgement = judge(figures.matrix_rows, figures.matrices)
            remarks += _word(names[0], name, judgement, figures, has_base=has_base)
    return remarks


def _word(base: str, model: str, judgement: Judgement, figures: DeltaFigures, *, has_base: bool) -> list[str]:
    if judgement.verdict == "different backbone":
        role = f"base {base}" if has_base else f"model {base}"
        return [
            f"model {model}: sampled weights are unrelated to those of {role} (cosine "
            f"{judgement.cosine:.2f}): a different backbone, whose merge is not likely to work; "
            "check that both come from one pretrained model"
        ]
    if has_base and judgement.verdict == "identical":
        return [
            f"note: model {model} equals base {base} in all sampled weights: it adds nothing to the merge"
        ]
    if has_base and judgement.verdict == "continued pretraining":
        median = figures.matrices.quantiles([0.5])[0]
        return [
            f"model {model}: median |delta| {median:.2g} from base {base} on sampled weights, "
            f"{SFT_QUANTILE:.0%} within {judgement.magnitude:.2g} (fine-tuning: {SFT_MAGNITUDE}): continued "
            "pretraining or another base; dropping deltas as DARE does is known to fail there "
            "(arXiv:2311.03099)"
        ]
    return []


def _quick_selections(checkpoints: Sequence[Checkpoint]) -> list[Selection]:
    """Choose strips of matrices of the first checkpoint, spread over its files."""
    matrices = [
        name for name, info in checkpoints[0].tensors.items() if is_matrix(info) and is_float(info.dtype)
    ]
    step = max(1, math.ceil(len(matrices) / _QUICK_TENSORS))
    selections = []
    for name in matrices[::step]:
        first = checkpoints[0].tensors[name]
        found = [find_tensor(checkpoint, name) for checkpoint in checkpoints]
        infos = [
            info if info and info.shape == first.shape and is_float(info.dtype) else None for info in found
        ]
        wanted = _QUICK_STRIPS * _QUICK_STRIP_ELEMENTS
        strips = spread_strips(first.num_elements, wanted, _QUICK_STRIP_ELEMENTS)
        selections.append(Selection(tuple(infos), strips))
    return selections


def _open(name: str, *, allow_pickle: bool) -> Checkpoint:
    try:
        ref = parse_model(name)
    except ValueError as error:
        raise RecipeError(f"model {name!r} {error}") from error
    if ref.adapter is not None:
        raise RecipeError(
            f"model {name!r} names an adapter, which inspect does not read; name the model without it, or "
            "merge the adapter first (raymerge merge with the method passthrough)"
        )
    return open_checkpoint(
        locate(ref.path, ref.revision, allow_pickle=allow_pickle), allow_pickle=allow_pickle
    )


def _comparison(
    first: str, one: Checkpoint, second: str, other: Checkpoint, figures: DeltaFigures
) -> Comparison:
    overall = figures.overall
    judgement = _judge(first, one, figures)
    return Comparison(
        base=first,
        model=second,
        verdict=judgement.verdict,
        reason=judgement.reason,
        differences=tuple(compare_headers(first, one, second, other)),
        num_elements=overall.num_elements,
        num_nonfinite=overall.num_nonfinite,
        norm=overall.norm,
        relative_norm=overall.relative_norm,
        cosine=overall.cosine,
        equal_fraction=overall.equal_fraction,
        quantiles=tuple(overall.quantiles(QUANTILES)),
        max_magnitude=overall.max_magnitude,
        matrix_magnitude=judgement.magnitude,
        matrix_relative_norm=judgement.relative_norm,
        matrix_cosine=judgement.cosine,
        tensors=tuple(figures.tensors),
    )


def _judge(first: str, one: Checkpoint, figures: DeltaFigures) -> Judgement:
    common = {tensor.name for tensor in figures.tensors}
    floats = [info for info in one.tensors.values() if is_float(info.dtype)]
    total = sum(info.num_elements for info in floats)
    shared = sum(info.num_elements for info in floats if info.name in common)
    if shared < _COMPARABLE_FRACTION * total or not total:
        share = shared / total if total else 0.0
        reason = (
            f"only {share:.0%} of the parameters of {first} have a counterpart of the same name and shape"
        )
        return Judgement("different architecture", reason, math.nan, math.nan, math.nan)
    if not figures.overall.num_elements:
        reason = "all elements are NaN or infinite in one of the two"
        return Judgement("different backbone", reason, math.nan, math.nan, math.nan)
    if figures.matrices.num_elements:
        return judge(figures.matrix_rows, figures.matrices)
    overall = figures.overall
    return judge([MatrixRow(overall.num_elements, overall.relative_norm, overall.cosine)], overall)


def _pair(first: str, second: str, agreement: Agreement) -> TaskVectorPair:
    moved = agreement.num_both_moved / agreement.num_elements if agreement.num_elements else math.nan
    return TaskVectorPair(
        first=first,
        second=second,
        cosine=agreement.cosine,
        both_moved_fraction=moved,
        conflict_fraction=agreement.conflict_fraction,
    )


def _remarks(names: Sequence[str], checkpoints: Sequence[Checkpoint], base: str | None) -> list[str]:
    remarks = []
    if base is None and len(names) > 1:
        remarks.append(
            "note: no base is given, so models are compared with each other: deltas are those between two "
            "models, and task vectors are unknown; name their common ancestor with --base"
        )
    for name, checkpoint in zip(names, checkpoints, strict=True):
        others = [info for info in checkpoint.tensors.values() if not is_float(info.dtype)]
        if others:
            remarks.append(
                f"note: {counted(len(others), 'tensor')} of {name} without floats ({others[0].dtype}) not compared"
            )
    return remarks


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
