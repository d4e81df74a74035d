"""Tensors that a method with statistics does not treat: `exclude` and `fallback`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import raymerge
from raymerge.cluster.options import MergeOptions
from raymerge.cluster.plan_report import plan_report, plan_text
from raymerge.cluster.recipe import load_recipes
from raymerge.merge_actors.errors import MismatchError, RecipeError
from raymerge.merge_actors.methods.gram_matrix import pack_upper

O, I = 4, 3  # noqa: E741 - the house letters for out and in features
NAMES = ("layers.0.q.weight", "layers.0.rare.weight", "classifier.weight", "layers.0.q.bias")


@pytest.fixture
def folders(tmp_path: Path, write_statistics: Callable[..., None]) -> list[Path]:
    """Write a base and two models in the reverse of their names' order; the data never reached `rare`."""
    found = []
    for number, name in enumerate(("base", "z", "a")):
        rng = np.random.default_rng(number)
        tensors = {name: rng.standard_normal((O, I)).astype(np.float32) for name in NAMES[:3]}
        tensors[NAMES[3]] = rng.standard_normal(O).astype(np.float32)
        folder = tmp_path / name
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors")
        found.append(folder)
        rows = rng.standard_normal((20, I))
        entry = {"gram": "q", "kind": "linear", "in_features": I, "num_rows": 20}
        write_statistics(
            tmp_path / f"{name}-statistics",
            folder,
            "gram",
            {"q": pack_upper(torch.from_numpy((rows.T @ rows).astype(np.float32))).numpy()},
            {NAMES[0]: entry, NAMES[2]: entry},
        )
        path = tmp_path / f"{name}-statistics" / "raymerge_statistics.json"
        text = path.read_text().replace('"linear_maps": [', f'"linear_maps": ["{NAMES[1]}",')
        path.write_text(text.replace('"uncovered": []', f'"uncovered": ["{NAMES[1]}"]'))
    return found


def _recipe(folders: list[Path], **changes: Any) -> dict[str, Any]:
    return {
        "merge_method": "regmean",
        "base_model": str(folders[0]),
        "models": [
            {
                "model": str(folder),
                "statistics": f"{folder}-statistics",
                "parameters": {"weight": weight},
            }
            for folder, weight in zip(folders[1:], (3.0, 1.0), strict=True)
        ],
        **changes,
    }


def _merge(asked: dict[str, Any], out: Path) -> dict[str, np.ndarray]:
    raymerge.merge(asked, out, in_process=True, workers=1)
    found: dict[str, np.ndarray] = load_file(out / "model.safetensors")
    return found


def _tensors(folder: Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = load_file(folder / "model.safetensors")
    return found


@pytest.mark.parametrize(
    ("fallback", "source"),
    [(None, "mean"), ("mean", "mean"), ("base", 0), ("first", 1), ("model", 2)],
)
def test_fallback_serves_what_has_no_statistics_and_what_is_excluded(
    fallback: str | None, source: str | int, folders: list[Path], tmp_path: Path
) -> None:
    policy = {"model": {"model": str(folders[2])}, None: None}.get(fallback, fallback)
    merged = _merge(_recipe(folders, exclude="classifier", fallback=policy), tmp_path / "out")
    solved = _merge(_recipe(folders), tmp_path / "plain")
    tensors = [_tensors(folder) for folder in folders]
    mean = {name: (3 * tensors[1][name] + tensors[2][name]) / 4 for name in NAMES}
    wanted = mean if source == "mean" else tensors[int(source)]
    for name in NAMES[1:3]:
        np.testing.assert_allclose(merged[name], wanted[name], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(merged[NAMES[3]], mean[NAMES[3]], rtol=1e-6, atol=1e-6)  # no linear map
    np.testing.assert_array_equal(merged[NAMES[0]], solved[NAMES[0]])
    assert not np.allclose(solved[NAMES[2]], mean[NAMES[2]])  # solved where it is not excluded


def test_fallback_error_names_the_tensor_and_the_way_out(folders: list[Path], tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match=r"rare\.weight has no gram statistics of .*a.*set exclude: "):
        _merge(_recipe(folders, fallback="error"), tmp_path / "out")
    merged = _merge(_recipe(folders, fallback="error", exclude="*.rare.*"), tmp_path / "out")
    assert merged.keys() == set(NAMES)


def test_the_plan_says_what_statistics_cover(folders: list[Path]) -> None:
    report = plan_report([_recipe(folders, exclude=["classifier"])], MergeOptions(in_process=True))
    assert report["recipes"][0]["coverage"] == {
        "kind": "gram",
        "num_expected": 3,
        "num_measured": 1,
        "excluded": [NAMES[2]],
        "fallback": [NAMES[1]],
    }
    text = plan_text(report)
    assert f"1 of 3 linear maps solved, 1 excluded ({NAMES[2]}), 1 by fallback ({NAMES[1]})" in text


@pytest.mark.parametrize(
    ("pattern", "excluded"),
    [
        ("classifier", True),
        ("*.weight", True),
        ("*", True),
        ("class*", True),
        ("fier", True),
        ("lassifier*", False),
    ],
)
def test_patterns_are_parts_of_names_or_those_of_a_shell(
    pattern: str, excluded: bool, folders: list[Path]
) -> None:
    report = plan_report([_recipe(folders, exclude=[pattern])], MergeOptions(in_process=True))
    coverage = report["recipes"][0]["coverage"]
    assert (NAMES[2] in coverage["excluded"]) == excluded
    assert coverage["num_expected"] == 3  # the bias is no linear map, excluded or not


def test_excluded_embeddings_and_biases_follow_the_fallback(folders: list[Path], tmp_path: Path) -> None:
    merged = _merge(_recipe(folders, exclude="*.bias", fallback="base"), tmp_path / "out")
    np.testing.assert_array_equal(merged[NAMES[3]], _tensors(folders[0])[NAMES[3]])


def test_rows_of_a_model_that_does_not_count_do_not_count(folders: list[Path], tmp_path: Path) -> None:
    path = Path(f"{folders[1]}-statistics") / "raymerge_statistics.json"
    path.write_text(path.read_text().replace('"num_rows": 20', '"num_rows": 2'))
    asked = _recipe(folders, parameters={"alpha": 1})
    _merge(asked, tmp_path / "both")
    asked["models"][1]["parameters"]["weight"] = 0.0
    with pytest.raises(RecipeError, match="the statistics have 2 tokens in all for 3 input features"):
        _merge(asked, tmp_path / "one")


def test_a_base_without_the_tensor_is_refused(folders: list[Path], tmp_path: Path) -> None:
    tensors = _tensors(folders[0])
    del tensors[NAMES[2]]
    save_file(tensors, folders[0] / "model.safetensors")
    with pytest.raises(
        MismatchError, match=r"classifier\.weight is to be taken from .*base.* does not have it"
    ):
        _merge(_recipe(folders, exclude="classifier", fallback="base"), tmp_path / "out")


def test_the_normal_form_reads_back(folders: list[Path]) -> None:
    asked = _recipe(folders, exclude=["a*", "b"], fallback={"model": str(folders[1])}, heads="label-aware")
    (read,), remarks = load_recipes(asked, strict=True)
    assert remarks == []
    (again,), _ = load_recipes(read.to_mapping(), strict=True)
    assert again == read


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"fallback": "median"},
            r"fallback is 'median'; it must be one of mean, base, first, error, or \{model",
        ),
        ({"fallback": {"model": "/elsewhere"}}, "/elsewhere, which is none of the models: /a, /b"),
        ({"fallback": "base"}, "fallback is base, but the recipe names no base_model"),
        ({"exclude": [3]}, r"exclude\[0\] is 3; it must be a part of a tensor's name"),
        ({"heads": "both"}, "heads is 'both'; it must be one of merge, label-aware, keep, exclude"),
    ],
)
def test_bad_policies_are_refused(changes: dict[str, Any], message: str) -> None:
    asked = {"merge_method": "regmean", "models": ["/a", "/b"], **changes}
    with pytest.raises(RecipeError, match=message):
        load_recipes(asked)


def test_policies_have_no_effect_without_statistics() -> None:
    asked = {"merge_method": "linear", "models": ["/a", "/b"], "parameters": {"weight": 1}, "exclude": "x"}
    _, remarks = load_recipes(asked)
    assert any("key exclude has no effect: linear uses no statistics" in line for line in remarks)


def test_fisher_averages_by_the_weights_of_the_right_models(
    folders: list[Path], tmp_path: Path, write_statistics: Callable[..., None]
) -> None:
    """The fallback of Fisher, with models whose names sort the other way round than they are listed."""
    for folder in folders[1:]:
        name = NAMES[0]
        write_statistics(
            Path(f"{folder}-fisher"),
            folder,
            "fisher",
            {name: np.ones((O, I), np.float32)},
            {name: {"fisher": name, "num_examples": 1}},
        )
    asked = _recipe(folders, merge_method="fisher")
    for model in asked["models"]:
        model["statistics"] = f"{model['model']}-fisher"
    merged = _merge(asked, tmp_path / "out")
    first, second = (_tensors(folder) for folder in folders[1:])
    for name in NAMES:  # equal Fisher values: the weighted mean everywhere
        np.testing.assert_allclose(merged[name], (3 * first[name] + second[name]) / 4, rtol=1e-5, atol=1e-6)


def test_a_pattern_that_no_name_fits_is_told(folders: list[Path], tmp_path: Path) -> None:
    asked = _recipe(folders, exclude=["classifier", "lassifier*"])
    told = raymerge.merge(asked, tmp_path / "out", in_process=True, workers=1).remarks
    lines = [line for line in told if "has no effect" in line]
    assert [line.split(": ", 1)[1] for line in lines] == [
        "exclude: lassifier* has no effect, no tensor's name fits it"
    ]
