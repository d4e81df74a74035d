"""What an object store does wrong, and what is made of it: retried, then one clear error, never a short file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from object_store import BUCKET, Kind, ObjectStore

from raymerge.merge_actors.errors import CheckpointError, OutputError, RaymergeError
from raymerge.merge_actors.files import RangeRead
from raymerge.merge_actors.storage import arrow_store, retry
from raymerge.merge_actors.storage.folders import entries, read_bytes
from raymerge.merge_actors.storage.objects import delete_folder, upload_file, write_object
from raymerge.merge_actors.storage.storage_files import StorageFiles
from raymerge.merge_actors.storage.store import forget_stores, store_of

DATA = bytes(os.urandom(300_000))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Wait for milliseconds where users wait for seconds."""
    monkeypatch.setattr(retry, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(arrow_store, "_PART_ATTEMPTS", 2)
    forget_stores()
    yield
    forget_stores()


@pytest.fixture
def files() -> Iterator[StorageFiles]:
    made = StorageFiles()
    yield made
    made.close()


@pytest.mark.parametrize("kind", ["503", "500", "cut", "drop", "stall"])
def test_a_read_that_fails_is_repeated(
    kind: Kind, object_store: ObjectStore, files: StorageFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "stall":  # elsewhere a slow machine's server may think for a second
        monkeypatch.setattr(arrow_store, "_STALLED_SECONDS", 1)
    object_store.put_bytes("faults/data", DATA)
    fault = object_store.fail(kind, "faults/data", times=1 if kind == "stall" else 3)
    buffer = bytearray(1000)
    files.read_into(f"s3://{BUCKET}/faults/data", 5000, memoryview(buffer))
    assert buffer == DATA[5000:6000]
    assert fault.num_done == fault.times
    assert files.take_fetched_bytes() == 1000


@pytest.mark.parametrize("kind", ["503", "cut", "drop"])
def test_a_store_that_keeps_failing_is_named(
    kind: Kind, object_store: ObjectStore, files: StorageFiles
) -> None:
    object_store.put_bytes("faults/data", DATA)
    object_store.fail(kind, "faults/data", times=1000)
    expected = (
        rf"cannot read bytes \[5,000, 6,000\) of s3://{BUCKET}/faults/data: {retry.MOST_ATTEMPTS} attempts in \d+ s "
        r"failed, the last one with: .+; see whether the storage works, then try again \(a merge goes on "
        r"with --resume\)"
    )
    with pytest.raises(CheckpointError, match=expected):
        files.read_into(f"s3://{BUCKET}/faults/data", 5000, memoryview(bytearray(1000)))


def test_all_attempts_are_counted(object_store: ObjectStore) -> None:
    object_store.put_bytes("faults/data", DATA)
    fault = object_store.fail("503", "faults/data", times=1000)
    with pytest.raises(CheckpointError):
        read_bytes(f"s3://{BUCKET}/faults/data")
    assert fault.num_done == retry.MOST_ATTEMPTS  # the client behind us makes none of its own


@pytest.mark.parametrize(
    ("kind", "num_bytes"), [("503", 100), ("500", 100), ("drop", 100), ("503", 11 << 20)]
)
def test_an_upload_that_fails_is_repeated(
    kind: Kind, num_bytes: int, object_store: ObjectStore, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(data := os.urandom(1024) * (num_bytes // 1024) or b"x" * num_bytes)
    fault = object_store.fail(kind, "faults/up", method="PUT", times=3)
    upload_file(str(tmp_path / "file"), f"s3://{BUCKET}/faults/up")
    assert fault.num_done == fault.times
    assert object_store.get("faults/up") == data
    checksums = [
        each.headers.get("x-amz-trailer")
        for each in object_store.requests
        if (each.method, each.key) == ("PUT", "faults/up")
    ]
    assert set(checksums) == {"x-amz-checksum-crc64nvme"}  # the store checks what it gets


def test_an_upload_that_keeps_failing_leaves_nothing(
    object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "MOST_ATTEMPTS", 2)
    (tmp_path / "file").write_bytes(bytes(11 << 20))
    object_store.fail("503", "faults/gone", method="PUT", query="partNumber=2", times=10_000)
    with pytest.raises(OutputError, match=rf"cannot write s3://{BUCKET}/faults/gone: .+ attempts"):
        upload_file(str(tmp_path / "file"), f"s3://{BUCKET}/faults/gone")
    assert not object_store.keys("faults/gone")


def test_an_upload_whose_source_fails_leaves_nothing(object_store: ObjectStore) -> None:
    def blocks() -> Iterator[bytes]:
        yield bytes(12 << 20)
        raise OSError("the disk broke")

    uri = f"s3://{BUCKET}/faults/broken"
    with pytest.raises(OSError, match="the disk broke"):
        store_of(uri).write(uri, blocks(), blocks_in_flight=1)
    assert not object_store.keys("faults/broken")


def test_an_object_that_shrank_is_an_error(object_store: ObjectStore, files: StorageFiles) -> None:
    object_store.put_bytes("faults/data", DATA[:5500])
    with pytest.raises(CheckpointError, match="ends at byte 5,500, 500 bytes before the tensor does"):
        files.read_into(f"s3://{BUCKET}/faults/data", 5000, memoryview(bytearray(1000)))


def _read_absent(store: ObjectStore) -> None:
    read_bytes(f"s3://{BUCKET}/faults/absent")


def _list_no_bucket(store: ObjectStore) -> None:
    entries("s3://nosuchbucket/folder")


def _write_no_bucket(store: ObjectStore) -> None:
    write_object("s3://nosuchbucket/key", b"x")


def _read_refused(store: ObjectStore) -> None:
    store.put_bytes("faults/data", DATA)
    store.fail("403", "faults/data")
    read_bytes(f"s3://{BUCKET}/faults/data")


def _write_refused(store: ObjectStore) -> None:
    store.fail("403", "faults/refused", method="PUT", times=5)
    write_object(f"s3://{BUCKET}/faults/refused", b"x")


def _unknown_scheme(store: ObjectStore) -> None:
    read_bytes("nosuchscheme://place/key")


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (_read_absent, f"cannot read s3://{BUCKET}/faults/absent: it does not exist; check the name"),
        (
            _list_no_bucket,
            "cannot list s3://nosuchbucket/folder: its bucket does not exist; check the name, and",
        ),
        (
            _write_no_bucket,
            "cannot write s3://nosuchbucket/key: its bucket does not exist; check the name, and",
        ),
        (_read_refused, "access is refused"),
        (_write_refused, "access is refused"),
        (_unknown_scheme, "cannot read nosuchscheme://place/key: no client for nosuchscheme:// can be"),
    ],
)
def test_what_repeating_cannot_mend_fails_at_once(
    action: Callable[[ObjectStore], None], message: str, object_store: ObjectStore
) -> None:
    with pytest.raises(RaymergeError) as raised:
        action(object_store)
    assert message in str(raised.value)
    assert "attempts" not in str(raised.value)
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in str(raised.value)


def test_many_ranges_at_once(object_store: ObjectStore, files: StorageFiles, tmp_path: Path) -> None:
    """Neighbours are joined, long ranges are cut, local files are read as well; order does not matter."""
    data = os.urandom(20 << 20)
    object_store.put_bytes("faults/long", data)
    (tmp_path / "local").write_bytes(DATA)
    uri = f"s3://{BUCKET}/faults/long"
    places = [(uri, 100, 50), (uri, 150, 7), (uri, 157, 1 << 10), (uri, 3 << 20, 17 << 20), (uri, 20_000, 0)]
    places += [(str(tmp_path / "local"), 10, 999)]
    buffers = [bytearray(num_bytes) for _, _, num_bytes in places]
    reads = [
        RangeRead(path, offset, memoryview(buffer))
        for (path, offset, _), buffer in zip(places, buffers, strict=True)
    ]
    object_store.fail("503", "faults/long", times=3)
    files.read_many(reads[::-1])
    for (path, offset, num_bytes), buffer in zip(places, buffers, strict=True):
        source = data if path == uri else DATA
        assert buffer == source[offset : offset + num_bytes]
    ranges = object_store.fetched("faults/long")
    assert [(begin, end) for _, begin, end in ranges] == [
        (100, 157 + 1024),
        (3 << 20, 11 << 20),
        (11 << 20, 19 << 20),
        (19 << 20, 20 << 20),
    ]


def test_a_folder_is_removed_whole(object_store: ObjectStore) -> None:
    for name in ("a", "b/c"):
        object_store.put_bytes(f"remove/me/{name}", b"x")
    object_store.put_bytes("remove/meat", b"x")
    delete_folder(f"s3://{BUCKET}/remove/me")
    delete_folder(f"s3://{BUCKET}/remove/never-there")
    assert object_store.keys("remove/") == ["remove/meat"]
