"""Data in an object store: the rows of a local copy, made once, and made anew when an object changes."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from object_store import BUCKET, ObjectStore

from raymerge.cluster.grid_plan import _file_fingerprints
from raymerge.cluster.yaml_source import MAX_TEXT_BYTES, read_documents
from raymerge.merge_actors.errors import CheckpointError, RecipeError
from raymerge.stats import remote_data
from raymerge.stats.data_rows import DataSpec, read_rows
from raymerge.stats.image_data import are_images
from raymerge.stats.remote_data import local_data


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAYMERGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _jsonl(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def test_a_file_is_copied_once_and_again_when_it_changes(object_store: ObjectStore, cache: Path) -> None:
    object_store.put_bytes("data-file/texts.jsonl", _jsonl("one", "two"))
    spec = DataSpec(source=f"s3://{BUCKET}/data-file/texts.jsonl")
    assert read_rows(spec).texts == ["one", "two"]
    object_store.forget()
    assert read_rows(spec).texts == ["one", "two"]
    assert object_store.fetched("data-file/") == []
    object_store.put_bytes("data-file/texts.jsonl", _jsonl("other", "texts"))
    assert read_rows(spec).texts == ["other", "texts"]
    assert not [name for name in os.listdir(cache / "data") if name.startswith("copying-")]


def test_a_folder_is_read_by_its_splits(object_store: ObjectStore, cache: Path) -> None:
    object_store.put_bytes("data-folder/train/a.jsonl", _jsonl("a"))
    object_store.put_bytes("data-folder/train/b.jsonl", _jsonl("b"))
    object_store.put_bytes("data-folder/test/c.jsonl", _jsonl("c"))
    source = f"s3://{BUCKET}/data-folder/"
    assert read_rows(DataSpec(source=source)).texts == ["a", "b"]
    assert read_rows(DataSpec(source=source, split="test")).texts == ["c"]
    assert not are_images(DataSpec(source=source))
    object_store.put_bytes("data-images/cat.png", b"png")
    assert are_images(DataSpec(source=f"s3://{BUCKET}/data-images"))


def test_a_large_file_is_copied_in_parts(
    object_store: ObjectStore, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raymerge.stats.remote_data.REQUEST_BYTES", 1000)
    content = _jsonl(*(f"text {number}" for number in range(300)))
    object_store.put_bytes("data-large/texts.jsonl", content)
    uri = f"s3://{BUCKET}/data-large/texts.jsonl"
    copy = Path(local_data(uri))
    assert copy.read_bytes() == content
    assert len(object_store.fetched("data-large/")) == -(-len(content) // 1000)
    # The time is the object's: a grid's keys are the same on another machine.
    status = copy.stat()
    shutil.rmtree(cache)
    assert Path(local_data(uri)).stat().st_mtime == status.st_mtime


def test_what_is_not_there_or_broken_off_is_said(object_store: ObjectStore, cache: Path) -> None:
    with pytest.raises(RecipeError, match=r"'s3://models/nothing\.jsonl' do not exist"):
        read_rows(DataSpec(source=f"s3://{BUCKET}/nothing.jsonl"))
    with pytest.raises(CheckpointError, match="bucket"):
        local_data("s3://no-such-bucket/texts.jsonl")
    object_store.put_bytes("data-cut/texts.jsonl", _jsonl("one", "two"))
    fault = object_store.fail("cut", "data-cut/texts")
    assert read_rows(DataSpec(source=f"s3://{BUCKET}/data-cut/texts.jsonl")).texts == ["one", "two"]
    assert fault.num_done == 1


@pytest.mark.parametrize("way_out", ["../../../left.jsonl", "train/../../../../left.jsonl"])
def test_no_key_leads_out_of_the_cache(object_store: ObjectStore, cache: Path, way_out: str) -> None:
    """A store knows no folders, so a stranger's key may say what would be one above on a disk."""
    object_store._call("PUT", f"/{BUCKET}/data-out/texts.jsonl", _jsonl("one"))
    assert object_store._call("PUT", f"/{BUCKET}/data-out/{way_out}", _jsonl("left"))[0] == 200
    with pytest.raises(RecipeError, match=r"'\.\.', which is no name of a file or a folder"):
        local_data(f"s3://{BUCKET}/data-out")
    assert not list(cache.parent.rglob("left.jsonl"))


def test_workers_of_a_node_copy_data_once(
    object_store: ObjectStore, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them have looked, and found no copy, before the first one begins."""
    object_store.put_bytes("data-node/texts.jsonl", _jsonl("one"))
    object_store.forget()
    copy, looked = remote_data._copy, threading.Barrier(3, timeout=60)

    def copy_together(*arguments: Any) -> None:
        looked.wait()
        copy(*arguments)

    monkeypatch.setattr(remote_data, "_copy", copy_together)
    with ThreadPoolExecutor(3) as workers:
        places = set(workers.map(local_data, [f"s3://{BUCKET}/data-node"] * 3))
    assert [Path(place, "texts.jsonl").read_bytes() for place in places] == [_jsonl("one")]
    assert len(object_store.fetched("data-node/")) == 1


def test_a_full_cache_is_said(object_store: ObjectStore, cache: Path) -> None:
    object_store.put_bytes("data-full/texts.jsonl", _jsonl("one"))
    cache.write_text("a file where the folder should be")
    with pytest.raises(RecipeError, match="set RAYMERGE_CACHE to another folder"):
        local_data(f"s3://{BUCKET}/data-full/texts.jsonl")


def test_points_of_a_grid_follow_data_in_a_store(object_store: ObjectStore, cache: Path) -> None:
    uri = f"s3://{BUCKET}/data-keys/texts.jsonl"
    object_store.put_bytes("data-keys/texts.jsonl", _jsonl("one"))
    tasks = [{"name": "lm", "kind": "loss", "validation": uri}]
    before = _file_fingerprints(tasks)
    assert list(before) == [uri]
    object_store.put_bytes("data-keys/texts.jsonl", _jsonl("two", "three"))
    assert _file_fingerprints(tasks) != before


def test_recipes_are_read_from_a_store(
    object_store: ObjectStore, tiny_checkpoints: Callable[..., Any], tmp_path: Path
) -> None:
    import raymerge

    family = tiny_checkpoints("llama")
    recipe = {"merge_method": "linear", "models": [{"model": str(m)} for m in family.models]}
    recipe["parameters"] = {"weight": 1}
    object_store.put_bytes("recipes/soup.yaml", json.dumps(recipe).encode())
    raymerge.merge(f"s3://{BUCKET}/recipes/soup.yaml", tmp_path / "out", in_process=True)
    raymerge.merge(recipe, tmp_path / "plain", in_process=True)
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    object_store.put_bytes("recipes/bomb.yaml", b"a" * (MAX_TEXT_BYTES + 1))
    with pytest.raises(RecipeError, match="is larger than 4 MiB"):
        read_documents(f"s3://{BUCKET}/recipes/bomb.yaml")
