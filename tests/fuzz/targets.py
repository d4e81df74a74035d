"""What is fuzzed: each takes bytes from a stranger and may only succeed or raise an error of ours.

Anything else (an IndexError, a hang, gigabytes of memory) is a finding. `run.py` drives them by coverage;
`test_corpus.py` replays what earlier runs found worth keeping.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable

from safetensors import SafetensorError, safe_open

from raymerge.cluster.recipe import load_recipes
from raymerge.cluster.yaml_source import parse_documents
from raymerge.merge_actors.checkpoint.folder import open_checkpoint
from raymerge.merge_actors.checkpoint.header import read_header
from raymerge.merge_actors.errors import RaymergeError

_FOLDER = tempfile.mkdtemp(prefix="raymerge-fuzz-")
_WEIGHTS = (
    (60).to_bytes(8, "little")
    + b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'.ljust(60)
    + bytes(8)
)


def header(data: bytes) -> None:
    """Read a safetensors header; what we accept, the safetensors library accepts with the same tensors."""
    path = os.path.join(_FOLDER, "model.safetensors")
    with open(path, "wb") as file:
        file.write(data)
    try:
        tensors, _ = read_header(path)
    except RaymergeError:
        return
    try:
        with safe_open(path, framework="numpy") as theirs:
            names = set(theirs.keys())
    except SafetensorError as error:
        raise AssertionError(f"accepted by us, refused by the library: {error}") from error
    assert names == set(tensors)
    assert all(0 <= tensor.begin <= tensor.end <= len(data) for tensor in tensors.values())


def index(data: bytes) -> None:
    """Open a sharded checkpoint whose index a stranger wrote: no file outside its folder is ever named."""
    folder = os.path.join(_FOLDER, "sharded")
    os.makedirs(folder, exist_ok=True)
    for name, content in (
        ("model-00001-of-00001.safetensors", _WEIGHTS),
        ("model.safetensors.index.json", data),
        ("config.json", b"{}"),
    ):
        with open(os.path.join(folder, name), "wb") as file:
            file.write(content)
    try:
        checkpoint = open_checkpoint(folder)
    except RaymergeError:
        return
    for tensor in checkpoint.tensors.values():
        assert os.path.dirname(os.path.realpath(tensor.file)) == os.path.realpath(folder)


def recipe(data: bytes) -> None:
    """Read a recipe file."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return
    try:
        parse_documents(text, "recipe.yaml")
        load_recipes(text + "\n")
    except RaymergeError:
        return


TARGETS: dict[str, Callable[[bytes], None]] = {"header": header, "index": index, "recipe": recipe}
