"""The parts of the zoo studies: paired tests against known values, recipes that read strictly, a tiny study."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from raymerge.cluster.recipe import load_recipes

REPOSITORY = Path(__file__).resolve().parents[2]
BENCHMARKS = REPOSITORY / "benchmarks"
Part = Callable[[str], ModuleType]
LABELS = ["even", "odd"]


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Iterator[Part]:
    """Import modules of benchmarks/ as its scripts do."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    for file in BENCHMARKS.glob("*.py"):
        sys.modules.pop(file.stem, None)


def test_mcnemar_is_the_exact_sign_test(part: Part) -> None:
    mcnemar = part("paired").mcnemar
    assert mcnemar(0, 0) == 1
    assert mcnemar(5, 5) == 1
    assert mcnemar(0, 5) == pytest.approx(2 / 2**5)
    assert mcnemar(9, 1) == mcnemar(1, 9) == pytest.approx(2 * (1 + 10) / 2**10)


def test_accuracy_is_the_mean_over_data_sets_not_over_examples(part: Part) -> None:
    found = part("paired").accuracy([[True] * 10, [True, False] * 50])
    assert found.value == pytest.approx(0.75)
    assert found.error == pytest.approx((0.25 / 100) ** 0.5 / 2)


def test_difference_is_paired(part: Part) -> None:
    one = [[True, True, False, True] * 25]
    other = [[True, False, False, True] * 25]
    found = part("paired").difference(one, other)
    assert found.value == pytest.approx(0.25)
    # Of 100 differences 25 are 1 and the rest 0.
    assert found.error == pytest.approx((0.25 * 0.75 / 100) ** 0.5)
    assert found.p == pytest.approx(2 / 2**25)
    assert part("paired").difference(other, one).value == -found.value


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two settings of two tiny models: one shared head and an out-of-domain set; a head per task."""
    folder = tmp_path_factory.mktemp("zoo")
    models = {name: {"labels": LABELS} for name in ("one", "two")}
    settings = {
        "domains": {"base": "domains/base", "labels": LABELS, "models": models, "extra_tests": {"ood": {}}},
        "tasks": {"base": "tasks/base", "models": models},
    }
    (folder / "zoo.json").write_text(json.dumps({"max_length": 16, "settings": settings}))
    return folder


def test_settings_say_what_is_merged_and_measured(part: Part, zoo: Path) -> None:
    domains, tasks = part("zoo_points").read_settings(zoo)
    assert domains.models == ("domains/models/one", "domains/models/two")
    assert (domains.has_own_heads, tasks.has_own_heads) == (False, True)
    assert [(probe.name, probe.head, probe.group) for probe in domains.probes] == [
        ("one", None, "in domain"),
        ("two", None, "in domain"),
        ("ood", None, "out of domain"),
    ]
    assert [probe.head for probe in tasks.probes] == ["tasks/models/one", "tasks/models/two"]


def test_every_recipe_of_the_study_reads_without_remarks(part: Part, zoo: Path) -> None:
    points_part = part("zoo_points")
    for setting in points_part.read_settings(zoo):
        points = list(points_part.study_points(setting))
        assert len({point.name for point in points}) == len(points)
        rows = {point.row for point in points}
        assert {"average", "TIES 20 %", "Fisher, expected", "RegMean 0.9"} <= rows
        for point in points:
            if point.recipe is not None:
                recipes, remarks = load_recipes(dict(point.recipe), strict=True)
                assert (len(recipes), remarks) == (1, [])


def test_every_recipe_of_the_dare_study_reads_without_remarks(part: Part, zoo: Path) -> None:
    dare, setting = part("zoo_dare_study"), part("zoo_points").read_settings(zoo)[1]
    single = next(dare.single_settings(setting))
    assert [probe.name for probe in single.probes] == ["one"]
    assert single.models == ("tasks/models/one",)
    points = [*dare.single_points(single), *dare.merge_points(setting)]
    assert len({point.name for point in points}) == len(points)
    for point in points:
        recipes, remarks = load_recipes(dict(point.recipe), strict=True)
        assert (len(recipes), remarks) == (1, [])


def test_merge_to_learn_keeps_the_general_model_whole_and_weighs_skills_by_steps(
    part: Part, zoo: Path
) -> None:
    learn, settings = part("zoo_merge_to_learn"), part("zoo_points").read_settings(zoo)
    setting = learn.skills_setting(*settings)
    assert [(probe.name, probe.group, probe.head) for probe in setting.probes] == [
        ("one", "general", learn.GENERAL),
        ("two", "general", learn.GENERAL),
        ("ood", "out of domain", learn.GENERAL),
        ("one", "tasks", "tasks/models/one"),
        ("two", "tasks", "tasks/models/two"),
    ]
    points = list(learn.sweep_points(setting, {"general": 100, "one": 30, "two": 50}))
    rule = next(point for point in points if point.name == "all skills_rule")
    weights = {use["model"]: use["parameters"]["weight"] for use in rule.recipe["models"]}
    assert weights == {learn.GENERAL: 1, "tasks/models/one": 0.3, "tasks/models/two": 0.5}
    for point in points:
        if point.recipe is None:
            assert (point.folder, point.axes["omega"]) == (learn.GENERAL, "0")
        else:
            recipes, remarks = load_recipes(dict(point.recipe), strict=True)
            assert (len(recipes), remarks) == (1, [])


def test_the_best_on_validation_is_chosen_whatever_the_test_says(
    part: Part, zoo: Path, tmp_path: Path
) -> None:
    pages, points_part = part("zoo_pages"), part("zoo_points")
    points = [points_part.Point(name=name, row="row") for name in ("a", "b", "c")]
    right = {"a": (1, 4), "b": (3, 0), "c": (3, 4)}
    answers = {
        name: {
            "one": {
                split: [i < number for i in range(4)]
                for split, number in zip(("validation", "test"), numbers, strict=True)
            }
        }
        for name, numbers in right.items()
    }
    assert pages.chosen(points, answers)["row"].name == "b"


def test_a_study_merges_measures_and_goes_on_where_it_was(
    part: Part,
    zoo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _fill(zoo)
    study = part("zoo_study").main
    skipped = ["fisher_*", "dare*", "ties*", "task*", "*alpha*", "*samples*", "*sum", "*plus"]
    words = [
        "zoo_study.py",
        zoo,
        tmp_path / "out",
        "--results",
        tmp_path / "kept",
        "--threads",
        "1",
        "--skip",
    ]
    monkeypatch.setattr(sys, "argv", [*map(str, words), *skipped])
    monkeypatch.chdir(tmp_path)
    for name in ("RAYMERGE_CACHE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "")  # the study sets it; this takes it back afterwards
    study()
    said = capsys.readouterr().out
    # The settings hold the same models and data: the cache has them when the second one asks.
    assert said.count("note: measuring") == 2
    assert said.count("domains/average: one test ") == 1
    (page,) = (tmp_path / "kept").glob("zoo_*.md")
    results = json.loads(page.with_suffix(".json").read_text())["results"]
    assert [picture.name for picture in page.parent.glob("*.png")] == [f"{page.stem}_methods.png"]
    assert str(tmp_path) not in page.read_text() + page.with_suffix(".json").read_text()
    for name in ("domains", "tasks"):
        alone, merged = results[name]["only one"], results[name]["average"]
        # The heads are constant: "one" always says even, which half of the labels are.
        assert alone["accuracy"]["one"]["test"]["value"] == 0.5
        assert merged["groups"].keys() == alone["groups"].keys()
    assert results["domains"]["regmean"]["groups"]["in domain"]["against_regmean"]["value"] == 0
    assert list((tmp_path / "out").glob("merged*")) == []
    study()
    again = capsys.readouterr().out
    assert "measuring" not in again and "domains/average" not in again


def _fill(zoo: Path) -> None:
    """Write models and data: a BERT of two layers, random words, labels that alternate."""
    import pyarrow
    import pyarrow.parquet
    from safetensors.torch import load_file, save_file
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    words = [f"word{i}" for i in range(40)]
    (zoo / "pretrained").mkdir()
    (zoo / "pretrained" / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])
    )
    tokenizer = BertTokenizerFast(str(zoo / "pretrained" / "vocab.txt"))
    tokenizer.save_pretrained(zoo / "pretrained")
    config = BertConfig(
        vocab_size=45,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=2,
    )
    for setting in ("domains", "tasks"):
        for seed, name in enumerate(("base", "models/one", "models/two")):
            torch.manual_seed(seed)
            model = BertForSequenceClassification(config)
            with torch.no_grad():
                model.classifier.weight.zero_()
                model.classifier.bias.copy_(torch.tensor([1.0, 0.0] if name == "models/one" else [0.0, 1.0]))
            model.save_pretrained(zoo / setting / name)
            tokenizer.save_pretrained(zoo / setting / name)
        for name in ("one", "two", "ood")[: 3 if setting == "domains" else 2]:
            data = zoo / setting / "data" / name
            data.mkdir(parents=True)
            for split in ("train", "validation", "test") if name != "ood" else ("test",):
                texts = [f"{words[i % 40]} {words[(7 * i) % 40]} {words[(3 * i) % 40]}" for i in range(20)]
                table = pyarrow.table({"text": texts, "label": [i % 2 for i in range(20)]})
                pyarrow.parquet.write_table(table, data / f"{split}.parquet")
    weights = zoo / "tasks" / "base" / "model.safetensors"
    headless = {
        name: value for name, value in load_file(weights).items() if not name.startswith("classifier.")
    }
    save_file(headless, weights, metadata={"format": "pt"})
