"""Merge sixteen recipes over the same four checkpoints in one campaign, against the floor.

    python benchmarks/campaign_floor.py

The floor reads the four inputs once and writes sixteen outputs, and computes nothing. The campaign runs in a
session whose workers are up. Page cache warm; before every run the outputs of the one before are deleted and
dirty pages are written back. The recipes are task arithmetic, DARE and linear with different weights.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from floor import floor_seconds
from kept_file import Report, Spread, add_folder_options
from local_cluster import LocalCluster, local_cluster
from make_models import make_models
from model_shapes import LLAMA_SHAPES
from processes import run

#: What was promised: seconds against those of the floor.
_MOST_TIMES_THE_FLOOR = 1.5
_CAMPAIGN = """
import sys, time
import raymerge
recipes, out, workers, small = sys.argv[1:]
with raymerge.Session(workers=int(workers), device="cpu") as session:
    session.merge(small, out + "-small", overwrite=True)
    time.sleep(5)  # until every worker is up
    session.merge(small, out + "-small", overwrite=True)
    begin = time.perf_counter()
    result = session.merge(recipes, out)
    print(time.perf_counter() - begin, result.totals.read_bytes, result.totals.write_bytes)
"""


def write_recipes(folder: Path, base: Path, fine_tunes: Sequence[Path], count: int) -> Path:
    """Write recipes over the same inputs, and return their folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for number in range(count):
        method = ("task_arithmetic", "dare_linear", "linear")[number % 3]
        weight = 0.2 + 0.02 * number
        parameters: dict[str, Any] = {"weight": weight}
        if method == "dare_linear":
            parameters["density"] = 0.5
        recipe: dict[str, Any] = {"merge_method": method, "dtype": "bfloat16"}
        models = [base, *fine_tunes] if method == "linear" else fine_tunes
        recipe["models"] = [{"model": os.fspath(model), "parameters": parameters} for model in models]
        if method != "linear":
            recipe["base_model"] = os.fspath(base)
        (folder / f"recipe_{number:02}.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return folder


def main() -> None:
    """Parse the options, measure, keep the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=LLAMA_SHAPES, default="1.1b")
    parser.add_argument("--recipes", type=int, default=16)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--runs", type=int, default=3)
    add_folder_options(parser)
    options = parser.parse_args()
    models = options.work / "models"
    base, fine_tunes = make_models(models / options.shape, LLAMA_SHAPES[options.shape])
    out = options.work / "campaign"
    recipes = write_recipes(options.work / "campaign_recipes", base, fine_tunes, options.recipes)
    tiny = make_models(models / "tiny", LLAMA_SHAPES["tiny"])
    small = write_recipes(options.work / "campaign_small", *tiny, 2)
    _cleared(out)
    floor = floor_seconds(
        [base, *fine_tunes],
        options.work,
        workers=options.workers,
        runs=options.runs,
        num_outputs=options.recipes,
    )
    with local_cluster(options.workers) as cluster:
        done = [_campaign(recipes, out, options.workers, small, cluster) for _ in range(options.runs)]
    _cleared(out)
    seconds = Spread.of([each[0] for each in done])
    ratio = seconds.median / floor["median_seconds"]
    report = Report(
        "campaign_floor",
        f"{options.recipes} recipes over four checkpoints in one campaign",
        {
            "shape": options.shape,
            "recipes": options.recipes,
            "workers": options.workers,
            "runs": options.runs,
            "page cache": "warm",
        },
    )
    report.text(
        f"Promised: at most {_MOST_TIMES_THE_FLOOR:g} times the floor. Measured: {ratio:.2f} times (medians). Seconds, "
        "least / median / greatest."
    )
    of_floor = Spread(
        min=floor["min_seconds"],
        median=floor["median_seconds"],
        max=floor["max_seconds"],
        runs=options.runs,
    )
    rows = [
        (
            "floor: inputs read once, outputs written",
            of_floor,
            *_gb(floor["bytes_read"], floor["bytes_written"]),
        ),
        ("campaign", seconds, *_gb(*done[0][1:])),
    ]
    report.table(("", "seconds", "GB read", "GB written"), rows)
    report.data = {"floor": floor, "campaign": seconds, "runs": done, "times_the_floor": ratio}
    report.write(options.results)


def _campaign(
    recipes: Path, out: Path, workers: int, small: Path, cluster: LocalCluster
) -> tuple[float, int, int]:
    """Run the campaign once: seconds, bytes read, bytes written."""
    _cleared(out)
    done = run(
        [sys.executable, "-c", _CAMPAIGN, recipes, out, str(workers), small],
        variables=cluster.variables,
        other_roots=[cluster.pid],
    )
    shutil.rmtree(f"{out}-small")
    seconds, read_bytes, write_bytes = done.stdout.split()
    print(f"campaign {float(seconds):,.2f} s", file=sys.stderr, flush=True)
    return float(seconds), int(read_bytes), int(write_bytes)


def _gb(*counts: float) -> list[str]:
    return [f"{count / 1e9:.2f}" for count in counts]


def _cleared(out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    os.sync()


if __name__ == "__main__":
    main()
