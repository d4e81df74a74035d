"""Run raymerge as its users run it: the command, and the function in a warm process."""

from __future__ import annotations

import sys
from pathlib import Path

from local_cluster import AUTHENTICATION, LocalCluster
from processes import Run, run

_IN_PROCESS = """
import sys, time
import torch
import raymerge
options = {"workers": int(sys.argv[3]), "device": "cpu", "in_process": True, "overwrite": True}
begin = time.perf_counter()
raymerge.merge(sys.argv[1], sys.argv[2], **options)
print(time.perf_counter() - begin)
"""


def raymerge_merge(recipe: Path, out: Path, workers: int, cluster: LocalCluster | None = None) -> Run:
    """Run `raymerge merge` with its own Ray, or on a cluster."""
    command = Path(sys.executable).parent / "raymerge"
    return run(
        [
            command,
            "merge",
            recipe,
            out,
            "--workers",
            str(workers),
            "--device",
            "cpu",
            "--quiet",
            "--overwrite",
        ],
        variables=cluster.variables if cluster else AUTHENTICATION,
        other_roots=[cluster.pid] if cluster else [],
    )


def merge_in_process(recipe: Path, out: Path, workers: int) -> Run:
    """Run `raymerge.merge` on threads of one process; the time is that of the call alone.

    It counts reading the recipe and headers, planning, merging and the commit, but neither the
    imports nor Ray: what the floor can be compared with.
    """
    done = run([sys.executable, "-c", _IN_PROCESS, recipe, out, str(workers)])
    done.seconds = float(done.stdout)
    return done
