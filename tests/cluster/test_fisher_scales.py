"""Fisher values normalised over the whole model, from sums of squares in the statistics' manifest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import raymerge
from raymerge.cluster.statistics import collect_statistics
from raymerge.cluster.statistics_options import StatisticsOptions
from raymerge.merge_actors.errors import MismatchError
from raymerge.stats.data_rows import DataSpec
from raymerge.stats.statistics_file import open_statistics

SHAPES = {"a.weight": (4, 3), "b.weight": (5,), "head.weight": (2, 3)}


@pytest.fixture
def models(tmp_path: Path, write_statistics: Callable[..., None]) -> list[dict[str, Any]]:
    """Two models whose Fisher values differ in scale by 1e4, and in the head by another factor."""
    found = []
    for number in range(2):
        rng = np.random.default_rng(number)
        tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
        fishers = {
            name: rng.random(shape).astype(np.float32) * 10.0 ** (4 * number)
            for name, shape in SHAPES.items()
        }
        fishers["head.weight"] *= 1000
        fishers = {name: each.astype(np.float32) for name, each in fishers.items()}
        folder = tmp_path / f"m{number}"
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors")
        modules = {
            name: {
                "fisher": name,
                "num_examples": 7,
                "sum_squares": float(np.square(each.astype(np.float64)).sum()),
            }
            for name, each in fishers.items()
        }
        write_statistics(tmp_path / f"s{number}", folder, "fisher", fishers, modules)
        found.append({"folder": folder, "tensors": tensors, "fishers": fishers})
    return found


def _recipe(models: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    return {
        "merge_method": "fisher",
        "models": [
            {"model": str(each["folder"]), "statistics": str(each["folder"].parent / f"s{number}")}
            for number, each in enumerate(models)
        ],
        "parameters": {"normalize": "model"},
        **changes,
    }


def _expected(models: list[dict[str, Any]], name: str, over: tuple[str, ...]) -> np.ndarray:
    """Merge one tensor in float64, each model's Fisher values divided by their RMS over some tensors."""
    shares, total = np.zeros(SHAPES[name]), np.zeros(SHAPES[name])
    for model in models:
        values = np.concatenate([model["fishers"][each].astype(np.float64).ravel() for each in over])
        share = np.maximum(model["fishers"][name] / np.sqrt(np.mean(values**2)), 1e-6)
        shares += share
        total += share * model["tensors"][name]
    return total / shares


def test_values_are_divided_by_their_scale_over_the_model(models: Any, tmp_path: Path) -> None:
    raymerge.merge(_recipe(models), tmp_path / "out", in_process=True, workers=2)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name in SHAPES:
        np.testing.assert_allclose(merged[name], _expected(models, name, tuple(SHAPES)), rtol=0, atol=2e-6)
    per_tensor = _recipe(models, parameters={"normalize": "tensor"})
    raymerge.merge(per_tensor, tmp_path / "tensor", in_process=True, workers=1)
    other = load_file(tmp_path / "tensor" / "model.safetensors")
    for name in SHAPES:
        np.testing.assert_allclose(other[name], _expected(models, name, (name,)), rtol=0, atol=2e-6)
    assert not np.allclose(merged["a.weight"], other["a.weight"], atol=1e-4)


def test_excluded_tensors_do_not_count(models: Any, tmp_path: Path) -> None:
    raymerge.merge(_recipe(models, exclude="head"), tmp_path / "out", in_process=True)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name in ("a.weight", "b.weight"):
        expected = _expected(models, name, ("a.weight", "b.weight"))
        np.testing.assert_allclose(merged[name], expected, rtol=0, atol=2e-6)


def test_a_scale_of_one_model_changes_nothing(
    models: Any, tmp_path: Path, write_statistics: Callable[..., None]
) -> None:
    scaled = {name: (each * np.float32(1024)) for name, each in models[0]["fishers"].items()}
    modules = {
        name: {
            "fisher": name,
            "num_examples": 7,
            "sum_squares": float(np.square(each.astype(np.float64)).sum()),
        }
        for name, each in scaled.items()
    }
    write_statistics(tmp_path / "scaled", models[0]["folder"], "fisher", scaled, modules)
    asked = _recipe(models)
    raymerge.merge(asked, tmp_path / "a", in_process=True)
    asked["models"][0]["statistics"] = str(tmp_path / "scaled")
    raymerge.merge(asked, tmp_path / "b", in_process=True)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    for name in SHAPES:
        np.testing.assert_allclose(one[name], other[name], rtol=0, atol=1e-6)


def test_statistics_without_sums_are_refused(models: Any, tmp_path: Path) -> None:
    path = tmp_path / "s1" / "raymerge_statistics.json"
    manifest = json.loads(path.read_text())
    for entry in manifest["modules"].values():
        del entry["sum_squares"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(
        MismatchError, match=r"normalize: model needs the sum of squares of .*m1's Fisher values"
    ):
        raymerge.merge(_recipe(models), tmp_path / "out", in_process=True)
    raymerge.merge(_recipe(models, parameters={"normalize": "tensor"}), tmp_path / "out", in_process=True)


def test_measured_statistics_hold_their_sums(tiny_checkpoints: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": f"word{i} word{2 * i} word3"}) + "\n" for i in range(6)))
    model = tiny_checkpoints("llama").models[0]
    spec = DataSpec(source=str(path))
    for workers in (1, 2):
        options = StatisticsOptions(
            kind="fisher", data=spec, estimator="sampled", in_process=True, workers=workers
        )
        collect_statistics(str(model), tmp_path / f"s{workers}", options)
    found = [open_statistics(tmp_path / f"s{workers}").modules for workers in (1, 2)]
    for name, module in found[0].items():
        values = load_file(module.tensor.file)[name].astype(np.float64)
        assert module.sum_squares is not None
        np.testing.assert_allclose(module.sum_squares, np.square(values).sum(), rtol=1e-12)
        assert found[1][name].sum_squares == pytest.approx(module.sum_squares, rel=1e-6)
