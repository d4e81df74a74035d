"""Checks before a job is sent, of the commands that have no --dry-run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def check_without_running(command: str, options: Mapping[str, Any]) -> None:
    """Raise what a command would refuse at its beginning; a command with a dry run says so itself.

    Args:
        command: its name.
        options: its parsed options and arguments.

    Raises:
        RaymergeError: as the command would.
    """
    if command == "stats":
        from raymerge.cluster.job_check import check_measurement

        check_measurement(options["model"], options["data"], allow_pickle=options["allow_pickle"])
    elif command == "evaluate":
        from raymerge.cluster.evaluate import check_evaluation

        names = {"split", "allow_pickle", "trust_remote_code"}
        check_evaluation(options["model"], options["tasks"], **{name: options[name] for name in names})
