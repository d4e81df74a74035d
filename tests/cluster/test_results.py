"""Results: readable at any time, nothing lost by a kill, no memory that grows with the grid."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from raymerge.cluster.results import JOURNAL_NAME, RESULTS_NAME, ResultsWriter, read_results, read_rows
from raymerge.merge_actors.errors import OutputError


def _row(point: int, **more: Any) -> dict[str, Any]:
    return {"point": point, "split": "validation", "status": "ok", "metric.a.acc": point / 10, **more}


def test_rows_can_be_read_while_they_are_written(tmp_path: Path) -> None:
    writer = ResultsWriter(str(tmp_path), rows_per_compaction=4)
    for point in (3, 1, 0, 2, 5, 4):
        writer.append(_row(point))
        assert point in [row["point"] for row in read_rows(str(tmp_path))]
    assert pyarrow.parquet.read_table(tmp_path / RESULTS_NAME).num_rows == 4
    assert len((tmp_path / JOURNAL_NAME).read_text().splitlines()) == 2
    writer.close()
    assert [row["point"] for row in read_rows(str(tmp_path))] == [0, 1, 2, 3, 4, 5]
    assert pyarrow.parquet.read_table(tmp_path / RESULTS_NAME).num_rows == 6


def test_a_kill_at_any_step_loses_nothing(tmp_path: Path) -> None:
    """A kill leaves the journal with a cut line, or the journal beside the table that holds it already."""
    run = tmp_path / "run"
    run.mkdir()
    writer = ResultsWriter(str(run))
    for point in range(3):
        writer.append(_row(point))
    killed = tmp_path / "killed"
    shutil.copytree(run, killed)
    with open(killed / JOURNAL_NAME, "a") as file:
        file.write('{"point": 3, "split": "valid')
    assert [row["point"] for row in read_rows(str(killed))] == [0, 1, 2]
    again = ResultsWriter(str(killed))
    again.append(_row(3))
    again.close()
    assert [row["point"] for row in read_rows(str(killed))] == [0, 1, 2, 3]

    journal = (run / JOURNAL_NAME).read_text()
    writer.close()
    (run / JOURNAL_NAME).write_text(journal)  # as if the kill came before the journal was emptied
    assert [row["point"] for row in read_rows(str(run))] == [0, 1, 2]


def test_columns_may_come_later_and_types_are_widened(tmp_path: Path) -> None:
    writer = ResultsWriter(str(tmp_path), rows_per_compaction=1)
    writer.append(_row(0, **{"axis.p": 1, "axis.m": "ties", "error": None}))
    writer.append(_row(1, **{"axis.p": 0.5, "axis.m": True, "error": "Traceback", "seed": (1 << 64) - 1}))
    writer.append({"point": 2, "split": "validation", "status": "failed", "metric.a.acc": float("nan")})
    writer.close()
    table = read_results(str(tmp_path))
    assert table.column("axis.p").to_pylist() == [1.0, 0.5, None]
    assert table.column("axis.m").to_pylist() == ["ties", "true", None]
    assert table.column("error").to_pylist() == [None, "Traceback", None]
    assert table.column("seed").to_pylist() == [None, str((1 << 64) - 1), None]
    assert str(table.column("metric.a.acc").to_pylist()[2]) == "nan"


def test_splits_of_a_point_are_two_rows_and_the_last_one_counts(tmp_path: Path) -> None:
    writer = ResultsWriter(str(tmp_path))
    writer.append(_row(1, **{"split": "test", "metric.a.acc": 0.2}))
    writer.append(_row(1, **{"metric.a.acc": 0.3}))
    writer.append(_row(1, **{"metric.a.acc": 0.4}))
    writer.close()
    found = [(row["split"], row["metric.a.acc"]) for row in read_rows(str(tmp_path))]
    assert found == [("validation", 0.4), ("test", 0.2)]


def test_rows_can_be_replaced_and_folders_without_any_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="holds no results of a grid or a search"):
        read_results(str(tmp_path))
    writer = ResultsWriter(str(tmp_path))
    assert read_rows(str(tmp_path)) == []
    writer.append(_row(0))
    writer.compact()
    writer.replace([_row(7)])
    assert [row["point"] for row in read_rows(str(tmp_path))] == [7]
    writer.replace([])
    writer.close()
    assert read_rows(str(tmp_path)) == []
    (tmp_path / RESULTS_NAME).write_text("no parquet")
    with pytest.raises(OutputError, match="is no table of results"):
        read_results(str(tmp_path))


def test_a_row_is_on_disk_when_append_returns(tmp_path: Path) -> None:
    writer = ResultsWriter(str(tmp_path))
    writer.append(_row(0, error="two\nlines"))
    [line] = (tmp_path / JOURNAL_NAME).read_text().splitlines()
    assert json.loads(line)["error"] == "two\nlines"
    writer.close()
