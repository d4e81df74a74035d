"""One task of an `evaluate:` section: the fields that all kinds share, and what a kind has to provide.

A kind is a frozen dataclass of what its section may say, beside the code that scores by it. Reading
such a section imports neither torch nor transformers: they come with `prepare`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from raymerge.merge_actors.errors import RaymergeError, RecipeError

if TYPE_CHECKING:
    from raymerge.stats.evaluation.prepared import PreparedTask

Split = Literal["validation", "test"]
SPLITS: tuple[Split, ...] = ("validation", "test")

#: Which model of the merged parameters a kind runs: keys of `resident.AUTO_CLASSES`.
ModelKind = Literal["language_model", "sequence_classifier", "token_classifier", "encoder"]


class EvaluationError(RaymergeError):
    """A task cannot score this model: a callable raised, outputs are not finite. Other models may do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskSpec:
    """What all kinds of task say."""

    kind: ClassVar[str]
    """Value of `kind:` in the file."""
    needs_data: ClassVar[bool] = True
    """Whether `validation:` has to be given."""

    takes_encoder_decoder: ClassVar[bool] = False
    """Whether an encoder-decoder can be its language model."""
    shares_model: ClassVar[bool] = True
    """Whether it leaves the model's modules as they are, so that other tasks can run them at the same time."""

    name: str
    """Unique in the section; the first part of its metrics' names."""
    validation: str | Mapping[str, str] | None = None
    """Data for choosing: a file, folder or data set's name; or {source, config, split}."""
    test: str | Mapping[str, str] | None = None
    """Data that score the chosen ones once; spelt like `validation`."""
    samples: int | None = None
    """Take so many rows [all]."""
    take: Literal["random", "first"] = "random"
    """Which rows `samples` takes."""
    seed: int = 0
    """Of the random choice of rows."""
    batch_tokens: int = 4096
    """Tokens of a batch, padding included [the section's]. Results do not depend on it but by rounding."""
    where: str = field(default="", compare=False, repr=False)
    """Key path of the task in its file, for errors."""
    trust_remote_code: bool = field(default=False, repr=False)
    """Run code of the models where transformers has no class of its own. Never read from a file."""

    def __post_init__(self) -> None:
        for name in ("samples", "batch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise self.error(name, f"{value} is too few; it must be at least 1.")
        if self.needs_data and self.validation is None and self.test is None:
            raise self.error("validation", "missing; name the data that the task scores.")
        for split, given in (("validation", self.validation), ("test", self.test)):
            if isinstance(given, Mapping) and not {"source"} <= given.keys() <= {"source", "config", "split"}:
                raise self.error(
                    split,
                    f"it has the keys {', '.join(given)}; write {{source: ..., config: ..., split: ...}}.",
                )

    def error(self, key: str, reason: str) -> RecipeError:
        """Make an error that carries the key path."""
        return RecipeError(f"{self.where or self.name}.{key}: {reason}" if key else f"{self.where}: {reason}")

    def metric_names(self) -> tuple[str, ...]:
        """Return the metrics that the task yields, the main one first."""
        raise NotImplementedError

    def higher_is_better(self, metric: str) -> bool:
        """Tell whether a larger value of a metric is a better model."""
        return metric not in ("loss", "perplexity", "mse")

    @property
    def model_kind(self) -> ModelKind:
        """Tell which model of the merged parameters the task runs."""
        raise NotImplementedError

    @property
    def head_folder(self) -> str | None:
        """Checkpoint whose head the task puts on the merged encoder; None for the model's own."""
        return getattr(self, "head", None)

    def prepare(self, split: Split, model_folder: str) -> PreparedTask:
        """Read the data of a split and tokenise them.

        Args:
            split: which data.
            model_folder: config.json and tokenizer of the models to score; no weights are read.

        Raises:
            RecipeError: the data do not fit the task, its head or the model.
            CheckpointError: the folder has no tokenizer.
        """
        raise NotImplementedError

    def data(self, split: Split) -> dict[str, str]:
        """Return which data a split is: source, and config and split where they are given.

        Raises:
            RecipeError: the task has no data for the split.
        """
        given = self.validation if split == "validation" else self.test
        if given is None:
            raise self.error(split, f"missing; the task {self.name!r} has no data for the {split} split.")
        return {"source": given} if isinstance(given, str) else dict(given)

    def to_mapping(self) -> dict[str, Any]:
        """Return kind and fields as JSON values, for fingerprints and manifests."""
        values = {name: getattr(self, name) for name in keys_of(type(self))}
        if self.trust_remote_code:
            values["trust_remote_code"] = True
        return {"kind": self.kind, **{name: _plain(value) for name, value in values.items()}}


def keys_of(kind: type[TaskSpec]) -> list[str]:
    """Return what the section of a task may say."""
    return [each.name for each in fields(kind) if each.name not in ("where", "trust_remote_code")]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, tuple | list) else value
