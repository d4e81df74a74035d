"""Every use of a URI on stores other than S3: models, adapters, statistics, outputs, verify, inspect, resume.

memory:// and file:// always run. RAYMERGE_TEST_STORE names folders in further stores, between spaces, that exist only
while somebody tries them (docs/storage.md says with which servers that was done):

    RAYMERGE_TEST_STORE="gs://models/tried abfs://models/tried" pytest tests/cluster/test_other_stores.py
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import raymerge
from raymerge.cli.main import main
from raymerge.merge_actors.errors import CheckpointError, OutputError, RaymergeError
from raymerge.merge_actors.storage.folders import entries, exists, read_bytes
from raymerge.merge_actors.storage.objects import delete_folder, delete_objects, upload_file, write_object
from raymerge.merge_actors.storage.ranges import RemoteRanges
from raymerge.merge_actors.storage.storage_files import StorageFiles
from raymerge.merge_actors.storage.store import forget_stores

PLACES = ["memory://tests", "file", *os.environ.get("RAYMERGE_TEST_STORE", "").split()]


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Make a folder of the store that is this test's own."""
    monkeypatch.setenv("RAYMERGE_CACHE", str(tmp_path / "cache"))
    forget_stores()
    if request.param == "file":
        yield f"file://{tmp_path}/store"
        return
    uri = f"{request.param}/{uuid.uuid4().hex[:8]}"
    yield uri
    delete_folder(uri)


def put(folder: Path, uri: str) -> str:
    """Upload a folder, or copy it where the store is a folder."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            if uri.startswith("file://"):
                target = Path(uri.removeprefix("file://")) / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
            else:
                upload_file(str(path), f"{uri}/{name}")
    return uri


def get(uri: str) -> bytes:
    return Path(uri.removeprefix("file://")).read_bytes() if uri.startswith("file://") else read_bytes(uri)


def weights(uri: str, tmp_path: Path) -> dict[str, torch.Tensor]:
    path = tmp_path / f"{uuid.uuid4().hex}.safetensors"
    path.write_bytes(get(f"{uri}/model.safetensors"))
    found: dict[str, torch.Tensor] = load_file(path)
    return found


def test_a_merge_from_and_into_the_store(
    place: str, tmp_path: Path, tiny_checkpoints: Callable[..., Any]
) -> None:
    family = tiny_checkpoints("llama", sharded=True)
    base, *models = (
        put(folder, f"{place}/in{number}") for number, folder in enumerate((family.base, *family.models))
    )
    recipe = {
        "merge_method": "ties",
        "base_model": base,
        "models": [{"model": model, "parameters": {"weight": 0.5, "density": 0.6}} for model in models],
    }
    local = recipe | {
        "base_model": str(family.base),
        "models": [
            {"model": str(each), "parameters": {"weight": 0.5, "density": 0.6}} for each in family.models
        ],
    }
    raymerge.merge(local, tmp_path / "expected", in_process=True)
    raymerge.merge(recipe, f"{place}/out", in_process=True, workers=2, stage=str(tmp_path / "stage"))
    found, expected = (
        weights(f"{place}/out", tmp_path),
        load_file(tmp_path / "expected" / "model.safetensors"),
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    for command in (
        ["verify", f"{place}/out"],
        ["inspect", f"{place}/out", "--base", base],
        ["status", f"{place}/out"],
    ):
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 0, result.output
    with pytest.raises(OutputError, match="--overwrite"):
        raymerge.merge(recipe, f"{place}/out", in_process=True)
    raymerge.merge(recipe, f"{place}/out", in_process=True, overwrite=True)


def test_statistics_and_an_adapter_in_the_store(
    place: str, tmp_path: Path, tiny_checkpoints: Callable[..., Any]
) -> None:
    family = tiny_checkpoints("llama")
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"word{i} word{i * 7 % 90}"}) + "\n" for i in range(40)))
    lora = tmp_path / "lora"
    lora.mkdir()
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    size = json.loads((family.base / "config.json").read_text())["hidden_size"]
    factors = {
        f"{module}.lora_A.weight": torch.randn(2, size),
        f"{module}.lora_B.weight": torch.randn(size, 2),
    }
    save_file(factors, lora / "adapter_model.safetensors")
    (lora / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    plain = put(family.models[0], f"{place}/plain")
    adapted = f"{put(family.base, f'{place}/base')}+{put(lora, f'{place}/lora')}"
    for number, model in enumerate((plain, adapted)):
        command = ["stats", model, "--data", str(texts), "--out", f"{place}/s{number}", "--in-process"]
        result = CliRunner().invoke(main, [*command, "--workers", "1"])
        assert result.exit_code == 0, result.output
    models = [{"model": plain, "statistics": f"{place}/s0"}, {"model": adapted, "statistics": f"{place}/s1"}]
    recipe = {"merge_method": "regmean", "models": models, "parameters": {"alpha": 0.5}}
    raymerge.merge(recipe, f"{place}/out", in_process=True)
    measured = [{"model": each["model"], "data": str(texts)} for each in models]
    raymerge.merge(recipe | {"models": measured}, f"{place}/out2", in_process=True)
    one, other = (weights(f"{place}/{name}", tmp_path) for name in ("out", "out2"))
    assert all(torch.equal(other[name], tensor) for name, tensor in one.items())


def test_what_is_not_there_is_one_sentence(place: str, tmp_path: Path) -> None:
    recipe = {"merge_method": "linear", "models": [{"model": f"{place}/no", "parameters": {"weight": 1}}]}
    with pytest.raises(CheckpointError, match=r"model '.*/no' does not exist"):
        raymerge.merge(recipe, tmp_path / "out", in_process=True)


def test_objects(place: str, tmp_path: Path) -> None:
    if place.startswith("file://"):
        pytest.skip("a local folder")
    data = os.urandom(20 << 20)
    write_object(f"{place}/a/small", b"0123456789")
    (tmp_path / "large").write_bytes(data)
    upload_file(str(tmp_path / "large"), f"{place}/a/large")
    assert {each.name: each.num_bytes for each in entries(f"{place}/a")} == {"large": len(data), "small": 10}
    assert exists(f"{place}/a/small") and not exists(f"{place}/a/none") and entries(f"{place}/none") == []
    ranges = RemoteRanges()
    before = ranges.identity(f"{place}/a/small")
    ranges.close()
    for stage in (None, str(tmp_path / "stage")):
        files = StorageFiles(stage)
        buffer = bytearray(len(data) - 5)
        files.read_into(f"{place}/a/large", 5, memoryview(buffer))
        assert buffer == data[5:]
        files.close()
    write_object(f"{place}/a/small", b"9876543210")
    forget_stores()
    ranges = RemoteRanges()
    assert ranges.identity(f"{place}/a/small") != before
    with pytest.raises(CheckpointError, match="does not exist"):
        ranges.num_bytes(f"{place}/a/none")
    ranges.close()
    delete_objects([f"{place}/a/small", f"{place}/a/none"])
    assert [each.name for each in entries(f"{place}/a")] == ["large"]
    delete_folder(f"{place}/a")
    assert entries(f"{place}/a") == [] and not exists(f"{place}/a/large")


@pytest.mark.parametrize(
    ("uri", "sentence"),
    [
        (
            "nonsense://bucket/x",
            r"no client for nonsense:// can be made \(Protocol not known: nonsense\); docs",
        ),
        ("gdrive://x/y", r"no client for gdrive:// can be made \(.*[Pp]lease install"),
        ("hdfs://nowhere:9000/x", r"it needs libhdfs and a Java on every node"),
        ("abfs://container/x", "write abfs://CONTAINER@ACCOUNT"),
    ],
)
def test_what_is_not_supported_is_one_sentence(
    uri: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    forget_stores()
    recipe = {"merge_method": "linear", "models": [{"model": uri, "parameters": {"weight": 1}}]}
    with pytest.raises(RaymergeError, match=sentence) as caught:
        raymerge.merge(recipe, tmp_path / "out", in_process=True)
    assert "\n" not in str(caught.value)
