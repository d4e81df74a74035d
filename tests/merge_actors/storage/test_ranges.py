"""Ranges and their repetition, on a store that fails as it is told: no server, no waiting."""

from __future__ import annotations

import concurrent.futures
import errno
import random
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from raymerge.merge_actors.errors import CheckpointError, OutputError
from raymerge.merge_actors.files import RangeRead
from raymerge.merge_actors.storage import ranges, retry, staged_outputs
from raymerge.merge_actors.storage.ranges import REQUEST_BYTES, RemoteRanges, requests_for, wait_for
from raymerge.merge_actors.storage.retry import MOST_ATTEMPTS, permanent_reason, with_retries

DATA = bytes(range(256)) * 8


@dataclass
class FakeReader:
    """Gives DATA, but fails at first, or gives only so many bytes of it."""

    failure: OSError | int | None
    num_bytes: int = len(DATA)
    tag: str = ""
    is_closed: bool = False

    def read_into(self, offset: int, buffer: memoryview) -> int:
        assert not self.is_closed, "a connection that failed is used again"
        if isinstance(self.failure, OSError):
            raise self.failure
        count = len(buffer) if self.failure is None else self.failure
        buffer[:count] = DATA[offset : offset + count]
        return count

    def close(self) -> None:
        self.is_closed = True


@dataclass
class FakeStore:
    """Opens a reader for each planned failure, then good ones."""

    failures: list[OSError | int]
    opened: list[FakeReader] = field(default_factory=list)

    def open(self, uri: str) -> FakeReader:
        self.opened.append(FakeReader(self.failures.pop(0) if self.failures else None))
        return self.opened[-1]


@pytest.mark.parametrize("failure", [OSError("connection reset"), 0, 99])
def test_a_connection_that_failed_is_closed_and_what_is_short_is_not_taken(
    failure: OSError | int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "FIRST_PAUSE_SECONDS", 0.0)
    store = FakeStore([failure, failure])
    monkeypatch.setattr(ranges, "store_of", lambda uri: store)
    remote, buffer = RemoteRanges(), bytearray(100)
    remote.read_into("s3://bucket/key", 7, memoryview(buffer))
    assert buffer == DATA[7:107]
    assert remote.fetched_bytes == 100
    assert [reader.is_closed for reader in store.opened] == [True, True, False]
    remote.read_into("s3://bucket/key", 0, memoryview(buffer))
    assert len(store.opened) == 3, "a connection that works is used again"
    remote.close()
    assert store.opened[-1].is_closed


def test_requests_are_bounded_and_stay_in_their_file() -> None:
    """Small neighbours are joined up to a request's length; the end of one file is not the beginning of the next."""
    third = memoryview(bytearray(REQUEST_BYTES // 3))
    reads = [RangeRead("a", number * len(third), third) for number in range(4)]
    reads.append(RangeRead("b", 4 * len(third), third))
    reads.append(RangeRead("b", 5 * len(third) + 1, third))
    requests = [[(read.path, read.offset // len(third)) for read in group] for group in requests_for(reads)]
    assert requests == [[("a", 0), ("a", 1), ("a", 2)], [("a", 3)], [("b", 4)], [("b", 5)]]


def test_no_range_is_still_being_filled_when_an_error_is_raised() -> None:
    """The buffers are used again after an error: nobody may write to them by then."""
    go_on, has_written = threading.Event(), threading.Event()

    def write_late() -> None:
        go_on.wait(5)
        time.sleep(0.05)
        has_written.set()

    def fail() -> None:
        go_on.set()
        raise CheckpointError("gone")

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        late = pool.submit(write_late)
        with pytest.raises(CheckpointError, match="gone"):
            wait_for([pool.submit(fail), late])
        assert has_written.is_set()


def test_pauses_double_up_to_a_bound_and_are_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(retry, "MOST_PAUSE_SECONDS", 5.0)
    monkeypatch.setattr(time, "sleep", pauses.append)

    def fail() -> None:
        raise OSError("503")

    for fraction in (0.0, 1.0):  # the least and the greatest that can be drawn
        monkeypatch.setattr(random, "uniform", lambda low, high, at=fraction: low + at * (high - low))
        pauses.clear()
        with pytest.raises(
            CheckpointError, match=f"{MOST_ATTEMPTS} attempts in .* failed, the last one with: 503"
        ):
            with_retries(fail, "read it", CheckpointError)
        whole = [0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
        assert pauses == pytest.approx([pause * (0.5 + 0.5 * fraction) for pause in whole])


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk is full"),
        (PermissionError("not yours"), "access is refused"),
        (OSError("AWS Error EXPIRED_TOKEN during HeadObject operation"), "access is refused"),
        (OSError("AWS Error ACCESS_DENIED during PutObject operation"), "access is refused"),
        (OSError("got HTTP status 403"), "access is refused"),
        (OSError("AWS Error NO_SUCH_BUCKET during CreateMultipartUpload"), "its bucket does not exist"),
        (FileNotFoundError("key"), "it does not exist"),
        (IsADirectoryError("is a folder"), "is a folder"),
        (OSError("AWS Error SLOW_DOWN (HTTP status 503)"), None),
        (TimeoutError("timed out"), None),
        (ConnectionResetError(errno.ECONNRESET, "reset"), None),
    ],
)
def test_which_errors_are_not_worth_a_repetition(error: OSError, reason: str | None) -> None:
    found = permanent_reason(error)
    assert found is None if reason is None else found is not None and found.startswith(reason)


class TakingStore:
    """Keeps the blocks of the last object that was written."""

    def __init__(self) -> None:
        self.blocks: list[int] = []
        self.in_flight = 0

    def write(self, uri: str, blocks: Iterable[bytes], *, blocks_in_flight: int) -> None:
        self.blocks, self.in_flight = [], blocks_in_flight
        for block in blocks:
            self.blocks.append(len(block))


def test_an_upload_has_a_bounded_number_of_parts_and_is_never_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stores take 10,000 parts; the parts of a larger file are larger, and fewer of them are in memory at once."""
    store = TakingStore()
    monkeypatch.setattr(staged_outputs, "store_of", lambda uri: store)
    monkeypatch.setattr(staged_outputs, "PART_BYTES", 10)
    monkeypatch.setattr(staged_outputs, "_MOST_PARTS", 4)
    monkeypatch.setattr(retry, "FIRST_PAUSE_SECONDS", 0.0)
    (tmp_path / "file").write_bytes(DATA[:100])
    with open(tmp_path / "file", "rb") as file:
        for num_bytes, parts, in_flight in ((35, [10, 10, 10, 5], 8), (100, [25] * 4, 3), (0, [], 8)):
            staged_outputs.upload("s3://bucket/key", file.fileno(), num_bytes)
            assert (store.blocks, store.in_flight) == (parts, in_flight)
        with pytest.raises(OutputError, match="the staged file has 100 bytes, not 101"):
            staged_outputs.upload("s3://bucket/key", file.fileno(), 101)
