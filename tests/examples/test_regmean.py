"""The walk through RegMean: its recipes read, its commands are those of the recipes, its data come from the demo."""

import importlib
import json
import shlex
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from click.testing import CliRunner

from raymerge.cli.main import main
from raymerge.cluster.recipe_reader import read_recipes

WALK = Path(__file__).parents[2] / "examples" / "regmean"
RECIPES = sorted((WALK / "recipes").glob("*.yaml"))


@pytest.fixture
def calibration(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(WALK)
    return importlib.import_module("calibration")


def _stats_commands() -> list[list[str]]:
    lines = (WALK / "README.md").read_text().splitlines()
    return [shlex.split(line)[2:] for line in lines if line.startswith("$ raymerge stats ")]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_read_without_remarks(path: Path) -> None:
    recipes, remarks = read_recipes(path, strict=True)
    assert (len(recipes), remarks) == (1, [])


def test_the_readmes_commands_make_what_the_recipe_reads() -> None:
    uses = yaml.safe_load((WALK / "recipes" / "regmean.yaml").read_text())["models"]
    made = {words[1]: words[words.index("--out") + 1] for words in _stats_commands()}
    assert made == {use["model"]: use["statistics"] for use in uses}


def test_both_ways_measure_the_same(calibration: ModuleType) -> None:
    by_data = yaml.safe_load((WALK / "recipes" / "regmean_by_data.yaml").read_text())
    for use, words in zip(by_data["models"], _stats_commands(), strict=True):
        assert words[words.index("--data") + 1] == use["data"]
        assert int(words[words.index("--max-length") + 1]) == by_data["data"]["max_length"]


def test_the_readmes_options_exist() -> None:
    for words in _stats_commands():
        result = CliRunner().invoke(main, [*words[:1], "no/such/model", *words[2:]])
        assert result.exit_code == 1, result.output  # 2 would be a wrong option
        assert "no/such/model" in result.output


def test_calibration_sets_are_the_training_texts(calibration: ModuleType, tmp_path: Path) -> None:
    splits = {"train": [["a text", 0], ["another", 1]], "test": [["a third", 0]]}
    (tmp_path / "texts.json").write_text(json.dumps({"library": splits}))
    (file,) = calibration.write_calibration(tmp_path)
    assert file == tmp_path / "calibration" / "library.jsonl"
    assert [json.loads(line) for line in file.read_text().splitlines()] == [
        {"text": "a text"},
        {"text": "another"},
    ]
