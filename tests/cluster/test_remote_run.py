"""Runs that write to an object store: resumed, refused, locked, checked on every node, without a secret in sight."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from object_store import BUCKET, ObjectStore

import raymerge
from raymerge.cluster import store_lock
from raymerge.cluster.journal import Journal, read_journal
from raymerge.cluster.merge import merge
from raymerge.cluster.merge_result import MergeResult
from raymerge.cluster.options import MergeOptions
from raymerge.cluster.remote_run_folder import RemoteRunFolder
from raymerge.cluster.status import run_status
from raymerge.merge_actors.errors import CheckpointError, ClusterError, OutputError, RaymergeError
from raymerge.merge_actors.storage import retry
from raymerge.merge_actors.storage.store import Entry, forget_stores
from raymerge.merge_actors.task import RunContext
from raymerge.merge_actors.worker import MergeWorker

OPTIONS = {"in_process": True, "workers": 1, "out_shard_size": "20KB"}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(retry, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(retry, "MOST_ATTEMPTS", 2)
    monkeypatch.setattr("raymerge.merge_actors.storage.arrow_store._PART_ATTEMPTS", 1)
    forget_stores()
    yield
    forget_stores()


@pytest.fixture
def recipe(tiny_checkpoints: Callable[..., Any]) -> dict[str, Any]:
    family = tiny_checkpoints("llama")
    return {
        "merge_method": "task_arithmetic",
        "base_model": str(family.base),
        "models": [{"model": str(path), "parameters": {"weight": 0.5}} for path in family.models],
    }


@pytest.fixture
def out(request: pytest.FixtureRequest) -> str:
    return f"s3://{BUCKET}/runs/{request.node.name.partition('[')[0]}"


def run(recipe: Any, out: str, **options: Any) -> MergeResult:
    recipes = recipe if isinstance(recipe, list) else [recipe]
    return merge(recipes, out, MergeOptions(**{**OPTIONS, **options}))


def key_of(uri: str) -> str:
    return uri.removeprefix(f"s3://{BUCKET}/")


def contents(store: ObjectStore, uri: str) -> dict[str, bytes]:
    names = [key for key in store.keys(key_of(uri) + "/") if key.endswith((".safetensors", ".index.json"))]
    return {key.rpartition("/")[2]: store.get(key) for key in names}


def test_resume_repeats_no_finished_file(
    recipe: Any, out: str, object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third file is refused for good: what is there is no checkpoint, and the next run makes the rest."""
    object_store.fail("403", "model-00003-of", method="PUT", times=1000)
    with pytest.raises(
        OutputError, match=r"cannot write s3://.*/model-00003-of-\d+.safetensors: access is refused"
    ):
        run(recipe, out)
    left = {key.rpartition("/")[2] for key in object_store.keys(key_of(out) + "/")}
    assert not {name for name in left if not name.endswith(".safetensors")}, "it looks finished"
    with pytest.raises(RaymergeError):
        raymerge.verify(out)
    with pytest.raises(OutputError, match=r"an unfinished run for .* go on with --resume, or start anew"):
        run(recipe, out)
    with pytest.raises(OutputError, match="was planned from other inputs or options"):
        run({**recipe, "dtype": "bfloat16"}, out, resume=True)
    object_store.faults.clear()
    object_store.forget()
    done = len(read_journal(RemoteRunFolder(out, is_campaign=False).journal_path)[1])
    # From another machine, or after a restart: what a store has taken stays.
    monkeypatch.setattr("raymerge.cluster.journal.boot_id", lambda: "another")
    result = run(recipe, out, resume=True)
    written = [each.key.rpartition("/")[2] for each in object_store.requests if each.method == "PUT"]
    assert 0 < done == result.num_resumed
    assert result.totals.num_tasks == result.num_tasks - done
    assert len([name for name in written if name.endswith(".safetensors")]) == result.num_tasks - done
    last = [name for name in written if name and not name.startswith("lock-")][-3:]
    assert last == ["config.json", "raymerge_manifest.json", "model.safetensors.index.json"]
    local = run(recipe, str(tmp_path / "local"))
    expected = {path.name: path.read_bytes() for path in Path(local.outputs[0]).iterdir()}
    assert contents(object_store, out).items() <= expected.items()
    assert raymerge.verify(out).outputs[0].load is not None
    assert not object_store.keys(f"{os.path.dirname(key_of(out))}/.{os.path.basename(out)}.raymerge/")


def test_a_killed_run_is_resumed(recipe: Any, out: str, object_store: ObjectStore, tmp_path: Path) -> None:
    """SIGKILL while the fourth file is uploaded: its lock does not keep the next run out."""
    stalled = object_store.fail("stall", "model-00004-of", method="PUT", times=1)
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    command = [sys.executable, "-m", "raymerge", "merge", str(tmp_path / "recipe.yaml"), out, "--in-process"]
    process = subprocess.Popen(
        [*command, "--workers", "1", "--out-shard-size", "20KB"],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        journal = f"{key_of(RemoteRunFolder(out, is_campaign=False).journal_path)}/task-"
        while not (stalled.num_done and object_store.keys(journal)):
            assert process.poll() is None, process.communicate()
    finally:
        process.kill()
        process.communicate()
    assert not [key for key in object_store.keys(key_of(out) + "/") if not key.endswith(".safetensors")]
    assert run_status(out).state == "unfinished"
    header, reports = read_journal(RemoteRunFolder(out, is_campaign=False).journal_path)
    assert header["num_tasks"] == 9 and 0 < len(reports) < 9
    result = run(str(tmp_path / "recipe.yaml"), out, resume=True)
    assert result.num_resumed == len(reports)
    assert raymerge.verify(out).outputs


def test_an_existing_out_is_refused_or_replaced_whole(
    recipe: Any, out: str, object_store: ObjectStore
) -> None:
    object_store.put_bytes(f"{key_of(out)}/config.json", b"{}")
    object_store.put_bytes(f"{key_of(out)}/old/part.bin", b"old")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=r"holds config\.json, old and no manifest of raymerge"):
            run(recipe, out, overwrite=overwrite)
    with pytest.raises(OutputError, match=r"b holds x and no manifest of raymerge"):
        object_store.put_bytes(f"{key_of(out)}-more/b/x", b"mine")
        run([{**recipe, "name": "a"}, {**recipe, "name": "b"}], f"{out}-more", overwrite=True)
    assert object_store.keys(f"{key_of(out)}-more/") == [f"{key_of(out)}-more/b/x"]
    object_store.put_bytes(f"{key_of(out)}/raymerge_manifest.json", b"{}")
    with pytest.raises(OutputError, match="exists; choose another folder or replace it with --overwrite"):
        run(recipe, out)
    run(recipe, out, overwrite=True)
    assert f"{key_of(out)}/old/part.bin" not in object_store.keys(key_of(out))
    assert raymerge.verify(out).outputs
    with pytest.raises(OutputError, match=f"s3://{BUCKET} is a whole bucket; name a folder in it"):
        run(recipe, f"s3://{BUCKET}")


def test_a_refused_input_leaves_nothing(recipe: Any, out: str, object_store: ObjectStore) -> None:
    with pytest.raises(CheckpointError):
        run({**recipe, "base_model": f"s3://{BUCKET}/no/such/model"}, out)
    assert not object_store.keys(os.path.dirname(key_of(out)) + "/." + os.path.basename(out))
    assert not object_store.keys(key_of(out))


def test_campaign_whose_second_recipe_uses_the_first(
    recipe: Any, out: str, object_store: ObjectStore
) -> None:
    first = {**recipe, "name": "first"}
    second = {**recipe, "name": "second", "models": [{"model": "first", "parameters": {"weight": 1.0}}]}
    result = run(yaml.safe_dump_all([first, second]), out)
    assert result.outputs == (f"{out}/first", f"{out}/second")
    assert {each.folder for each in raymerge.verify(out).outputs} == set(result.outputs)


def test_two_runs_on_one_out(recipe: Any, out: str, object_store: ObjectStore) -> None:
    with RemoteRunFolder(out, is_campaign=False).locked():
        with pytest.raises(OutputError, match=rf"another run is writing {out} \(process {os.getpid()} on "):
            run(recipe, out)
    run(recipe, out)


def test_a_stale_lock_is_broken(recipe: Any, out: str, object_store: ObjectStore, monkeypatch: Any) -> None:
    """A run of another machine is gone when its ticket has not been written for long."""
    folder = RemoteRunFolder(out, is_campaign=False)
    ticket = json.dumps({"host": "elsewhere", "pid": 1, "since": "then"}).encode()
    object_store.put_bytes(f"{key_of(folder.path)}/lock-0123.json", ticket)
    with pytest.raises(OutputError, match=r"another run is writing .* on elsewhere since then"):
        run(recipe, out)
    monkeypatch.setattr(store_lock, "STALE_SECONDS", -1.0)
    run(recipe, out)


@pytest.mark.parametrize(
    ("written", "now", "is_stale"),
    [(0.0, 120.0, False), (0.0, 121.0, True), (500.0, 0.0, False), (None, 999.0, False), (0.0, None, False)],
)
def test_only_the_times_of_the_store_make_a_ticket_stale(
    written: float | None, now: float | None, is_stale: bool
) -> None:
    """Where a store tells none, whoever has a ticket may be alive."""
    ticket, own = (Entry("lock-0.json", False, 9, "", seconds) for seconds in (written, now))
    assert store_lock._is_stale(ticket, own) is is_stale


def test_a_lock_that_was_broken_stops_its_owner(out: str, object_store: ObjectStore) -> None:
    lock = store_lock.StoreLock(f"{out}/.run", out)
    with lock.held():
        lock.check_held()
        for key in object_store.keys(f"{key_of(out)}/.run/"):
            object_store._call("DELETE", f"/{BUCKET}/{key}")
        with pytest.raises(OutputError, match=r"took .* over"):
            lock.check_held()


def test_a_run_whose_lock_was_taken_over_hands_out_nothing_more(
    recipe: Any, out: str, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its driver was stopped for long enough; going on, it would write over what the new owner has made."""
    monkeypatch.setattr(store_lock, "HEARTBEAT_SECONDS", 0.05)
    prefix = f"{key_of(RemoteRunFolder(out, is_campaign=False).path)}/"
    add = Journal.add

    def add_and_wait(journal: Journal, report: Any) -> None:
        add(journal, report)
        wait_for(is_lost)

    def is_lost() -> bool:
        """Do what the new owner does with a stale ticket; again, if a heartbeat was just being written."""
        for key in object_store.keys(f"{prefix}lock-"):
            object_store._call("DELETE", f"/{BUCKET}/{key}")
        return not _is_beating()

    monkeypatch.setattr(Journal, "add", add_and_wait)
    with pytest.raises(OutputError, match=r"another run took .* over"):
        run(recipe, out, workers=1)
    header, reports = read_journal(RemoteRunFolder(out, is_campaign=False).journal_path)
    assert 0 < len(reports) < header["num_tasks"] - 3
    assert not [key for key in object_store.keys(key_of(out) + "/") if not key.endswith(".safetensors")]


def _is_beating() -> bool:
    return any(thread.name == "store-lock" for thread in threading.enumerate())


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_heartbeat_that_comes_late_does_not_bring_a_lost_lock_back(
    out: str, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The owner looked, was stopped, and wrote its ticket after another had removed it."""
    monkeypatch.setattr(store_lock, "HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr(store_lock, "STALE_SECONDS", 0.05)
    first, second = (store_lock.StoreLock(f"{out}/.run", out) for _ in range(2))
    with first.held():
        wait_for(lambda: object_store.keys(f"{key_of(out)}/.run/") != [])
        time.sleep(0.2)  # beats that are all late, but nobody else is there
        first.check_held()
        second._write()
        wait_for(lambda: not _is_beating())
        with pytest.raises(OutputError, match=r"took .* over"):
            first.check_held()
        second.check_held()


@pytest.mark.parametrize(
    ("changed", "is_dead"), [({}, True), ({"processes": "elsewhere"}, False), ({"host": "elsewhere"}, False)]
)
def test_a_ticket_of_a_process_that_is_gone_counts_for_nothing_where_its_number_means_something(
    out: str, object_store: ObjectStore, changed: dict[str, str], is_dead: bool
) -> None:
    """Containers may share their host's name and not its processes: a number unknown here may live there."""
    folder = f"{out}/.run{'-'.join(changed)}"
    store_lock.StoreLock(folder, out)._write()
    [key] = object_store.keys(f"{key_of(folder)}/")
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    ticket = {**json.loads(object_store.get(key)), "pid": ended.pid, **changed}
    object_store.put_bytes(key, json.dumps(ticket).encode())
    other = store_lock.StoreLock(folder, out)
    if is_dead:
        with other.held():
            other.check_held()
        return
    with pytest.raises(OutputError, match="another run is writing"), other.held():
        pass


@pytest.mark.parametrize("fault", ["403", "503"])
def test_a_ticket_that_cannot_be_read_is_not_taken_for_a_withdrawn_one(
    out: str, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch, fault: Any
) -> None:
    """Its owner is at work, and another account or a store in trouble is no reason to end him."""
    monkeypatch.setattr("raymerge.merge_actors.storage.retry.FIRST_PAUSE_SECONDS", 0.001)
    first, second = (store_lock.StoreLock(f"{out}/.run", out) for _ in range(2))
    with first.held():
        object_store.fail(fault, f".run/{first._name}", times=1000)
        object_store.fail(fault, f".run/{first._name}", method="HEAD", times=1000)
        with pytest.raises(CheckpointError, match=r"cannot .*lock-"), second.held():
            pass
        object_store.faults.clear()
        first.check_held()
    assert not object_store.keys(f"{key_of(out)}/.run/lock-")


def test_a_ticket_that_is_gone_before_it_was_looked_for_is_no_lock(
    out: str, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run that held the folder has just ended, and removed what was in it."""
    lock = store_lock.StoreLock(f"{out}/.run", out)
    write = lock._write

    def write_and_lose() -> None:
        write()
        for key in object_store.keys(f"{key_of(out)}/.run/"):
            object_store._call("DELETE", f"/{BUCKET}/{key}")

    monkeypatch.setattr(lock, "_write", write_and_lose)
    with pytest.raises(OutputError, match=r"another run of .* is just ending"), lock.held():
        pass


def context(**fields: Any) -> RunContext:
    return RunContext(run_id="x", settings=(), device="cpu", num_threads=1, **fields)


@pytest.mark.parametrize(
    ("fields", "fault", "message"),
    [
        ({"visible_paths": (f"s3://{BUCKET}/not/there",)}, None, "does not see s3://models/not/there; check"),
        ({"visible_paths": ("s3://nosuchbucket/x",)}, None, "does not (see|reach) s3://nosuchbucket/x"),
        (
            {"visible_paths": (f"s3://{BUCKET}/here",)},
            ("GET", 9),
            "does not reach s3://models/here: .*refused",
        ),
        (
            {"writable_folders": (f"s3://{BUCKET}/here",)},
            ("PUT", 9),
            "cannot write under s3://models/here: .*refused",
        ),
    ],
)
def test_a_node_that_does_not_reach_a_bucket_is_named(
    fields: Any, fault: tuple[str, int] | None, message: str, object_store: ObjectStore
) -> None:
    object_store.put_bytes("here/file", b"x")
    if fault is not None:
        object_store.fail("403", "", method=fault[0], times=fault[1])
    worker = MergeWorker(context(**fields))
    with pytest.raises(ClusterError, match=f"node {os.uname().nodename} {message}"):
        worker.check()
    worker.close()


def test_a_worker_that_comes_when_all_is_done_leaves_nothing(out: str, object_store: ObjectStore) -> None:
    folder = RemoteRunFolder(out, is_campaign=False).path
    worker = MergeWorker(context(writable_folders=(folder,)))
    worker.check()
    assert object_store.keys(key_of(folder)) == []
    object_store.put_bytes(f"{key_of(folder)}/lock-1.json", b"of a run that goes on")
    worker.check()
    worker.close()
    mark = f"{key_of(folder)}/node-{os.uname().nodename}"
    assert object_store.keys(key_of(folder)) == [f"{key_of(folder)}/lock-1.json", mark]


def test_no_secret_is_written_anywhere(
    recipe: Any, out: str, object_store: ObjectStore, tmp_path: Path
) -> None:
    result = run(recipe, out)
    written = [object_store.get(key) for key in object_store.keys(key_of(out))]
    for secret in (os.environ["AWS_SECRET_ACCESS_KEY"], os.environ["AWS_ACCESS_KEY_ID"]):
        assert not any(secret.encode() in data for data in written)
        assert secret not in repr(result)
    with_secret = f"s3://AKIAEXAMPLE:hunter2hunter2@{BUCKET}/x"
    for bad in ({**recipe, "base_model": with_secret}, recipe):
        with pytest.raises(RaymergeError) as raised:
            run(bad, str(tmp_path / "new") if bad is not recipe else with_secret)
        assert "carries credentials" in str(raised.value) and "hunter2" not in str(raised.value)


def test_on_ray(recipe: Any, out: str, object_store: ObjectStore, ray_session: None) -> None:
    uris = {}
    for path in (recipe["base_model"], *(model["model"] for model in recipe["models"])):
        uris[path] = object_store.put(Path(path), f"runs/ray/{os.path.basename(path)}")
    remote = {
        **recipe,
        "base_model": uris[recipe["base_model"]],
        "models": [{**model, "model": uris[model["model"]]} for model in recipe["models"]],
    }
    result = run(remote, out, in_process=False, workers=2)
    local = run(recipe, f"{out}-local")
    assert contents(object_store, out) == contents(object_store, local.outputs[0])
    assert result.totals.fetched_bytes > 0
