"""The local copy of a remote model's small files: what is in it, and when it is another one."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from raymerge.merge_actors.errors import CheckpointError
from raymerge.merge_actors.storage import mirror
from raymerge.merge_actors.storage.mirror import mirrored
from raymerge.merge_actors.storage.store import Entry

URI = "s3://bucket/model"
NAMES = [
    "config.json",
    "tokenizer.model",
    "chat_template.jinja",
    "vocab.txt",
    "model.safetensors",
    "README.md",
]


def _file(name: str, num_bytes: int = 9) -> Entry:
    return Entry(name, is_folder=False, num_bytes=num_bytes, version="1")


def _folder(name: str) -> Entry:
    return Entry(name, is_folder=True, num_bytes=0, version="")


LISTING = [*map(_file, NAMES), _file("huge.json", 1 << 40), _folder("1_Pooling"), _folder("onnx")]


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Return what is fetched, in any order, from a store in which every file holds its own address."""
    found: list[str] = []

    def read(uri: str) -> bytes:
        found.append(uri.removeprefix(f"{URI}/"))
        return uri.encode()

    monkeypatch.setenv("RAYMERGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(mirror, "read_bytes", read)
    monkeypatch.setattr(mirror, "entries", lambda uri: [_file("config.json")])
    monkeypatch.setattr(mirror, "map_concurrently", lambda action, values, uris: [*map(action, values)])
    return found


def test_what_is_small_and_known_is_fetched_once(fetched: list[str]) -> None:
    folder = mirrored(URI, LISTING)
    wanted = [*NAMES[:4], "1_Pooling/config.json"]
    assert sorted(fetched) == sorted(wanted)
    there = [
        os.path.relpath(os.path.join(root, file), folder)
        for root, _, files in os.walk(folder)
        for file in files
    ]
    assert sorted(there) == sorted(wanted)
    assert Path(folder, "1_Pooling/config.json").read_text() == f"{URI}/1_Pooling/config.json"
    assert mirrored(URI, LISTING) == folder and len(fetched) == len(wanted)


@pytest.mark.parametrize("change", [{"version": "2"}, {"num_bytes": 10}])
def test_a_file_that_was_replaced_makes_another_copy(fetched: list[str], change: dict[str, object]) -> None:
    """A tokenizer that is mended in place often keeps its length; weights that change do not matter."""
    folder = mirrored(URI, LISTING)
    assert mirrored(URI, [dataclasses.replace(LISTING[0], **change), *LISTING[1:]]) != folder
    weights = NAMES.index("model.safetensors")
    rest = [*LISTING[:weights], dataclasses.replace(LISTING[weights], **change), *LISTING[weights + 1 :]]
    assert mirrored(URI, rest) == folder
    assert mirrored("s3://bucket/other", LISTING) != folder


def test_a_fetch_that_fails_leaves_no_copy(fetched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(uri: str) -> bytes:
        if fetched:
            raise CheckpointError("the store keeps failing")
        fetched.append(uri)
        return b"{}"

    with monkeypatch.context() as patched:
        patched.setattr(mirror, "read_bytes", fail)
        with pytest.raises(CheckpointError, match="keeps failing"):
            mirrored(URI, LISTING)
    folder = mirrored(URI, LISTING)
    assert os.listdir(os.path.dirname(folder)) == [os.path.basename(folder)]
    assert Path(folder, "config.json").read_text() == f"{URI}/config.json"
