"""The small files of merged models in an evaluator: config and tokenizer, written once for all points that share them.

Points differ in weights and rarely in anything else. What they may differ in (the donor of the config, the
vocabulary, the dtype) decides the key; folders with the same files are one folder.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import xxhash

from raymerge.cluster.campaign import PlannedWave
from raymerge.cluster.output_files import RECIPE_NAME, write_metadata_files

#: Written beside a model, but without influence on how it is scored.
_IGNORED = (RECIPE_NAME, "README.md")
#: Keys of a recipe that config and tokenizer do not depend on.
_OF_WEIGHTS = frozenset({"merge_method", "parameters", "seed", "name", "statistics", "data"})


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """Config and tokenizer of some points' models, and their tensors."""

    path: str
    fingerprint: str
    """Of the files, and of name, dtype and shape of every tensor."""


@dataclass(slots=True)
class ModelFolders:
    """Temporary folders by what decides their files."""

    root: str = field(default_factory=lambda: tempfile.mkdtemp(prefix="raymerge-evaluator-"))
    _by_key: dict[Hashable, ModelFolder] = field(default_factory=dict)
    _by_fingerprint: dict[str, ModelFolder] = field(default_factory=dict)

    def folder_of(self, wave: PlannedWave) -> ModelFolder:
        """Return the folder of a point's model; its files are written if no earlier point had the same."""
        (plan,), (vocabulary,), (heads,) = wave.plan.recipes, wave.vocabularies, wave.heads
        signature = tuple((tensor.name, tensor.dtype, tensor.shape) for tensor in plan.tensors)
        key = (repr(_without_weights(plan.recipe.to_mapping())), repr(vocabulary), signature)
        if key not in self._by_key:
            path = tempfile.mkdtemp(dir=self.root)
            write_metadata_files(path, plan.recipe, wave.models, plan.tensors, plan.layout, vocabulary, heads)
            fingerprint = _fingerprint(path, signature)
            if fingerprint in self._by_fingerprint:
                shutil.rmtree(path)
            else:
                self._by_fingerprint[fingerprint] = ModelFolder(path, fingerprint)
            self._by_key[key] = self._by_fingerprint[fingerprint]
        return self._by_key[key]

    def remove(self) -> None:
        """Delete all folders."""
        shutil.rmtree(self.root, ignore_errors=True)


def _without_weights(value: Any) -> Any:
    """Return a recipe's mapping without what decides the weights alone."""
    if isinstance(value, Mapping):
        return {name: _without_weights(each) for name, each in value.items() if name not in _OF_WEIGHTS}
    return [_without_weights(each) for each in value] if isinstance(value, list) else value


def _fingerprint(path: str, signature: tuple[object, ...]) -> str:
    digest = xxhash.xxh3_128(repr(signature).encode())
    for folder, folders, files in os.walk(path):
        folders.sort()
        for name in sorted(files):
            if name in _IGNORED:
                continue
            digest.update(os.path.relpath(os.path.join(folder, name), path).encode())
            with open(os.path.join(folder, name), "rb") as file:
                digest.update(file.read())
    return digest.hexdigest()
