"""Run a grid of 64 points with raymerge, against 64 runs of mergekit 0.1.5 that are each loaded by transformers.

    python benchmarks/grid_versus_peer.py

lambda x density x method over three fine-tunes and their base. Ours is `raymerge grid` as its users run it: one
process that starts its own Ray, merges every point in memory and scores it on a few texts; the time that scoring took
is taken off, as it is not counted for the peer either. The peer merges one point for each method and density at
hand, four by default, and each result is loaded once by transformers; 64 take 64 times their mean. Page cache warm
for both.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from kept_file import Report, add_folder_options
from local_cluster import AUTHENTICATION
from make_models import make_models
from model_shapes import LLAMA_SHAPES
from peer import peer_merge, peer_python
from processes import run
from recipes import WEIGHTS

from raymerge.cluster.results import read_rows

#: What was promised, evaluation apart.
_LEAST_TIMES_AS_FAST = 20.0
METHODS = ("dare_linear", "ties")
DENSITIES = (0.1, 0.2, 0.4, 0.6)
LAMBDAS = (0.3, 0.5, 0.7, 0.9, 1.0, 1.1, 1.3, 1.5)
_LOAD = """
import sys, time
import torch, transformers
from transformers import AutoModelForCausalLM
begin = time.perf_counter()
AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
print(time.perf_counter() - begin)
"""


def recipe_of(
    base: Path, fine_tunes: Sequence[Path], method: Any, density: Any, scale: Any
) -> dict[str, Any]:
    """Return the recipe of a point, or of the grid for references instead of values."""
    return {
        "merge_method": method,
        "dtype": "bfloat16",
        "base_model": os.fspath(base),
        "models": [
            {"model": os.fspath(model), "parameters": {"weight": weight, "density": density}}
            for model, weight in zip(fine_tunes, WEIGHTS, strict=True)
        ],
        "parameters": {"lambda": scale},
    }


def write_grid(file: Path, base: Path, fine_tunes: Sequence[Path], texts: int) -> Path:
    """Write the grid and its data."""
    rows = file.with_suffix(".jsonl")
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"text": f"Text number {i} says a few words of no great weight."}) for i in range(texts)
    ]
    rows.write_text("\n".join(lines) + "\n")
    grid = {
        **recipe_of(base, fine_tunes, "$method", "$density", "$lambda"),
        "grid": {"lambda": list(LAMBDAS), "density": list(DENSITIES), "method": list(METHODS)},
        "evaluate": {
            "batch_tokens": 512,
            "tasks": [{"name": "text", "kind": "loss", "validation": os.fspath(rows)}],
        },
        "select": {"metric": "text.loss", "mode": "min"},
    }
    file.write_text(yaml.safe_dump(grid, sort_keys=False))
    return file


def main() -> None:
    """Parse the options, measure, keep the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=LLAMA_SHAPES, default="1.1b")
    parser.add_argument("--workers", type=int, help="evaluators (default: one)")
    parser.add_argument("--texts", type=int, default=16, help="that every point is scored on")
    parser.add_argument("--peer-python", type=Path, help="an interpreter that has mergekit 0.1.5")
    parser.add_argument("--peer-runs", type=int, default=4)
    parser.add_argument("--no-peer", action="store_true", help="measure raymerge only")
    add_folder_options(parser)
    options = parser.parse_args()
    python = None if options.no_peer else peer_python(options.peer_python)
    base, fine_tunes = make_models(options.work / "models" / options.shape, LLAMA_SHAPES[options.shape])
    work = options.work / "grid_versus_peer"
    shutil.rmtree(work, ignore_errors=True)
    _read_all([base, *fine_tunes])
    ours = _run_grid(
        write_grid(work / "grid.yaml", base, fine_tunes, options.texts), work / "out", options.workers
    )
    sources = sum(
        file.stat().st_size for model in (base, *fine_tunes) for file in model.glob("*.safetensors")
    )
    theirs = _run_peer(python, base, fine_tunes, work, options.peer_runs) if python else []
    shutil.rmtree(work)
    _report(ours, theirs, sources, options).write(options.results)


def _run_grid(source: Path, out: Path, workers: int | None) -> dict[str, Any]:
    command = [Path(sys.executable).parent / "raymerge", "grid", source, out, "--device", "cpu"]
    done = run([*command, *(["--workers", str(workers)] if workers else [])], variables=AUTHENTICATION)
    rows = read_rows(os.fspath(out))
    assert len(rows) == len(LAMBDAS) * len(DENSITIES) * len(METHODS), len(rows)
    assert {row["status"] for row in rows} == {"ok"}, [row["error"] for row in rows if row["error"]]
    of_method: dict[str, list[float]] = {}
    for row in rows:
        of_method.setdefault(row["axis.method"], []).append(row["merge_seconds"])
    found = {
        "seconds": done.seconds,
        "evaluate_seconds": sum(row["evaluate_seconds"] for row in rows) / (workers or 1),
        "bytes_read": sum(row["bytes_read"] for row in rows),
        "forward_passes": sum(row["num_forward_passes"] for row in rows),
        "reused_states": sum(row["num_reused_states"] for row in rows),
        "reused_directions": sum(row["num_reused_directions"] for row in rows),
        "median_merge_seconds": {
            method: sorted(seconds)[len(seconds) // 2] for method, seconds in of_method.items()
        },
        "peak_gib": max(peak.peak_bytes for peak in done.peaks) / 2**30,
    }
    print(f"raymerge grid: {found['seconds']:,.1f} s", file=sys.stderr, flush=True)
    return found


def _run_peer(
    python: Path, base: Path, fine_tunes: Sequence[Path], work: Path, num_runs: int
) -> list[dict[str, Any]]:
    """Merge and load a sample of the points: methods in turn, densities from both ends."""
    densities = [DENSITIES[0], DENSITIES[-1], *DENSITIES[1:-1]]
    sample = [(method, density) for density in densities for method in METHODS][:num_runs]
    found = []
    for method, density in sample:
        recipe = work / "peer.yaml"
        recipe.write_text(yaml.safe_dump(recipe_of(base, fine_tunes, method, density, 1.0), sort_keys=False))
        out = work / "peer"
        shutil.rmtree(out, ignore_errors=True)
        os.sync()
        merged = peer_merge(python, recipe, out)
        loaded = float(run([sys.executable, "-c", _LOAD, out], variables={"HF_HUB_OFFLINE": "1"}).stdout)
        found.append({"method": method, "density": density, "merge": merged.seconds, "load": loaded})
        print(
            f"mergekit {method} {density}: {merged.seconds:,.1f} + {loaded:.1f} s",
            file=sys.stderr,
            flush=True,
        )
    return found


def _report(
    ours: dict[str, Any], theirs: list[dict[str, Any]], sources: int, options: argparse.Namespace
) -> Report:
    num_points = len(LAMBDAS) * len(DENSITIES) * len(METHODS)
    apart = ours["seconds"] - ours["evaluate_seconds"]
    report = Report(
        "grid_versus_peer",
        f"A grid of {num_points} points against as many runs of mergekit",
        {
            "shape": options.shape,
            "evaluators": options.workers or 1,
            "lambda": f"{len(LAMBDAS)} values",
            "density": f"{len(DENSITIES)} values",
            "method": " and ".join(METHODS),
            "texts": options.texts,
            "page cache": "warm",
        },
    )
    rows = [
        ("whole command, seconds", f"{ours['seconds']:.1f}"),
        ("of it scoring", f"{ours['evaluate_seconds']:.1f}"),
        ("seconds a point, scoring apart", f"{apart / num_points:.2f}"),
        *(
            (f"median seconds of a merge, {method}", f"{seconds:.2f}")
            for method, seconds in ours["median_merge_seconds"].items()
        ),
        ("GB read from disk or its cache", f"{ours['bytes_read'] / 1e9:.2f} of {sources / 1e9:.2f}"),
        ("greatest process, GiB", f"{ours['peak_gib']:.1f}"),
    ]
    if theirs:
        each = [run["merge"] + run["load"] for run in theirs]
        total = sum(each) / len(each) * num_points
        ratio = total / apart
        report.text(
            f"Promised: at least {_LEAST_TIMES_AS_FAST:g} times as fast, scoring apart. Measured: {ratio:.0f} times "
            f"({total:,.0f} s extrapolated from {len(each)} runs, {apart:,.0f} s)."
        )
        report.table(
            ("mergekit, point", "merge, seconds", "load, seconds"),
            [
                (f"{r['method']}, density {r['density']}", f"{r['merge']:.1f}", f"{r['load']:.1f}")
                for r in theirs
            ],
        )
        report.data = {"times_as_fast": ratio, "peer_seconds": total}
    report.table(("raymerge grid", ""), rows)
    report.data |= {"ours": ours, "peer": theirs, "source_bytes": sources}
    return report


def _read_all(models: Sequence[Path]) -> None:
    """Bring the inputs into the page cache."""
    for model in models:
        for file in model.glob("*.safetensors"):
            with open(file, "rb", buffering=0) as stream:
                while stream.read(16 << 20):
                    pass


if __name__ == "__main__":
    main()
