"""What is equal for all recipes of a campaign is planned once."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from raymerge.cluster import campaign, plan, plan_reads
from raymerge.cluster.campaign import PlannedWave, plan_wave, read_recipes, waves
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


def _fingerprint(folder: Path, vocabulary: str | None = None, **options: Any) -> str:
    raw: dict[str, Any] = {"name": "r", "merge_method": "linear", "parameters": {"weight": 1}}
    raw["models"] = [f"{folder}/base+{folder}/lora", f"{folder}/one"]
    if vocabulary:
        raw["vocabulary"] = vocabulary
    recipes, _ = read_recipes([raw], MergeOptions(**options))
    wave = plan_wave(recipes, {"r": "/out"}, MergeOptions(**options), {})
    # What every node is asked whether it sees it.
    assert wave.plan.input_folders() == {str(folder / name) for name in ("base", "lora", "one")}
    return wave.fingerprint


def test_the_fingerprint_is_another_when_anything_is_that_decides_the_output(
    write_token_model: Callable[..., Path], tmp_path: Path
) -> None:
    """A run is resumed where the fingerprint is equal: parts of two different merges must never meet."""

    def write_models(dtype: str = "float32", tokens: str = "abcd") -> None:
        for number, name in enumerate(("base", "one")):
            shutil.rmtree(tmp_path / name, ignore_errors=True)
            write_token_model(tmp_path / name, number, list(tokens if name == "one" else "abcd"), dtype=dtype)

    def write_adapter(value: float) -> None:
        (tmp_path / "lora").mkdir(exist_ok=True)
        names = {"A": (1, 2), "B": (4, 1)}
        tensors = {
            f"base_model.model.lm_head.lora_{name}.weight": torch.full(shape, value)
            for name, shape in names.items()
        }
        save_file(tensors, tmp_path / "lora" / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["lm_head"]}
        (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config))

    write_models()
    write_adapter(1.0)
    first, of_union = _fingerprint(tmp_path), _fingerprint(tmp_path, "union")
    assert _fingerprint(tmp_path) == first and _fingerprint(tmp_path, "union") == of_union
    found = [first, of_union, *(_fingerprint(tmp_path, **each) for each in ({"seed": 5}, {"slice_mib": 1}))]
    write_models(tokens="abdc")  # the same files but for the tokenizer
    assert _fingerprint(tmp_path) == first
    found.append(_fingerprint(tmp_path, "union"))
    write_models()
    write_adapter(2.0)
    found.append(_fingerprint(tmp_path))
    write_adapter(1.0)
    assert _fingerprint(tmp_path) == first
    weights = tmp_path / "one" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    found.append(_fingerprint(tmp_path))
    assert len(set(found)) == len(found)


def test_options_override_recipes_also_by_what_is_false() -> None:
    raw = {"name": "r", "merge_method": "linear", "models": ["a"], "parameters": {"weight": 1}, "seed": 7}
    (as_written,), _ = read_recipes([raw], MergeOptions())
    (with_zero,), _ = read_recipes([raw], MergeOptions(seed=0))
    assert (as_written.seed, with_zero.seed) == (7, 0)


def test_each_recipe_runs_after_those_whose_results_it_uses() -> None:
    raw = [
        {"name": name, "merge_method": "linear", "models": models, "parameters": {"weight": 1}}
        for name, models in (("a", ["/m"]), ("b", ["a"]), ("other", ["/m"]), ("c", ["b", "a"]), ("d", ["c"]))
    ]
    recipes, _ = read_recipes([yaml.safe_dump_all(raw)], MergeOptions())
    assert [[each.name for each in wave] for wave in waves(recipes)] == [["a", "other"], ["b"], ["c"], ["d"]]


def test_recipes_with_vocabularies_of_their_own_share_no_rows(
    write_token_model: Callable[..., Path], tmp_path: Path
) -> None:
    """What is kept of one recipe's inputs for the next holds where no vocabulary is planned, and nowhere else."""
    models = [
        str(write_token_model(tmp_path / name, number, list(tokens), num_rows=6))
        for number, (name, tokens) in enumerate((("one", "abcd"), ("two", "dcbaef")))
    ]
    raw = [
        {"name": name, "merge_method": "linear", "models": models, "parameters": {"weight": 1}} | wish
        for name, wish in (
            ("plain", {}),
            ("union", {"vocabulary": "union"}),
            ("base", {"vocabulary": "base"}),
        )
    ]

    def rows(*chosen: dict[str, Any]) -> dict[str, Any]:
        recipes, _ = read_recipes(list(chosen), MergeOptions())
        wave = plan_wave(recipes, {each.name: f"/{each.name}" for each in recipes}, MergeOptions(), {})
        return {
            each.recipe.name: {t.name: [o.row_runs for o in t.operands] for t in each.tensors}
            for each in wave.plan.recipes
        }

    alone = rows(raw[0]) | rows(raw[1]) | rows(raw[2])
    assert rows(*raw) == rows(*raw[::-1]) == alone
    assert len({repr(each) for each in alone.values()}) == 3
