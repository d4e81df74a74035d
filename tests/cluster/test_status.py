"""Where a run stands, read from its folder."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
import time

import pytest
from click.testing import CliRunner

import raymerge
from raymerge.cli.main import main
from raymerge.cluster import local_lock, remote_grid_folder, status, store_lock
from raymerge.cluster.grid_folder import GridFolder
from raymerge.cluster.journal import Journal
from raymerge.cluster.remote_grid_folder import open_grid_folder
from raymerge.cluster.remote_run_folder import RemoteRunFolder
from raymerge.cluster.results import ResultsWriter
from raymerge.cluster.run_folder import LOCK_NAME, STATISTICS_JOURNAL_NAME, RunFolder
from raymerge.cluster.status import run_status
from raymerge.cluster.store_claim import write_claim
from raymerge.merge_actors.errors import OutputError
from raymerge.merge_actors.task import TaskReport


def _report(number: int) -> TaskReport:
    return TaskReport(
        number=number,
        pieces=(),
        read_bytes=3_000_000_000,
        write_bytes=1_000_000_000,
        read_seconds=0.0,
        merge_seconds=0.0,
        write_seconds=0.0,
    )


def test_a_run_is_running_then_unfinished(tmp_path):
    folder = RunFolder(str(tmp_path / "out"))
    with folder.locked():
        journal = Journal.create(folder.journal_path, "plan", {"num_tasks": 5})
        journal.add(_report(0))
        journal.add(_report(1))
        second = Journal.create(folder.journal_path + ".1", "plan", {"num_tasks": 2})
        running = run_status(tmp_path / "out")
        assert (running.state, running.num_done, running.num_tasks) == ("running", 2, 7)
        assert (running.read_bytes, running.write_bytes) == (6_000_000_000, 2_000_000_000)
        assert running.last_progress is not None
        words = running.text(now=running.last_progress + 12)
        assert "running, 2 of 7 tasks, 8.0 GB moved, last task 12 s ago, process " in words
        journal.close()
        second.close()
    left = run_status(tmp_path / "out")
    assert left.state == "unfinished"
    assert left.text().endswith("go on with --resume")
    shown = CliRunner().invoke(main, ["status", str(tmp_path / "out"), "--json"])
    assert shown.exit_code == 1
    assert json.loads(shown.output)["num_done"] == 2


def test_a_finished_output_and_none(tiny_checkpoints, tmp_path):
    family = tiny_checkpoints("llama")
    entries = [{"model": str(model), "parameters": {"weight": 1}} for model in family.models[:2]]
    recipes = [{"name": name, "merge_method": "linear", "models": entries} for name in ("a", "b")]
    raymerge.merge(recipes, tmp_path / "both", in_process=True)
    below = run_status(tmp_path / "both")
    assert (below.state, below.outputs) == ("outputs below", ("a", "b"))
    assert run_status(tmp_path / "both" / "a").state == "finished"
    shown = CliRunner().invoke(main, ["status", str(tmp_path / "both" / "b"), "--watch"])
    assert (shown.exit_code, shown.output) == (0, f"{tmp_path / 'both' / 'b'}: finished\n")
    (tmp_path / "both" / "mine.txt").write_text("a folder that holds outputs may hold anything")
    shown = CliRunner().invoke(main, ["status", str(tmp_path / "both")])
    assert (shown.exit_code, shown.output) == (
        0,
        f"{tmp_path / 'both'}: no run under way; finished below: a, b\n",
    )
    (tmp_path / "other").mkdir()
    with pytest.raises(
        OutputError, match="other is no output of raymerge and holds none, and no run for it is"
    ):
        run_status(tmp_path / "other")
    with pytest.raises(OutputError, match="absent does not exist, and no run for it is under way"):
        run_status(tmp_path / "absent")


def test_a_measurement_is_a_run_too(tmp_path):
    folder = RunFolder(str(tmp_path / "grams"))
    with folder.locked():
        assert "running, no task finished yet, process " in run_status(tmp_path / "grams").text()
        path = os.path.join(folder.path, STATISTICS_JOURNAL_NAME)
        with open(path, "w") as file:
            json.dump({"groups_end": [2, 4, 6], "groups": [{}]}, file)
    left = run_status(tmp_path / "grams")
    assert (left.state, left.num_done, left.num_tasks) == ("unfinished", 1, 3)
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "raymerge_statistics.json").write_text("{}")
    assert run_status(tmp_path / "done").state == "finished"


def test_a_run_that_starts_while_status_looks_is_not_refused(tmp_path, monkeypatch):
    """`status` holds a shared lock for a moment; a run asks again for longer than that."""
    monkeypatch.setattr(local_lock, "_PATIENCE_SECONDS", 60.0)
    folder = RunFolder(str(tmp_path / "out"))
    os.makedirs(folder.path)
    lock = os.path.join(folder.path, LOCK_NAME)
    with open(lock, "w") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        threading.Timer(0.1, lambda: fcntl.flock(looking, fcntl.LOCK_UN)).start()
        with folder.locked():
            assert run_status(tmp_path / "out").state == "running"


def test_a_run_that_ends_while_status_looks_is_finished(tiny_checkpoints, tmp_path, monkeypatch):
    family = tiny_checkpoints("llama")
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(model)} for model in family.models],
        "parameters": {"weight": 1},
    }
    out = tmp_path / "out"
    raymerge.merge(recipe, out, in_process=True)
    folder = RunFolder(str(out))
    os.makedirs(folder.path)
    journal = Journal.create(folder.journal_path, "plan", {"num_tasks": 1})
    journal.add(_report(0))
    journal.close()
    read = status.read_journal

    def read_late(path: str) -> object:
        shutil.rmtree(folder.path, ignore_errors=True)  # as a run does when it commits
        return read(path)

    monkeypatch.setattr(status, "read_journal", read_late)
    assert run_status(out).state == "finished"


def _grid_folder(out: str, num_points: int, rows: list[dict[str, object]]) -> GridFolder:
    folder = open_grid_folder(out)
    with folder.locked():
        writer = ResultsWriter(folder.path)
        folder.write_json("run.json", {"kind": "grid", "num_points": num_points})
        for row in rows:
            writer.append(row)
        writer.close()
    return folder


@pytest.mark.parametrize("place", ["disk", "store"])
def test_a_grid_is_a_run_too(place, tmp_path, object_store, monkeypatch):
    monkeypatch.setattr(remote_grid_folder, "SYNC_SECONDS", 0.02)
    out = str(tmp_path / "out") if place == "disk" else "s3://models/status-of-a-grid"
    rows = [{"point": i, "split": "validation", "status": "ok" if i else "failed"} for i in range(3)]
    folder = _grid_folder(out, 4, [*rows, {"point": 1, "split": "test", "status": "ok"}])
    left = run_status(out)
    assert (left.state, left.num_done, left.num_tasks, left.num_failed) == ("unfinished", 3, 4, 1)
    assert left.text(now=left.last_progress + 3) == (
        f"{out}: unfinished, 3 of 4 points (1 failed), last point 3 s ago, go on with --resume"
    )
    folder = open_grid_folder(out)
    with folder.locked():
        assert "running, 3 of 4 points" in run_status(out).text()
        assert f"process {os.getpid()} on " in run_status(out).text()
        writer = ResultsWriter(folder.path)
        writer.append({"point": 3, "split": "validation", "status": "ok"})
        writer.close()
        folder.write_json("best.json", [])
    assert run_status(out).text() == f"{out}: finished, 4 points (1 failed)"


def test_a_run_that_was_killed_before_its_journal_is_unfinished(object_store):
    out = "s3://models/status-claimed"
    folder = RemoteRunFolder(out, is_campaign=False)
    write_claim(folder.path, [out])
    assert run_status(out).text() == f"{out}: unfinished, no task finished yet, go on with --resume"


def test_a_file_of_the_same_name_is_no_grid(tmp_path):
    (tmp_path / "run.json").write_text('["mine"]')
    with pytest.raises(OutputError, match="is no output of raymerge"):
        run_status(tmp_path)


@pytest.mark.parametrize("skew", [-400.0, 400.0])
def test_clocks_that_differ_do_not_hide_a_run(skew, object_store, monkeypatch):
    """The store's clock is minutes off ours: its ticket is watched, and beats or does not."""
    out = f"s3://models/skewed{skew:g}"
    monkeypatch.setattr(store_lock, "HEARTBEAT_SECONDS", 1.2)  # a store tells whole seconds
    lock = store_lock.StoreLock(f"{out}/.lock", out)
    here = time.time
    with lock.held():
        monkeypatch.setattr(store_lock.time, "time", lambda: here() + skew)
        owner, is_alive = store_lock.owner_of(f"{out}/.lock")
        assert is_alive
        assert owner.startswith(f"process {os.getpid()} on ")
    assert store_lock.owner_of(f"{out}/.lock") == (None, False)
    ticket = {"host": "elsewhere", "pid": 1, "since": "then"}
    object_store.put_bytes(f"skewed{skew:g}/.lock/lock-0.json", json.dumps(ticket).encode())
    owner, is_alive = store_lock.owner_of(f"{out}/.lock")
    assert not is_alive
    assert owner == "process 1 on elsewhere since then"
