"""Keys of points: a resumed grid takes over no result of other inputs, and loses none of the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from raymerge.cluster.grid_options import GridOptions
from raymerge.cluster.grid_plan import GridPlan, plan_grid
from raymerge.cluster.grid_spec import read_grid
from raymerge.merge_actors.errors import RecipeError

TASK = {"name": "topic", "kind": "text_classification", "validation": "v.jsonl", "head": "h"}


@pytest.fixture
def models(tiny_checkpoints: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with a base, a model, and two adapters of the base; it is the working folder."""
    monkeypatch.setattr("raymerge.cluster.grid_plan._check_tasks", lambda evaluation, folder: [])
    family = tiny_checkpoints("llama")
    shutil.copytree(family.base, tmp_path / "base")
    shutil.copytree(family.models[0], tmp_path / "math")
    for seed, name in enumerate(("first", "second")):
        _write_adapter(tmp_path / name, seed)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _write_adapter(folder: Path, seed: int) -> None:
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    pair = {
        f"{module}.lora_A.weight": torch.randn(2, 32, generator=generator),
        f"{module}.lora_B.weight": torch.randn(32, 2, generator=generator),
    }
    save_file(pair, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def _plan(values: list[Any], **more: Any) -> GridPlan:
    raw = {
        "merge_method": "linear",
        "models": ["math", "$model"],
        "parameters": {"weight": 0.5},
        "grid": {"model": values},
        "evaluate": [TASK],
        **more,
    }
    return plan_grid(read_grid(raw), GridOptions())


def _keys(values: list[Any]) -> list[str]:
    return [point.key for point in _plan(values).points()]


def _mapped(adapter: str) -> dict[str, Any]:
    return {"model": {"model": {"path": "base"}, "lora": {"path": adapter}}}


@pytest.mark.parametrize("spell", [lambda name: f"base+{name}", lambda name: f"base + {name}", _mapped])
def test_adapters_of_one_base_are_inputs_of_their_own(models: Path, spell: Any) -> None:
    values = ["base", spell("first"), spell("second")]
    before = _keys(values)
    assert len(set(before)) == 3
    assert [_keys([value])[0] for value in values] == before, "whatever else is in the grid"
    config = models / "second/adapter_config.json"
    config.write_text(config.read_text().replace("4", "8"))
    after = _keys(values)
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, True, False]
    shutil.rmtree(models / "first")
    _write_adapter(models / "first", 7)
    assert [old == new for old, new in zip(after, _keys(values), strict=True)] == [True, False, True]


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_a_change_beside_the_weights_is_another_input(models: Path, name: str) -> None:
    values = ["base", "base+first"]
    before = _keys(values)
    path = models / "base" / name
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, "eos_token_id": 3}))
    assert all(old != new for old, new in zip(before, _keys(values), strict=True))


def test_notes_and_logs_beside_the_weights_are_no_inputs(models: Path) -> None:
    before = _keys(["base"])
    for name in ("README.md", "raymerge_manifest.json", "trainer_state.json", ".gitattributes", "events.out"):
        (models / "base" / name).write_text("{}")
    assert _keys(["base"]) == before


def test_a_method_that_measures_while_it_merges_is_refused_at_planning(models: Path) -> None:
    (models / "rows.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(RecipeError, match=r"key merge_method is regmean_plus, .* raymerge merge .* evaluate"):
        _plan(
            ["base"],
            merge_method="$method",
            parameters={"alpha": 0.5},
            data="rows.jsonl",
            grid={"model": ["base"], "method": ["regmean_plus"]},
        )


def test_data_that_do_not_fit_a_task_name_file_and_line(
    tiny_checkpoints: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    models = "".join(f"- {model}\n" for model in tiny_checkpoints("llama").models[:2])
    (tmp_path / "rows.jsonl").write_text('{"sentence": "word1 word2"}\n')
    (tmp_path / "g.yaml").write_text(
        f"merge_method: linear\nmodels:\n{models}parameters: {{weight: $w}}\ngrid: {{w: [1, 2]}}\n"
        "export: {top: 3}\nevaluate:\n  tasks:\n  - name: lm\n    kind: loss\n    validation: rows.jsonl\n"
    )
    with pytest.raises(
        RecipeError, match=r"^g\.yaml:12: key evaluate.tasks\[0\]\.validation: .* 'text'; they have"
    ):
        plan_grid(read_grid("g.yaml"), GridOptions())
    (tmp_path / "rows.jsonl").write_text('{"text": "word1 word2"}\n')
    said = "note: export.top is 3, but the grid has 2 points, and so no more checkpoints"
    assert said in plan_grid(read_grid("g.yaml"), GridOptions()).remarks
