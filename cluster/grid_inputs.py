"""The inputs of a grid's points, summed up: a point's key changes with whatever its recipe names.

A recipe names its inputs by texts, in many spellings, and a grid makes thousands of recipes; so a point's
inputs are looked up by the texts in it. Where a text could name two inputs (two revisions of one model), both
count: that a point is measured once too often costs less than a result that is another model's.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import xxhash

from raymerge.cluster.campaign import PlannedWave
from raymerge.cluster.grid_points import fingerprint
from raymerge.cluster.model_ref import ModelRef, parse_model
from raymerge.cluster.opened import OpenedInputs, refs_of
from raymerge.cluster.recipe import Recipe
from raymerge.stats.remote_data import local_data

#: Files up to this size are read whole for a fingerprint; larger ones count by length and time.
_HASHED_BYTES = 256 << 20
#: What config, tokenizer, processors and code of a model are written in.
_SMALL_FILES = re.compile(r".*\.(json|jinja|txt|model|vocab|merges|bpe|tiktoken|py)")
#: Of these, what has no influence: the index of weights, logs of a training or of an earlier merge.
_NO_INPUTS = re.compile(
    r".*\.index\.json|raymerge_.*|trainer_state\.json|(all|train|eval)_results\.json|README.*|LICENSE.*"
)
#: Modules after the network, as sentence-transformers keeps them, and chat templates by name.
_FOLDERS = re.compile(r"\d+_\w+|additional_chat_templates")


class GridInputs:
    """Fingerprints of models, adapters, statistics and data, found by what recipes call them."""

    def __init__(self) -> None:
        #: path -> {revision of it: fingerprint}
        self._found: dict[str, dict[str, str]] = {}
        #: text of a recipe -> fingerprints
        self._of_texts: dict[str, list[str]] = {}

    def note(self, recipe: Recipe, wave: PlannedWave, opened: OpenedInputs) -> None:
        """Take down the inputs of a planned recipe."""
        self._of_texts.clear()
        for ref in refs_of(recipe):
            model = wave.models[ref.key]
            self._note_model(ref, model.checkpoint.fingerprint, model.checkpoint.folder)
            if ref.adapter is not None and model.adapter is not None:
                self._note_model(ref.adapter, model.adapter.fingerprint, model.adapter.folder)
        for use in (use for _, layers in recipe.slices() for use in layers.sources):
            if use.statistics is not None and use.measurement in wave.statistics:
                # Of all samples: another value on a samples axis leaves the other points as they are.
                self._note_statistics(use.statistics, opened)
            elif use.data is not None:
                self._note_path(use.data.spec.source)
        if recipe.chat_template is not None:
            self._note_path(recipe.chat_template)

    def of(self, recipe: Mapping[str, Any]) -> list[str]:
        """Return the fingerprints of all inputs that a recipe names, in the order of their names."""
        return [each for text in sorted(set(texts(recipe))) for each in self._of_text(text)]

    def _of_text(self, text: str) -> list[str]:
        if text not in self._of_texts:
            paths = [path for path in dict.fromkeys([text, *_paths_in(text)]) if path in self._found]
            self._of_texts[text] = [each for path in paths for _, each in sorted(self._found[path].items())]
        return self._of_texts[text]

    def _note_model(self, ref: ModelRef, of_weights: str, folder: str) -> None:
        self._note(ref.path, ref.revision or "", lambda: fingerprint(of_weights, _small_files(folder)))

    def _note_statistics(self, path: str, opened: OpenedInputs) -> None:
        self._note(path, "", lambda: opened.open_statistics(path).fingerprint)

    def _note_path(self, text: str) -> None:
        path = local_data(text)
        if os.path.exists(path):
            self._note(text, "", lambda: path_fingerprint(path))

    def _note(self, path: str, revision: str, make: Callable[[], str]) -> None:
        of_path = self._found.setdefault(path, {})
        if revision not in of_path:
            of_path[revision] = make()


def texts(value: Any) -> Iterator[str]:
    """Yield every text in nested values."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from texts(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from texts(each)


def path_fingerprint(path: str) -> str:
    """Return a fingerprint of a file's content, or of the files of a folder."""
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        names = sorted(
            os.path.relpath(os.path.join(folder, name), path)
            for folder, _, files in os.walk(path)
            for name in files
            if not name.startswith(".")
        )
        return fingerprint([(name, path_fingerprint(os.path.join(path, name))) for name in names])
    status = os.stat(path)
    if status.st_size > _HASHED_BYTES:
        return fingerprint(status.st_size, status.st_mtime_ns)
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _paths_in(text: str) -> list[str]:
    """Return the paths that a text names if it is a model: path[@revision][+adapter[@revision]]."""
    try:
        ref = parse_model(text)
    except ValueError:
        return []
    return [ref.path] if ref.adapter is None else [ref.path, ref.adapter.path]


def _small_files(folder: str) -> list[tuple[str, str]]:
    """Return what lies beside a model's weights and goes into a merged model or its scores."""
    found = []
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        if os.path.isdir(path):
            is_input = _FOLDERS.fullmatch(name) is not None
        else:
            is_input = _SMALL_FILES.fullmatch(name) is not None and not _NO_INPUTS.fullmatch(name)
        if is_input:
            found.append((name, path_fingerprint(path)))
    return found
