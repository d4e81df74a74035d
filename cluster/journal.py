"""The journal of a run: one JSON line per finished task, so that a killed run can go on.

The first line names the plan it belongs to; a line that was cut short by a kill is ignored.
Only the driver writes it, after a worker has reported, so a task in the journal is on disk.
In an object store, which cannot append, the journal is a folder with an object per line.
"""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from raymerge.merge_actors.errors import CheckpointError, OutputError
from raymerge.merge_actors.files import write_error
from raymerge.merge_actors.storage.folders import entries, map_concurrently, read_bytes
from raymerge.merge_actors.storage.objects import write_object
from raymerge.merge_actors.storage.uris import is_remote
from raymerge.merge_actors.task import PieceReport, TaskReport

#: In a store, what a file has in its first line.
_HEADER_NAME = "header.json"


@dataclass
class Journal:
    """Finished tasks of one run, in memory and on disk."""

    path: str
    plan_fingerprint: str
    done: dict[int, TaskReport] = field(default_factory=dict)
    """Reports by number of the task."""
    _file: io.FileIO | None = None

    @classmethod
    def create(cls, path: str, plan_fingerprint: str, header: dict[str, Any]) -> Journal:
        """Begin a new journal."""
        journal = cls(path, plan_fingerprint)
        journal._begin({"plan": plan_fingerprint, "started": time.time(), "boot": boot_id(), **header})
        return journal

    @classmethod
    def resume(cls, path: str, plan_fingerprint: str, made_by: Mapping[str, str] | None = None) -> Journal:
        """Read a journal and go on writing it.

        Args:
            path: of the journal.
            plan_fingerprint: of this run's plan.
            made_by: device and versions of this run, by name; those of the journal must be the same,
                for one output is not made of parts that round differently.

        Raises:
            OutputError: it belongs to another plan, or was made on another kind of device or with another version.
        """
        header, reports = read_journal(path)
        if header.get("plan") != plan_fingerprint:
            raise OutputError(
                f"the unfinished run in {os.path.dirname(path)} was planned from other inputs or options (recipe, "
                "models, dtype, seed, slice or shard size); run with the same ones to resume, or with --overwrite "
                "to start anew"
            )
        for name, value in (made_by or {}).items():
            earlier = header.get("made_by", {}).get(name, value)
            if earlier != value:
                raise OutputError(
                    f"the unfinished run in {os.path.dirname(path)} was made with {name} {earlier}, this one has "
                    f"{value}, which may round differently; go on with the same, or start anew with --overwrite"
                )
        journal = cls(path, plan_fingerprint, {report.number: report for report in reports})
        if header.get("boot") != boot_id() and not is_remote(path):
            journal.done.clear()  # the machine went down: what was written may not have reached the disk
        # Rewritten whole, so that a line cut short by the kill does not stay in the middle.
        journal._begin({**header, "boot": boot_id()})
        return journal

    def add(self, report: TaskReport) -> None:
        """Record a finished task."""
        self.done[report.number] = report
        if is_remote(self.path):
            write_object(f"{self.path}/task-{report.number:06d}.json", json.dumps(_to_row(report)).encode())
            return
        try:
            self._write(_to_row(report))
        except OSError as error:
            raise write_error(self.path, error) from error

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _begin(self, header: dict[str, Any]) -> None:
        """Write the header and what is done to a new file, and put it in place of an older one."""
        if is_remote(self.path):  # what is done has its objects already
            write_object(f"{self.path}/{_HEADER_NAME}", json.dumps(header).encode())
            return
        new = f"{self.path}.new"
        try:
            self._file = open(new, "wb", buffering=0)
            self._write(header, *map(_to_row, self.done.values()))
            os.replace(new, self.path)
        except OSError as error:
            self.close()
            raise write_error(self.path, error) from error

    def _write(self, *rows: dict[str, Any]) -> None:
        assert self._file is not None
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        while data:
            data = data[self._file.write(data) :]


def read_journal(path: str) -> tuple[dict[str, Any], list[TaskReport]]:
    """Read a journal of a running, finished or killed run: its header and the finished tasks."""
    if is_remote(path):
        return _read_objects(path)
    with open(path, encoding="ascii") as file:
        lines = file.read().split("\n")
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break  # the line that was being written when the driver was killed
    return (rows[0], [_from_row(row) for row in rows[1:]]) if rows else ({}, [])


def read_journal_header(path: str) -> dict[str, Any]:
    """Read the first line of a journal alone; {} if the run was killed before it stood there."""
    try:
        if is_remote(path):
            return dict(json.loads(read_bytes(f"{path}/{_HEADER_NAME}")))
        with open(path, encoding="ascii") as file:
            return dict(json.loads(file.readline()))
    except (ValueError, CheckpointError):
        return {}


def _read_objects(folder: str) -> tuple[dict[str, Any], list[TaskReport]]:
    names = [entry.name for entry in entries(folder) if not entry.is_folder]
    if _HEADER_NAME not in names:
        return {}, []
    tasks = [f"{folder}/{name}" for name in names if name != _HEADER_NAME]
    rows = map_concurrently(lambda uri: json.loads(read_bytes(uri)), tasks, tasks)
    return json.loads(read_bytes(f"{folder}/{_HEADER_NAME}")), [_from_row(row) for row in rows]


def boot_id() -> str:
    """Return an identifier that changes when this machine restarts."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


def _to_row(report: TaskReport) -> dict[str, Any]:
    return {
        "task": report.number,
        "pieces": [
            [p.recipe, p.tensor, p.checksum, p.sum_squares, p.num_nonfinite, dict(p.figures)]
            for p in report.pieces
        ],
        "read_bytes": report.read_bytes,
        "write_bytes": report.write_bytes,
        "seconds": [report.read_seconds, report.merge_seconds, report.write_seconds],
        "warnings": list(report.warnings),
    }


def _from_row(row: dict[str, Any]) -> TaskReport:
    read, merge, write = row["seconds"]
    return TaskReport(
        number=row["task"],
        pieces=tuple(
            PieceReport(recipe=r, tensor=t, checksum=c, sum_squares=s, num_nonfinite=n, figures=f)
            for r, t, c, s, n, f in row["pieces"]
        ),
        read_bytes=row["read_bytes"],
        write_bytes=row["write_bytes"],
        read_seconds=read,
        merge_seconds=merge,
        write_seconds=write,
        warnings=tuple(row["warnings"]),
    )
