"""A node's copy of remote inputs, between processes: fetched once, never wrong, and never in the way."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from object_store import BUCKET, ObjectStore

from raymerge.merge_actors.errors import CheckpointError
from raymerge.merge_actors.storage import retry, stage
from raymerge.merge_actors.storage.storage_files import StorageFiles
from raymerge.merge_actors.storage.store import forget_stores

BLOCK = stage._BLOCK_BYTES
DATA = os.urandom(2 * BLOCK + 12_345)
URI = f"s3://{BUCKET}/stage/data"
#: Waits until a file is there, reads an object through the stage, and writes what it got.
_READER = """
import os, sys, time
from raymerge.merge_actors.storage.storage_files import StorageFiles
uri, folder, start, out, num_bytes = sys.argv[1:]
files = StorageFiles(folder)
open(out + ".ready", "w").close()
while not os.path.exists(start):
    time.sleep(0.001)
buffer = bytearray(int(num_bytes))
files.read_into(uri, 0, memoryview(buffer))
files.close()
with open(out, "wb") as file:
    file.write(buffer)
"""


@pytest.fixture(autouse=True)
def source(object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(retry, "FIRST_PAUSE_SECONDS", 0.01)
    object_store.put_bytes("stage/data", DATA)
    object_store.forget()
    forget_stores()
    yield
    forget_stores()


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(tmp_path / "nvme")


def read(files: StorageFiles, begin: int, end: int) -> bytes:
    buffer = bytearray(end - begin)
    files.read_into(URI, begin, memoryview(buffer))
    return bytes(buffer)


def start_reader(folder: str, start: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", _READER, URI, folder, str(start), str(out), str(len(DATA))]
    process = subprocess.Popen(command)
    _wait_for(lambda: (out.parent / f"{out.name}.ready").exists() or process.poll() is not None)
    assert process.poll() is None
    return process


def _wait_for(condition: object) -> None:
    deadline = time.monotonic() + 60
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_two_processes_at_once_fetch_every_byte_once(
    folder: str, tmp_path: Path, object_store: ObjectStore
) -> None:
    start, outs = tmp_path / "start", [tmp_path / "a", tmp_path / "b"]
    processes = [start_reader(folder, start, out) for out in outs]
    start.touch()
    assert [process.wait(60) for process in processes] == [0, 0]
    assert [out.read_bytes() == DATA for out in outs] == [True, True]
    assert [(begin, end) for _, begin, end in object_store.fetched("stage/data")] == [
        (0, BLOCK),
        (BLOCK, 2 * BLOCK),
        (2 * BLOCK, len(DATA)),
    ]


def test_two_workers_of_one_process_fetch_every_byte_once(folder: str, object_store: ObjectStore) -> None:
    """Locks of the process would not keep them apart, and closing one would let go of the other's."""
    for _ in range(3):
        workers = [StorageFiles(folder) for _ in range(4)]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda each: read(each, 0, len(DATA)), workers))
        for each in workers:
            each.close()
        assert [each == DATA for each in found] == [True] * 4
    assert sum(end - begin for _, begin, end in object_store.fetched("stage/data")) == len(DATA)


def test_the_copy_serves_the_next_run(folder: str, object_store: ObjectStore) -> None:
    for expected in (1000, 0):
        files = StorageFiles(folder)
        assert read(files, 2 * BLOCK + 5, len(DATA)) == DATA[2 * BLOCK + 5 :]
        assert (files.take_fetched_bytes() > 0) == (expected > 0)
        files.close()
    assert len(object_store.fetched("stage/data")) == 1


def test_a_stager_that_is_killed_leaves_no_lock_and_nothing_wrong(
    folder: str, tmp_path: Path, object_store: ObjectStore
) -> None:
    """Killed while it holds the lock of a block and fetches it; half of the block lies in the copy."""
    fault = object_store.fail("stall", "stage/data", times=1000)
    start = tmp_path / "start"
    process = start_reader(folder, start, tmp_path / "out")
    start.touch()
    _wait_for(lambda: fault.num_done)
    [copy] = [path for path in Path(folder).rglob("*") if path.is_file() and not path.name.endswith(".have")]
    with copy.open("r+b") as file:
        file.write(b"\x55" * (BLOCK // 2))
    held = StorageFiles(folder)
    waiting = threading.Thread(target=lambda: found.append(read(held, 0, len(DATA))))
    found: list[bytes] = []
    process.send_signal(signal.SIGKILL)
    process.wait()
    object_store.faults.clear()
    started = time.monotonic()
    waiting.start()
    waiting.join(60)
    held.close()
    assert found == [DATA] and time.monotonic() - started < 30


def test_a_stager_that_does_not_get_on_is_gone_round(
    folder: str, tmp_path: Path, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "PATIENCE_SECONDS", 0.3)
    fault = object_store.fail("stall", "stage/data", times=1000)
    start = tmp_path / "start"
    process = start_reader(folder, start, tmp_path / "out")
    try:
        start.touch()
        _wait_for(lambda: fault.num_done)
        process.send_signal(signal.SIGSTOP)  # and it holds the locks for good
        object_store.faults.clear()
        files = StorageFiles(folder)
        assert read(files, 10, 2000) == DATA[10:2000]
        assert files.take_fetched_bytes() == 1990 and files.remarks() == ()
        files.close()
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system with room for one block; skip where that is not allowed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={BLOCK + (1 << 20)}", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a file system is not allowed here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_said_and_costs_fetches_of_what_is_needed(
    small_disk: Path, object_store: ObjectStore
) -> None:
    files = StorageFiles(str(small_disk))
    assert read(files, 0, 10) == DATA[:10]
    assert files.remarks() == ()
    assert read(files, BLOCK, BLOCK + 10) == DATA[BLOCK : BLOCK + 10]  # found full: fetched, not kept
    [remark] = files.remarks()
    assert f"cannot keep more of the remote inputs in {small_disk} (No space left on device)" in remark
    object_store.forget()
    assert read(files, 5, BLOCK) == DATA[5:BLOCK]  # what is there is used
    assert read(files, BLOCK, BLOCK + 10) == DATA[BLOCK : BLOCK + 10]
    assert [(begin, end) for _, begin, end in object_store.fetched()] == [(BLOCK, BLOCK + 10)]
    files.close()


def test_a_disk_without_room_for_a_file_is_said(small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(b"x" * shutil.disk_usage(small_disk).free)
    files = StorageFiles(str(small_disk))
    assert read(files, 0, len(DATA)) == DATA
    [remark] = files.remarks()
    assert "give --stage more room" in remark
    files.close()


def test_a_merge_says_that_the_disk_is_full(
    small_disk: Path, object_store: ObjectStore, tmp_path: Path
) -> None:
    import numpy as np
    from safetensors.numpy import load_file, save_file

    from raymerge.cluster.merge import merge
    from raymerge.cluster.options import MergeOptions

    uris = []
    for number in range(2):
        model = tmp_path / f"m{number}"
        model.mkdir()
        values = np.full((5 << 18,), number + 1, np.float32)
        save_file({"w": values, "v": values}, model / "model.safetensors")
        (model / "config.json").write_text("{}")
        uris.append(object_store.put(model, f"stage/m{number}"))
    recipe = {"merge_method": "linear", "models": [{"model": u, "parameters": {"weight": 1}} for u in uris]}
    said: list[str] = []
    options = MergeOptions(in_process=True, workers=1, stage=str(small_disk))
    merge([recipe], tmp_path / "out", options, on_remark=said.append)
    assert [line for line in said if "cannot keep more of the remote inputs" in line]
    assert all((tensor == 1.5).all() for tensor in load_file(tmp_path / "out" / "model.safetensors").values())


def test_a_source_that_changed_is_not_taken_from_the_copy(folder: str, object_store: ObjectStore) -> None:
    """Of the same length, in the same second: S3 tells times by the second, and the tag is another."""
    other = bytes(reversed(DATA))
    for content in (DATA, other, DATA[:-1], DATA):
        object_store.put_bytes("stage/data", content)
        forget_stores()
        files = StorageFiles(folder)
        assert read(files, 0, len(content)) == content
        files.close()
    object_store.forget()
    files = StorageFiles(folder)
    assert read(files, 0, len(DATA)) == DATA and not object_store.fetched()  # the first content, and its copy
    files.close()


def test_a_copy_that_was_cut_is_fetched_again(folder: str) -> None:
    files = StorageFiles(folder)
    assert read(files, 0, len(DATA)) == DATA
    for path in Path(folder).rglob("*"):
        if path.is_file() and not path.name.endswith(".have"):
            os.truncate(path, BLOCK)
    assert read(files, 0, len(DATA)) == DATA
    files.close()


def test_a_copy_is_of_this_start_of_the_machine(folder: str) -> None:
    """After a crash a file's end may be lost and the byte that says it is there may not."""
    files = StorageFiles(folder)
    read(files, 0, 10)
    files.close()
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        assert os.listdir(folder) == [f"staged-{file.read()[:8]}"]


def test_an_object_that_became_shorter_is_an_error_and_not_a_crash(folder: str) -> None:
    files = StorageFiles(folder)
    for begin, end in ((0, len(DATA) + 1), (len(DATA) - 5, len(DATA) + 5), (3 * BLOCK, 3 * BLOCK + 9)):
        with pytest.raises(CheckpointError, match="before the tensor does: it was truncated or replaced"):
            read(files, begin, end)
    files.close()
