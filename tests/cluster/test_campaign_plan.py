"""What is equal for all recipes of a campaign is planned once."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from raymerge.cluster import campaign, plan, plan_reads
from raymerge.cluster.campaign import PlannedWave, plan_wave, read_recipes
from raymerge.cluster.options import MergeOptions

METHODS = ("task_arithmetic", "dare_linear", "ties", "linear")


def _wave(family: Any, count: int) -> PlannedWave:
    raw = []
    for number in range(count):
        method = METHODS[number % len(METHODS)]
        models = [family.base, *family.models] if method == "linear" else family.models
        recipe = {"name": f"r{number}", "merge_method": method, "models": list(map(str, models))}
        recipe["parameters"] = {"weight": 0.1 + number}
        if method != "linear":
            recipe["base_model"] = str(family.base)
        if method in ("dare_linear", "ties"):
            recipe["parameters"]["density"] = 0.5
        raw.append(recipe)
    recipes, _ = read_recipes(raw, MergeOptions())
    return plan_wave(recipes, {each.name: f"/{each.name}" for each in recipes}, MergeOptions(), {})


def test_more_recipes_over_the_same_models_look_up_and_lay_out_nothing_again(
    tiny_checkpoints: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, counts = tiny_checkpoints("llama"), Counter[str]()

    def count(module: Any, name: str) -> None:
        real = getattr(module, name)

        def counted(*arguments: Any, **more: Any) -> Any:
            counts[name] += 1
            return real(*arguments, **more)

        monkeypatch.setattr(module, name, counted)

    count(campaign, "lay_out")
    count(plan_reads, "read_of")
    count(plan, "stream_key")
    one = _wave(family, 4)
    of_four = dict(counts)
    many = _wave(family, 16)
    assert {name: number - of_four[name] for name, number in counts.items()} == of_four
    assert of_four["lay_out"] == 1
    num_tensors = len(one.plan.recipes[0].tensors)
    assert of_four["read_of"] == 4 * num_tensors, "each tensor of each model once"
    operands = {id(o) for each in many.plan.recipes for tensor in each.tensors for o in tensor.operands}
    assert len(operands) == 4 * num_tensors


@pytest.mark.parametrize("number", range(4))
def test_a_recipe_in_a_campaign_is_planned_as_it_is_alone(
    number: int, tiny_checkpoints: Any, tmp_path: Path
) -> None:
    family = tiny_checkpoints("gpt2", tied=True)
    together = _wave(family, 4).plan.recipes[number]
    recipe = dataclasses.replace(together.recipe)
    alone = plan_wave([recipe], {recipe.name: together.folder}, MergeOptions(), {}).plan.recipes[0]
    assert (alone.tensors, alone.layout) == (together.tensors, together.layout)
