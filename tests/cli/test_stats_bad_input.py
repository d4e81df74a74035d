"""Bad input of `raymerge stats`, as a user meets it: one sentence, exit 1, and nothing written."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from click.testing import CliRunner, Result
from object_store import BUCKET, ObjectStore
from safetensors.torch import load_file, save_file

from raymerge.cli.main import main

OK = "".join(json.dumps({"text": f"word{i} word{i * 7 % 90}", "label": i % 2}) + "\n" for i in range(30))


@pytest.fixture
def bert(tiny_checkpoints: Callable[..., Any], tmp_path: Path) -> Path:
    """Return a copy, to be spoilt."""
    return Path(shutil.copytree(tiny_checkpoints("bert").models[0], tmp_path / "bert"))


def write(tmp_path: Path, name: str, content: str | bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def measure(model: Path, data: Path | str, out: Path, *words: str) -> Result:
    command = ["stats", str(model), "--data", str(data), "--out", str(out), "--in-process", "--workers", "1"]
    return CliRunner().invoke(main, [*command, "--quiet", *words])


def refusal(result: Result, out: Path) -> str:
    """Return the sentence of a command that failed as it should."""
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output
    [line] = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert not out.exists()
    return line


def parquet_bytes(tmp_path: Path) -> bytes:
    path = tmp_path / "whole.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["word1 word2"] * 100}), path)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", '{"text": ""}\n{"text": null}\n', "of 2 rows none has text in 'text'"),
        ("a.jsonl", "", "a.jsonl' is empty"),
        ("a.csv", "", "a.csv' is empty"),
        ("a.parquet", "", "a.parquet' is empty"),
        ("a.txt", "", "no row of the data"),
        ("a.parquet", b"no parquet at all", "is no Parquet file: it begins with b'no p'"),
        ("a.parquet", "cut", "was cut: a Parquet file ends with its footer"),
        ("a.jsonl", OK + '{"text": "wor\n' + OK, "line 31 of the data file .*a.jsonl' is not JSON"),
        ("a.jsonl", "hello there\n", "line 1 of .* is not JSON .Expecting value, column 1.: 'hello there'"),
        ("a.jsonl", OK + "[1, 2]\n", "line 31 of .* is no object"),
        ("a.json", '[\n{"text": "word1"},\n{"text": "word2"}\n]\n', "is one JSON document over many lines"),
        (
            "a.jsonl",
            OK + '{"text": 5}\n',
            "line 31 of .* has a number in 'text', line 1 a text; a column has values of one type",
        ),
        ("a.jsonl", '{"text": 1}\n', "row 0 .* holds a value of type int in 'text'"),
        ("a.txt", "word1\ncaf\xe9\n".encode("latin-1"), r"line 2 of .* is not UTF-8 \(byte 0xe9\)"),
        ("a.jsonl", '{"text": "caf\xe9"}\n'.encode("latin-1"), r"line 1 of .* is not UTF-8 \(byte 0xe9\)"),
        ("a.csv", "text\ncaf\xe9\n".encode("latin-1"), r"line 2 of .* is not UTF-8 \(byte 0xe9\)"),
        ("a.jsonl", OK.encode("utf-16"), "is UTF-16; it must be UTF-8"),
        ("a.csv", "text,label\na,1\nb\n", "cannot be read as csv: .*Expected 2 columns, got 1"),
        ("a.xlsx", "abc", "is none of .parquet, .jsonl, .json, .csv, .txt"),
    ],
)
def test_data_that_cannot_be_read(
    name: str, content: str | bytes, sentence: str, bert: Path, tmp_path: Path
) -> None:
    data = parquet_bytes(tmp_path) if content == "cut" else content
    path = write(tmp_path, name, data[: len(data) // 2] if content == "cut" else data)
    line = refusal(measure(bert, path, tmp_path / "out"), tmp_path / "out")
    assert str(path) in line

    assert re.search(sentence, line), line


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--text-column", "txt"], "have no column 'txt'; they have 'text', 'label' (did you mean 'text'?)"),
        (["--text-pair-column", "label"], "row 0 of the data"),
        (["--max-length", "100000"], "max_length is 100,000, but the model takes at most 64 tokens"),
        (["--samples", "0"], "samples of the data is 0"),
        (["--samples-at", "10,1000"], "asks for 1,000 rows"),
        (["--chat-template"], "conversations (lists of messages) must stand there"),
        (["--kind", "fisher"], "Fisher needs a classification or language-modelling head"),
        (["--memory-gib", "0.000001"], "but a worker needs"),
        (["--workers", "0"], "--workers is 0"),
    ],
)
def test_options_that_do_not_fit(words: list[str], sentence: str, bert: Path, tmp_path: Path) -> None:
    path = write(tmp_path, "good.jsonl", OK)
    assert sentence in refusal(measure(bert, path, tmp_path / "out", *words), tmp_path / "out")


def test_data_that_are_not_there(bert: Path, tmp_path: Path, object_store: ObjectStore) -> None:
    out = tmp_path / "out"
    line = refusal(measure(bert, f"s3://{BUCKET}/none.jsonl", out), out)
    assert f"the data 's3://{BUCKET}/none.jsonl' do not exist; give a file or a folder in the store" in line
    assert "do not exist" in refusal(measure(bert, tmp_path / "none.jsonl", out), out)


@pytest.mark.parametrize("label", ["7", "-1", "0.5", '"good"'])
def test_labels_outside_the_head(label: str, bert: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    BertForSequenceClassification(BertConfig.from_pretrained(bert, num_labels=2)).save_pretrained(
        tmp_path / "clf"
    )
    AutoTokenizer.from_pretrained(bert).save_pretrained(tmp_path / "clf")
    path = write(tmp_path, "labels.jsonl", f'{{"text": "word1", "label": {label}}}\n')
    words = ["--kind", "fisher", "--estimator", "empirical", "--label-column", "label"]
    line = refusal(measure(tmp_path / "clf", path, tmp_path / "out", *words), tmp_path / "out")
    assert (
        f"has the label {label.replace(chr(34), chr(39))} in 'label'; the model's head has 2 classes" in line
    )


def test_models_that_cannot_run(bert: Path, tmp_path: Path) -> None:
    path, out = write(tmp_path, "good.jsonl", OK), tmp_path / "out"
    weights = load_file(bert / "model.safetensors")
    name = next(name for name in weights if "layer.1.intermediate.dense.weight" in name)
    weights[name][0, 0] = float("nan")
    save_file(weights, bert / "model.safetensors", metadata={"format": "pt"})
    line = refusal(measure(bert, path, out), out)
    assert "the input of bert.encoder.layer.1.output.dense.weight is NaN or infinite for sample 0" in line
    for file in [*bert.glob("*token*"), *bert.glob("vocab*")]:
        file.unlink()
    other = tmp_path / "other"
    assert "has no tokenizer (tokenizer.json" in refusal(measure(bert, path, other), other)


def test_a_tokenizer_of_another_model(bert: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bert)
    tokenizer.add_tokens(["beyond"])
    tokenizer.save_pretrained(bert)
    path = write(tmp_path, "beyond.jsonl", OK + '{"text": "word1 beyond"}\n')
    line = refusal(measure(bert, path, tmp_path / "out"), tmp_path / "out")
    assert "sample 30 has the token 96, but" in line and "has 96 embeddings" in line


def test_what_is_only_remarked_on(bert: Path, tmp_path: Path) -> None:
    path = write(tmp_path, "long.jsonl", json.dumps({"text": "word1 " * 200}) + "\n" + '{"text": null}\n')
    result = measure(bert, path, tmp_path / "out", "--split", "test")
    assert result.exit_code == 0
    for line in (
        "1 texts are longer than 64 tokens and were cut there",
        "1 of 2 rows without text or label are left out",
        "is a single file, so the split 'test' has no effect",
    ):
        assert line in result.stderr, result.stderr


def test_fewer_tokens_than_features_is_remarked_on(bert: Path, tmp_path: Path) -> None:
    path = write(tmp_path, "few.jsonl", '{"text": "word1"}\n')
    result = measure(bert, path, tmp_path / "out")
    assert result.exit_code == 0
    assert "saw fewer inputs than they have input features, bert.encoder.layer.0." in result.stderr
    assert "merge with alpha below 1, or measure more data" in result.stderr
