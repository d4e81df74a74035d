"""Peak memory of an actor at the default slice size, on a model and on one three times its size.

    python benchmarks/memory.py

Runs `raymerge merge` with its own Ray once per method and shape; the 3.4B models take 28 GB of
disk and the output 7 GB more.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys

from kept_file import Report, add_folder_options
from make_models import make_models
from model_shapes import LLAMA_SHAPES
from ours import raymerge_merge
from recipes import DENSITIES, WEIGHTS, write_recipe

#: What was promised for an actor's resident set.
_MAX_GIB = 1.5


def main() -> None:
    """Parse the options, measure, keep the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=LLAMA_SHAPES, default=["1.1b", "3.4b"])
    parser.add_argument("--methods", nargs="+", default=["task_arithmetic", "dare_linear", "ties"])
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    add_folder_options(parser)
    options = parser.parse_args()
    report = Report(
        "memory",
        "Peak memory of merge actors",
        {
            "models": f"base and {len(WEIGHTS)} fine-tunes, bf16",
            "densities": ", ".join(f"{method} {density}" for method, density in DENSITIES.items()),
            "workers": options.workers,
            "slice size": "default",
        },
    )
    rows = []
    for shape in options.shapes:
        sizes = LLAMA_SHAPES[shape].tensors()
        num_parameters = sum(tensor.num_elements for tensor in sizes)
        largest_mib = max(tensor.num_bytes for tensor in sizes) >> 20
        base, fine_tunes = make_models(options.work / "models" / shape, LLAMA_SHAPES[shape])
        for method in options.methods:
            recipe = write_recipe(options.work / "out" / f"{method}.yaml", method, base, fine_tunes)
            out = recipe.with_suffix("")
            shutil.rmtree(out, ignore_errors=True)
            done = raymerge_merge(recipe, out, options.workers)
            actors = [peak for peak in done.peaks if peak.role == "actor"]
            resident = max(peak.peak_bytes for peak in actors)
            private = max(peak.peak_private_bytes for peak in actors)
            driver = done.peak_bytes("driver")
            print(f"{shape} {method}: actor {resident >> 20} MiB", file=sys.stderr, flush=True)
            mib = (resident >> 20, private >> 20, driver >> 20)
            rows.append((shape, f"{num_parameters:,}", largest_mib, method, len(actors), *mib))
            report.data[f"{shape} {method}"] = {
                "actor_bytes": [peak.peak_bytes for peak in actors],
                "actor_private_bytes": [peak.peak_private_bytes for peak in actors],
                "driver_bytes": driver,
                "seconds": done.seconds,
            }
    shutil.rmtree(options.work / "out")
    report.text(
        f"Promised: an actor stays under {_MAX_GIB} GiB at the default slice size, and needs no more for a "
        "model three times the size. MiB, the greatest of all actors; `private` is without the pages of "
        "shared libraries and shared memory."
    )
    report.table(
        ("shape", "parameters", "largest tensor", "method", "actors", "resident", "private", "driver"), rows
    )
    report.write(options.results)


if __name__ == "__main__":
    main()
