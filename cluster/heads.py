"""Classification heads: rows of a matrix that belong to labels, which models may not share.

Models of different tasks have heads whose row 3 means different things, even where the shapes
agree. What a row means stands in config.json (`id2label`), so that rows can be matched by name.
Nothing here reads a weight.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raymerge.cluster.matched import LoadedModel
from raymerge.cluster.model_ref import ModelRef
from raymerge.cluster.recipe import Recipe
from raymerge.cluster.remarks import as_note
from raymerge.merge_actors.checkpoint.header import TensorInfo
from raymerge.merge_actors.dtypes import is_float
from raymerge.merge_actors.errors import MismatchError
from raymerge.merge_actors.task import RowRun
from raymerge.merge_actors.wording import counted, some_of

#: First components of the names of a classification head's tensors in transformers.
_PARTS = frozenset({"classifier", "score", "classification_head", "pre_classifier", "logits_proj"})
_CLASSIFIERS = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForImageClassification",
    "ForAudioClassification",
    "ForVideoClassification",
)
#: What transformers calls labels that nobody named.
_UNNAMED = re.compile(r"LABEL_\d+")
#: Tensors of a head before its last layer, whose rows are no labels.
_INNER = re.compile(r"(^|\.)(dense|pre_classifier)(\.|$)")
#: Keys of config.json that speak of labels.
LABEL_KEYS = ("id2label", "label2id", "num_labels", "problem_type")


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """What becomes of the heads of a recipe's models."""

    policy: str
    """One of label-aware, keep, exclude."""
    labels: Mapping[str, tuple[str, ...]]
    """Key of each model with a head -> names of its labels, in the order of the rows."""
    union: tuple[str, ...]
    """Labels of the output, for label-aware: the first model's, then what others add."""
    donor: str
    """Key of the model whose head, or at least config, the output has."""
    is_beside: bool = False
    """Are all heads written beside the output too?"""

    def row_runs(self, model_key: str, info: TensorInfo) -> tuple[RowRun, ...] | None:
        """Return where a model's label rows go in the union; None if all stay, or if these are no label rows."""
        labels = self.labels[model_key]
        if not self.has_label_rows(model_key, info) or labels == self.union:
            return None
        return tuple(
            sorted(
                (RowRun(self.union.index(label), row, 1) for row, label in enumerate(labels)),
                key=lambda run: run.to,
            )
        )

    def has_label_rows(self, model_key: str, info: TensorInfo) -> bool:
        """Return whether the rows of a head's tensor are the model's labels."""
        labels = self.labels.get(model_key)
        return (
            labels is not None
            and is_head_tensor(info.name)
            and not _INNER.search(info.name)
            and len(info.shape) > 0
            and info.shape[0] == len(labels)
        )

    def check_weights(self, name: str, having: Sequence[tuple[str, TensorInfo, float]]) -> None:
        """Refuse weights that leave a row of the output, or an inner layer, without a mean.

        Args:
            name: of the head's tensor in the output.
            having: key, tensor and weight of each model that has it.

        Raises:
            MismatchError: the weights of the models that know a label, or of all, cancel.
        """
        knowing: dict[str | None, list[tuple[str, float]]] = {}  # None: all rows of the tensor
        for key, info, weight in having:
            knowing.setdefault(None, []).append((key, weight))
            for label in self.labels[key] if self.has_label_rows(key, info) else ():
                knowing.setdefault(label, []).append((key, weight))
        for known, models in knowing.items():
            weights = [weight for _, weight in models]
            if abs(sum(weights)) <= 1e-6 * sum(map(abs, weights)):
                of = f"tensor {name}" if known is None else f"the row of label {known} in {name}"
                raise MismatchError(
                    f"heads: label-aware makes {of} the mean, by weight, of {', '.join(key for key, _ in models)}, but "
                    f"their weights ({', '.join(f'{each:g}' for each in weights)}) sum to 0; choose others, or set "
                    "heads: keep or {keep: MODEL}"
                )


def is_head_tensor(name: str) -> bool:
    """Return whether a tensor of a classification model belongs to its head."""
    return name.split(".", 1)[0] in _PARTS


def plan_heads(recipe: Recipe, models: Mapping[str, LoadedModel]) -> Heads | None:
    """Decide about the heads of a recipe's models.

    Args:
        recipe: its `heads` says what is wanted.
        models: by `ModelRef.key`.

    Returns:
        None if heads are merged like other tensors.

    Raises:
        MismatchError: heads have different labels and the recipe does not say what to do; or they are to
            be matched by label and a model's labels have no names; or a head has more or fewer rows than labels.
    """
    labels = _labels_by_model(recipe, models)
    _refuse_faults(recipe, labels, models)
    if recipe.heads == "merge" or not labels:
        return None
    if recipe.heads is None:
        _refuse_different(labels)
        return None
    first = next(iter(labels))
    if isinstance(recipe.heads, ModelRef):
        if recipe.heads.key not in labels:
            raise MismatchError(
                f"heads: the model {recipe.heads.key} is to give the head, but it is no classifier with labels; "
                f"those are {', '.join(labels)}"
            )
        return Heads(policy="keep", labels=labels, union=(), donor=recipe.heads.key)
    if recipe.heads == "label-aware":
        union = _union(labels)
        return Heads(policy="label-aware", labels=labels, union=union, donor=first)
    return Heads(policy=recipe.heads, labels=labels, union=(), donor=first, is_beside=recipe.heads == "keep")


def label_remarks(recipe: Recipe, models: Mapping[str, LoadedModel], *, strict: bool) -> list[str]:
    """Say so where heads are merged row by row of which some name their labels and some do not.

    Args:
        recipe: one that `plan_heads` has accepted.
        models: by `ModelRef.key`.
        strict: make it an error.

    Raises:
        MismatchError: there is something to say, and `strict`.
    """
    if recipe.heads is not None:
        return []
    labels = _labels_by_model(recipe, models)
    named = [key for key, each in labels.items() if _is_named(each)]
    unnamed = [key for key, each in labels.items() if not _is_named(each)]
    if not named or not unnamed:
        return []
    line = (
        f"labels of the head are named in {', '.join(named)} ({some_of(labels[named[0]], 4)}) but not in "
        f"{', '.join(unnamed)} ({some_of(labels[unnamed[0]], 4)}), so their rows are merged by position all the same; "
        "write the names into id2label of config.json, or set heads: merge if the rows mean the same"
    )
    if strict:
        raise MismatchError(line)
    return [line]


def label_fault(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> str | None:
    """Return how the rows of a classification head disagree with the labels in config.json; None if they agree."""
    labels = _labels_in(config, tensors)
    matrices = [
        info
        for info in tensors.values()
        if is_head_tensor(info.name) and not _INNER.search(info.name) and len(info.shape) == 2
    ]
    if labels is None or not matrices or any(info.shape[0] == len(labels) for info in matrices):
        return None
    last = matrices[-1]
    named = f"{counted(len(labels), 'label')} ({some_of(labels, 4)})"
    return f"tensor {last.name} has {last.shape[0]:,} rows, but config.json has {named}; transformers would not load it"


def labels_of(model: LoadedModel) -> tuple[str, ...] | None:
    """Return the labels of a classification model in the order of its rows; None for any other model."""
    return _labels_in(model.checkpoint.config, model.checkpoint.tensors)


def _labels_in(config: Mapping[str, Any], tensors: Iterable[str]) -> tuple[str, ...] | None:
    names = [str(each) for each in config.get("architectures") or ()]
    if not any(name.endswith(_CLASSIFIERS) for name in names):
        return None
    if not any(is_head_tensor(name) for name in tensors):
        return None
    named = config.get("id2label")
    if not isinstance(named, Mapping) or not named:
        count = config.get("num_labels", 2)  # transformers leaves its default out
        return tuple(f"LABEL_{row}" for row in range(int(count)))
    rows = sorted((int(row), str(label)) for row, label in named.items())
    return tuple(label for _, label in rows)


def set_labels(config: dict[str, Any], heads: Heads, models: Mapping[str, LoadedModel]) -> list[str]:
    """Write labels and architecture of the output's head into its config.json; returns remarks."""
    given = models[heads.donor].checkpoint.config
    if heads.policy == "exclude":
        architecture = ", ".join(config.get("architectures") or ["its class"])
        return [as_note(f"heads: exclude leaves out the head; {architecture} gets a new one when loaded")]
    for key in (*LABEL_KEYS, "architectures"):
        config.pop(key, None)
        if key in given:
            config[key] = given[key]
    if heads.policy == "label-aware":
        config["id2label"] = {str(row): label for row, label in enumerate(heads.union)}
        config["label2id"] = {label: row for row, label in enumerate(heads.union)}
        config.pop("num_labels", None)
        return [f"the head has the {len(heads.union)} labels of all models: {', '.join(heads.union)}"]
    return [as_note(f"the head is that of {heads.donor}")]


def head_tensors(model: LoadedModel) -> dict[str, TensorInfo]:
    """Return the tensors of a model's head, those that an adapter replaced in their place."""
    full = model.adapter.full if model.adapter else {}
    tensors = {**model.checkpoint.tensors, **full}
    return {name: info for name, info in tensors.items() if is_head_tensor(name) and is_float(info.dtype)}


def _labels_by_model(recipe: Recipe, models: Mapping[str, LoadedModel]) -> dict[str, tuple[str, ...]]:
    """Return the labels of the models that are merged, as far as they are classifiers, by key."""
    merged = dict.fromkeys(use.model.key for _, layers in recipe.slices() for use in layers.sources)
    return {key: found for key in merged if (found := labels_of(models[key])) is not None}


def _refuse_faults(recipe: Recipe, having: Iterable[str], models: Mapping[str, LoadedModel]) -> None:
    """Refuse models whose head, if the output gets anything of it, is not as large as its config says."""
    if recipe.heads == "exclude":
        return
    for key in [recipe.heads.key] if isinstance(recipe.heads, ModelRef) else having:
        fault = label_fault(models[key].checkpoint.config, models[key].checkpoint.tensors)
        if fault is not None:
            raise MismatchError(
                f"model {key}: {fault}; mend id2label there, or leave the heads out by heads: exclude"
            )


def _is_named(labels: Sequence[str]) -> bool:
    return not all(_UNNAMED.fullmatch(label) for label in labels)


def _refuse_different(labels: Mapping[str, tuple[str, ...]]) -> None:
    """Refuse heads whose rows mean different things, as far as names tell."""
    first, *others = labels
    for other in others:
        one, two = labels[first], labels[other]
        if one != two and (len(one) != len(two) or (_is_named(one) and _is_named(two))):
            raise MismatchError(
                f"the heads of {first} and {other} have different labels ({some_of(one, 4)} and {some_of(two, 4)}), so "
                "their rows do not mean the same; set heads: label-aware (match rows by name), keep (each model's head "
                "beside the output), {keep: MODEL}, exclude, or merge (row by row all the same)"
            )


def _union(labels: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    for key, names in labels.items():
        if not _is_named(names):
            raise MismatchError(
                f"heads: label-aware matches rows by the names of labels, but config.json of {key} names none "
                f"(id2label is {some_of(names, 4)}); write them there, or set heads: {{keep: MODEL}}"
            )
        if len(set(names)) < len(names):
            raise MismatchError(
                f"two labels of {key} have one name ({some_of(names, 4)}); mend id2label in its config"
            )
    return tuple(dict.fromkeys(label for names in labels.values() for label in names))
