"""OUT of a grid or a search: its lock, what it was made from, and what a resumed run keeps.

results.parquet, journal.jsonl   one row per point (results.py)
run.json                         the file, its axes, metrics and selection
best.json, best-1/ ...           the winners (grid_export.py)
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from typing import Any

from raymerge.cluster import local_lock
from raymerge.cluster.grid_points import label_of
from raymerge.cluster.grid_spec import GridSpec
from raymerge.cluster.results import JOURNAL_NAME, RESULTS_NAME
from raymerge.cluster.select import Objective, Selection
from raymerge.merge_actors.errors import OutputError
from raymerge.merge_actors.files import write_error

RUN_NAME = "run.json"
BEST_NAME = "best.json"
LOCK_NAME = ".lock"


class GridFolder:
    """The folder of one grid or search, local or on a shared file system; `RemoteGridFolder` is that of a store."""

    def __init__(self, out: str) -> None:
        """Name the folder; nothing is touched."""
        #: what the user named, without a slash at its end
        self.out = out
        #: where results, journal and JSON files are read and written
        self.path = out

    def file(self, name: str) -> str:
        """Return the local path of a small file in it."""
        return os.path.join(self.path, name)

    def output(self, name: str) -> str:
        """Return the place of a checkpoint in it."""
        return f"{self.out}/{name}"

    def check_free(self, *, resume: bool, overwrite: bool) -> None:
        """Refuse a folder that holds something, unless the user said what to do with it.

        Raises:
            OutputError: with the way out.
        """
        if not os.path.lexists(self.path):
            return
        if not os.path.isdir(self.path):
            raise OutputError(f"{self.path} is a file; choose a folder")
        is_ours = os.path.exists(self.file(RUN_NAME))
        if not is_ours and set(os.listdir(self.path)) - {LOCK_NAME}:
            raise OutputError(f"{self.path} exists and holds no results of a grid; choose another folder")
        if is_ours and not (resume or overwrite):
            raise self.taken()

    def taken(self) -> OutputError:
        """Return the error for a folder that holds results already."""
        return OutputError(
            f"{self.out} holds results; go on with --resume, which keeps what still belongs to the file, or start "
            "anew with --overwrite"
        )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process alone; it is made if need be.

        Raises:
            OutputError: another run holds it, or it cannot be made.
        """
        with local_lock.locked(self.file(LOCK_NAME), self.out):
            yield

    @contextlib.contextmanager
    def readable(self) -> Iterator[None]:
        """Have the small files where `path` says for the block, without holding the folder."""
        yield

    def check(self) -> None:
        """Make sure that results still get to where they belong; asked whenever there is one."""

    def write_text(self, name: str, text: str) -> None:
        """Write a text beside the weights of a checkpoint.

        Raises:
            OutputError: it cannot be written.
        """
        path = self.output(name)
        try:
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise write_error(path, error) from error

    def clear(self) -> None:
        """Remove an earlier run's results and checkpoints; files that are not ours stay."""
        for name in sorted(os.listdir(self.path), key=RUN_NAME.__eq__):  # by which the rest is known for ours
            if name.startswith("best-") and os.path.isdir(self.file(name)):
                shutil.rmtree(self.file(name))
            elif name in (RESULTS_NAME, JOURNAL_NAME, RUN_NAME, BEST_NAME):
                os.remove(self.file(name))

    def keep_aside(self) -> str:
        """Copy the results to a name of their own, and return it."""
        name = f"results-{time.strftime('%Y%m%d-%H%M%S')}.parquet"
        shutil.copyfile(self.file(RESULTS_NAME), self.file(name))
        return name

    def write_json(self, name: str, value: Any) -> None:
        """Write a file, whole or not at all.

        Raises:
            OutputError: the disk is full or not writable.
        """
        path = self.file(name)
        try:
            with open(f"{path}.new", "w", encoding="utf-8") as file:
                json.dump(value, file, indent=1, default=str)
                file.write("\n")
            os.replace(f"{path}.new", path)
        except OSError as error:
            raise write_error(path, error) from error

    def read_json(self, name: str) -> Any:
        """Return the content of a file; None if there is none."""
        try:
            with open(self.file(name), encoding="utf-8") as file:
                return json.load(file)
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise OutputError(f"{self.file(name)} cannot be read: {error}") from error


def run_description(spec: GridSpec, *, kind: str, num_points: int) -> dict[str, Any]:
    """Return what run.json holds: enough to report on the results without the file."""
    return {
        "kind": kind,
        "name": spec.name,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "num_points": num_points,
        "axes": {
            axis.name: {
                "values": [label_of(value) for value in axis.values] or None,
                "range": dataclasses.asdict(axis.range) if axis.range else None,
            }
            for axis in spec.axes
        },
        "metrics": {name: spec.evaluation.higher_is_better(name) for name in spec.evaluation.metrics},
        "select": dataclasses.asdict(spec.selection),
        "recipe": spec.template,
        "evaluate": spec.evaluation.to_mapping(),
    }


def selection_of(description: Mapping[str, Any]) -> Selection:
    """Return the selection of a run.json."""
    return Selection(
        objectives=tuple(
            Objective(weights=tuple((name, weight) for name, weight in each["weights"]), mode=each["mode"])
            for each in description["select"]["objectives"]
        ),
        average_over=tuple(description["select"]["average_over"]),
    )
