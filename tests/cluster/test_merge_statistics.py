"""Recipes with statistics, end to end: Grams and Fisher values from files, against float64 references."""

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
from raymerge.cluster.campaign import plan_wave
from raymerge.cluster.manifest import MANIFEST_NAME
from raymerge.cluster.options import MergeOptions
from raymerge.cluster.recipe import load_recipes
from raymerge.merge_actors.checkpoint.folder import open_checkpoint
from raymerge.merge_actors.errors import MismatchError, RecipeError
from raymerge.merge_actors.methods.gram_matrix import pack_upper
from raymerge.stats.statistics_file import MANIFEST

O1, O2, I = 7, 5, 12  # noqa: E741 - the house letter for input features


def write_model(folder: Path, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    tensors = {
        "q.weight": rng.standard_normal((O1, I)).astype(np.float32),
        "k.weight": rng.standard_normal((O2, I)).astype(np.float32),
        "conv.weight": rng.standard_normal((I, O1)).astype(np.float32),
        "q.bias": rng.standard_normal(O1).astype(np.float32),
    }
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return tensors


@pytest.fixture
def measured(
    tmp_path: Path, write_statistics: Callable[..., None]
) -> tuple[list[Path], list[dict[str, np.ndarray]], list[np.ndarray]]:
    """Two models, and Gram statistics of each in a folder beside it."""
    folders, weights, inputs = [], [], []
    for number in range(2):
        folder = tmp_path / f"m{number}"
        weights.append(write_model(folder, number))
        rng = np.random.default_rng(10 + number)
        rows = rng.standard_normal((40 + 20 * number, I)) @ rng.standard_normal((I, I))
        inputs.append(rows)
        gram = torch.from_numpy((rows.T @ rows).astype(np.float32))
        kinds = {"q.weight": "linear", "k.weight": "linear", "conv.weight": "conv1d"}
        write_statistics(
            tmp_path / f"s{number}",
            folder,
            "gram",
            {"q": pack_upper(gram).numpy()},
            {
                name: {"gram": "q", "kind": kind, "in_features": I, "num_rows": len(rows)}
                for name, kind in kinds.items()
            },
        )
        folders.append(folder)
    return folders, weights, inputs


def recipe(folders: list[Path], **parameters: Any) -> dict[str, Any]:
    return {
        "merge_method": "regmean",
        "models": [{"model": str(f), "statistics": str(f.parent / f"s{f.name[1:]}")} for f in folders],
        "parameters": parameters,
    }


def expected(weights: list[np.ndarray], inputs: list[np.ndarray], alpha: float) -> np.ndarray:
    """Solve in float64 by the formula of the paper; weights are (O, I)."""
    total, right = np.zeros((I, I)), 0.0
    for weight, rows in zip(weights, inputs, strict=True):
        gram = rows.T @ rows / len(rows)
        gram = alpha * gram + (1 - alpha) * np.diag(np.diag(gram))
        total += gram
        right = right + weight.astype(np.float64) @ gram
    return np.linalg.solve(total, np.transpose(right)).T


@pytest.mark.parametrize("alpha", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("workers", [1, 2])
def test_regmean_is_the_least_squares_solution(
    alpha: float, workers: int, measured: Any, tmp_path: Path
) -> None:
    folders, weights, inputs = measured
    out = tmp_path / "out"
    result = raymerge.merge(recipe(folders, alpha=alpha), out, in_process=True, workers=workers)
    merged = load_file(out / "model.safetensors")
    for name in ("q.weight", "k.weight"):
        reference = expected([w[name] for w in weights], inputs, alpha)
        np.testing.assert_allclose(merged[name], reference, rtol=0, atol=2e-5 * np.abs(reference).max())
    reference = expected([w["conv.weight"].T for w in weights], inputs, alpha).T
    np.testing.assert_allclose(merged["conv.weight"], reference, rtol=0, atol=2e-5 * np.abs(reference).max())
    np.testing.assert_allclose(merged["q.bias"], (weights[0]["q.bias"] + weights[1]["q.bias"]) / 2, rtol=1e-6)
    [said] = [remark for remark in result.remarks if "averaged, no gram statistics for it: q.bias" in remark]
    assert said.startswith("note: ")  # there are none for a bias
    rows = json.loads((out / MANIFEST_NAME).read_text())["tensors"]
    assert rows["q.weight"]["rank"] == I and rows["q.weight"]["condition"] >= 1
    assert "rank" not in rows["q.bias"]


@pytest.mark.parametrize(
    "step",
    [{"method": "dare", "drop": 0.5}, {"method": "magnitude", "density": 0.4}],
    ids=["dare", "magnitude"],
)
def test_sparsified_models_are_what_regmean_solves_for(
    step: dict[str, Any], measured: Any, tmp_path: Path
) -> None:
    folders, _, inputs = measured
    base = tmp_path / "base"
    write_model(base, 7)
    thinned = []
    for number, folder in enumerate(folders):  # base + step(model - base), by a method that only adds
        alone = {
            "merge_method": "task_arithmetic",
            "base_model": str(base),
            "models": [{"model": str(folder), "parameters": {"weight": 1.0, "sparsify": step}}],
        }
        raymerge.merge(alone, tmp_path / f"thin{number}", in_process=True)
        thinned.append(load_file(tmp_path / f"thin{number}" / "model.safetensors"))
    recipes = []
    for asked in (step, {"method": "dare", "drop": 0.9}):
        recipes.append({**recipe(folders, alpha=0.9, sparsify=asked), "base_model": str(base)})
    raymerge.merge(recipes[0], tmp_path / "out", in_process=True, workers=2)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name in ("q.weight", "k.weight"):
        reference = expected([model[name] for model in thinned], inputs, 0.9)
        np.testing.assert_allclose(merged[name], reference, rtol=0, atol=2e-5 * np.abs(reference).max())
    reference = expected([model["conv.weight"].T for model in thinned], inputs, 0.9).T
    np.testing.assert_allclose(merged["conv.weight"], reference, rtol=0, atol=2e-5 * np.abs(reference).max())
    np.testing.assert_allclose(
        merged["q.bias"], (thinned[0]["q.bias"] + thinned[1]["q.bias"]) / 2, rtol=1e-5, atol=1e-6
    )
    # In one campaign the Grams are shared, the thinned models are not.
    raymerge.merge(
        [{**each, "name": f"r{number}"} for number, each in enumerate(recipes)],
        tmp_path / "both",
        in_process=True,
    )
    again = load_file(tmp_path / "both" / "r0" / "model.safetensors")
    assert all(np.array_equal(again[name], merged[name]) for name in merged)
    other = load_file(tmp_path / "both" / "r1" / "model.safetensors")
    assert not np.array_equal(other["q.weight"], merged["q.weight"])


def test_what_cannot_be_sparsified_before_a_solve_is_refused(measured: Any, tmp_path: Path) -> None:
    folders, _, _ = measured
    write_model(tmp_path / "base", 7)
    with pytest.raises(RecipeError, match="base"):
        raymerge.merge(
            recipe(folders, sparsify={"method": "dare", "drop": 0.5}), tmp_path / "a", in_process=True
        )
    step = {"method": "magnitude", "density": 0.4, "trim": "model"}
    asked = {**recipe(folders, sparsify=step), "base_model": str(tmp_path / "base")}
    with pytest.raises(RecipeError, match="trim: tensor"):
        raymerge.merge(asked, tmp_path / "b", in_process=True)


def test_bytes_do_not_depend_on_workers_or_slices(measured: Any, tmp_path: Path) -> None:
    folders, _, _ = measured
    for name, options in (("a", {"workers": 1}), ("b", {"workers": 3, "slice_mib": 1})):
        raymerge.merge(recipe(folders, alpha=0.5), tmp_path / name, in_process=True, **options)
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert one == other


def test_models_in_another_order_give_the_same_bytes(measured: Any, tmp_path: Path) -> None:
    folders, _, _ = measured
    raymerge.merge(recipe(folders), tmp_path / "a", in_process=True)
    raymerge.merge(recipe(folders[::-1]), tmp_path / "b", in_process=True)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_fisher_weights_elements(tmp_path: Path, write_statistics: Callable[..., None]) -> None:
    weights, fishers, folders = [], [], []
    for number in range(2):
        folder = tmp_path / f"m{number}"
        weights.append(write_model(folder, number))
        rng = np.random.default_rng(20 + number)
        fisher = {"q.weight": rng.random((O1, I)).astype(np.float32)}
        fishers.append(fisher["q.weight"])
        entry = {"fisher": "q.weight", "num_examples": 10}
        write_statistics(tmp_path / f"s{number}", folder, "fisher", fisher, {"q.weight": entry})
        folders.append(folder)
    asked = {**recipe(folders), "merge_method": "fisher"}
    del asked["parameters"]
    raymerge.merge(asked, tmp_path / "out", in_process=True)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    first, second = (f.astype(np.float64) for f in fishers)
    reference = (first * weights[0]["q.weight"] + second * weights[1]["q.weight"]) / (first + second)
    np.testing.assert_allclose(merged["q.weight"], reference, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(merged["q.bias"], (weights[0]["q.bias"] + weights[1]["q.bias"]) / 2, rtol=1e-6)


def test_statistics_of_another_model_are_refused(measured: Any, tmp_path: Path) -> None:
    folders, _, _ = measured
    asked = recipe(folders)
    asked["models"][0]["statistics"], asked["models"][1]["statistics"] = (
        asked["models"][1]["statistics"],
        asked["models"][0]["statistics"],
    )
    with pytest.raises(MismatchError, match="were measured on"):
        raymerge.merge(asked, tmp_path / "out", in_process=True)
    assert not (tmp_path / "out").exists()


def test_a_model_without_statistics_is_refused(measured: Any, tmp_path: Path) -> None:
    folders, _, _ = measured
    asked = recipe(folders)
    del asked["models"][1]["statistics"]
    with pytest.raises(
        RecipeError, match=r"regmean needs statistics of .*m1; measure them with raymerge stats"
    ):
        raymerge.merge(asked, tmp_path / "out", in_process=True)


def test_too_few_tokens_at_alpha_1_are_refused(measured: Any, tmp_path: Path) -> None:
    folders, _, _ = measured
    for number in range(2):
        path = tmp_path / f"s{number}" / MANIFEST
        path.write_text(path.read_text().replace(f'"num_rows": {40 + 20 * number}', '"num_rows": 3'))
    with pytest.raises(RecipeError, match=r"6 tokens in all for 12 input features.*set alpha below 1"):
        raymerge.merge(recipe(folders, alpha=1), tmp_path / "out", in_process=True)
    result = raymerge.merge(recipe(folders, alpha=0.9), tmp_path / "out", in_process=True)
    assert any("fewer tokens than input features" in remark for remark in result.remarks)


def test_statistics_have_no_effect_on_other_methods(measured: Any, tmp_path: Path) -> None:
    folders, _, _ = measured
    asked = {**recipe(folders), "merge_method": "linear", "parameters": {"weight": 1}}
    result = raymerge.merge(asked, tmp_path / "out", in_process=True)
    assert any("statistics has no effect: linear uses no statistics" in line for line in result.remarks)


def test_statistics_belong_to_what_a_run_was_planned_from(measured: Any, tmp_path: Path) -> None:
    """Statistics that change between a kill and `--resume` make another run."""
    folders, _, _ = measured
    (read,), _ = load_recipes({"name": "merged", **recipe(folders)})
    fingerprints = []
    for value in (1.0, 1.0, 2.0):
        grams = load_file(tmp_path / "s0" / "part.safetensors")
        grams["q"][0] = value
        save_file(grams, tmp_path / "s0" / "part.safetensors")
        wave = plan_wave([read], {"merged": str(tmp_path / "out")}, MergeOptions(), {})
        fingerprints.append(wave.fingerprint)
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]
    # What every node is asked whether it sees it.
    assert wave.plan.input_folders() == {str(tmp_path / name) for name in ("m0", "m1", "s0", "s1")}


def test_statistics_of_the_base_alone_are_refused_for_a_model_with_an_adapter(
    measured: Any, tmp_path: Path
) -> None:
    folders, _, _ = measured
    lora = tmp_path / "lora"
    lora.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q"]}
    (lora / "adapter_config.json").write_text(json.dumps(config))
    prefix = "base_model.model.q"
    factors = {
        f"{prefix}.lora_A.weight": np.ones((2, I), np.float32),
        f"{prefix}.lora_B.weight": np.ones((O1, 2), np.float32),
    }
    save_file(factors, lora / "adapter_model.safetensors")
    asked = recipe(folders)
    asked["models"][0]["model"] += f"+{lora}"
    with pytest.raises(MismatchError, match=r"were measured on .*, not on .*/m0\+.*/lora"):
        raymerge.merge(asked, tmp_path / "out", in_process=True)


def test_a_grid_over_alpha_reads_grams_and_weights_once(
    measured: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty alphas cost twenty factorisations and solves; their bytes are those of each alone."""
    from raymerge.merge_actors.solving import Solving, _GramsOnDisk

    folders, _, _ = measured
    read: list[str] = []
    read_weights, read_gram = Solving._read_weights, _GramsOnDisk._read

    def count_weights(self: Solving, job: Any, *rest: Any) -> Any:
        read.append(job.tensor)
        return read_weights(self, job, *rest)

    def count_gram(self: _GramsOnDisk, index: int) -> Any:
        read.append(f"gram {index}")
        return read_gram(self, index)

    monkeypatch.setattr(Solving, "_read_weights", count_weights)
    monkeypatch.setattr(_GramsOnDisk, "_read", count_gram)
    alphas = [round(0.05 * i, 2) for i in range(20)]
    grid = [{**recipe(folders, alpha=alpha), "name": f"alpha-{alpha}"} for alpha in alphas]
    result = raymerge.merge(grid, tmp_path / "grid", in_process=True, workers=2)
    assert len(read) == len(set(read)) and {"conv.weight", "q.weight", "gram 0", "gram 1"} <= {*read}
    model_bytes = sum((path / "model.safetensors").stat().st_size for path in folders)
    assert result.totals.read_bytes < 1.5 * model_bytes
    for alpha in (0.0, 0.5, 0.95):
        alone = tmp_path / f"alone-{alpha}"
        raymerge.merge(recipe(folders, alpha=alpha), alone, in_process=True, workers=1)
        one = (tmp_path / "grid" / f"alpha-{alpha}" / "model.safetensors").read_bytes()
        assert one == (alone / "model.safetensors").read_bytes()


def test_of_a_grid_the_recipe_that_reads_a_broken_weight_is_left_out(measured: Any, tmp_path: Path) -> None:
    folders, _, _ = measured
    tensors = load_file(folders[0] / "model.safetensors")
    broken = tmp_path / "m0"
    tensors["k.weight"][0, 0] = np.nan
    save_file(tensors, broken / "model.safetensors")
    statistics = json.loads((tmp_path / "s0" / MANIFEST).read_text())
    statistics["model"]["fingerprint"] = open_checkpoint(broken).fingerprint
    (tmp_path / "s0" / MANIFEST).write_text(json.dumps(statistics))
    every = {**recipe(folders, alpha=0.5), "name": "every"}
    other = {"exclude": ["k.weight"], "fallback": {"model": str(folders[1])}}
    without = {**recipe(folders, alpha=0.6), "name": "without", **other}
    result = raymerge.merge([every, without], tmp_path / "both", in_process=True)
    assert list(result.failed) == ["every"] and "k.weight of model" in result.failed["every"]
    raymerge.merge(without, tmp_path / "alone", in_process=True)
    one, two = (path / "model.safetensors" for path in (tmp_path / "both" / "without", tmp_path / "alone"))
    assert one.read_bytes() == two.read_bytes()
