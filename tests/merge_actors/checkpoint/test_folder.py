"""A folder is opened whole or refused with the reason; nothing but headers is read."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from raymerge.merge_actors.checkpoint import folder
from raymerge.merge_actors.checkpoint.folder import Checkpoint, open_checkpoint
from raymerge.merge_actors.errors import CheckpointError

ONE = {"a.weight": torch.arange(6.0).reshape(2, 3), "scalar": torch.tensor(1.5)}
TWO = {"b.weight": torch.ones(4, dtype=torch.bfloat16), "empty": torch.empty(0)}


def write_sharded(folder: Path, *shards: dict[str, torch.Tensor], config: Any = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / name)
        weight_map |= dict.fromkeys(shard, name)
    write_index(folder, weight_map)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(folder, **options)
    return str(raised.value)


def read_bytes(checkpoint: Checkpoint, name: str) -> bytes:
    tensor = checkpoint.tensors[name]
    return Path(tensor.file).read_bytes()[tensor.begin : tensor.end]


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_shards_are_merged_in_order(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path / "model", ONE, TWO, config={"model_type": "x"})
    (tmp_path / "link").symlink_to(folder)
    checkpoint = open_checkpoint(tmp_path / "link")
    assert checkpoint.path == str(tmp_path / "link") and checkpoint.folder == str(folder)
    assert checkpoint.tensors.keys() == ONE.keys() | TWO.keys()
    assert [os.path.basename(tensor.file)[:11] for tensor in checkpoint.tensors.values()] == (
        ["model-00001"] * 2 + ["model-00002"] * 2
    )
    assert checkpoint.config == {"model_type": "x"} and checkpoint.tied == {}
    assert checkpoint.num_parameters == 6 + 1 + 4
    assert checkpoint.num_bytes == 24 + 4 + 8
    for name, tensor in (ONE | TWO).items():
        assert read_bytes(checkpoint, name) == as_bytes(tensor)


def test_a_single_file_wins_over_the_rest_as_in_transformers(tmp_path: Path) -> None:
    write_sharded(tmp_path, TWO)
    save_file(ONE, tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path).tensors.keys() == ONE.keys()


def test_files_without_an_index_are_merged_and_the_adapter_is_left_out(tmp_path: Path) -> None:
    save_file(ONE, tmp_path / "diffusion_pytorch_model.safetensors")
    save_file(TWO, tmp_path / "more.safetensors")
    save_file(TWO, tmp_path / "adapter_model.safetensors")
    assert open_checkpoint(tmp_path).tensors.keys() == ONE.keys() | TWO.keys()
    save_file(ONE, tmp_path / "again.safetensors")
    assert refusal(tmp_path) == (
        f"tensor 'a.weight' stands in both {tmp_path}/again.safetensors and "
        f"{tmp_path}/diffusion_pytorch_model.safetensors; a name must occur once: "
        "move the file that does not belong to the model."
    )


def test_an_index_of_diffusers_is_found(tmp_path: Path) -> None:
    save_file(ONE, tmp_path / "diffusion_pytorch_model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(ONE, "diffusion_pytorch_model-00001-of-00001.safetensors")}
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert open_checkpoint(tmp_path).tensors.keys() == ONE.keys()


def test_an_absent_shard_is_named(tmp_path: Path) -> None:
    write_sharded(tmp_path, ONE, TWO)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    assert refusal(tmp_path) == (
        f"{tmp_path} lacks 1 of the 2 files in model.safetensors.index.json: "
        "model-00002-of-00002.safetensors; download the checkpoint again."
    )
    (tmp_path / "model.safetensors.index.json").unlink()
    assert refusal(tmp_path) == (
        f"{tmp_path} lacks 1 of 2 shards and has no index: model-00002-of-00002.safetensors; "
        "download the checkpoint again."
    )


AGAIN = "download the index and the shards again from one revision."
FIRST = "model-00001-of-00002.safetensors"
SECOND = "model-00002-of-00002.safetensors"


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    write_sharded(tmp_path, ONE, TWO)
    index = tmp_path / "model.safetensors.index.json"
    right = json.loads(index.read_text())["weight_map"]
    write_index(tmp_path, right | {"c": SECOND})
    assert refusal(tmp_path) == f"{index} puts tensor 'c' into {SECOND}, but it stands in no shard; {AGAIN}"
    write_index(tmp_path, right | {"scalar": SECOND})
    assert (
        refusal(tmp_path) == f"{index} puts tensor 'scalar' into {SECOND}, but it stands in {FIRST}; {AGAIN}"
    )
    write_index(tmp_path, {name: file for name, file in right.items() if name != "empty"})
    assert refusal(tmp_path) == f"tensor 'empty' stands in {tmp_path}/{SECOND} but not in {index}; {AGAIN}"


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "", "a\\b", "a\0b"]
)
def test_an_index_cannot_name_a_file_elsewhere(tmp_path: Path, name: str) -> None:
    save_file(ONE, tmp_path / "model.safetensors")
    folder = tmp_path / "folder"
    folder.mkdir()
    write_index(folder, dict.fromkeys(ONE, name))
    assert refusal(folder) == (
        f"{folder}/model.safetensors.index.json names the file {name!r}; "
        "it must be a plain file name in the folder of the index: download the checkpoint again."
    )


def test_an_index_cannot_leave_its_folder_by_a_link(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path / "folder", ONE, TWO)
    (folder / SECOND).rename(tmp_path / "elsewhere")
    (folder / SECOND).symlink_to("../elsewhere")
    assert refusal(folder) == (
        f"{SECOND}, which {folder}/model.safetensors.index.json names, is a symbolic link to "
        f"{tmp_path}/elsewhere outside the folder; "
        "give the folder that holds the files themselves, or copy them."
    )


@pytest.mark.parametrize("weight_map", [None, [], {"a": 3}, "x"])
def test_an_index_without_a_map_is_refused(tmp_path: Path, weight_map: Any) -> None:
    write_index(tmp_path, weight_map)
    assert refusal(tmp_path) == (
        f"weight_map in {tmp_path}/model.safetensors.index.json must map tensor names to file names: "
        "download the checkpoint again."
    )


def test_the_hub_cache_with_its_links_is_opened(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    snapshot = write_sharded(repository / "snapshots" / "abc", ONE, TWO)
    (repository / "blobs").mkdir()
    for path in list(snapshot.iterdir()):
        path.rename(repository / "blobs" / f"hash-of-{path.name}")
        path.symlink_to(f"../../blobs/hash-of-{path.name}")
    checkpoint = open_checkpoint(snapshot)
    assert checkpoint.tensors.keys() == ONE.keys() | TWO.keys()
    assert read_bytes(checkpoint, "b.weight") == as_bytes(TWO["b.weight"])


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    assert (
        refusal(tmp_path / "none") == f"model '{tmp_path}/none' does not exist (looked at {tmp_path}/none)."
    )
    assert (
        refusal(tmp_path) == f"{tmp_path} holds no *.safetensors and no pytorch_model*.bin: check the path."
    )
    save_file({}, tmp_path / "model.safetensors")
    assert refusal(tmp_path) == f"{tmp_path}/model.safetensors holds no tensors; a model has at least one."
    file = tmp_path / "model.safetensors"
    assert refusal(file) == f"model '{file}' is a file; give the folder that holds it (looked at {file})."
    pipeline = tmp_path / "pipeline"
    write_sharded(pipeline / "unet", ONE)
    assert refusal(pipeline).endswith("; there are some in unet: give that folder.")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(ONE, adapter / "adapter_model.safetensors")
    assert refusal(adapter) == (
        f"{adapter} holds an adapter, not a model; write the model as base+adapter, "
        "with this folder after the plus."
    )


def test_a_config_that_is_not_json_is_refused(tmp_path: Path) -> None:
    write_sharded(tmp_path, ONE)
    (tmp_path / "config.json").write_text("{")
    assert refusal(tmp_path).startswith(f"{tmp_path}/config.json is not valid JSON: Expecting property name")
    (tmp_path / "config.json").write_text("[1]")
    assert refusal(tmp_path) == (
        f"{tmp_path}/config.json holds a list; it must hold a JSON object: download the checkpoint again."
    )


EMBEDDING = torch.arange(2.0**12).reshape(-1, 4)


@pytest.mark.parametrize(
    ("config", "head", "is_tied"),
    [
        ({"tie_word_embeddings": True}, EMBEDDING, True),
        ({"text_config": {"tie_word_embeddings": True}}, EMBEDDING, True),
        ({"tie_word_embeddings": False}, EMBEDDING, False),
        ({}, EMBEDDING, False),
        ({"tie_word_embeddings": True}, EMBEDDING + 1, False),
        ({"tie_word_embeddings": True}, EMBEDDING.T.contiguous(), False),
        ({"tie_word_embeddings": True}, EMBEDDING.to(torch.bfloat16), False),
    ],
)
def test_a_tied_head_is_dropped_only_when_the_config_ties_it_and_the_bytes_agree(
    tmp_path: Path, config: Any, head: torch.Tensor, is_tied: bool
) -> None:
    tensors = {"model.embed_tokens.weight": EMBEDDING, "lm_head.weight": head.clone()}
    checkpoint = open_checkpoint(write_sharded(tmp_path, tensors, config=config))
    if is_tied:
        assert checkpoint.tied == {"lm_head.weight": "model.embed_tokens.weight"}
        assert list(checkpoint.tensors) == ["model.embed_tokens.weight"]
        assert checkpoint.num_parameters == EMBEDDING.numel()
    else:
        assert checkpoint.tied == {}
        assert checkpoint.tensors.keys() == tensors.keys()


def test_the_embeddings_of_an_encoder_decoder_are_tied_to_the_shared_one(tmp_path: Path) -> None:
    names = ["encoder.embed_tokens.weight", "shared.weight", "decoder.embed_tokens.weight", "lm_head.weight"]
    tensors = {name: EMBEDDING.clone() for name in names}
    checkpoint = open_checkpoint(write_sharded(tmp_path, tensors, config={"tie_word_embeddings": True}))
    assert checkpoint.tied == dict.fromkeys(
        (name for name in names if name != "shared.weight"), "shared.weight"
    )
    assert list(checkpoint.tensors) == ["shared.weight"]


def test_the_fingerprint_follows_the_data_and_not_the_path(tmp_path: Path) -> None:
    one = write_sharded(tmp_path / "one", ONE, TWO)
    two = write_sharded(tmp_path / "two", ONE, TWO)
    before = open_checkpoint(one).fingerprint
    assert len(before) == 32 and open_checkpoint(two).fingerprint == before
    os.utime(two / SECOND, ns=(0, 10**18 + 1))  # copied, or downloaded again
    assert open_checkpoint(two).fingerprint == before
    changed = bytearray((two / FIRST).read_bytes())
    changed[-1] ^= 1
    (two / FIRST).write_bytes(changed)
    assert open_checkpoint(two).fingerprint != before


def test_opening_a_folder_does_not_import_torch(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path, ONE)
    code = (
        "import sys; from raymerge.merge_actors.checkpoint.folder import open_checkpoint; "
        f"open_checkpoint({str(folder)!r}); "
        "assert not {'torch', 'numpy', 'huggingface_hub'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("architecture", ["bert", "llama", "gpt2", "t5"])
@pytest.mark.parametrize("sharded", [False, True])
def test_what_transformers_saves_is_opened(
    tiny_checkpoints: Callable[..., Any], architecture: str, sharded: bool
) -> None:
    folder = tiny_checkpoints(architecture, sharded=sharded).base
    checkpoint = open_checkpoint(folder)
    expected: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        expected |= load_file(path)
    assert checkpoint.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert read_bytes(checkpoint, name) == as_bytes(tensor)


@pytest.mark.parametrize(("num_files", "a_file"), [(1, 8), (4, 8), (8, 4), (40, 1)])
def test_every_file_enters_the_fingerprint_and_many_by_one_sample_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_files: int, a_file: int
) -> None:
    names = [f"model-{number:05}-of-{num_files:05}.safetensors" for number in range(1, num_files + 1)]
    for number, name in enumerate(names):
        save_file({f"t{number}": torch.zeros(4096)}, tmp_path / name)
    counts = []
    real = folder._samples

    def counted(path: str, count: int) -> tuple[int, list[bytes]]:
        counts.append(count)
        return real(path, count)

    monkeypatch.setattr(folder, "_samples", counted)
    before = open_checkpoint(tmp_path).fingerprint
    assert counts == [a_file] * num_files
    changed = torch.zeros(4096)
    changed[1024:3072] = 1
    save_file({f"t{num_files - 1}": changed}, tmp_path / names[-1])
    assert open_checkpoint(tmp_path).fingerprint != before
