"""Runs that replace what lies in an object store and are killed while they do: what is left is known for raymerge's."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from object_store import BUCKET, ObjectStore

import raymerge
from raymerge.cluster.merge import merge
from raymerge.cluster.options import MergeOptions
from raymerge.cluster.remote_run_folder import RemoteRunFolder
from raymerge.cluster.statistics import collect_statistics
from raymerge.cluster.statistics_options import StatisticsOptions
from raymerge.merge_actors.errors import OutputError
from raymerge.stats.data_rows import DataSpec

OPTIONS: dict[str, Any] = {"in_process": True, "workers": 1, "out_shard_size": "40KB"}


@pytest.fixture
def recipe(tiny_checkpoints: Callable[..., Any]) -> dict[str, Any]:
    family = tiny_checkpoints("llama")
    return {
        "merge_method": "task_arithmetic",
        "base_model": str(family.base),
        "models": [{"model": str(family.models[0]), "parameters": {"weight": 0.5}}],
    }


def names(store: ObjectStore, prefix: str) -> set[str]:
    return {key.rpartition("/")[2] for key in store.keys(f"{prefix}/")}


def kill_at(store: ObjectStore, command: list[str], method: str, key: str, query: str = "") -> None:
    """Start a command and kill it while the store makes it wait for its answer to one request."""
    stalled = store.fail("stall", key, method=method, query=query)
    process = subprocess.Popen([sys.executable, "-m", "raymerge", *command], stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 120
        while not stalled.num_done:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.01)
    finally:
        process.kill()
        process.communicate()
        store.faults.clear()


def merge_command(recipe: Any, out: str, tmp_path: Path) -> list[str]:
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    flags = ["--in-process", "--workers", "1", "--out-shard-size", "40KB", "--overwrite"]
    return ["merge", str(tmp_path / "recipe.yaml"), out, *flags]


@pytest.mark.parametrize(
    ("method", "key", "query", "again"),
    [
        ("DELETE", "out/model.safetensors.index.json$", "", "overwrite"),
        ("POST", "", "delete", "overwrite"),  # the manifest is gone, the weights are not
        ("POST", "", "delete", "resume"),
        ("PUT", "header.json$", "", "resume"),  # all is gone, and no journal yet
    ],
)
def test_a_run_killed_while_it_replaces_an_output_is_known_for_ours(
    recipe: Any,
    object_store: ObjectStore,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    method: str,
    key: str,
    query: str,
    again: str,
) -> None:
    prefix = f"overwrite/{request.node.callspec.id.replace('/', '')}/out"
    out = f"s3://{BUCKET}/{prefix}"
    merge([recipe], out, MergeOptions(**OPTIONS))
    before = names(object_store, prefix)
    kill_at(object_store, merge_command(recipe, out, tmp_path), method, key, query)
    left = names(object_store, prefix)
    if query:
        assert "raymerge_manifest.json" not in left and any(".safetensors" in name for name in left)
    with pytest.raises(OutputError, match="an unfinished run for"):
        merge([recipe], out, MergeOptions(**OPTIONS))
    merge([recipe], out, MergeOptions(**OPTIONS, **{again: True}))
    assert names(object_store, prefix) == before
    assert raymerge.verify(out).outputs
    assert not object_store.keys(f"{prefix.removesuffix('out')}.out.raymerge/")


@pytest.mark.parametrize("query", ["delete", ""])
def test_a_run_killed_while_it_clears_an_unfinished_one_away(
    recipe: Any, object_store: ObjectStore, tmp_path: Path, query: str
) -> None:
    """At the removal of the weights that are there, and at the claim of its own that follows."""
    prefix = f"overwrite/unfinished-{query}/out"
    out = f"s3://{BUCKET}/{prefix}"
    object_store.fail("403", r"out/model-00003-of", method="PUT", times=1000)
    with pytest.raises(OutputError, match="access is refused"):
        merge([recipe], out, MergeOptions(**OPTIONS))
    object_store.faults.clear()
    assert any(".safetensors" in name for name in names(object_store, prefix))
    command = merge_command(recipe, out, tmp_path)
    if query:
        kill_at(object_store, command, "POST", "", query)
    else:
        kill_at(object_store, command, "PUT", "begun.json$")
    merge([recipe], out, MergeOptions(**OPTIONS, overwrite=True))
    assert raymerge.verify(out).outputs


def test_statistics_killed_while_they_are_uploaded_are_replaced_from_another_machine(
    recipe: Any, object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"word{i} word{i + 1}"}) + "\n" for i in range(20)))
    out = f"s3://{BUCKET}/overwrite/grams"
    command = ["stats", recipe["base_model"], "--data", str(texts), "--out", out, "--in-process"]
    monkeypatch.setenv("RAYMERGE_CACHE", str(tmp_path / "cache"))
    kill_at(object_store, command, "PUT", "grams/manifest.json$|grams/raymerge_statistics.json$")
    assert names(object_store, "overwrite/grams")
    monkeypatch.setenv("RAYMERGE_CACHE", str(tmp_path / "elsewhere"))
    options = StatisticsOptions(kind="gram", in_process=True, workers=1, data=DataSpec(source=str(texts)))
    collect_statistics(recipe["base_model"], out, options)
    assert "raymerge_statistics.json" in names(object_store, "overwrite/grams")
    assert not object_store.keys("overwrite/.grams.raymerge/")


@pytest.mark.parametrize("at", ["check_space", "preallocate"])
def test_a_run_whose_lock_was_taken_over_removes_nothing_of_the_new_owner(
    recipe: Any, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """Its driver was stopped for long, before or after it made room; what it finds then is another's."""
    prefix = f"overwrite/taken-{at}/out"
    run_folder = f"{prefix.removesuffix('out')}.out.raymerge"
    theirs = [f"{prefix}/model.safetensors", f"{run_folder}/journal.jsonl/header.json"]
    step = getattr(RemoteRunFolder, at)

    def stop_after(folder: RemoteRunFolder, *arguments: Any) -> None:
        step(folder, *arguments)
        for key in object_store.keys(f"{run_folder}/lock-"):
            object_store._call("DELETE", f"/{BUCKET}/{key}")
        for key in theirs:
            object_store.put_bytes(key, b"{}")

    monkeypatch.setattr(RemoteRunFolder, at, stop_after)
    monkeypatch.setattr(RemoteRunFolder, "small_files", lambda folder, _: folder._lock.check_held())
    with pytest.raises(OutputError, match=r"another run took .* over"):
        merge([recipe], f"s3://{BUCKET}/{prefix}", MergeOptions(**OPTIONS))
    assert set(theirs) <= {*object_store.keys(prefix), *object_store.keys(run_folder)}
