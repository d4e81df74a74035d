"""The inputs of a campaign, each opened once: headers of models and adapters, manifests of statistics.

Whoever plans many times over the same models (a grid, the waves of a campaign) hands one
`OpenedInputs` to every `plan_wave`. What is open stays as it was when it was opened: a model
that is overwritten meanwhile needs a new `OpenedInputs`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from raymerge.cluster.matched import LoadedModel
from raymerge.cluster.model_ref import ModelRef
from raymerge.cluster.recipe import Measurement, Recipe
from raymerge.merge_actors.checkpoint.adapter import Adapter, open_adapter
from raymerge.merge_actors.checkpoint.folder import Checkpoint, open_checkpoint
from raymerge.merge_actors.checkpoint.hub import locate
from raymerge.merge_actors.errors import CheckpointError
from raymerge.merge_actors.storage.uris import is_remote
from raymerge.merge_actors.task import HubModel
from raymerge.stats.statistics_file import Statistics, open_statistics

#: (path, revision) as a recipe names a model; a recipe's result has its folder and the revision "".
Place = tuple[str, str | None]


@dataclass(slots=True)
class OpenedInputs:
    """What has been opened so far."""

    checkpoints: dict[Place, Checkpoint] = field(default_factory=dict)
    adapters: dict[tuple[Place, Place], Adapter] = field(default_factory=dict)
    """By the adapter's place and that of the model it belongs to."""
    statistics: dict[tuple[str, int | None], Statistics] = field(default_factory=dict)
    """By path."""
    cached_statistics: dict[tuple[Measurement, str], str] = field(default_factory=dict)
    """Folder of the statistics in the cache, by what was measured and their kind."""
    hub_models: dict[Place, HubModel] = field(default_factory=dict)
    """The models, and adapters, that came from the Hub."""

    def open_models(
        self, recipes: Sequence[Recipe], results: Mapping[str, str], *, allow_pickle: bool
    ) -> tuple[dict[str, LoadedModel], list[HubModel]]:
        """Return all models of some recipes by `ModelRef.key`, and those that came from the Hub.

        Args:
            recipes: recipes of one wave.
            results: folders of earlier recipes' results, by name.
            allow_pickle: read PyTorch `.bin` files.

        Raises:
            CheckpointError: a model cannot be read, or is quantised.
            MismatchError: an adapter does not fit its model.
        """
        # A model's folder may bear the name of a recipe that has written something by now.
        made_here = {name: results[name] for recipe in recipes for name in recipe.depends_on}
        models: dict[str, LoadedModel] = {}
        places: list[Place] = []
        for ref in dict.fromkeys(ref for recipe in recipes for ref in refs_of(recipe)):
            place = _place_of(ref, made_here)
            checkpoint = self._checkpoint(place, allow_pickle)
            places.append(place)
            adapter = None
            if ref.adapter is not None:
                places.append(_place_of(ref.adapter, made_here))
                adapter = self._adapter(places[-1], place, checkpoint, allow_pickle)
            models[ref.key] = LoadedModel(ref.key, checkpoint, adapter)
        from_hub = [self.hub_models[place] for place in dict.fromkeys(places) if place in self.hub_models]
        return models, from_hub

    def open_statistics(self, path: str, samples: int | None = None) -> Statistics:
        """Return the statistics of a folder, of all samples or of so many.

        Raises:
            CheckpointError: they are absent or cannot be read.
            MismatchError: they were not kept at so many samples.
        """
        if (path, samples) not in self.statistics:
            self.statistics[path, samples] = open_statistics(path, samples)
        return self.statistics[path, samples]

    def _checkpoint(self, place: Place, allow_pickle: bool) -> Checkpoint:
        if place not in self.checkpoints:
            found = open_checkpoint(self._folder(place, allow_pickle), allow_pickle=allow_pickle)
            _refuse_quantised(found)
            self.checkpoints[place] = found
        return self.checkpoints[place]

    def _adapter(self, place: Place, of_model: Place, checkpoint: Checkpoint, allow_pickle: bool) -> Adapter:
        if (place, of_model) not in self.adapters:
            folder = self._folder(place, allow_pickle)
            self.adapters[place, of_model] = open_adapter(folder, checkpoint, allow_pickle=allow_pickle)
        return self.adapters[place, of_model]

    def _folder(self, place: Place, allow_pickle: bool) -> str:
        path, revision = place
        if revision == "":
            return path
        folder = locate(path, revision, allow_pickle=allow_pickle)
        if not (is_remote(folder) or os.path.isdir(path)):
            self.hub_models[place] = HubModel(path, revision, os.path.realpath(folder))
        return folder


def _place_of(ref: ModelRef, made_here: Mapping[str, str]) -> Place:
    return (made_here[ref.path], "") if ref.path in made_here else (ref.path, ref.revision)


def refs_of(recipe: Recipe) -> list[ModelRef]:
    """Return every model that a recipe needs opened: those it merges, and those of config and tokenizer."""
    refs = [*recipe.all_models(), recipe.donor]
    return refs + list(recipe.tokenizer.models() if recipe.tokenizer else ())


def _refuse_quantised(checkpoint: Checkpoint) -> None:
    quantisation = checkpoint.config.get("quantization_config")
    if quantisation:
        kind = quantisation.get("quant_method", "unknown") if isinstance(quantisation, dict) else "unknown"
        raise CheckpointError(
            f"model {checkpoint.path} is quantised ({kind}): its tensors are codes and scales, not weights; merge "
            "the original checkpoint, or dequantise it first"
        )
