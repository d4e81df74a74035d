"""Run raymerge as its users run it: the command, and a session whose workers are up."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from local_cluster import AUTHENTICATION, LocalCluster
from processes import Run, run

_IN_SESSION = """
import sys, time
import raymerge
recipe, out, workers, small = sys.argv[1:]
with raymerge.Session(workers=int(workers), device="cpu") as session:
    session.merge(small, out + "-small", overwrite=True)
    time.sleep(5)  # until every worker is up
    session.merge(small, out + "-small", overwrite=True)
    begin = time.perf_counter()
    session.merge(recipe, out)
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


def merge_in_session(recipe: Path, out: Path, workers: int, cluster: LocalCluster, small: Path) -> Run:
    """Run `Session.merge` on workers that have merged before; the time is that of the call alone.

    It counts reading the recipe and headers, planning, merging and the commit, but not the start
    of Ray, of its workers and of torch in them: what the floor can be compared with.
    """
    done = run(
        [sys.executable, "-c", _IN_SESSION, recipe, out, str(workers), small],
        variables=cluster.variables,
        other_roots=[cluster.pid],
    )
    done.seconds = float(done.stdout)
    shutil.rmtree(f"{out}-small")
    return done
