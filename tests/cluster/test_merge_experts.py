"""Fused experts: each is solved with the Gram matrix of its own inputs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import raymerge
from raymerge.cluster.campaign import plan_wave, read_recipes
from raymerge.cluster.manifest import MANIFEST_NAME
from raymerge.cluster.options import MergeOptions
from raymerge.cluster.verify import verify
from raymerge.merge_actors.errors import RecipeError
from raymerge.merge_actors.methods.gram_matrix import pack_upper
from raymerge.merge_actors.task import SolveTask

E, O, I = 4, 5, 6  # noqa: E741 - the house letters for out and in features
UP, DOWN = "experts.up", "experts.down"
ROWS = ((20, 9, 0, 12), (30, 0, 0, 60))
"""Inputs of each expert: the second is reached in the first model only, the third in none."""


@pytest.fixture
def models(
    tmp_path: Path, write_statistics: Callable[..., None]
) -> tuple[list[Path], list[dict[str, Any]], Any]:
    """Two models with experts stored (E, O, I) and (E, I, O), which share their inputs."""
    folders, weights, inputs = [], [], []
    for number in range(2):
        rng = np.random.default_rng(number)
        tensors = {
            UP: rng.standard_normal((E, O, I)).astype(np.float32),
            DOWN: rng.standard_normal((E, I, O)).astype(np.float32),
        }
        folder = tmp_path / f"m{number}"
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors")
        rows = [rng.standard_normal((count, I)) for count in ROWS[number]]
        grams = [torch.from_numpy((each.T @ each).astype(np.float32)) for each in rows]
        entry = {"gram": UP, "num_rows": list(ROWS[number]), "in_features": I, "kind": "experts"}
        write_statistics(
            tmp_path / f"s{number}",
            folder,
            "gram",
            {UP: torch.stack([pack_upper(gram) for gram in grams]).numpy()},
            {UP: {**entry, "layout": "EOI"}, DOWN: {**entry, "layout": "EIO"}},
        )
        folders.append(folder)
        weights.append(tensors)
        inputs.append(rows)
    return folders, weights, inputs


def _recipe(folders: list[Path], **parameters: Any) -> dict[str, Any]:
    return {
        "merge_method": "regmean",
        "models": [{"model": str(f), "statistics": str(f.parent / f"s{f.name[1:]}")} for f in folders],
        "parameters": parameters,
    }


def _expected(weights: list[np.ndarray], inputs: list[np.ndarray], alpha: float) -> np.ndarray:
    """Solve one expert in float64 by the formula of the paper; weights are (O, I)."""
    total, right = np.zeros((I, I)), np.zeros((O, I))
    for weight, rows in zip(weights, inputs, strict=True):
        if len(rows):
            gram = rows.T @ rows / len(rows)
            gram = alpha * gram + (1 - alpha) * np.diag(np.diag(gram))
            total += gram
            right += weight.astype(np.float64) @ gram
    if not total.any():
        return np.mean(weights, axis=0)
    return np.linalg.solve(total, right.T).T


@pytest.mark.parametrize("alpha", [1.0, 0.8])
def test_every_expert_is_solved_by_its_own_inputs(alpha: float, models: Any, tmp_path: Path) -> None:
    folders, weights, inputs = models
    out = tmp_path / "out"
    result = raymerge.merge(_recipe(folders, alpha=alpha), out, in_process=True, workers=2)
    merged = load_file(out / "model.safetensors")
    for expert in range(E):
        rows = [of_model[expert] for of_model in inputs]
        reference = _expected([each[UP][expert] for each in weights], rows, alpha)
        np.testing.assert_allclose(merged[UP][expert], reference, atol=2e-5)
        reference = _expected([each[DOWN][expert].T for each in weights], rows, alpha)
        np.testing.assert_allclose(merged[DOWN][expert].T, reference, atol=2e-5)
    assert any(
        "experts that no token reached are averaged: " in line and "experts.up[2]" in line
        for line in result.remarks
    )
    verify(out, load=False)  # checksums of tensors that were written in parts
    row = json.loads((out / MANIFEST_NAME).read_text())["tensors"][UP]
    assert row["num_dead_inputs"] == I and row["rank"] == 0  # the worst expert: the third


def test_every_expert_has_a_mask_of_its_own(models: Any) -> None:
    folders = models[0]
    recipe = _recipe(folders) | {"base_model": str(folders[0])}
    for each in recipe["models"]:
        each["parameters"] = {"sparsify": {"method": "random", "density": 0.5}}
    recipes, _ = read_recipes([{"name": "r", **recipe}], MergeOptions())
    tasks = plan_wave(recipes, {"r": "/out"}, MergeOptions(), {}).plan.tasks
    keys = [key for task in tasks if isinstance(task, SolveTask) for job in task.jobs for key in job.keys]
    assert len(keys) == 2 * E * len(folders) == len(set(keys))


def test_bytes_do_not_depend_on_workers(models: Any, tmp_path: Path) -> None:
    folders = models[0]
    for name, workers in (("a", 1), ("b", 3)):
        raymerge.merge(_recipe(folders), tmp_path / name, in_process=True, workers=workers)
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert one == other


def test_an_expert_with_few_tokens_is_refused_at_alpha_1(models: Any, tmp_path: Path) -> None:
    folders = models[0]
    for number in range(2):
        path = tmp_path / f"s{number}" / "raymerge_statistics.json"
        manifest = json.loads(path.read_text())
        for entry in manifest["modules"].values():
            entry["num_rows"][1] = min(entry["num_rows"][1], 2)
        path.write_text(json.dumps(manifest))
    with pytest.raises(
        RecipeError, match=r"experts\.\w+\[1\]: the statistics have 2 tokens in all for 6 input"
    ):
        raymerge.merge(_recipe(folders, alpha=1), tmp_path / "out", in_process=True)
    result = raymerge.merge(_recipe(folders, alpha=0.9), tmp_path / "out", in_process=True)
    assert any("fewer tokens than input features" in line and "[1]" in line for line in result.remarks)
