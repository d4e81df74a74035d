"""raymerge stats: streams, exit codes, JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from raymerge.cli.main import main
from raymerge.stats.statistics_file import open_statistics


@pytest.fixture
def model(tiny_checkpoints: Callable[..., Any]) -> Path:
    folder = tiny_checkpoints("gpt2").models[0]
    assert isinstance(folder, Path)
    return folder


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.csv"
    path.write_text("sentence,label\n" + "".join(f"word{i} word{i + 1},0\n" for i in range(9)))
    return path


def stats(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["stats", *map(str, arguments), "--in-process"])


def test_the_summary_is_the_result(model: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "grams"
    done = stats(model, "--data", texts, "--text-column", "sentence", "--out", out, "--workers", "1")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"wrote {out} in ")
    assert lines[0].endswith("18 tokens of 9 examples, 1 worker on cpu, 1 layer group")
    assert lines[1] == "coverage: 8 of 8 linear maps have statistics"
    assert lines[2].startswith("Gram update ")
    assert "note: lm_head.weight is tied to the embedding" in done.stderr
    assert open_statistics(out).num_tokens == 18


def test_json_is_one_document(model: Path, texts: Path, tmp_path: Path) -> None:
    done = stats(
        model,
        "--data",
        texts,
        "--text-column",
        "sentence",
        "--samples",
        "4",
        "--out",
        tmp_path / "out",
        "--json",
    )
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["tokens"], found["examples"], found["covered"], found["expected"]) == (8, 4, 8, 8)


def test_quiet_prints_nothing_but_remarks(model: Path, texts: Path, tmp_path: Path) -> None:
    done = stats(model, "--data", texts, "--text-column", "sentence", "--out", tmp_path / "out", "--quiet")
    assert done.exit_code == 0, done.output
    assert done.stdout == ""


def test_bad_input_is_one_sentence_and_leaves_nothing(model: Path, texts: Path, tmp_path: Path) -> None:
    done = stats(model, "--data", texts, "--out", tmp_path / "out")
    assert done.exit_code == 1
    assert done.stderr == (
        f"Error: the data '{texts}' have no column 'text'; they have 'sentence', 'label'.\n"
    )
    done = stats(
        model, "--data", texts, "--text-column", "sentence", "--out", tmp_path / "out", "--kind", "fisher"
    )
    assert done.exit_code == 1
    assert "use the estimator sampled" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["texts.csv"]


def test_misuse_exits_with_2(model: Path) -> None:
    assert stats(model, "--out", "out").exit_code == 2
    assert stats(model, "--data", "texts.csv", "--out", "out", "--kind", "hessian").exit_code == 2


def test_fisher_of_a_language_model(model: Path, texts: Path, tmp_path: Path) -> None:
    arguments = ["--kind", "fisher", "--estimator", "sampled", "--text-column", "sentence"]
    done = stats(model, "--data", texts, *arguments, "--out", tmp_path / "out", "--workers", "1")
    assert done.exit_code == 0, done.output
    assert "coverage: 28 of 28 tensors have statistics" in done.stdout
