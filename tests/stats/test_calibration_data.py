"""Rows, columns, labels and lengths of calibration data, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from raymerge.merge_actors.errors import CheckpointError, RecipeError
from raymerge.stats.calibration_data import CalibrationData, Example, tokenizer_fingerprint
from raymerge.stats.data_rows import DataSpec, read_rows

ROWS = [{"text": f"word{i} word{i + 1}", "more": f"word{i + 2}", "label": i % 3} for i in range(50)]


@pytest.fixture
def model(tiny_checkpoints: Callable[..., Any]) -> Path:
    folder = tiny_checkpoints("bert").base
    assert isinstance(folder, Path)
    return folder


def _write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    elif path.suffix == ".txt":
        path.write_text("\n".join(row["text"] for row in rows) + "\n")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def _examples(data: CalibrationData) -> list[Example]:
    return [example for shard in range(data.num_shards) for example in data.shard(shard)]


def _open(model: Path, source: str, **options: Any) -> CalibrationData:
    config = json.loads((model / "config.json").read_text())
    return CalibrationData(DataSpec(source=source, **options), str(model), config)


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "csv", "txt"])
def test_every_format_gives_the_same_examples(ending: str, model: Path, tmp_path: Path) -> None:
    data = _open(model, _write(tmp_path / f"rows.{ending}", ROWS))
    assert data.num_shards == 32
    examples = _examples(data)
    assert [each.number for each in examples] == list(range(50))
    assert examples[3].input_ids == (7, 8)  # four special tokens stand before word0


def test_a_saved_dataset_is_read(model: Path, tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert len(_examples(_open(model, str(tmp_path / "saved")))) == 50


def test_a_folder_is_read_by_split(model: Path, tmp_path: Path) -> None:
    _write(tmp_path / "data" / "train-00000-of-00002.jsonl", ROWS[:10])
    _write(tmp_path / "data" / "train-00001-of-00002.jsonl", ROWS[10:20])
    _write(tmp_path / "data" / "test.jsonl", ROWS[20:])
    data = _open(model, str(tmp_path / "data"))
    assert len(data.rows.texts) == 20
    assert "split 'train' is taken" in data.rows.remarks[0]
    assert len(_open(model, str(tmp_path / "data"), split="test").rows.texts) == 30
    with pytest.raises(RecipeError, match=r"no file of the split 'dev'; it has test\.jsonl, train"):
        _open(model, str(tmp_path / "data"), split="dev")


def test_samples_are_spread_fixed_and_nested(tmp_path: Path) -> None:
    source = _write(tmp_path / "rows.jsonl", ROWS)
    few = read_rows(DataSpec(source=source, samples=10)).texts
    again = read_rows(DataSpec(source=source, samples=10)).texts
    more = read_rows(DataSpec(source=source, samples=25)).texts
    assert list(few) == list(again) and len(few) == 10
    assert set(few) < set(more)
    assert few[-1] not in [row["text"] for row in ROWS[:25]]
    everything = read_rows(DataSpec(source=source, samples=99))
    assert len(everything.texts) == 50
    assert "fewer than the 99 samples" in everything.remarks[0]


def test_rows_without_text_or_label_are_left_out(tmp_path: Path) -> None:
    source = _write(
        tmp_path / "rows.jsonl",
        [
            {"text": "a", "label": 1},
            {"text": " ", "label": 1},
            {"text": None, "label": 0},
            {"text": "b", "label": None},
        ],
    )
    rows = read_rows(DataSpec(source=source, label_column="label"))
    assert (list(rows.texts), list(rows.labels or ())) == (["a"], [1])
    assert rows.remarks == ("3 of 4 rows without text or label are left out",)


def test_pairs_go_to_an_encoder_together_and_to_a_decoder_apart(
    model: Path, tiny_checkpoints: Callable[..., Any], tmp_path: Path
) -> None:
    source = _write(tmp_path / "rows.jsonl", ROWS)
    together = _open(model, source, text_pair_column="more").shard(0)[0]
    assert together.input_ids == (4, 5, 6) and together.target_ids is None
    apart = _open(tiny_checkpoints("t5").base, source, text_pair_column="more").shard(0)[0]
    assert (apart.input_ids, apart.target_ids) == ((4, 5), (6,))


def test_packed_texts_fill_examples_without_crossing_shards(model: Path, tmp_path: Path) -> None:
    source = _write(tmp_path / "rows.jsonl", ROWS * 4)
    data = _open(model, source, packed=True, max_length=8)
    shards = [data.shard(i) for i in range(data.num_shards)]
    assert all(len(each.input_ids) == 8 for shard in shards for each in shard[:-1])
    assert sum(len(each.input_ids) for shard in shards for each in shard) == 200 * 3  # two words and an end
    first = [token for each in shards[0] for token in each.input_ids]
    assert first[:6] == [4, 5, 3, 5, 6, 3]


def test_long_texts_are_cut_and_counted(model: Path, tmp_path: Path) -> None:
    long_text = {"text": " ".join(["word1"] * 30)}
    data = _open(model, _write(tmp_path / "rows.jsonl", [long_text, {"text": "word2"}]), max_length=12)
    assert [len(each.input_ids) for each in _examples(data)] == [12, 1]
    assert data.num_truncated == 1


def test_labels_are_numbers_or_names_of_the_head(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}}
    (folder / "config.json").write_text(json.dumps(config))
    named = _write(
        tmp_path / "named.jsonl", [{"text": "word1", "label": "yes"}, {"text": "word2", "label": "no"}]
    )
    assert [each.label for each in _examples(_open(folder, named, label_column="label"))] == [1, 0]
    numbered = _write(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(
        RecipeError,
        match=r"row 2 of .* has the label 2 in 'label'; the model's head has 2 classes \(no, yes\)",
    ):
        _open(folder, numbered, label_column="label")
    unknown = _write(tmp_path / "unknown.jsonl", [{"text": "word1", "label": "maybe"}])
    with pytest.raises(RecipeError, match="the label 'maybe'"):
        _open(folder, unknown, label_column="label")


def test_conversations_need_the_model_to_have_a_template(model: Path, tmp_path: Path) -> None:
    talks = [{"text": [{"role": "user", "content": f"word{i}"}]} for i in range(3)]
    source = _write(tmp_path / "talks.jsonl", talks)
    with pytest.raises(RecipeError, match="has no chat template"):
        _open(model, source, chat_template=True)
    with pytest.raises(RecipeError, match=r"row 0 .* holds a conversation in 'text'"):
        _open(model, source)
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    template = "{% for message in messages %}<s> {{ message['content'] }} </s>{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    data = _open(folder, source, chat_template=True)
    assert _examples(data)[1].input_ids == (2, 5, 3)
    with pytest.raises(RecipeError, match=r"row 0 .* holds a value of type str in 'text'; conversations"):
        _open(folder, _write(tmp_path / "rows.jsonl", ROWS), chat_template=True)


def test_what_cannot_be_used_is_refused(model: Path, tmp_path: Path) -> None:
    source = _write(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(
        RecipeError, match=r"no column 'txt'; they have 'text', 'more', 'label' \(did you mean 'text'"
    ):
        _open(model, source, text_column="txt")
    with pytest.raises(RecipeError, match=r"no row of the data .* is left: of 2 rows none has text"):
        _open(model, _write(tmp_path / "empty.jsonl", [{"text": ""}, {"text": "  "}]))
    with pytest.raises(RecipeError, match=r"max_length is 65, but the model takes at most 64 tokens"):
        _open(model, source, max_length=65)
    with pytest.raises(RecipeError, match=r"is none of \.parquet, \.jsonl"):
        _open(model, _write(tmp_path / "rows.xml", ROWS))
    with pytest.raises(RecipeError, match=r"mixes \.csv, \.jsonl files"):
        _write(tmp_path / "mixed" / "a.csv", ROWS)
        _write(tmp_path / "mixed" / "b.jsonl", ROWS)
        _open(model, str(tmp_path / "mixed"))
    with pytest.raises(RecipeError, match=r"'nowhere\.jsonl' do not exist"):
        _open(model, "nowhere.jsonl")
    with pytest.raises(RecipeError, match="neither a local path nor a data set"):
        _open(model, "no-such-organisation/no-such-data")
    with pytest.raises(RecipeError, match="samples of the data is 0"):
        DataSpec(source=source, samples=0)
    with pytest.raises(RecipeError, match="packed data have no"):
        DataSpec(source=source, packed=True, label_column="label")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": ')
    with pytest.raises(RecipeError, match=r"line 1 of .* is not JSON"):
        _open(model, str(broken))


def test_a_model_without_a_tokenizer_is_refused(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    shutil.copy(model / "config.json", folder)
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        _open(folder, _write(tmp_path / "rows.jsonl", ROWS))


def test_fingerprints_follow_content_not_place(model: Path, tmp_path: Path) -> None:
    one = _open(model, _write(tmp_path / "one.jsonl", ROWS))
    other = _open(model, _write(tmp_path / "two.parquet", ROWS), batch_tokens=17)
    assert one.data_fingerprint() == other.data_fingerprint()
    changes = [
        {"samples": 10},
        {"text_column": "more"},
        {"label_column": None, "packed": True},
        {"max_length": 9},
    ]
    prints = {_open(model, str(tmp_path / "one.jsonl"), **change).data_fingerprint() for change in changes}
    assert len(prints | {one.data_fingerprint()}) == 5
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    assert tokenizer_fingerprint(str(folder)) == tokenizer_fingerprint(str(model))
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + " ")
    assert tokenizer_fingerprint(str(folder)) != tokenizer_fingerprint(str(model))
