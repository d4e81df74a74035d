"""Inputs that stay open between plans: opened once, and plans are the same as without."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raymerge.cluster import opened as opened_module
from raymerge.cluster.campaign import plan_wave
from raymerge.cluster.opened import OpenedInputs
from raymerge.cluster.options import MergeOptions
from raymerge.cluster.recipe import Recipe, load_recipes
from raymerge.merge_actors.checkpoint.folder import open_checkpoint


def _ties(family: Any, number: int) -> Recipe:
    (recipe,), _ = load_recipes(
        {
            "name": f"point{number}",
            "merge_method": "ties",
            "base_model": str(family.base),
            "models": [
                {"model": str(folder), "parameters": {"weight": 1.0, "density": 0.5}}
                for folder in family.models
            ],
            "parameters": {"lambda": 0.1 * number},
        }
    )
    return recipe


def test_a_model_is_opened_once_for_many_plans(
    tiny_checkpoints: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    family = tiny_checkpoints("llama")
    folders: list[str] = []

    def spy(folder: Any, **arguments: Any) -> Any:
        folders.append(str(folder))
        return open_checkpoint(folder, **arguments)

    monkeypatch.setattr(opened_module, "open_checkpoint", spy)
    opened = OpenedInputs()
    recipes = [_ties(family, number) for number in range(5)]
    plans = [plan_wave([each], {each.name: "/out"}, MergeOptions(), {}, opened) for each in recipes]
    assert sorted(folders) == sorted(str(each) for each in (family.base, *family.models))
    fresh = plan_wave([recipes[3]], {recipes[3].name: "/out"}, MergeOptions(), {})
    assert fresh.plan == plans[3].plan and fresh.fingerprint == plans[3].fingerprint
    assert len({each.fingerprint for each in plans}) == 5


def test_a_result_is_not_taken_for_a_model_of_the_same_name(
    tiny_checkpoints: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = tiny_checkpoints("llama")
    documents = [
        {"name": "first", "merge_method": "passthrough", "models": [str(family.models[0])]},
        {"name": "second", "merge_method": "passthrough", "models": ["first"]},
    ]
    recipes, _ = load_recipes(documents)
    opened = OpenedInputs()
    for result in family.models[1:]:  # the same name is another folder in another run
        wave = plan_wave([recipes[1]], {"second": "/out"}, MergeOptions(), {"first": str(result)}, opened)
        assert wave.models["first"].checkpoint.folder == str(result)


def test_planning_a_point_of_a_grid_takes_milliseconds(tiny_checkpoints: Callable[..., Any]) -> None:
    family = tiny_checkpoints("llama")
    recipes = [_ties(family, number) for number in range(20)]
    opened = OpenedInputs()
    plan_wave(recipes[:1], {"point0": "/out"}, MergeOptions(), {}, opened)
    seconds = []
    for recipe in recipes:
        begin = time.thread_time()
        plan_wave([recipe], {recipe.name: "/out"}, MergeOptions(), {}, opened)
        seconds.append(time.thread_time() - begin)
    assert min(seconds) < 0.01  # 1 ms on an idle core
