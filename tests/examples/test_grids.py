"""The grid files of examples/: they read, expand as their comments say, and Merge to Learn is its formula."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from raymerge.cluster.grid_options import GridOptions
from raymerge.cluster.grid_plan import plan_grid
from raymerge.cluster.grid_spec import GridSpec, read_grid
from raymerge.cluster.recipe_reader import read_document
from raymerge.cluster.search_spec import read_search
from raymerge.cluster.yaml_source import Document

EXAMPLES = Path(__file__).parents[2] / "examples"
FILES = sorted([*EXAMPLES.glob("grids/*.yaml"), *EXAMPLES.glob("merge_to_learn/*.yaml")])


def _read(path: Path) -> GridSpec:
    return read_grid(path, is_search=path.stem == "search")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_point_is_a_recipe_without_remarks(path: Path) -> None:
    spec = _read(path)
    if path.stem == "search":
        assert read_search(spec).num_trials == 200
        values: Any = {"method": "ties", "weight_a": 0.5, "weight_b": 1.0, "density_a": 0.2, "density_b": 0.8}
        recipes = [spec.recipe(values), spec.recipe({**values, "method": "della"})]
    else:
        recipes = [
            spec.recipe(spec.combination(index)) for index in spec.kept[:: max(1, len(spec.kept) // 50)]
        ]
    for recipe in recipes:
        read_document(Document(value=recipe, origin=spec.origin), "point", strict=path.stem != "search")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_is_planned_where_its_models_are(
    path: Path, tiny_checkpoints: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Methods with every value, ends of ranges, models and calibration data: all but the tasks' data."""
    monkeypatch.setattr("raymerge.cluster.grid_plan._check_tasks", lambda evaluation, folder: [])
    monkeypatch.setenv("RAYMERGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    family = tiny_checkpoints("llama")
    (tmp_path / "models").mkdir()
    for name in ("base", "skill_a", "skill_b", "skill_c", "general", "skill", "math", "code", "safety"):
        (tmp_path / "models" / name).symlink_to(family.base if name == "base" else family.models[0])
    for task in ("a", "b"):
        (tmp_path / "data" / task).mkdir(parents=True)
        (tmp_path / "data" / task / "train.jsonl").write_text('{"text": "word1 word2"}\n' * 4)
    plan = plan_grid(_read(path), GridOptions())
    assert not [line for line in plan.remarks if not line.startswith("note:") and "same weights" not in line]
    assert plan.output_bytes and len(plan.missing) == (12 if path.stem == "regmean_study" else 0)


def test_the_numbers_of_points() -> None:
    by_name = {path.stem: _read(path) for path in FILES}
    # pairs x methods x lambdas x (p = 0 once, and six p with deltas and three with weights, three seeds each)
    assert len(by_name["dare_study"].kept) == 3 * 2 * 6 * (1 + 3 * (6 + 3))
    assert len(by_name["regmean_study"].kept) == 11 * 6
    assert len(by_name["one_skill"].kept) == 11
    assert by_name["one_skill"].axes[0].values[2] == 0.2
    assert len(by_name["skills"].kept) == 7 * 4


def test_merge_to_learn_is_its_formula(tiny_checkpoints: Callable[..., Any], tmp_path: Path) -> None:
    """theta_general + omega (theta_skill - theta_base), where the general model keeps its whole weight."""
    from raymerge.cluster.merge import merge
    from raymerge.cluster.options import MergeOptions

    family = tiny_checkpoints("llama")
    text = (EXAMPLES / "merge_to_learn" / "one_skill.yaml").read_text()
    for name, folder in {"base": family.base, "general": family.models[0], "skill": family.models[1]}.items():
        text = text.replace(f"models/{name}", str(folder))
    spec = read_grid(text)
    recipe = spec.recipe({"omega": 0.3})
    merge([recipe | {"name": "ptm"}], tmp_path / "out", MergeOptions(in_process=True, workers=1))
    base, general, skill = (
        load_file(folder / "model.safetensors") for folder in (family.base, *family.models[:2])
    )
    for name, merged in load_file(tmp_path / "out" / "model.safetensors").items():
        expected = general[name].double() + 0.3 * (skill[name].double() - base[name].double())
        torch.testing.assert_close(merged.double(), expected, rtol=1e-6, atol=1e-7)


def test_the_readme_shows_the_file_that_is_there() -> None:
    shown = (EXAMPLES / "merge_to_learn" / "README.md").read_text()
    whole = yaml.safe_load((EXAMPLES / "merge_to_learn" / "one_skill.yaml").read_text())
    assert f"omega: {whole['grid']['omega']}".replace("'", "") in shown
