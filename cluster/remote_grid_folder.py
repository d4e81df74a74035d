"""OUT of a grid or a search in an object store: small files are made here and follow to the store.

A store appends to nothing, so results, journal and JSON files live in a temporary folder of the driver; a thread
writes those that have changed to the store every few seconds, and the end of the run writes the last. A row is in
the table or in the journal at every moment that the store shows, whatever is compacted meanwhile: the journal is
read before the table and written after it, and a row that stands in both counts once. A driver that is killed
loses the points of the last seconds, which `--resume` runs again, from any machine. Checkpoints go to the store as
those of `raymerge merge` do.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

from raymerge.cluster.grid_folder import BEST_NAME, RUN_NAME, GridFolder
from raymerge.cluster.results import JOURNAL_NAME, RESULTS_NAME
from raymerge.cluster.store_lock import STALE_SECONDS, TICKET_PREFIX, StoreLock
from raymerge.merge_actors.errors import CheckpointError, OutputError, RaymergeError
from raymerge.merge_actors.files import write_error
from raymerge.merge_actors.storage.folders import entries, read_bytes, remote_entry
from raymerge.merge_actors.storage.objects import delete_folder, delete_objects, write_object
from raymerge.merge_actors.storage.uris import absolute, is_remote

#: How often what has changed is written to the store.
SYNC_SECONDS = 5.0
#: Read in this order, so that a table that is written meanwhile costs no row.
_FETCHED = (JOURNAL_NAME, RESULTS_NAME, RUN_NAME, BEST_NAME)
#: How often an object that was replaced while it was read is read again.
_MOST_READS = 10


class RemoteGridFolder(GridFolder):
    """The folder of one grid or search in a store."""

    def __init__(self, out: str) -> None:
        """Name the folder; nothing is touched.

        Raises:
            OutputError: it is a whole bucket.
        """
        super().__init__(out)
        if not urlsplit(out).path:
            raise OutputError(f"{out} is a whole bucket; name a folder in it: {out}/NAME")
        self._lock = StoreLock(out, out)
        #: size and time of each small file as the store has it
        self._written: dict[str, tuple[int, int]] = {}
        self._failure: RaymergeError | None = None
        self._failing_since = 0.0

    def check_free(self, *, resume: bool, overwrite: bool) -> None:
        """Refuse as `GridFolder.check_free` does."""
        names = {entry.name for entry in entries(self.out) if not entry.name.startswith(TICKET_PREFIX)}
        if not names:
            return
        if RUN_NAME not in names:
            raise OutputError(f"{self.out} exists and holds no results of a grid; choose another folder")
        if not (resume or overwrite):
            raise self.taken()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process alone, and keep the store up to date for the block.

        Raises:
            OutputError: another run holds it, or the store cannot be written; then the results stay here.
        """
        with self._lock.held():
            self._fetch()
            done = threading.Event()
            thread = threading.Thread(target=self._follow, args=(done,), name="grid-results", daemon=True)
            thread.start()
            try:
                yield
            finally:
                done.set()
                thread.join()
                self._leave()

    @contextlib.contextmanager
    def readable(self) -> Iterator[None]:
        """Have the small files as the store has them now."""
        self._fetch()
        try:
            yield
        finally:
            shutil.rmtree(self.path, ignore_errors=True)

    def check(self) -> None:
        """Make sure that nobody else has taken the folder over, and that the store is not out of reach for good.

        Raises:
            OutputError: it is not so.
        """
        self._lock.check_not_lost()
        if self._failure is not None and time.monotonic() - self._failing_since > STALE_SECONDS:
            raise self._failure

    def write_text(self, name: str, text: str) -> None:
        """Write a text beside the weights of a checkpoint."""
        write_object(self.output(name), text.encode())

    def clear(self) -> None:
        """Remove an earlier run's results and checkpoints; objects that are not ours stay."""
        self._lock.check_held()
        for entry in entries(self.out):
            if entry.is_folder and entry.name.startswith("best-"):
                delete_folder(f"{self.out}/{entry.name}")
        super().clear()  # last: by run.json the next run knows what is left for ours

    def _fetch(self) -> None:
        # Not by a listing: a table that came after it would be missed, and its rows are in the journal no more.
        found = {name: _read_whole(f"{self.out}/{name}") for name in _FETCHED}
        data = {name: content for name, content in found.items() if content is not None}
        if RUN_NAME in data:
            data.setdefault(JOURNAL_NAME, b"")  # no point was finished yet
        try:
            self.path = tempfile.mkdtemp(prefix="raymerge-grid-")
            for name in data:
                with open(self.file(name), "wb") as file:
                    file.write(data[name])
        except OSError as error:
            raise write_error(tempfile.gettempdir(), error) from error
        self._written = self._versions()

    def _follow(self, done: threading.Event) -> None:
        while not done.wait(SYNC_SECONDS):
            try:
                self._lock.check_held()  # as the store has it now: the driver may have been stopped for minutes
                self._write_changes()
                self._failure = None
            except RaymergeError as error:
                self._fail(error)
            except OSError as error:  # of this machine
                self._fail(write_error(self.path, error))

    def _fail(self, error: RaymergeError) -> None:
        if self._failure is None:
            self._failing_since = time.monotonic()
        self._failure = error

    def _leave(self) -> None:
        """Write the last changes; what the store does not take is kept here, and the error says where."""
        try:
            self._lock.check_held()
            self._write_changes()
        except (RaymergeError, OSError) as error:
            raise OutputError(f"{error}; the results are kept in {self.path}") from error
        shutil.rmtree(self.path, ignore_errors=True)

    def _write_changes(self) -> None:
        journal_version = self._versions().get(JOURNAL_NAME)
        journal = self._read(JOURNAL_NAME)
        versions = self._versions()
        if journal_version is not None:
            versions[JOURNAL_NAME] = journal_version
        changed = [name for name, version in versions.items() if self._written.get(name) != version]
        for name in sorted(changed, key=lambda each: each == JOURNAL_NAME):
            data = journal if name == JOURNAL_NAME else self._read(name)
            if data is not None:
                write_object(f"{self.out}/{name}", data)
                self._written[name] = versions[name]
        gone = sorted((name for name in self._written if name not in versions), key=RUN_NAME.__eq__)
        delete_objects([f"{self.out}/{name}" for name in gone])
        for name in gone:
            del self._written[name]

    def _read(self, name: str) -> bytes | None:
        try:
            with open(self.file(name), "rb") as file:
                return file.read()
        except FileNotFoundError:
            return None

    def _versions(self) -> dict[str, tuple[int, int]]:
        found = {}
        for entry in os.scandir(self.path):
            with contextlib.suppress(FileNotFoundError):  # renamed just now
                status = entry.stat()
                if not entry.name.endswith(".new"):
                    found[entry.name] = (status.st_size, status.st_mtime_ns)
        return found


def _read_whole(uri: str) -> bytes | None:
    """Read an object that its writer may replace between the requests for its length and for so many bytes.

    Returns:
        its bytes; None if there is none.

    Raises:
        OutputError: it is replaced again and again.
        CheckpointError: it cannot be read.
    """
    for _ in range(_MOST_READS):
        before = remote_entry(uri)
        if before is None:
            return None
        try:
            data = read_bytes(uri)
        except CheckpointError:  # it may have become shorter, or is gone
            if remote_entry(uri) == before:
                raise
            continue
        if remote_entry(uri) == before:
            return data
    raise OutputError(f"{uri} is replaced faster than it can be read from here; look again later")


def open_grid_folder(out: str | os.PathLike[str]) -> GridFolder:
    """Return the folder of a grid or a search, local or in a store; nothing is touched.

    Raises:
        RaymergeError: a URI carries credentials, or names a whole bucket.
    """
    place = absolute(os.fspath(out))
    return RemoteGridFolder(place) if is_remote(place) else GridFolder(place)
