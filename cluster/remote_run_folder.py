"""A run whose output goes to an object store: nothing can be renamed there, so the order of writing commits.

Weight files are uploaded whole, each by the worker that made it (`merge_actors/storage/staged_outputs.py`), to
their final place. Config and tokenizer are built in a temporary folder here and follow when all weights are there;
the last objects are config.json, the manifest and the index. Until then no reader takes OUT for a checkpoint.
Journal and lock are small objects under ".NAME.raymerge" beside OUT, so that `--resume` works from any machine.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from urllib.parse import urlsplit

from raymerge.cluster.journal import read_journal_header
from raymerge.cluster.run_folder import JOURNAL_NAME, MANIFEST_NAME, RunFolder, check_own
from raymerge.cluster.store_claim import read_claim, write_claim
from raymerge.cluster.store_lock import TICKET_PREFIX, StoreLock
from raymerge.cluster.totals import Totals
from raymerge.merge_actors.checkpoint.layout import INDEX_NAME, Layout
from raymerge.merge_actors.errors import OutputError, RaymergeError, RecipeError
from raymerge.merge_actors.storage.folders import entries, exists
from raymerge.merge_actors.storage.objects import delete_folder, delete_objects, upload_file
from raymerge.merge_actors.storage.uris import absolute, checked, is_remote

#: What makes a folder a checkpoint, in the order in which it is written.
_COMMITTING = ("config.json", MANIFEST_NAME, INDEX_NAME)


class RemoteRunFolder:
    """Where one run keeps its journal, and its outputs as they grow."""

    def __init__(self, out: str, *, is_campaign: bool) -> None:
        """Name the folders; nothing is written yet.

        Raises:
            RaymergeError: OUT carries credentials, or is a whole bucket.
        """
        self.out = checked(out)
        if not urlsplit(self.out).path:
            raise OutputError(f"{self.out} is a whole bucket; name a folder in it: {self.out}/NAME")
        parent, name = os.path.split(self.out)
        self.path = f"{parent}/.{name}.raymerge"
        self.journal_path = f"{self.path}/{JOURNAL_NAME}"
        self._is_campaign = is_campaign
        self._lock = StoreLock(self.path, self.out)
        self._local = ""
        self._prepared: list[str] = []
        self._begun: set[str] = set()
        self._finished: set[str] = set()

    @property
    def writable_folders(self) -> tuple[str, ...]:
        """Where every worker has to be able to write."""
        return (self.path,)

    def output(self, name: str) -> str:
        """Return the final folder of a recipe's output."""
        return f"{self.out}/{name}" if self._is_campaign else self.out

    def small_files(self, name: str) -> str:
        """Return the local folder in which everything but the weights of an output is built."""
        folder = os.path.join(self._local, name)
        os.makedirs(folder, exist_ok=True)
        return folder

    def has_output(self, name: str) -> bool:
        """Return whether a recipe's output has been finished, in this run or the one that it resumes."""
        return name in self._finished or exists(f"{self.output(name)}/{MANIFEST_NAME}")

    def has_journal(self, path: str) -> bool:
        """Return whether there is something to resume; uploaded files are where the journal says."""
        return bool(entries(path))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run folder for this process alone.

        Raises:
            OutputError: another run holds it, or the store cannot be written.
        """
        with self._lock.held(), tempfile.TemporaryDirectory(prefix="raymerge-") as local:
            self._local = local
            yield

    def watched(self, on_progress: Callable[[Totals], None]) -> Callable[[Totals], None]:
        """Return what a run calls as it goes on: it ends when another has taken the folder over.

        Else its workers would put files of their own in the place of those that the other has made.
        """

        def check(totals: Totals) -> None:
            self._lock.check_not_lost()
            on_progress(totals)

        return check

    def check_free(self, *, overwrite: bool, resume: bool, names: Sequence[str], is_campaign: bool) -> None:
        """Refuse as `RunFolder.check_free` does."""
        assert is_campaign == self._is_campaign
        self._begun |= self._begun_earlier()
        for folder in {self.output(name) for name in names} - self._begun:
            check_own(folder, [entry.name for entry in entries(folder)])
        if self._begun or self.has_journal(self.journal_path):
            if not (resume or overwrite):
                raise OutputError(
                    f"an unfinished run for {self.out} lies in {self.path}; go on with --resume, or start anew with "
                    "--overwrite"
                )
            if resume:
                return
        if not overwrite and entries(self.out):
            raise OutputError(f"{self.out} exists; choose another folder or replace it with --overwrite")

    def _begun_earlier(self) -> set[str]:
        """Return the folders that an unfinished run has begun to replace or to fill."""
        paths = (self.journal_path + (f".{wave}" if wave else "") for wave in itertools.count())
        journals = itertools.takewhile(self.has_journal, paths)
        return read_claim(self.path) | {
            self.output(name) for path in journals for name in read_journal_header(path).get("outputs", ())
        }

    def clear(self) -> None:
        """Remove what an unfinished run and this one have written, and last what says that it is theirs."""
        for folder in sorted(self._begun - set(self._prepared)):
            if not exists(f"{folder}/{MANIFEST_NAME}"):
                delete_folder(folder)
        for folder in self._prepared:
            delete_folder(folder)
        self._prepared.clear()
        self._begun.clear()
        for entry in entries(self.path):
            if entry.is_folder:
                delete_folder(f"{self.path}/{entry.name}")
            elif not entry.name.startswith(TICKET_PREFIX):
                delete_objects([f"{self.path}/{entry.name}"])

    def abandon(self) -> None:
        """Leave nothing of a run that failed before it got anywhere, if the store lets us.

        What lies there may be another's, if this run was stopped for so long that its lock was taken over.
        """
        with contextlib.suppress(RaymergeError):  # what the run failed of is the news
            self._lock.check_held()
            self.clear()

    def discard(self, name: str) -> None:
        """Remove what a run has written of a recipe's output, if the store lets us; an earlier output stays."""
        folder = self.output(name)
        if folder in self._begun:
            with contextlib.suppress(RaymergeError):
                self._lock.check_held()
                delete_folder(folder)

    def check_space(self, num_bytes: int) -> None:
        """Check nothing: a store has no end, and a node looks at its disk when it begins a file."""

    def preallocate(self, folder: str, layout: Layout) -> None:
        """Empty the folder of an output. What was there is no checkpoint any more from here on.

        Raises:
            OutputError: another run has taken the folder over, or the store fails.
        """
        del layout
        self._lock.check_held()
        self._begun.add(folder)
        write_claim(self.path, self._begun)
        delete_objects([f"{folder}/{name}" for name in reversed(_COMMITTING)])
        if entries(folder):
            delete_folder(folder)
        self._prepared.append(folder)

    def finish(self, name: str, layout: Layout) -> None:
        """Upload everything but the weights, what makes it a checkpoint last.

        Raises:
            OutputError: a weight file is not there at its length, or the store fails.
        """
        folder, local = self.output(name), self.small_files(name)
        self._lock.check_held()
        there = {entry.name: entry.num_bytes for entry in entries(folder)}
        for file in layout.files:
            if there.get(file.name) != file.num_bytes:
                raise OutputError(
                    f"{folder}/{file.name} has {there.get(file.name, 0):,} bytes in the store, not {file.num_bytes:,}: "
                    "something else changes this folder; start anew with --overwrite"
                )
        names = [
            os.path.relpath(os.path.join(root, file), local)
            for root, _, files in os.walk(local)
            for file in files
        ]
        names.sort(key=lambda each: (_COMMITTING.index(each) if each in _COMMITTING else -1, each))
        for each in names:
            upload_file(os.path.join(local, each), f"{folder}/{each.replace(os.sep, '/')}")
        self._finished.add(name)
        shutil.rmtree(local, ignore_errors=True)

    def commit(self, names: Sequence[str], *, is_campaign: bool) -> list[str]:
        """Return the final folders; their indexes were the commit."""
        assert is_campaign == self._is_campaign
        return [self.output(name) for name in names]

    def remove(self) -> None:
        """Remove the run folder after a commit."""
        with contextlib.suppress(RaymergeError):
            self._lock.check_held()
            delete_folder(self.path)


def open_run_folder(out: str, *, is_campaign: bool) -> RunFolder | RemoteRunFolder:
    """Return the run folder of an output, local or in an object store.

    Raises:
        RaymergeError: a URI carries credentials, or names a whole bucket.
    """
    return RemoteRunFolder(out, is_campaign=is_campaign) if is_remote(out) else RunFolder(absolute(out))


def refuse_sequential(names: Sequence[str]) -> None:
    """Refuse recipes that read their own output while they write it.

    Raises:
        RecipeError: there is one.
    """
    if names:
        raise RecipeError(
            f"recipe {names[0]} is merged layer by layer and reads what it has merged, which an object store does not "
            "give back before a file is whole; merge into a folder and copy it"
        )
