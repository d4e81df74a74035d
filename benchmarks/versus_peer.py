"""Merge the same models by the same recipes with raymerge and with mergekit 0.1.5, side by side.

    python benchmarks/versus_peer.py

Per method, in this order: the floor; `raymerge merge` as a whole process that starts its own Ray;
the same on a running local cluster; `raymerge.merge` in a warm process; the peer, once. Page
cache warm for all: the floor reads the inputs first, and both programs have merged tiny models
before. Before every timed run the output of the one before is deleted and dirty pages are written
back. Outputs are then compared.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from comparison import compare, dare_statistics
from floor import floor_seconds
from kept_file import add_folder_options
from local_cluster import LocalCluster, local_cluster
from make_models import make_models
from model_shapes import LLAMA_SHAPES
from ours import merge_in_session, raymerge_merge
from peer import peer_merge, peer_python
from processes import Run
from recipes import DENSITIES, PEER_METHODS, inputs, write_recipe
from versus_peer_report import MethodResult, report_on


def main() -> None:
    """Parse the options, measure, keep the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=LLAMA_SHAPES, default="1.1b")
    parser.add_argument("--methods", nargs="+", choices=PEER_METHODS, default=list(PEER_METHODS))
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--runs", type=int, default=5, help="of raymerge and of the floor; the peer runs once"
    )
    parser.add_argument("--peer-python", type=Path, help="an interpreter that has mergekit 0.1.5")
    parser.add_argument("--no-peer", action="store_true", help="measure raymerge and the floor only")
    add_folder_options(parser)
    options = parser.parse_args()
    python = None if options.no_peer else peer_python(options.peer_python)
    models = options.work / "models"
    base, fine_tunes = make_models(models / options.shape, LLAMA_SHAPES[options.shape])
    out = options.work / "out"
    _warm_up(python, models / "tiny", out, options.workers)
    results: dict[str, MethodResult] = {}
    with local_cluster(options.workers) as cluster:
        for method in options.methods:
            recipe = write_recipe(out / f"{method}.yaml", method, base, fine_tunes)
            results[method] = _measure(method, recipe, base, fine_tunes, cluster, python, options)
    shutil.rmtree(out)
    report_on(results, python, options).write(options.results)


def _warm_up(python: Path | None, models: Path, out: Path, workers: int) -> None:
    """Merge tiny models once with each program, so that its code is in the page cache."""
    base, fine_tunes = make_models(models, LLAMA_SHAPES["tiny"])
    recipe = write_recipe(out / "tiny.yaml", "linear", base, fine_tunes)
    raymerge_merge(recipe, _cleared(out / "tiny"), workers)
    if python:
        peer_merge(python, recipe, _cleared(out / "tiny"))


def _measure(
    method: str,
    recipe: Path,
    base: Path,
    fine_tunes: Sequence[Path],
    cluster: LocalCluster,
    python: Path | None,
    options: argparse.Namespace,
) -> MethodResult:
    out = recipe.parent
    ours, theirs = out / "raymerge", out / "peer"
    floor = floor_seconds(inputs(method, base, fine_tunes), out, workers=options.workers, runs=options.runs)
    result = MethodResult(floor)
    for place, runs in ((None, result.whole), (cluster, result.on_cluster)):
        for _ in range(options.runs):
            runs.append(raymerge_merge(recipe, _cleared(ours), options.workers, place))
            _remark(method, "raymerge on a cluster" if place else "raymerge", runs[-1])
    for _ in range(options.runs):
        small = out / "tiny.yaml"
        result.in_session.append(merge_in_session(recipe, _cleared(ours), options.workers, cluster, small))
        _remark(method, "raymerge in a session", result.in_session[-1])
    if python:
        result.peer = peer_merge(python, recipe, _cleared(theirs))
        _remark(method, "mergekit", result.peer)
        result.differences = compare(ours, theirs, method, base, fine_tunes)
        if method == "dare_linear":
            result.dare = {
                name: dare_statistics(folder, base, fine_tunes, DENSITIES[method])
                for name, folder in (("raymerge", ours), ("mergekit", theirs))
            }
        shutil.rmtree(theirs)
    shutil.rmtree(ours)
    return result


def _cleared(out: Path) -> Path:
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    return out


def _remark(method: str, program: str, done: Run) -> None:
    print(f"{method}: {program} {done.seconds:,.2f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
