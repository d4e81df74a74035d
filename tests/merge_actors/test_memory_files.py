"""Outputs in memory lie on the devices that they are given; sources go to the device with the most room."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from raymerge.merge_actors.checkpoint.layout import OutputTensor, lay_out
from raymerge.merge_actors.errors import OutputError
from raymerge.merge_actors.mapped_sources import MappedSources
from raymerge.merge_actors.memory_files import MemoryFiles

SHAPES = {"a": ("F32", (3, 5)), "b": ("BF16", (7,)), "c": ("F32", (2,)), "none": ("F32", (0, 4))}


def test_a_device_has_its_tensors_in_one_piece_of_memory() -> None:
    layout = lay_out([OutputTensor(name, *place) for name, place in SHAPES.items()], 10**9)
    files = MemoryFiles()
    numbers = {"a": 0, "b": 1, "c": 0, "none": 1}
    tensors = files.lay_out("memory:0", layout, SHAPES, ("cpu", "cpu"), numbers)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        name: shape for name, (_, shape) in SHAPES.items()
    }
    of_device = {name: tensor.untyped_storage().data_ptr() for name, tensor in tensors.items()}
    assert of_device["a"] == of_device["c"] != of_device["b"] == of_device["none"]
    assert all(tensor.data_ptr() % 256 == 0 for tensor in tensors.values() if tensor.numel())
    values = {"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "c": torch.randn(2)}
    for file in layout.files:
        for name, (begin, _) in file.tensors.items():
            if name in values:
                data = values[name].reshape(-1).view(torch.uint8).numpy()
                half = len(data) // 2  # pieces of a tensor come one by one
                files.write_from(f"memory:0/{file.name}", begin, data[:half].data)
                files.write_from(f"memory:0/{file.name}", begin + half, data[half:].data)
    for name, value in values.items():
        assert torch.equal(tensors[name], value), name
    files.drop("memory:0")
    assert files.output(f"memory:0/{layout.files[0].name}", 0, 4) is None


def test_a_tensor_elsewhere_is_on_its_device() -> None:
    layout = lay_out([OutputTensor(name, *place) for name, place in SHAPES.items()], 10**9)
    tensors = MemoryFiles().lay_out(
        "memory:0", layout, SHAPES, ("cpu", "meta"), {"a": 1, "b": 0, "c": 1, "none": 0}
    )
    assert [tensors[name].device.type for name in ("a", "b", "c")] == ["meta", "cpu", "meta"]


def test_what_is_no_tensor_is_refused() -> None:
    layout = lay_out([OutputTensor("c", *SHAPES["c"])], 10**9)
    files = MemoryFiles()
    files.lay_out("memory:0", layout, {"c": SHAPES["c"]})
    with pytest.raises(OutputError, match="has no tensor at bytes"):
        files.write_from(f"memory:0/{layout.files[0].name}", 0, memoryview(bytes(4)))


def test_sources_go_to_the_device_with_the_most_left(tmp_path: Path) -> None:
    paths = []
    for number, num_bytes in enumerate((300, 500, 300, 300)):
        path = tmp_path / str(number)
        path.write_bytes(np.full(num_bytes, number, np.uint8).tobytes())
        paths.append(str(path))
    room = {"cpu": 1 << 30, "meta": 1 << 30}
    sources = MappedSources(
        1 << 20, device_budgets={"cpu": 700, "meta": 900}, room_of=lambda device: room[device]
    )

    def device_of(path: str) -> str | None:
        found = sources.find(path)
        assert found is not None
        return None if found.on_device is None else found.on_device.device.type

    assert [device_of(path) for path in paths[:3]] == ["meta", "cpu", "meta"]
    assert sources.num_device_bytes == 1100 and sources.num_bytes == 1100
    room["meta"] = 100  # somebody else has filled it meanwhile; 200 are left on the other
    assert device_of(paths[3]) is None
    assert sources.num_device_bytes == 1100 and sources.num_bytes == 1400
