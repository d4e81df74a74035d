"""What travels to a cluster with a submitted command: its files, its paths made absolute, its name.

A job starts in a folder of its own on the cluster's head, so a relative path of the submitter's means nothing there.
Recipe files are copied into the job's folder with the paths in them made absolute; other paths stay where they are
and must be visible to the cluster. The same command with the same files has the same name.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

import raymerge
from raymerge.cluster.yaml_source import read_documents

_YAML = (".yaml", ".yml")
#: Under these a bare word is a path if there is a file or folder of its name.
_PATH_KEYS = frozenset(
    "model base_model path lora adapter statistics data source validation test head file general skill".split()
)
#: What Ray accepts as a submission id, and what reads well in a list of jobs.
_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9_.-]+")


@dataclass(kw_only=True, slots=True)
class JobBundle:
    """A command as it will run on the cluster."""

    command: list[str]
    """Words after `raymerge`, paths absolute or in the job's folder."""
    files: dict[str, str] = field(default_factory=dict)
    """Texts by name in the job's folder."""
    num_gpus: int = 0
    """Which the command needs for itself, beside those of its workers."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that are set for it."""
    way: str = "staged"
    """How the nodes come by raymerge."""

    def submission_id(self, name: str | None) -> str:
        """Return a name that the same command always has, with the same files and in the same environment."""
        files, environment = sorted(self.files.items()), sorted(self.environment.items())
        content = json.dumps([self.command, files, self.num_gpus, environment, self.way, _version()])
        own = _NOT_IN_A_NAME.sub("-", name or self._spoken_name()).strip("-.") or "raymerge"
        return f"{own}-{hashlib.sha256(content.encode()).hexdigest()[:10]}"

    def _spoken_name(self) -> str:
        first = next((os.path.splitext(os.path.basename(file))[0] for file in self.files), "")
        return "-".join(part for part in ("raymerge", self.command[0], first) if part)

    def write(self, folder: str, *, with_package: bool) -> None:
        """Write the job's folder.

        Args:
            folder: an existing one.
            with_package: put this raymerge into it, so that the nodes need none (or run this one).
        """
        for name, text in self.files.items():
            with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
                file.write(text)
        if with_package:
            copy_package(folder)


def bundle_words(words: Iterable[tuple[str, bool]], *, files: dict[str, str]) -> list[str]:
    """Return the words of a command with their paths made absolute.

    Args:
        words: each word, and whether it is a path whatever it looks like (OUT, which need not exist).
        files: receives the YAML files among the words (and those of folders that hold nothing but recipes); a word that
            names one is replaced by the file's place in the job's folder.

    Raises:
        RecipeError: a YAML file cannot be read.
    """
    made: list[str] = []
    for word, is_path in words:
        if word.endswith(_YAML) and os.path.isfile(word):
            made.append(_add_file(word, files))
        elif not is_path and _is_recipe_folder(word):
            inside = sorted(name for name in os.listdir(word) if name.endswith(_YAML))
            made += [_add_file(os.path.join(word, name), files) for name in inside]
        elif is_path and "://" not in word:
            made.append(os.path.abspath(os.path.expanduser(word)))
        else:
            made.append(absolute_model(word))
    return made


def absolute_model(text: str) -> str:
    """Make the local folders in a model reference, or any path that exists here, absolute.

    What does not exist here stays as it is: a Hub id, a URI, a word that is no path.
    """
    if "://" in text or "\n" in text:
        return text
    parts = []
    for part in text.split("+"):
        path, at, revision = part.partition("@")
        own = os.path.expanduser(path)
        parts.append(f"{os.path.abspath(own)}{at}{revision}" if path and os.path.exists(own) else part)
    return "+".join(parts)


def absolute_document(value: Any, keep: frozenset[str] = frozenset(), key: str = "") -> Any:
    """Make every path that stands in a YAML document absolute.

    A word without a slash is taken for a path only where a path must stand: a folder that happens to be called
    `linear` does not change a method.

    Args:
        value: a document, or a part of it.
        keep: names of recipes in the campaign, which are models but no paths.
        key: under which the value stands.
    """
    if isinstance(value, str):
        if value in keep or not (os.sep in value or key in _PATH_KEYS):
            return value
        return absolute_model(value)
    if isinstance(value, dict):
        return {name: absolute_document(inner, keep, str(name)) for name, inner in value.items()}
    if isinstance(value, list):
        return [absolute_document(inner, keep, key) for inner in value]
    return value


def copy_package(folder: str) -> None:
    """Copy this raymerge into a folder as one package, whichever way it is installed here."""
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc", "*.egg-info")
    root = os.path.join(folder, "raymerge")
    shutil.copytree(os.path.dirname(raymerge.__file__), root, ignore=ignored)
    # An editable installation keeps the subpackages elsewhere: the repository's top folders.
    for name in ("merge_actors", "stats", "cluster", "cli"):
        place = os.path.join(root, name)
        if not os.path.isdir(place):
            module = __import__(f"raymerge.{name}", fromlist=["__path__"])
            shutil.copytree(next(iter(module.__path__)), place, ignore=ignored)


def _add_file(path: str, files: dict[str, str]) -> str:
    """Put a YAML file, its paths made absolute, among the job's files; return its name there."""
    read = [each.value for each in read_documents(path)]
    names = frozenset(str(each["name"]) for each in read if isinstance(each, dict) and "name" in each)
    documents = [absolute_document(each, names) for each in read]
    stem, extension = os.path.splitext(os.path.basename(path))
    name, number = f"{stem}{extension}", 2
    text = yaml.safe_dump_all(documents, sort_keys=False, allow_unicode=True, width=100)
    while files.get(name, text) != text:
        name, number = f"{stem}-{number}{extension}", number + 1
    files[name] = text
    return f"./{name}" if name.startswith("-") else name


def _is_recipe_folder(word: str) -> bool:
    if not os.path.isdir(word):
        return False
    names = os.listdir(word)
    return any(name.endswith(_YAML) for name in names) and not os.path.exists(
        os.path.join(word, "config.json")
    )


def _version() -> str:
    from importlib.metadata import version

    return version("raymerge")
