"""raymerge plan: figures and treatments from headers alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from raymerge.cli.main import main


@pytest.fixture
def family(tiny_checkpoints: Callable[..., Any]) -> Any:
    return tiny_checkpoints("bert", dtype="bfloat16")


@pytest.fixture
def recipe(family: Any, tmp_path: Path) -> Path:
    """Write a TIES recipe over tiny models."""
    models = [{"model": str(model), "parameters": {"weight": 0.5}} for model in family.models[:2]]
    path = tmp_path / "ties.yaml"
    path.write_text(
        yaml.safe_dump({"merge_method": "ties", "base_model": str(family.base), "models": models})
    )
    return path


def plan(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["plan", *map(str, arguments)])


def test_json_holds_figures_and_every_tensor(recipe: Path, family: Any) -> None:
    found = plan(recipe, "--json")
    assert found.exit_code == 0 and found.stderr == "", found.output
    report = json.loads(found.stdout)
    tensors = load_file(family.base / "model.safetensors")
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    assert report["read_bytes"] == 3 * num_bytes
    assert report["write_bytes"] == num_bytes
    assert report["disk_bytes"] >= num_bytes
    assert report["num_tasks"] == 1 and report["num_measured_tensors"] == 0 and report["later"] == []
    rows = {row["name"]: row for row in report["recipes"][0]["tensors"]}
    assert rows.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert rows[name]["shape"] == list(tensor.shape)
        assert (rows[name]["dtype"], rows[name]["treatment"]) == ("BF16", "ties of 2 models")
    assert [each["num_parameters"] for each in report["inputs"]] == [num_bytes // 2] * 3


def test_text_names_tasks_memory_disk_and_treatments(recipe: Path, family: Any) -> None:
    found = plan(recipe)
    assert found.exit_code == 0 and found.stderr == ""
    lines = found.stdout.splitlines()
    assert re.fullmatch(r"1 task; reads [\d.]+ KiB, writes [\d.]+ KiB", lines[0])
    assert lines[1].startswith("memory of a worker about ") and lines[2].startswith("disk needed ")
    assert sum(line.startswith("  input ") for line in lines) == 3
    assert any(line.startswith("recipe ties: ties, ") for line in lines)
    assert any(re.search(r"\d+ x ties of 2 models -> BF16$", line) for line in lines)


def test_cut_tensors_are_counted_as_measured(tmp_path: Path) -> None:
    for name in ("base", "one"):
        (tmp_path / name).mkdir()
        save_file({"w": torch.zeros(1024, 1024)}, tmp_path / name / "model.safetensors")
    models = [{"model": str(tmp_path / "one"), "parameters": {"weight": 1.0, "density": 0.5}}]
    recipe = {"merge_method": "ties", "base_model": str(tmp_path / "base"), "models": models}
    (tmp_path / "ties.yaml").write_text(yaml.safe_dump(recipe))
    whole, cut = (
        json.loads(plan(tmp_path / "ties.yaml", "--json", "--slice-mib", mib).stdout) for mib in ("64", "1")
    )
    assert (whole["num_tasks"], whole["num_measured_tensors"], whole["measure_bytes"]) == (1, 0, 0)
    assert (cut["num_tasks"], cut["num_measured_tensors"], cut["measure_bytes"]) == (4, 1, 8 << 20)
    assert cut["largest_task_bytes"] == 3 << 20
    assert cut["worker_bytes"] < whole["worker_bytes"]


def test_later_waves_are_named(recipe: Path) -> None:
    first = {**yaml.safe_load(recipe.read_text()), "name": "step1"}
    models = [{"model": "step1", "parameters": {"weight": 1.0}}, first["models"][0]]
    second = {"name": "step2", "merge_method": "linear", "models": models}
    recipe.write_text(yaml.safe_dump_all([first, second]))
    report = json.loads(plan(recipe, "--json").stdout)
    assert report["later"] == ["step2"] and [each["name"] for each in report["recipes"]] == ["step1"]
    assert plan(recipe).stdout.splitlines()[-1] == "planned when their inputs exist: step2"


def test_remarks_go_to_stderr_and_strict_refuses_them(recipe: Path) -> None:
    recipe.write_text(recipe.read_text() + "density: 0.5\n")
    found = plan(recipe, "--json")
    assert found.exit_code == 0 and json.loads(found.stdout)["num_tasks"] == 1
    assert found.stderr.startswith("warning: ") and "density" in found.stderr
    strict = plan(recipe, "--strict")
    assert strict.exit_code == 1 and strict.stdout == "" and strict.stderr.startswith("Error: ")


def test_errors_are_one_sentence(tmp_path: Path) -> None:
    found = plan(tmp_path / "none.yaml")
    assert found.exit_code == 1 and found.stdout == ""
    assert found.stderr.startswith("Error: ") and found.stderr.count("\n") == 1


def test_example_of_the_help_works(recipe: Path) -> None:
    shown = CliRunner().invoke(main, ["plan", "--help"]).stdout
    example = re.search(r"Example: raymerge plan (\S+) (\S+)", shown)
    assert example and example[1] == recipe.name, shown
    assert plan(recipe, example[2]).exit_code == 0
