"""Merges whose inputs and outputs lie in an object store: the same bytes as on a disk, each source byte once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from object_store import BUCKET, ObjectStore

import raymerge
from raymerge.cluster import merge as merge_module
from raymerge.cluster.merge import MergeResult, merge
from raymerge.cluster.options import MergeOptions

OPTIONS = {"in_process": True, "workers": 2, "out_shard_size": "40KB"}


@pytest.fixture
def family(
    tiny_checkpoints: Callable[..., Any], object_store: ObjectStore, request: pytest.FixtureRequest
) -> tuple[Any, dict[str, str], str]:
    """Return a family on disk, the URIs of its members by name, and a prefix of this test alone."""
    found = tiny_checkpoints("llama", sharded=True)
    prefix = request.node.name.replace("[", "-").replace("]", "")
    uris = {path.name: object_store.put(path, f"{prefix}/{path.name}") for path in (found.base, *found.models)}
    return found, uris, prefix


def recipe_of(base: Any, models: list[Any], method: str = "task_arithmetic", **parameters: Any) -> dict[str, Any]:
    return {
        "merge_method": method,
        "base_model": str(base),
        "models": [{"model": str(model), "parameters": {"weight": 0.5}} for model in models],
        "parameters": parameters,
        "dtype": "float32",
    }


def weights(read: Callable[[str], bytes], names: list[str]) -> dict[str, bytes]:
    return {name: read(name) for name in names if name.endswith((".safetensors", ".index.json"))}


def on_disk(folder: Path) -> dict[str, bytes]:
    return weights(lambda name: (folder / name).read_bytes(), sorted(path.name for path in folder.iterdir()))


def in_store(store: ObjectStore, prefix: str) -> dict[str, bytes]:
    names = [key.removeprefix(f"{prefix}/") for key in store.keys(f"{prefix}/")]
    return weights(lambda name: store.get(f"{prefix}/{name}"), sorted(names))


def run(recipe: dict[str, Any], out: Any, **options: Any) -> MergeResult:
    return merge([recipe], out, MergeOptions(**{**OPTIONS, **options}))


def test_same_bytes_from_and_to_a_store(family: Any, object_store: ObjectStore, tmp_path: Path) -> None:
    found, uris, prefix = family
    local = run(recipe_of(found.base, [*found.models]), tmp_path / "local")
    recipe = recipe_of(uris["base"], [uris[path.name] for path in found.models])
    result = run(recipe, f"s3://{BUCKET}/{prefix}/out")
    assert result.outputs == (f"s3://{BUCKET}/{prefix}/out",)
    expected = on_disk(Path(local.outputs[0]))
    assert len(expected) > 3
    assert in_store(object_store, f"{prefix}/out") == expected
    there = {key.rpartition("/")[2] for key in object_store.keys(f"{prefix}/out/")}
    assert there == {path.name for path in Path(local.outputs[0]).iterdir()}
    assert object_store.unfinished_uploads() == 0
    assert not object_store.keys(f"{prefix}/.out.raymerge/")


def test_mixed_places(family: Any, object_store: ObjectStore, tmp_path: Path) -> None:
    found, uris, prefix = family
    local = run(recipe_of(found.base, [found.models[0]]), tmp_path / "local")
    run(recipe_of(found.base, [uris["first"]]), tmp_path / "to-disk")
    run(recipe_of(uris["base"], [found.models[0]]), f"s3://{BUCKET}/{prefix}/out")
    expected = on_disk(Path(local.outputs[0]))
    assert on_disk(tmp_path / "to-disk") == expected == in_store(object_store, f"{prefix}/out")
