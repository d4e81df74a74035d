"""Regroup tasks by the output files that they fill: an object store takes whole files only.

A file is made by one worker, so all tasks that write to it become one. Pieces that read the same inputs are one
piece even if they fill several files (recipes of a campaign, a layer stacked twice): such files are made together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from raymerge.merge_actors.task import FileTask, MergeTask, OutputObject, Piece, SolveTask


def tasks_by_file(
    tasks: Sequence[MergeTask | SolveTask], objects: Mapping[str, OutputObject]
) -> list[FileTask]:
    """Return a task per output file, or per files that share inputs, in the order of the given tasks.

    Args:
        tasks: all that write the files.
        objects: every file by its URI.
    """
    root = _joined(tasks)
    parts: dict[str, list[MergeTask | SolveTask]] = {}
    for task in tasks:
        if isinstance(task, SolveTask):
            parts.setdefault(root[task.jobs[0].file], []).append(task)
            continue
        by_file: dict[str, list[Piece]] = {}
        for piece in task.pieces:
            by_file.setdefault(root[piece.jobs[0].file], []).append(piece)
        for file, pieces in by_file.items():
            states = {job.state for piece in pieces for job in piece.jobs if job.state is not None}
            part = dataclasses.replace(task, pieces=tuple(pieces), states=tuple(sorted(states)))
            parts.setdefault(file, []).append(part)
    files: dict[str, list[OutputObject]] = {}
    for uri, each in objects.items():
        files.setdefault(root[uri], []).append(each)
    return [
        FileTask(
            number=number,
            parts=tuple(of_file),
            files=tuple(files[file]),
            states=tuple(sorted({state for part in of_file for state in part.states})),
        )
        for number, (file, of_file) in enumerate(parts.items())
    ]


def _joined(tasks: Sequence[MergeTask | SolveTask]) -> dict[str, str]:
    """Return for every file the first of those that have to be made together (union-find)."""
    parent: dict[str, str] = {}

    def root(file: str) -> str:
        parent.setdefault(file, file)
        while parent[file] != file:
            parent[file] = parent[parent[file]]
            file = parent[file]
        return file

    for task in tasks:
        groups = [task.jobs] if isinstance(task, SolveTask) else [piece.jobs for piece in task.pieces]
        for jobs in groups:
            first = root(jobs[0].file)
            for job in jobs[1:]:
                parent[root(job.file)] = first
    return {file: root(file) for file in parent}
