"""Grids and reports whose OUT is a folder in an object store: the same results as on a disk, from any machine."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from object_store import ObjectStore

from raymerge.cluster import remote_grid_folder
from raymerge.cluster.grid import GridResult, grid
from raymerge.cluster.grid_options import GridOptions
from raymerge.cluster.merge import merge
from raymerge.cluster.options import MergeOptions
from raymerge.cluster.remote_grid_folder import RemoteGridFolder, open_grid_folder
from raymerge.cluster.report import write_report
from raymerge.cluster.report_data import read_report
from raymerge.cluster.results import ResultsWriter, read_rows
from raymerge.merge_actors.errors import OutputError, RaymergeError
from raymerge.merge_actors.storage import retry

Family = Any
FakeRunner = Any


@pytest.fixture
def family(grid_family: Any) -> Any:
    return grid_family


@pytest.fixture
def out(object_store: ObjectStore, request: pytest.FixtureRequest) -> str:
    """Name a folder of this test alone."""
    return f"s3://models/{request.node.name}"


@pytest.fixture
def local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let the driver keep its temporary files where the test looks."""
    folder = tmp_path / "driver"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def _grid(family: Any, **more: Any) -> dict[str, Any]:
    first, second, _ = map(str, family.models)
    return {
        "merge_method": "ties",
        "base_model": str(family.base),
        "models": [first, second],
        "parameters": {"weight": "$w", "density": "$p"},
        "grid": {"w": [0.5, 1], "p": [0.2, 0.5, 1]},
        "evaluate": [{"name": "topic", "kind": "text_classification", "validation": "v.jsonl", "head": "h"}],
        **more,
    }


def _score(axes: Mapping[str, Any]) -> float:
    return float(axes["w"] * axes["p"])


def _run(raw: Any, out: str | Path, runner: FakeRunner, **options: Any) -> GridResult:
    return grid(raw, out, GridOptions(in_process=True, **options), open_runner=runner.opener())


def _rows(out: str | Path) -> list[dict[str, Any]]:
    folder = open_grid_folder(out)
    with folder.readable():
        return read_rows(folder.path)


def test_results_and_checkpoints_are_those_of_a_disk(
    family: Family, fake_runner: Any, tmp_path: Path, object_store: ObjectStore, out: str, local_folder: Path
) -> None:
    raw = _grid(family, export={"top": 2})
    there = _run(raw, out, fake_runner(_score))
    _run(raw, tmp_path / "out", fake_runner(_score))
    assert there.out == out
    assert there.outputs == (f"{out}/best-1", f"{out}/best-2")
    assert _rows(out) == _rows(tmp_path / "out")
    key = out.removeprefix("s3://models/")
    for name in ("best-1", "best-2"):
        for file in ("model.safetensors", "recipe.yaml", "config.json"):
            expected = (tmp_path / "out" / name / file).read_bytes()
            assert object_store.get(f"{key}/{name}/{file}") == expected, file
    assert json.loads(object_store.get(f"{key}/best.json")) == json.loads(
        (tmp_path / "out/best.json").read_text()
    )
    # Nothing is left of the driver's own files, of the lock, or of the merges.
    assert list(local_folder.iterdir()) == []
    small = {name.removeprefix(f"{key}/") for name in object_store.keys(key) if "/best-" not in name}
    assert small == {"results.parquet", "journal.jsonl", "run.json", "best.json"}


def test_a_stopped_run_goes_on_from_another_machine(
    family: Family, fake_runner: Any, out: str, object_store: ObjectStore
) -> None:
    runner = fake_runner(_score)
    runner.interrupt_after = 2
    with pytest.raises(KeyboardInterrupt):
        _run(_grid(family), out, runner)
    assert len(_rows(out)) == 2
    with pytest.raises(OutputError, match="holds results; go on with --resume"):
        _run(_grid(family), out, runner)
    runner.interrupt_after = None
    result = _run(_grid(family), out, runner, resume=True)
    assert (result.num_run, result.num_resumed) == (4, 2)
    assert sorted(runner.ran) == list(range(6)), "no point ran twice"
    again = _run(_grid(family), out, runner, overwrite=True)
    assert (again.num_run, again.num_resumed) == (6, 0)


def test_results_reach_the_store_while_the_grid_runs(
    object_store: ObjectStore, out: str, monkeypatch: pytest.MonkeyPatch, local_folder: Path
) -> None:
    """A driver that is killed has lost the last seconds, not the run."""
    monkeypatch.setattr(remote_grid_folder, "SYNC_SECONDS", 0.02)
    folder = open_grid_folder(out)
    seen: list[int] = []
    with folder.locked():
        writer = ResultsWriter(folder.path, rows_per_compaction=2)
        folder.write_json("run.json", {})
        while "run.json" not in "".join(object_store.keys(out.removeprefix("s3://models/"))):
            time.sleep(0.005)
        for point in range(7):
            writer.append({"point": point, "split": "validation"})
            wanted = list(range(point + 1))
            for _ in range(200):
                seen = [row["point"] for row in _rows(out)]
                # A row is in the table or in the journal whenever one looks.
                assert seen == wanted[: len(seen)]
                assert len(seen) >= point
                if seen == wanted:
                    break
            assert seen == wanted
        with (
            pytest.raises(OutputError, match=f"another run is writing {out}"),
            open_grid_folder(out).locked(),
        ):
            pass
        writer.close()


def test_a_table_that_is_replaced_while_it_is_read_is_read_again(
    object_store: ObjectStore, out: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A reader asks for the length first and then for so many bytes, which may be those of a longer table."""
    tables = []
    for number in (1, 40):
        writer = ResultsWriter(str(tmp_path))
        for point in range(number):
            writer.append({"point": point, "split": "validation"})
        writer.close()
        tables.append((tmp_path / "results.parquet").read_bytes())
    earlier, later = tables
    key = f"{out.removeprefix('s3://models/')}/results.parquet"
    object_store.put_bytes(key, earlier)
    read = remote_grid_folder.read_bytes

    def read_late(uri: str) -> bytes:
        monkeypatch.setattr(remote_grid_folder, "read_bytes", read)
        object_store.put_bytes(key, later)
        return later[: len(earlier)]

    monkeypatch.setattr(remote_grid_folder, "read_bytes", read_late)
    assert [row["point"] for row in _rows(out)] == list(range(40))


def test_a_table_that_comes_while_the_folder_is_read_is_seen(
    object_store: ObjectStore, out: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The first rows move from the journal into a table that was not there when the reader began."""
    writer = ResultsWriter(str(tmp_path))
    writer.append({"point": 0, "split": "validation"})
    prefix = out.removeprefix("s3://models/")
    object_store.put_bytes(f"{prefix}/run.json", b"{}")
    object_store.put_bytes(f"{prefix}/journal.jsonl", (tmp_path / "journal.jsonl").read_bytes())
    writer.close()
    read = remote_grid_folder.read_bytes

    def compact_first(uri: str) -> bytes:
        monkeypatch.setattr(remote_grid_folder, "read_bytes", read)
        for name in ("results.parquet", "journal.jsonl"):
            object_store.put_bytes(f"{prefix}/{name}", (tmp_path / name).read_bytes())
        return read(uri)

    monkeypatch.setattr(remote_grid_folder, "read_bytes", compact_first)
    assert [row["point"] for row in _rows(out)] == [0]


def test_what_the_store_does_not_take_is_kept_here(
    object_store: ObjectStore, out: str, monkeypatch: pytest.MonkeyPatch, local_folder: Path
) -> None:
    monkeypatch.setattr(retry, "FIRST_PAUSE_SECONDS", 0.001)
    folder = open_grid_folder(out)
    key = out.removeprefix("s3://models/")
    with pytest.raises(OutputError, match="the results are kept in") as caught, folder.locked():
        folder.write_json("run.json", {"name": "lost"})
        object_store.fail("403", f"{key}/run.json", method="PUT", times=1000)
    object_store.faults.clear()
    kept = Path(str(caught.value).rpartition(" ")[2])
    assert json.loads((kept / "run.json").read_text()) == {"name": "lost"}


def test_a_store_that_fails_for_minutes_ends_the_run(
    object_store: ObjectStore, out: str, monkeypatch: pytest.MonkeyPatch, local_folder: Path
) -> None:
    monkeypatch.setattr(remote_grid_folder, "SYNC_SECONDS", 0.02)
    monkeypatch.setattr(remote_grid_folder, "STALE_SECONDS", 0.2)
    folder = open_grid_folder(out)
    fault, outlived = None, []
    with pytest.raises(OutputError, match=r"cannot write .*run\.json"), folder.locked():
        fault = object_store.fail("403", "run.json", method="PUT", times=10**6)
        folder.write_json("run.json", {})
        for _ in range(2000):
            folder.check()
            time.sleep(0.005)
        outlived.append(True)
    assert not outlived, "it was ended by its last writing, not by `check`"
    assert fault is not None
    assert fault.num_done >= 2, "it was tried again before the run ended"
    object_store.faults.clear()


def test_a_report_is_drawn_from_and_into_the_store(
    family: Family, fake_runner: Any, object_store: ObjectStore, out: str, local_folder: Path
) -> None:
    pytest.importorskip("matplotlib")
    _run(_grid(family), out, fake_runner(_score))
    key = out.removeprefix("s3://models/")
    object_store.put_bytes(f"{key}/plots/99-old.png", b"of an earlier report")
    written = write_report(read_report(out), out)
    assert written[0] == f"{out}/report.html"
    assert sorted(f"{out}{name.removeprefix(key)}" for name in object_store.keys(f"{key}/plots")) == sorted(
        written[1:]
    )
    assert object_store.get(f"{key}/report.html").startswith(b"<!doctype html>")
    assert list(local_folder.iterdir()) == []


def test_a_folder_of_something_else_is_left_alone(
    family: Family, fake_runner: Any, object_store: ObjectStore, out: str
) -> None:
    object_store.put_bytes(f"{out.removeprefix('s3://models/')}/thesis.tex", b"mine")
    with pytest.raises(OutputError, match="holds no results of a grid"):
        _run(_grid(family), out, fake_runner(_score), overwrite=True)
    with pytest.raises(OutputError, match="whole bucket"):
        open_grid_folder("s3://models")
    with pytest.raises(RaymergeError, match="credentials"):
        open_grid_folder("s3://key:secret@models/out")
    with pytest.raises(OutputError, match=r"holds no results .* no run\.json"):
        read_report(out)


def test_the_recipe_of_a_winner_gives_its_bytes(
    family: Family, fake_runner: Any, tmp_path: Path, object_store: ObjectStore, out: str
) -> None:
    _run(_grid(family, export={"top": 1}), out, fake_runner(_score))
    key = out.removeprefix("s3://models/")
    recipe = yaml.safe_load(object_store.get(f"{key}/best-1/recipe.yaml"))
    merge([recipe], str(tmp_path / "again"), MergeOptions(in_process=True))
    merged = (tmp_path / "again/model.safetensors").read_bytes()
    assert object_store.get(f"{key}/best-1/model.safetensors") == merged


def test_a_folder_taken_over_is_not_written(object_store: ObjectStore, out: str, local_folder: Path) -> None:
    folder = open_grid_folder(out)
    assert isinstance(folder, RemoteGridFolder)
    key = out.removeprefix("s3://models/")
    with pytest.raises(OutputError, match="another run took"), folder.locked():
        folder.write_json("run.json", {})
        [ticket] = object_store.keys(f"{key}/lock-")
        object_store._call("DELETE", f"/models/{ticket}")
    assert object_store.keys(key) == []


def test_a_driver_that_was_stopped_writes_nothing_over_its_successor(
    object_store: ObjectStore, out: str, monkeypatch: pytest.MonkeyPatch, local_folder: Path
) -> None:
    """It goes on with a heartbeat to come: what the store has of tickets counts, not what it knew."""
    monkeypatch.setattr(remote_grid_folder, "SYNC_SECONDS", 0.05)
    folder = open_grid_folder(out)
    key = out.removeprefix("s3://models/")
    with pytest.raises(OutputError, match="another run took"), folder.locked():
        [ticket] = object_store.keys(f"{key}/lock-")
        object_store._call("DELETE", f"/models/{ticket}")
        folder.write_json("run.json", {})
        time.sleep(0.5)
        assert object_store.keys(key) == []
        with pytest.raises(OutputError, match="another run took"):
            folder.clear()
        with pytest.raises(OutputError, match="another run took"):
            for _ in range(400):
                folder.check()
                time.sleep(0.005)
