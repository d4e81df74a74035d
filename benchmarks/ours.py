"""Run `raymerge merge` as its users run it, and read what it reports."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from local_cluster import AUTHENTICATION, LocalCluster
from processes import Run, run


def raymerge_merge(recipe: Path, out: Path, workers: int, cluster: LocalCluster | None = None) -> Run:
    """Run `raymerge merge` with its own Ray, or on a cluster."""
    command = Path(sys.executable).parent / "raymerge"
    return run(
        [command, "merge", recipe, out, "--workers", str(workers), "--quiet", "--json"],
        variables=cluster.variables if cluster else AUTHENTICATION,
        other_roots=[cluster.pid] if cluster else [],
    )


def merge_seconds(done: Run) -> float:
    """Return the seconds that raymerge itself reports, plan to commit, without start-up."""
    return float(json.loads(done.stdout)["seconds"])
