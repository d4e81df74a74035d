"""Keep two runs from one output in an object store, which has no locks.

Whoever wants the folder writes a ticket into it and then lists the tickets. Stores list what was written before,
so of two that come together at least one sees the other, and whoever sees another's live ticket withdraws: both
may, never do both stay. A ticket is alive while its owner writes it again, every `HEARTBEAT_SECONDS`; ages are
differences of the store's own times, so clocks need not agree. An owner whose ticket was removed, or who comes back
after so long that it may have been and finds another's, has lost the lock for good and ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import threading
import time
from collections.abc import Iterator, Mapping

from raymerge.cluster.journal import boot_id
from raymerge.cluster.local_lock import in_words
from raymerge.merge_actors.errors import OutputError, RaymergeError
from raymerge.merge_actors.storage.folders import entries, exists, read_bytes
from raymerge.merge_actors.storage.objects import delete_objects, write_object
from raymerge.merge_actors.storage.store import Entry

HEARTBEAT_SECONDS = 20.0
#: After so long without a heartbeat a ticket's owner is taken for gone.
STALE_SECONDS = 120.0
TICKET_PREFIX = "lock-"
#: Clocks that differ by less are taken for the same; those that differ by more than the second are refused by stores.
_NEAR_SECONDS, _MOST_DOUBTED_SECONDS = 5.0, 900.0


class StoreLock:
    """The lock of one run folder in a store."""

    def __init__(self, folder: str, out: str) -> None:
        self._folder, self._out = folder, out
        self._name = f"{TICKET_PREFIX}{secrets.token_hex(8)}.json"
        self._uri = f"{folder}/{self._name}"
        self._done = threading.Event()
        self._is_lost = False

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock.

        Raises:
            OutputError: another run holds it, or the store cannot be written.
            CheckpointError: the ticket of another cannot be read.
        """
        self._write()
        beating: threading.Thread | None = None
        try:
            self._refuse_others()
            beating = threading.Thread(target=self._beat, name="store-lock", daemon=True)
            beating.start()
            yield
        finally:
            self._done.set()
            if beating is not None:
                beating.join()
            with contextlib.suppress(OutputError):  # it grows stale by itself
                delete_objects([self._uri])

    def check_held(self) -> None:
        """Make sure that nobody took the lock for stale, before something is committed.

        Raises:
            OutputError: the ticket is gone.
        """
        self._is_lost = self._is_lost or all(entry.name != self._name for entry in entries(self._folder))
        self.check_not_lost()

    def check_not_lost(self) -> None:
        """Do the same from what the last heartbeat found, without asking the store.

        Raises:
            OutputError: the ticket was gone.
        """
        if self._is_lost:
            raise OutputError(
                f"another run took {self._out} over while this one did not reach the store for {STALE_SECONDS:g} s; "
                "this one ends without a commit"
            )

    def _write(self) -> None:
        owner = {"host": os.uname().nodename, "pid": os.getpid(), "since": time.strftime("%F %T")}
        write_object(self._uri, json.dumps({**owner, "processes": _processes()}).encode())

    def _refuse_others(self) -> None:
        tickets = [entry for entry in entries(self._folder) if entry.name.startswith(TICKET_PREFIX)]
        own = next((entry for entry in tickets if entry.name == self._name), None)
        if own is None:  # removed with all that lay in the folder
            raise OutputError(f"another run of {self._out} is just ending; start again")
        for ticket in tickets:
            if ticket.name == self._name:
                continue
            owner = self._owner(ticket)
            if owner is None or is_dead(owner) or _is_stale(ticket, own):
                delete_objects([f"{self._folder}/{ticket.name}"])
                continue
            raise OutputError(
                f"another run is writing {self._out} (process {owner['pid']} on {owner['host']} since "
                f"{owner['since']}); wait for it or choose another folder"
            )

    def _owner(self, ticket: Entry) -> dict[str, object] | None:
        """Return who wrote a ticket; None if it was withdrawn since, or is none of ours.

        Raises:
            CheckpointError: it is there and cannot be read, so its owner may be at work.
        """
        uri = f"{self._folder}/{ticket.name}"
        try:
            data = read_bytes(uri)
        except RaymergeError:
            if exists(uri):
                raise
            return None
        try:
            found = json.loads(data)
            return {
                "processes": found.get("processes"),
                **{key: found[key] for key in ("host", "pid", "since")},
            }
        except (ValueError, KeyError, TypeError, AttributeError):
            return None

    def _beat(self) -> None:
        written = time.time()
        while not (self._is_lost or self._done.wait(HEARTBEAT_SECONDS)):
            with contextlib.suppress(RaymergeError):  # the next one may get through
                # Not written anew when it is gone: somebody has taken the folder over.
                if self._name not in self._tickets():
                    self._is_lost = True
                    return
                self._write()
                now = time.time()
                # Written, maybe, after another has removed it: an outage or a stop lay between look and writing.
                if now - written > STALE_SECONDS - HEARTBEAT_SECONDS and self._tickets() - {self._name}:
                    self._is_lost = True
                written = now

    def _tickets(self) -> set[str]:
        return {entry.name for entry in entries(self._folder) if entry.name.startswith(TICKET_PREFIX)}


def _processes() -> str:
    """Name the set of processes in which ours has its number: containers may share a host's name and no processes."""
    with contextlib.suppress(OSError):
        return f"{boot_id()} {os.readlink('/proc/self/ns/pid')}"
    return ""


def is_dead(owner: Mapping[str, object]) -> bool:
    """Return whether the owner of a ticket is a process of this machine that is gone."""
    pid = owner["pid"]
    if (
        owner["host"] != os.uname().nodename
        or owner.get("processes") != _processes()
        or not isinstance(pid, int)
    ):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def owner_of(folder: str) -> tuple[str | None, bool]:
    """Return who wrote the latest ticket in a folder, in words, and whether he is at work.

    Who only looks cannot write a ticket to compare its age with, so clocks that differ leave doubt about one that is
    minutes old; then the ticket is watched for a heartbeat.

    Raises:
        CheckpointError: the store refuses, or keeps failing.
    """
    ticket = _latest(folder)
    if ticket is None:
        return None, False
    owner = None
    with contextlib.suppress(ValueError, KeyError, TypeError):
        found = json.loads(read_bytes(f"{folder}/{ticket.name}"))
        owner = in_words(found)
        if is_dead(found):
            return owner, False
    age = time.time() - (ticket.modified_seconds or 0.0)
    if (
        _MOST_DOUBTED_SECONDS >= age >= STALE_SECONDS
        or age < -_NEAR_SECONDS
        or ticket.modified_seconds is None
    ):
        return owner, _beats(folder, ticket)
    return owner, age < STALE_SECONDS


def _latest(folder: str) -> Entry | None:
    tickets = [entry for entry in entries(folder) if entry.name.startswith(TICKET_PREFIX)]
    return max(tickets, key=lambda entry: entry.modified_seconds or 0.0, default=None)


def _beats(folder: str, ticket: Entry) -> bool:
    """Wait a heartbeat for another ticket, or the same one written again."""
    deadline = time.monotonic() + 1.25 * HEARTBEAT_SECONDS
    while time.monotonic() < deadline:
        time.sleep(HEARTBEAT_SECONDS / 10)
        latest = _latest(folder)
        if latest is None or (latest.name, latest.version) != (ticket.name, ticket.version):
            return latest is not None
    return False


def _is_stale(ticket: Entry, own: Entry) -> bool:
    if own.modified_seconds is None or ticket.modified_seconds is None:
        return False
    return own.modified_seconds - ticket.modified_seconds > STALE_SECONDS
