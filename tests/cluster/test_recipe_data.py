"""`data:` in recipes: statistics measured on the way to the merge, once, and found again."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

import raymerge
from raymerge.cluster import statistics_cache
from raymerge.cluster.manifest import MANIFEST_NAME
from raymerge.cluster.options import MergeOptions
from raymerge.cluster.plan_report import plan_report, plan_text
from raymerge.cluster.recipe import load_recipes
from raymerge.cluster.statistics import collect_statistics
from raymerge.cluster.statistics_options import StatisticsOptions
from raymerge.merge_actors.errors import RecipeError
from raymerge.stats.data_rows import DataSpec


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    rng = random.Random(5)
    path = tmp_path / "texts.jsonl"
    rows = [
        {"text": " ".join(f"word{rng.randrange(92)}" for _ in range(rng.randrange(4, 16)))} for _ in range(30)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAYMERGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "statistics"


@pytest.fixture
def measured_models(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the models that have been measured so far."""
    seen: list[str] = []

    def spy(model: Any, *arguments: Any, **keywords: Any) -> Any:
        seen.append(model.key)
        return collect_statistics(model, *arguments, **keywords)

    monkeypatch.setattr(statistics_cache, "collect_statistics", spy)
    return seen


def _recipe(models: Any, data: Any, **changes: Any) -> dict[str, Any]:
    return {"merge_method": "regmean", "models": [str(each) for each in models], "data": data, **changes}


def test_data_give_what_statistics_give(
    tiny_checkpoints: Callable[..., Any], texts: Path, cache: Path, tmp_path: Path
) -> None:
    models = tiny_checkpoints("bert").models[:2]
    data = {"path": str(texts), "samples": 20, "max_length": 8}
    asked = _recipe(models, data)
    result = raymerge.merge(asked, tmp_path / "a", in_process=True, workers=1)
    for number, model in enumerate(models):
        spec = DataSpec(source=str(texts), samples=20, max_length=8)
        options = StatisticsOptions(kind="gram", data=spec, in_process=True, workers=1)
        collect_statistics(str(model), tmp_path / f"s{number}", options)
    named = {
        "merge_method": "regmean",
        "models": [
            {"model": str(model), "statistics": str(tmp_path / f"s{number}")}
            for number, model in enumerate(models)
        ],
    }
    raymerge.merge(named, tmp_path / "b", in_process=True, workers=1)
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert one == other
    manifest = json.loads((tmp_path / "a" / MANIFEST_NAME).read_text())
    assert [row["model"] for row in manifest["statistics"]] == [str(each) for each in models]
    assert all(row["path"].startswith(str(cache)) and row["num_tokens"] > 0 for row in manifest["statistics"])
    uses = manifest["recipe"]["modules"]["default"]["slices"][0]["sources"]
    assert [use["data"] for use in uses] == [data, data]
    assert any(f"measuring {models[0]} (1 of 2)" in line for line in result.remarks)
    (again,), _ = load_recipes(manifest["recipe"])
    assert again.to_mapping() == manifest["recipe"]


def test_models_are_measured_once_for_all_recipes(
    tiny_checkpoints: Callable[..., Any],
    texts: Path,
    cache: Path,
    measured_models: list[str],
    tmp_path: Path,
) -> None:
    models = tiny_checkpoints("bert").models[:2]
    campaign = [
        _recipe(models, str(texts), name=f"alpha-{alpha}", parameters={"alpha": alpha})
        for alpha in (0.1, 0.5, 0.9)
    ]
    raymerge.merge(campaign, tmp_path / "grid", in_process=True, workers=1)
    assert measured_models == [str(each) for each in models]
    # A later campaign, and another model beside one that is known.
    raymerge.merge(campaign[:1], tmp_path / "later", in_process=True, workers=1)
    third = tiny_checkpoints("bert").models[2]
    result = raymerge.merge(
        _recipe([models[0], third], str(texts)), tmp_path / "other", in_process=True, workers=1
    )
    assert measured_models == [str(each) for each in (*models, third)]
    assert not any(str(models[0]) in line for line in result.remarks if "measuring" in line)
    # Other settings are other statistics.
    raymerge.merge(
        _recipe(models, {"path": str(texts), "samples": 3}), tmp_path / "few", in_process=True, workers=1
    )
    assert len(measured_models) == 5


def test_a_plan_measures_nothing(
    tiny_checkpoints: Callable[..., Any],
    texts: Path,
    cache: Path,
    measured_models: list[str],
    tmp_path: Path,
) -> None:
    models = tiny_checkpoints("bert").models[:2]
    asked = _recipe(models, {"path": str(texts), "samples": 20})
    report = plan_report([asked], MergeOptions(in_process=True))
    assert [each["model"] for each in report["to_measure"]] == [str(each) for each in models]
    assert report["to_measure"][0]["num_rows"] == 20
    text = plan_text(report)
    tokens = report["to_measure"][0]["num_tokens"]
    assert f"to measure {models[0]}: gram statistics on {texts}, 20 rows, {tokens:,} tokens" in text
    assert "what becomes of each tensor is known when its models are measured" in text
    assert measured_models == [] and not cache.exists()
    raymerge.merge(asked, tmp_path / "out", in_process=True, workers=1)
    manifest = json.loads((tmp_path / "out" / MANIFEST_NAME).read_text())
    assert manifest["statistics"][0]["num_tokens"] == tokens
    after = plan_report([asked], MergeOptions(in_process=True))
    assert after["to_measure"] == []
    # 2 layers of 6 linear maps, the pooler's absence, and the head's dense layer; its decoder is tied.
    coverage = after["recipes"][0]["coverage"]
    assert coverage["num_measured"] == coverage["num_expected"] == 13
    assert "13 of 13 linear maps solved" in plan_text(after)


def test_a_model_has_data_of_its_own(
    tiny_checkpoints: Callable[..., Any], texts: Path, cache: Path, tmp_path: Path
) -> None:
    models = tiny_checkpoints("bert").models[:2]
    asked = {
        "merge_method": "regmean",
        "data": {"path": str(texts), "max_length": 8},
        "models": [str(models[0]), {"model": str(models[1]), "data": {"samples": 5}}],
    }
    (read,), _ = load_recipes(asked)
    first, second = read.modules[0].slices[0].sources
    assert first.data is not None and first.data.spec.samples is None
    assert second.data is not None
    assert second.data.to_mapping() == {"path": str(texts), "samples": 5, "max_length": 8}


def test_fisher_is_measured_with_its_estimator(
    tiny_checkpoints: Callable[..., Any], texts: Path, cache: Path, tmp_path: Path
) -> None:
    models = tiny_checkpoints("llama").models[:2]
    data = {"path": str(texts), "samples": 4, "estimator": "sampled"}
    asked = _recipe(models, data, merge_method="fisher")
    raymerge.merge(asked, tmp_path / "out", in_process=True, workers=1)
    [row, _] = json.loads((tmp_path / "out" / MANIFEST_NAME).read_text())["statistics"]
    assert row["kind"] == "fisher"
    settings = json.loads((Path(row["path"]) / "raymerge_statistics.json").read_text())["settings"]
    assert settings["estimator"] == "sampled"
    assert load_file(tmp_path / "out" / "model.safetensors")


def test_a_result_is_measured_in_a_later_wave(
    tiny_checkpoints: Callable[..., Any], texts: Path, cache: Path, tmp_path: Path
) -> None:
    first, second = tiny_checkpoints("bert").models[:2]
    documents = [
        {"name": "whole", "merge_method": "passthrough", "models": [str(first)]},
        _recipe(["whole", second], str(texts), name="merged"),
    ]
    text = yaml.safe_dump_all(documents)
    raymerge.merge(text, tmp_path / "out", in_process=True, workers=1)
    raymerge.merge(_recipe([first, second], str(texts)), tmp_path / "direct", in_process=True, workers=1)
    one = load_file(tmp_path / "out" / "merged" / "model.safetensors")
    other = load_file(tmp_path / "direct" / "model.safetensors")
    for name in other:  # models are summed in the order of their names, which differ
        np.testing.assert_allclose(one[name], other[name], atol=1e-6)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"samples": 3}, "key data lacks 'path'"),
        ({"path": "x", "samples": 0}, r"key data.samples is 0; it must be a whole number of at least 1"),
        ({"path": "x", "packed": "yes"}, r"key data.packed is 'yes'; it must be true or false"),
        ({"path": "x", "packed": True, "label_column": "y"}, "packed data have no text_pair_column"),
        (["x"], "must be a mapping"),
    ],
)
def test_bad_data_are_refused(data: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipes(_recipe(["/a", "/b"], data))


def test_data_beside_statistics_are_refused() -> None:
    asked = _recipe([], None)
    asked["models"] = [{"model": "/a", "statistics": "/s", "data": "x"}, "/b"]
    with pytest.raises(RecipeError, match="stands beside 'statistics'; keep one"):
        load_recipes(asked)


def test_data_have_no_effect_on_other_methods() -> None:
    _, remarks = load_recipes(_recipe(["/a", "/b"], "x", merge_method="linear", parameters={"weight": 1}))
    assert any("key data has no effect: linear uses no statistics" in line for line in remarks)
    _, remarks = load_recipes(_recipe(["/a", "/b"], {"path": "x", "estimator": "sampled"}))
    assert any("key data.estimator has no effect" in line for line in remarks)


def test_wrong_data_leave_nothing_behind(
    tiny_checkpoints: Callable[..., Any], cache: Path, tmp_path: Path
) -> None:
    models = tiny_checkpoints("bert").models[:2]
    with pytest.raises(RecipeError, match="do not exist"):
        raymerge.merge(_recipe(models, "/absent.jsonl"), tmp_path / "out", in_process=True)
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.raymerge").exists()


@pytest.mark.slow
def test_measuring_and_merging_share_one_ray(
    ray_session: None, tiny_checkpoints: Callable[..., Any], texts: Path, cache: Path, tmp_path: Path
) -> None:
    """The merge's actors make room for the activation workers, and start again."""
    models = tiny_checkpoints("bert").models[:2]
    asked = _recipe(models, str(texts))
    with raymerge.Session(workers=2) as session:
        session.merge({**asked, "merge_method": "linear", "parameters": {"weight": 1}}, tmp_path / "first")
        session.merge(asked, tmp_path / "ray")
    raymerge.merge(asked, tmp_path / "local", in_process=True, workers=1)
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("ray", "local"))
    assert one == other


def test_a_recipe_whose_models_cannot_be_measured_fails_alone(
    tiny_checkpoints: Callable[..., Any], texts: Path, cache: Path, tmp_path: Path
) -> None:
    models = tiny_checkpoints("llama").models[:2]
    words = {"path": str(texts), "samples": 4}
    recipes = [
        # The expected Fisher of a language model is refused, and only by those who measure it.
        _recipe(models, words, merge_method="fisher", name="refused"),
        _recipe(models, words, name="solved"),
        _recipe(models, None, merge_method="linear", parameters={"weight": 1}, name="averaged"),
    ]
    result = raymerge.merge(recipes, tmp_path / "out", in_process=True, workers=1)
    assert list(result.failed) == ["refused"] and "estimator sampled" in result.failed["refused"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["averaged", "solved"]
