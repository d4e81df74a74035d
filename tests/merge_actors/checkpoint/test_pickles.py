"""PyTorch pickles are refused unless allowed, and then converted once to the same bytes."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from raymerge.merge_actors.checkpoint.folder import Checkpoint, open_checkpoint
from raymerge.merge_actors.errors import CheckpointError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("RAYMERGE_CACHE", str(folder))
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    return folder


def read(checkpoint: Checkpoint, name: str) -> bytes:
    tensor = checkpoint.tensors[name]
    return Path(tensor.file).read_bytes()[tensor.begin : tensor.end]


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


EMBEDDING = torch.randn(8, 4)
TENSORS = {
    "embed.weight": EMBEDDING,
    "head.weight": EMBEDDING,
    "transposed": EMBEDDING.T,
    "half": torch.randn(3).to(torch.float16),
    "brain": torch.randn(3, 2).to(torch.bfloat16),
    "scalar": torch.tensor(3),
    "empty": torch.empty(0, 3),
    "other_empty": torch.empty(0, 3),
    "mask": torch.tensor([True, False, True]),
}


def test_without_the_flag_a_pickle_is_refused_by_its_name(model: Path) -> None:
    torch.save(TENSORS, model / "pytorch_model.bin")
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(model)
    assert str(raised.value) == (
        f"model '{model}' holds only PyTorch pickles (pytorch_model.bin), which can run code when opened; "
        "if you trust them, pass --allow-pickle to convert them to safetensors."
    )


@pytest.mark.parametrize("is_legacy", [False, True])
def test_the_bytes_are_kept_and_what_shares_its_storage_is_tied(model: Path, is_legacy: bool) -> None:
    torch.save(TENSORS, model / "pytorch_model.bin", _use_new_zipfile_serialization=not is_legacy)
    (model / "config.json").write_text('{"model_type": "x"}')
    checkpoint = open_checkpoint(model, allow_pickle=True)
    assert checkpoint.folder == str(model) and checkpoint.config == {"model_type": "x"}
    assert checkpoint.tied == {"head.weight": "embed.weight"}
    assert checkpoint.tensors.keys() == TENSORS.keys() - {"head.weight"}
    for name, tensor in checkpoint.tensors.items():
        assert tensor.shape == tuple(TENSORS[name].shape)
        assert read(checkpoint, name) == as_bytes(TENSORS[name])


def test_shards_are_converted_once_and_again_when_they_change(model: Path, cache: Path) -> None:
    names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    torch.save({"a": torch.ones(2)}, model / names[0])
    torch.save({"b": torch.zeros(3)}, model / names[1])
    index = {"weight_map": {"a": names[0], "b": names[1]}}
    (model / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    first = open_checkpoint(model, allow_pickle=True)
    (folder,) = {os.path.dirname(tensor.file) for tensor in first.tensors.values()}
    assert sorted(os.listdir(folder)) == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    inodes = [os.stat(tensor.file).st_ino for tensor in first.tensors.values()]
    second = open_checkpoint(model, allow_pickle=True)
    assert [os.stat(tensor.file).st_ino for tensor in second.tensors.values()] == inodes
    assert second.fingerprint == first.fingerprint
    torch.save({"b": torch.ones(4)}, model / names[1])
    third = open_checkpoint(model, allow_pickle=True)
    assert third.tensors["b"].shape == (4,) and third.fingerprint != first.fingerprint
    assert not [path for path in (cache / "pickle").iterdir() if path.name.startswith("converting-")]


def test_two_nodes_convert_to_the_same_fingerprint(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(TENSORS, model / "pytorch_model.bin")
    one = open_checkpoint(model, allow_pickle=True)
    monkeypatch.setenv("RAYMERGE_CACHE", str(tmp_path / "other-cache"))
    two = open_checkpoint(model, allow_pickle=True)
    assert one.tensors["embed.weight"].file != two.tensors["embed.weight"].file
    assert one.fingerprint == two.fingerprint


class Malice:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return (Path.touch, (self.file,))


def test_code_in_a_pickle_is_not_run(model: Path, tmp_path: Path, cache: Path) -> None:
    torch.save({"a": Malice(tmp_path / "ran")}, model / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"torch refuses to load .* with weights_only: "):
        open_checkpoint(model, allow_pickle=True)
    assert not (tmp_path / "ran").exists()
    assert [path.suffix for path in (cache / "pickle").iterdir()] in ([".lock"], [])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ([torch.ones(1)], "{file} holds a list; it must hold a dict of tensors."),
        (
            {"state_dict": {"a": torch.ones(1)}},
            "{file} holds a dict under 'state_dict'; every entry must be a tensor: "
            "save the model's state_dict() alone.",
        ),
        (
            {"a": torch.ones(2, dtype=torch.complex64)},
            "tensor 'a' in {file} is torch.complex64 and torch.strided, which raymerge does not read; "
            "convert it to a dense tensor of a common dtype.",
        ),
        (
            {"a": torch.eye(2).to_sparse()},
            "tensor 'a' in {file} is torch.float32 and torch.sparse_coo, which raymerge does not read; "
            "convert it to a dense tensor of a common dtype.",
        ),
    ],
)
def test_what_is_no_state_dict_is_refused(model: Path, content: Any, sentence: str) -> None:
    file = model / "pytorch_model.bin"
    torch.save(content, file)
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(model, allow_pickle=True)
    assert str(raised.value) == sentence.format(file=file)


@pytest.mark.parametrize(
    "content", [b"", b"not a pickle", pickle.dumps({"a": 1}, protocol=2), b"PK\x03\x04 cut off"]
)
def test_a_broken_pickle_is_refused(model: Path, content: bytes) -> None:
    (model / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        open_checkpoint(model, allow_pickle=True)


def test_a_truncated_archive_is_refused(model: Path) -> None:
    file = model / "pytorch_model.bin"
    torch.save(TENSORS, file)
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match="torch refuses to load"):
        open_checkpoint(model, allow_pickle=True)
