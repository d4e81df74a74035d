"""Scoring a checkpoint from a file: Python and command line, both splits, saved scores, bad files."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from object_store import ObjectStore

import raymerge
from raymerge.cli.main import main
from raymerge.merge_actors.errors import RecipeError

Maker = Callable[..., Any]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "data").mkdir()
    rng = random.Random(1)
    for split, num in (("validation", 12), ("test", 8), ("train", 3)):
        rows = [
            {"text": " ".join(f"word{rng.randrange(92)}" for _ in range(9)), "label": i % 2}
            for i in range(num)
        ]
        (folder / "data" / f"{split}-0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"validation": str(folder / "data"), "test": str(folder / "data")}
    choice = {"choices": ["word1", "word2"], "name": "ab", "kind": "multiple_choice"}
    section = {"tasks": [{"name": "text", "kind": "loss", **data}, {**choice, **data, "samples": 5}]}
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump({"merge_method": "linear", "evaluate": section}))
    return path


def test_python_and_command_line_agree(tiny_checkpoints: Maker, tasks: Path, tmp_path: Path) -> None:
    model = tiny_checkpoints("llama").base
    found = raymerge.evaluate(model, tasks)
    assert list(found.metrics) == ["text.loss", "text.perplexity", "ab.accuracy", "ab.accuracy_norm"]
    assert {name: len(scores["example"]) for name, scores in found.scores.items()} == {"text": 12, "ab": 5}
    out = tmp_path / "scores.npz"
    arguments = ["evaluate", str(model), "--tasks", str(tasks), "--scores", str(out), "--device", "cpu"]
    done = CliRunner().invoke(main, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    assert printed["metrics"] == found.to_mapping()["metrics"]
    np.testing.assert_array_equal(np.load(out)["text.nll"], found.scores["text"]["nll"])
    test = CliRunner().invoke(main, [*arguments, "--split", "test"])
    assert "13 examples of the test split" in test.stderr
    assert test.stdout.splitlines()[0].startswith("text.loss")
    assert f"{found.metrics['text.loss'].value:.4f}" not in test.stdout


def test_tasks_without_test_data_are_left_out_of_the_test_split(tiny_checkpoints: Maker, tasks: Path) -> None:
    model, data = tiny_checkpoints("llama").base, str(tasks.parent / "data")
    section = [
        {"name": "a", "kind": "loss", "validation": data, "test": data},
        {"name": "b", "kind": "loss", "validation": data},
    ]
    remarks: list[str] = []
    found = raymerge.evaluate(model, section, split="test", on_remark=remarks.append)
    assert list(found.scores) == ["a"]
    assert remarks == ["without test data, and so left out: b"]
    with pytest.raises(RecipeError, match="no task has test data"):
        raymerge.evaluate(model, section[1:], split="test")


def test_samples_are_the_same_rows_every_time_and_nested(tiny_checkpoints: Maker, tasks: Path) -> None:
    model = tiny_checkpoints("llama").base

    def nll(**task: Any) -> list[float]:
        data = str(tasks.parent / "data")
        found = raymerge.evaluate(
            model, [{"name": "x", "kind": "loss", "validation": data, "batch_tokens": 1, **task}]
        )
        return [float(each) for each in found.scores["x"]["nll"]]

    everything = nll()
    assert set(nll(samples=4)) < set(nll(samples=8)) < set(everything)
    assert nll(samples=4) == nll(samples=4) != nll(samples=4, seed=1)
    assert nll(samples=4, take="first") == everything[:4]


@pytest.mark.parametrize(
    ("section", "pattern"),
    [
        ({}, r"evaluate.tasks: a list of at least one task"),
        (
            {"tasks": [{"kind": "lss"}]},
            r"evaluate.tasks\[0\].kind: unknown kind 'lss'; .*did you mean 'loss'",
        ),
        ({"tasks": [{"name": "x"}]}, r"evaluate.tasks\[0\].kind: missing; known: loss"),
        ({"task": []}, r"evaluate.task: unknown key; .*did you mean 'tasks'"),
        ({"dtype": "float23", "tasks": [{}]}, r"evaluate.dtype: 'float23' is none of .*'float32'"),
        ([{"kind": "loss"}], r"evaluate.tasks\[0\].validation: missing"),
        (
            [{"kind": "loss", "validation": "x.jsonl", "sample": 3}],
            r"tasks\[0\].sample: unknown key; .*'samples'",
        ),
        ([{"kind": "loss", "validation": "x.jsonl", "samples": "3"}], r"samples: '3' is no whole number"),
        ([{"kind": "loss", "validation": "x.jsonl", "samples": 0}], r"tasks\[0\].samples: 0 is too few"),
        ([{"kind": "loss", "validation": "x.jsonl"}] * 2, r"tasks\[1\].name: two tasks are named 'loss'"),
        ([{"kind": "loss", "validation": "x.jsonl"}], r"validation: the data 'x.jsonl' do not exist"),
        ([{"kind": "loss", "test": "x.jsonl"}], r"validation: missing; the task 'loss' has no data"),
        ([{"kind": "loss", "validation": {"sourc": "x"}}], r"validation: it has the keys sourc; write"),
    ],
)
def test_bad_files(section: Any, pattern: str, tiny_checkpoints: Maker) -> None:
    with pytest.raises(RecipeError, match=pattern):
        raymerge.evaluate(tiny_checkpoints("llama").base, {"evaluate": section})


def test_one_file_for_both_splits_is_refused(tiny_checkpoints: Maker, tasks: Path) -> None:
    file = str(tasks.parent / "data" / "train-0.jsonl")
    task = {"name": "x", "kind": "loss", "validation": file, "test": file}
    with pytest.raises(RecipeError, match=r"test: .* holds the data of `validation` too"):
        raymerge.evaluate(tiny_checkpoints("llama").base, [task], split="test")


def test_models_heads_and_data_in_a_store_score_as_on_a_disk(
    tiny_checkpoints: Maker, tasks: Path, tmp_path: Path, object_store: ObjectStore
) -> None:
    from transformers import AutoModelForSequenceClassification, BertConfig

    model = tiny_checkpoints("llama").base
    uri = object_store.put(model, "evaluate/model")
    data = object_store.put(tasks.parent / "data", "evaluate/data")
    section = [{"name": "text", "kind": "loss", "validation": data}]
    found = raymerge.evaluate(uri, section).metrics["text.loss"]
    assert found == raymerge.evaluate(model, tasks).metrics["text.loss"]

    encoder = tiny_checkpoints("bert").base
    config = BertConfig.from_pretrained(encoder, num_labels=2)
    head = tmp_path / "head"
    AutoModelForSequenceClassification.from_config(config).save_pretrained(head)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (head / name).write_bytes((encoder / name).read_bytes())
    task = {"name": "c", "kind": "text_classification", "validation": data}
    here = raymerge.evaluate(encoder, [{**task, "head": str(head)}])
    there = raymerge.evaluate(encoder, [{**task, "head": object_store.put(head, "evaluate/head")}])
    assert there.metrics == here.metrics
    assert len(here.metrics) >= 1
