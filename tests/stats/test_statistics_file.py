"""Statistics on disk: bytes, manifest, checks against a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from raymerge.merge_actors.checkpoint.folder import Checkpoint, open_checkpoint
from raymerge.merge_actors.errors import CheckpointError, MismatchError
from raymerge.stats.statistics_file import (
    FORMAT_VERSION,
    MANIFEST,
    Written,
    open_statistics,
    write_json,
    write_statistics_file,
)


@pytest.fixture
def model(tmp_path: Path) -> Checkpoint:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(
        {
            "q.weight": torch.zeros(4, 3),
            "k.weight": torch.zeros(2, 3),
            "c.weight": torch.zeros(2, 5),
            "e": torch.zeros(2, 4, 3),
        },
        folder / "model.safetensors",
    )
    return open_checkpoint(folder)


@pytest.fixture
def statistics(tmp_path: Path, model: Checkpoint) -> Path:
    """Grams of q and k (shared), a Conv1D and two fused experts."""
    folder = tmp_path / "statistics"
    folder.mkdir()
    parts = [torch.arange(2.0), torch.arange(2.0, 6.0, dtype=torch.float64)]
    write_statistics_file(
        str(folder / "a.safetensors"),
        [
            Written(key="q.weight", shape=(6,), parts=parts),
            Written(key="e", shape=(2, 6), parts=[torch.ones(6), torch.zeros(6)]),
        ],
    )
    write_statistics_file(
        str(folder / "b.safetensors"), [Written(key="c.weight", shape=(3,), parts=[torch.ones(3)])]
    )
    shared = {"gram": "q.weight", "num_rows": 7, "in_features": 3, "kind": "linear"}
    manifest = {
        "format_version": FORMAT_VERSION,
        "kind": "gram",
        "model": {"path": model.path, "fingerprint": model.fingerprint},
        "num_tokens": 7,
        "coverage": {
            "linear_maps": ["q.weight", "k.weight", "c.weight", "e", "d.weight"],
            "uncovered": ["d.weight"],
            "tied": [],
        },
        "modules": {
            "q.weight": shared,
            "k.weight": shared,
            "c.weight": {"gram": "c.weight", "num_rows": 7, "in_features": 2, "kind": "conv1d"},
            "e": {"gram": "e", "num_rows": [7, 0], "in_features": 3, "kind": "experts", "layout": "EOI"},
        },
        "files": ["a.safetensors", "b.safetensors"],
    }
    write_json(str(folder / MANIFEST), manifest)
    return folder


def _edit(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    edit(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_the_safetensors_library_reads_the_files(statistics: Path) -> None:
    tensors = load_file(statistics / "a.safetensors")
    assert tensors["q.weight"].tolist() == [0, 1, 2, 3, 4, 5]
    assert tensors["e"].tolist() == [[1] * 6, [0] * 6]
    assert sorted(path.name for path in statistics.iterdir()) == ["a.safetensors", "b.safetensors", MANIFEST]


def test_opening_gives_the_byte_range_of_every_module(statistics: Path) -> None:
    found = open_statistics(statistics)
    assert list(found.modules) == ["q.weight", "k.weight", "c.weight", "e"]
    key = found.modules["k.weight"]
    assert (key.key, key.num_rows, key.in_features, key.kind) == ("q.weight", (7,), 3, "linear")
    raw = Path(key.tensor.file).read_bytes()[key.tensor.begin : key.tensor.end]
    assert torch.frombuffer(bytearray(raw), dtype=torch.float32).tolist() == [0, 1, 2, 3, 4, 5]
    assert found.modules["e"].num_rows == (7, 0)
    assert found.num_tokens == 7


def test_statistics_of_the_model_pass_and_tell_their_coverage(statistics: Path, model: Checkpoint) -> None:
    coverage = open_statistics(statistics).check_against(model)
    assert coverage.covered == ("q.weight", "k.weight", "c.weight", "e")
    assert coverage.uncovered == ("d.weight",)


def test_another_models_statistics_are_refused(statistics: Path, model: Checkpoint) -> None:
    other = replace(model, path="other", fingerprint="0" * 32)
    with pytest.raises(MismatchError, match=r"were measured on .*model .*, not on other \(000000000000\)"):
        open_statistics(statistics).check_against(other)


def test_an_unmatched_module_is_named(statistics: Path, model: Checkpoint) -> None:
    _edit(
        statistics,
        lambda manifest: manifest["modules"].update({"module.q.weight": manifest["modules"]["q.weight"]}),
    )
    with pytest.raises(MismatchError, match=r"name 'module\.q\.weight', which .* does not have"):
        open_statistics(statistics).check_against(model)


def test_a_missing_module_is_named(statistics: Path, model: Checkpoint) -> None:
    with pytest.raises(MismatchError, match=r"lack 'd\.weight'"):
        open_statistics(statistics).check_against(model, expected=["q.weight", "d.weight"])
    _edit(statistics, lambda manifest: manifest["modules"].pop("c.weight"))
    with pytest.raises(MismatchError, match=r"lack 'c\.weight'"):
        open_statistics(statistics).check_against(model)


def test_a_weight_of_another_width_is_refused(statistics: Path, model: Checkpoint) -> None:
    _edit(statistics, lambda manifest: manifest["modules"]["c.weight"].update({"kind": "linear"}))
    with pytest.raises(
        MismatchError, match=r"of c\.weight are for 2 input features, but the weight has the shape \[2, 5\]"
    ):
        open_statistics(statistics).check_against(model)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda manifest: manifest.update({"format_version": 99}),
            "has the format_version 99; this raymerge reads 1",
        ),
        (lambda manifest: manifest["files"].pop(), r"'c\.weight' for c\.weight, but no file holds it"),
        (
            lambda manifest: manifest["modules"]["c.weight"].update({"in_features": 3}),
            r"is F32 \[3\]; 3 input features need F32 \[6\]",
        ),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(
    edit: Callable[[dict[str, Any]], object], message: str, statistics: Path
) -> None:
    _edit(statistics, edit)
    with pytest.raises(CheckpointError, match=message):
        open_statistics(statistics)


def test_an_absent_or_unfinished_folder_is_refused(statistics: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist; make it with `raymerge stats`"):
        open_statistics(tmp_path / "absent")
    (statistics / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"has no raymerge_statistics\.json"):
        open_statistics(statistics)


def test_a_truncated_file_is_refused(statistics: Path) -> None:
    file = statistics / "b.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="truncated"):
        open_statistics(statistics)


def test_grams_of_another_type_are_refused(statistics: Path) -> None:
    """A matrix of the right shape in float64 has other bytes at every place."""
    save_file({"c.weight": torch.ones(3, dtype=torch.float64)}, statistics / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"is F64 \[3\]; 2 input features need F32 \[3\]"):
        open_statistics(statistics)


def test_the_fingerprint_is_that_of_the_numbers_and_of_what_is_said_of_them(statistics: Path) -> None:
    """The same matrices with another number of rows make another merge."""
    first = open_statistics(statistics).fingerprint
    assert open_statistics(statistics).fingerprint == first
    _edit(statistics, lambda manifest: manifest["modules"]["c.weight"].update(num_rows=1234))
    second = open_statistics(statistics).fingerprint
    save_file({"c.weight": torch.full((3,), 2.0)}, statistics / "b.safetensors")
    assert len({first, second, open_statistics(statistics).fingerprint}) == 3
