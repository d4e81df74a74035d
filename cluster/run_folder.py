"""The folder of a run: locked, beside the output, renamed into place when all is done.

Everything is written under ".NAME.raymerge" next to OUT, on the same file system. Weights go
into preallocated files there; the index and the rename come last. Whatever happens before the
rename leaves a previous OUT as it was, and a folder that cannot be mistaken for a checkpoint.
What raymerge did not write it never replaces, whatever it is told.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence

from raymerge.cluster import local_lock
from raymerge.cluster.journal import read_journal_header
from raymerge.cluster.progress import gib
from raymerge.cluster.totals import Totals
from raymerge.merge_actors.checkpoint.layout import INDEX_NAME, Layout
from raymerge.merge_actors.errors import OutputError
from raymerge.merge_actors.files import write_error
from raymerge.stats.statistics_file import MANIFEST

JOURNAL_NAME = "journal.jsonl"
MANIFEST_NAME = "raymerge_manifest.json"
STATISTICS_JOURNAL_NAME = "statistics.json"
LOCK_NAME = "lock"


class RunFolder:
    """Where one run keeps its journal and its unfinished outputs."""

    def __init__(self, out: str) -> None:
        self.out = os.path.realpath(out)  # beside what a link leads to: the disk that was meant
        parent, name = os.path.split(self.out)
        self.path = os.path.join(parent, f".{name}.raymerge")
        self.journal_path = os.path.join(self.path, JOURNAL_NAME)

    def output(self, name: str) -> str:
        """Return the folder in which a recipe's output is being written."""
        return os.path.join(self.path, "out", name)

    @property
    def writable_folders(self) -> tuple[str, ...]:
        """Return the URIs that workers write under: none, they write where they see the run folder."""
        return ()

    def small_files(self, name: str) -> str:
        """Return the folder in which everything but the weights of an output is built."""
        return self.output(name)

    def has_output(self, name: str) -> bool:
        """Return whether a recipe's output has been begun."""
        return os.path.isdir(self.output(name))

    def has_journal(self, path: str) -> bool:
        """Return whether there is something to resume."""
        return os.path.exists(path)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run folder for this process alone; it is created if need be.

        Raises:
            OutputError: another run holds it, or the folder cannot be made.
        """
        try:
            os.makedirs(self.path, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot write next to {self.out}: {error.strerror}") from error
        with local_lock.locked(os.path.join(self.path, LOCK_NAME), self.out):
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    if os.listdir(self.path) == [LOCK_NAME]:  # nothing came of the run: leave no trace
                        shutil.rmtree(self.path)

    def watched(self, on_progress: Callable[[Totals], None]) -> Callable[[Totals], None]:
        """Return what a run calls as it goes on: nobody takes this lock from a process that lives."""
        return on_progress

    def check_free(self, *, overwrite: bool, resume: bool, names: Sequence[str], is_campaign: bool) -> None:
        """Refuse an OUT that exists, and an unfinished run that nobody said what to do with.

        Args:
            overwrite: replace what raymerge wrote.
            resume: go on with an unfinished run.
            names: of the recipes.
            is_campaign: has each a folder of its own name in OUT?

        Raises:
            OutputError: with the way out.
        """
        for final in self._moves(names, is_campaign=is_campaign):
            refuse_foreign(final)
        if os.path.lexists(self.out) and not overwrite:
            if not _is_empty(self.out) and not (resume and self._began_with_overwrite()):
                raise OutputError(f"{self.out} exists; choose another folder or replace it with --overwrite")
        if os.path.exists(self.journal_path) and not (resume or overwrite):
            raise OutputError(
                f"an unfinished run for {self.out} lies in {self.path}; go on with --resume, or start anew with "
                "--overwrite"
            )

    def _began_with_overwrite(self) -> bool:
        """Return whether the unfinished run was told to replace OUT."""
        return os.path.exists(self.journal_path) and bool(
            read_journal_header(self.journal_path).get("overwrite")
        )

    def clear(self) -> None:
        """Remove an earlier run's journal and outputs; the lock stays."""
        for name in os.listdir(self.path):
            if name != LOCK_NAME:
                path = os.path.join(self.path, name)
                shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)

    def abandon(self) -> None:
        """Leave nothing of a run that failed before it got anywhere."""
        self.clear()

    def discard(self, name: str) -> None:
        """Remove what there is of a recipe's output: it failed, and the others are committed."""
        shutil.rmtree(self.output(name), ignore_errors=True)

    def check_space(self, num_bytes: int) -> None:
        """Refuse a run whose output will not fit.

        Raises:
            OutputError: the file system has too little room.
        """
        free = shutil.disk_usage(self.path).free
        if free < num_bytes:
            raise OutputError(
                f"the output needs {gib(num_bytes)} but only {gib(free)} are free on the file system of {self.out}"
            )

    def preallocate(self, folder: str, layout: Layout) -> None:
        """Make a recipe's weight files at full length, headers written.

        Raises:
            OutputError: the disk is full or not writable.
        """
        for file in layout.files:
            path = os.path.join(folder, file.name)
            try:
                os.makedirs(folder, exist_ok=True)
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
                try:
                    os.posix_fallocate(descriptor, 0, file.num_bytes)
                    os.ftruncate(descriptor, file.num_bytes)
                    os.pwrite(descriptor, file.header, 0)
                finally:
                    os.close(descriptor)
            except OSError as error:
                raise write_error(path, error) from error

    def finish(self, name: str, layout: Layout) -> None:
        """All of an output is in its folder; `commit` gives it its name."""

    def commit(self, names: Sequence[str], *, is_campaign: bool) -> list[str]:
        """Move finished outputs to their final place; return the final folders.

        A single rename, but for a campaign into an OUT that holds something: that stays beside it.

        Raises:
            OutputError: something else took the place meanwhile, or it cannot be written.
        """
        moves = self._moves(names, is_campaign=is_campaign)
        for final in moves:
            refuse_foreign(final)
        try:
            for final, source in moves.items():
                aside = os.path.join(self.path, f"replaced-{os.path.basename(final)}")
                _replace_folder(source, final, aside=aside)
        except OSError as error:
            raise write_error(self.out, error) from error
        return [os.path.join(self.out, name) for name in names] if is_campaign else [self.out]

    def _moves(self, names: Sequence[str], *, is_campaign: bool) -> dict[str, str]:
        """Return the folders that a commit makes or replaces, and what is moved there."""
        if not is_campaign:
            return {self.out: self.output(names[0])}
        if not os.path.isdir(self.out) or _is_empty(self.out):
            return {self.out: os.path.join(self.path, "out")}
        return {os.path.join(self.out, name): self.output(name) for name in names}

    def remove(self) -> None:
        """Remove the run folder after a commit."""
        shutil.rmtree(self.path, ignore_errors=True)


def refuse_foreign(folder: str) -> None:
    """Refuse to put an output where something lies that raymerge did not write.

    Raises:
        OutputError: with the way out.
    """
    if os.path.lexists(folder) and not os.path.isdir(folder):
        raise OutputError(f"{folder} is a file; choose another folder, or delete it yourself")
    check_own(folder, os.listdir(folder) if os.path.isdir(folder) else ())


def check_own(folder: str, names: Collection[str]) -> None:
    """Refuse a folder, local or in a store, that holds something but no manifest of raymerge's.

    Args:
        folder: to name it.
        names: of what is in it.

    Raises:
        OutputError: with the way out.
    """
    if names and not {MANIFEST_NAME, MANIFEST} & set(names):
        some = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
        raise OutputError(
            f"{folder} holds {some} and no manifest of raymerge: what raymerge did not write it does not replace; "
            "choose another folder, or delete it yourself"
        )


def write_index(folder: str, layout: Layout) -> None:
    """Write the index of a sharded output: the last file before the rename."""
    if layout.index is not None:
        with open(os.path.join(folder, INDEX_NAME), "w", encoding="utf-8") as file:
            json.dump(layout.index, file, indent=2)
            file.write("\n")


def sync_folder(folder: str) -> None:
    """Flush a folder's files to the disk, so that the rename cannot overtake the data."""
    for name in [*os.listdir(folder), "."]:
        path = os.path.join(folder, name)
        if os.path.isdir(path) and name != ".":
            continue
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _replace_folder(source: str, final: str, *, aside: str) -> None:
    if os.path.lexists(final) and not _is_empty(final):
        os.rename(final, aside)
    os.rename(source, final)


def _is_empty(folder: str) -> bool:
    return os.path.isdir(folder) and not os.listdir(folder)
