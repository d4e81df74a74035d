"""Where a run stands, from what it has written: no process is asked, so it works from any machine that sees OUT."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import time
from dataclasses import dataclass
from typing import Any, Literal

from raymerge.cluster import grid_folder, local_lock, store_lock
from raymerge.cluster.grid_folder import BEST_NAME
from raymerge.cluster.journal import read_journal
from raymerge.cluster.remote_grid_folder import open_grid_folder
from raymerge.cluster.remote_run_folder import RemoteRunFolder
from raymerge.cluster.results import JOURNAL_NAME, RESULTS_NAME, read_rows
from raymerge.cluster.run_folder import LOCK_NAME, MANIFEST_NAME, STATISTICS_JOURNAL_NAME, RunFolder
from raymerge.cluster.store_claim import read_claim
from raymerge.merge_actors.errors import CheckpointError, OutputError
from raymerge.merge_actors.storage.folders import entries, exists
from raymerge.merge_actors.storage.uris import is_remote, without_file_scheme
from raymerge.stats.statistics_file import MANIFEST

#: What makes a folder an output: of a merge, of a measurement.
_MANIFESTS = (MANIFEST_NAME, MANIFEST)

#: A run may end while its journal is read, and the next one begin: then what is there is looked at anew.
_MOST_LOOKS, _SECONDS_BETWEEN_LOOKS = 4, 0.2

State = Literal["running", "unfinished", "finished", "outputs below"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """A run as its folder shows it."""

    out: str
    state: State
    """An unfinished run has no driver: it was killed, or failed, and goes on with --resume. Of a folder that is no
    output itself, but holds some, nothing is known but that these are finished: a campaign, or several runs."""
    num_done: int
    """Finished tasks of the waves that have begun; of a measurement, layer groups; of a grid or a search, points."""
    num_tasks: int
    read_bytes: int
    write_bytes: int
    started: float | None
    """Seconds since 1970; of a resumed run, the first start."""
    last_progress: float | None
    """When the journal was written last, in seconds since 1970."""
    owner: str | None
    """Who runs it: process, host and since when."""
    outputs: tuple[str, ...] = ()
    """Names of the finished outputs below, if OUT is none itself."""
    unit: Literal["tasks", "points"] = "tasks"
    """What is counted."""
    num_failed: int = 0
    """Points that raised: rows with an error, run again with --resume."""

    def to_mapping(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return dataclasses.asdict(self)

    def text(self, now: float | None = None) -> str:
        """Return it in words.

        Args:
            now: seconds since 1970, to say how long ago something was; None for this moment.
        """
        if self.state == "finished":
            return f"{self.out}: finished{self._points()}"
        if self.state == "outputs below":
            return f"{self.out}: no run under way; finished below: {', '.join(self.outputs)}"
        now = time.time() if now is None else now
        parts = [f"{self.out}: {self.state}"]
        if self.num_tasks:
            parts.append(f"{self.num_done:,} of {self.num_tasks:,} {self.unit}{self._failed()}")
        else:
            parts.append("no task finished yet")
        if moved := self.read_bytes + self.write_bytes:
            parts.append(f"{moved / 1e9:.1f} GB moved")
        if self.last_progress is not None:
            parts.append(f"last {self.unit[:-1]} {max(0.0, now - self.last_progress):.0f} s ago")
        parts.append(self.owner if self.owner and self.state == "running" else "go on with --resume")
        return ", ".join(parts)

    def _points(self) -> str:
        return f", {self.num_done:,} points{self._failed()}" if self.unit == "points" else ""

    def _failed(self) -> str:
        return f" ({self.num_failed:,} failed)" if self.num_failed else ""


def run_status(out: str | os.PathLike[str]) -> RunStatus:
    """Return where the run for OUT stands.

    Args:
        out: the output folder of a merge, a measurement, a grid or a search, local or in an object store.

    Raises:
        OutputError: there is neither an output, in OUT or right below it, nor a run for it.
    """
    place = without_file_scheme(os.fspath(out))
    for _ in range(_MOST_LOOKS - 1):
        with contextlib.suppress(
            FileNotFoundError, CheckpointError
        ):  # a run that ends takes its journal away
            return _grid(place) or _look(place)
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    return _grid(place) or _look(place)


def _look(place: str) -> RunStatus:
    folder = RemoteRunFolder(place, is_campaign=False) if is_remote(place) else RunFolder(place)
    owner, is_alive = (
        store_lock.owner_of(folder.path)
        if is_remote(place)
        else local_lock.owner_of(os.path.join(folder.path, LOCK_NAME))
    )
    headers, num_done, moved, last = [], 0, [0, 0], None
    for number in itertools.count():  # one journal for each wave that has begun
        path = folder.journal_path + (f".{number}" if number else "")
        if not folder.has_journal(path):
            break
        header, reports = read_journal(path)
        headers.append(header)
        num_done += len(reports)
        moved = [
            moved[0] + sum(r.read_bytes for r in reports),
            moved[1] + sum(r.write_bytes for r in reports),
        ]
        last = _modified(path)
    measured = None if is_remote(place) else _measured(folder.path)
    is_claimed = is_remote(place) and bool(read_claim(folder.path))  # killed before its journal was there
    if not (headers or is_alive or is_claimed) and measured is None:
        outputs = _outputs(folder.out)
        state: State = "finished" if not outputs else "outputs below"
        return dataclasses.replace(_status(folder.out, state, [], 0, (0, 0), None, None), outputs=outputs)
    state = "running" if is_alive else "unfinished"
    if measured is not None:
        headers, num_done, last = measured
    return _status(folder.out, state, headers, num_done, (moved[0], moved[1]), last, owner)


def _grid(place: str) -> RunStatus | None:
    """Return where the grid or the search in a folder stands; None if there is none."""
    folder = open_grid_folder(place)
    listed = {entry.name: entry for entry in entries(folder.out)}
    if grid_folder.RUN_NAME not in listed:
        return None
    owner, is_alive = (
        store_lock.owner_of(folder.out)
        if is_remote(folder.out)
        else local_lock.owner_of(folder.file(grid_folder.LOCK_NAME))
    )
    with folder.readable():
        description = folder.read_json(grid_folder.RUN_NAME)
        if not isinstance(description, dict) or "num_points" not in description:
            return None  # of something else
        rows = [row for row in read_rows(folder.path, ("split", "status")) if row["split"] == "validation"]
    num_points = int(description["num_points"])
    is_done = BEST_NAME in listed and len(rows) >= num_points
    state: State = "running" if is_alive else "finished" if is_done else "unfinished"
    times = [listed[name].modified_seconds for name in (JOURNAL_NAME, RESULTS_NAME) if name in listed]
    last = max((each for each in times if each is not None), default=None)
    headers = [{"num_tasks": num_points}]
    found = _status(folder.out, state, headers, len(rows), (0, 0), last if rows else None, owner)
    num_failed = sum(row["status"] == "failed" for row in rows)
    return dataclasses.replace(found, unit="points", num_failed=num_failed)


def _status(
    out: str,
    state: State,
    headers: list[dict[str, Any]],
    num_done: int,
    moved: tuple[int, int],
    last: float | None,
    owner: str | None,
) -> RunStatus:
    return RunStatus(
        out=out,
        state=state,
        num_done=num_done,
        num_tasks=sum(int(header.get("num_tasks", 0)) for header in headers),
        read_bytes=moved[0],
        write_bytes=moved[1],
        started=headers[0].get("started") if headers else None,
        last_progress=last,
        owner=owner,
    )


def _outputs(out: str) -> tuple[str, ...]:
    """Return the names of the outputs right below a folder; none if it is an output itself.

    Raises:
        OutputError: it is none, and there are none.
    """
    if not is_remote(out) and not os.path.lexists(out):
        raise OutputError(f"{out} does not exist, and no run for it is under way")
    listed = entries(out)
    if any(entry.name in _MANIFESTS for entry in listed):
        return ()
    names = [entry.name for entry in listed if entry.is_folder]
    found = [name for name in names if any(exists(f"{out}/{name}/{each}") for each in _MANIFESTS)]
    if not found:
        raise OutputError(
            f"{out} is no output of raymerge and holds none, and no run for it is under way; name the OUT of a merge, "
            "of statistics, a grid or a search"
        )
    return tuple(found)


def _measured(folder: str) -> tuple[list[dict[str, Any]], int, float | None] | None:
    """Return what the journal of a measurement says, as that of a merge; None if there is none."""
    path = os.path.join(folder, STATISTICS_JOURNAL_NAME)
    try:
        with open(path, encoding="utf-8") as file:
            journal = json.load(file)
        return [{"num_tasks": len(journal["groups_end"])}], len(journal["groups"]), _modified(path)
    except (OSError, ValueError, KeyError):
        return None


def _modified(path: str) -> float | None:
    if is_remote(path):
        times = [entry.modified_seconds for entry in entries(path) if entry.modified_seconds is not None]
        return max(times, default=None)
    return os.stat(path).st_mtime
