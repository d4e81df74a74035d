"""Where a run stands, read from its folder."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading

import pytest
from click.testing import CliRunner

import raymerge
from raymerge.cli.main import main
from raymerge.cluster import run_folder, status
from raymerge.cluster.journal import Journal
from raymerge.cluster.run_folder import LOCK_NAME, STATISTICS_JOURNAL_NAME, RunFolder
from raymerge.cluster.status import run_status
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
    monkeypatch.setattr(run_folder, "_LOCK_SECONDS", 60.0)
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
