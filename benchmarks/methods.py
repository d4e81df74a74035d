"""Time of every method's arithmetic on one CPU core: nanoseconds per element, no files, no Ray.

    python benchmarks/methods.py

A base and three fine-tunes of 16 Mi bf16 elements in memory (4096 x 4096), measuring passes and
the rounding to bf16 included. The copy of one bf16 tensor stands beside it as the unit.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from kept_file import Report, Spread, add_folder_options
from method_examples import example, make_tensors

from raymerge.merge_actors.kernels.build import load_kernels
from raymerge.merge_actors.methods import METHODS


def nanoseconds(action: Callable[[], object], num_elements: int, runs: int) -> Spread:
    """Time an action after one warm-up; nanoseconds per element."""
    action()
    values = []
    for _ in range(runs):
        begin = time.perf_counter()
        action()
        values.append((time.perf_counter() - begin) / num_elements * 1e9)
    return Spread.of(values)


def main() -> None:
    """Parse the options, measure, keep the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=4096, help="of 4,096 elements each")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--threads", type=int, default=1, help="of torch; a merge actor uses one per core")
    add_folder_options(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tensors = make_tensors((options.rows, 4096), torch.device("cpu"))
    num_elements = tensors[0].numel()
    out_P = torch.empty(num_elements, dtype=torch.bfloat16)
    copy = nanoseconds(lambda: out_P.copy_(tensors[0].reshape(-1)), num_elements, options.runs)
    report = Report(
        "methods",
        "Arithmetic of every method on the CPU",
        {
            "elements": f"{num_elements:,}",
            "models": "base and 3 fine-tunes, bf16, in memory",
            "threads": options.threads,
            "runs": options.runs,
        },
    )
    kernels = load_kernels()
    rows: list[tuple[object, ...]] = [("(copy of one tensor)", copy, f"{4 / copy.median:.1f}", "-")]
    report.data["copy"] = copy
    for name in options.methods:
        made = example(name, tensors)
        spread = nanoseconds(partial(made.merge_into, out_P), num_elements, options.runs)
        fused: Spread | str = "-"
        if kernels.library is not None and made.merge_by_kernels_into(out_P, kernels.library):
            action = partial(made.merge_by_kernels_into, out_P, kernels.library)
            fused = report.data[f"{name} by kernels"] = nanoseconds(action, num_elements, options.runs)
        rows.append((name, spread, f"{made.moved_bytes / num_elements / spread.median:.1f}", fused))
        report.data[name] = spread
    report.text(
        "Nanoseconds per element of the output, least / median / greatest; GB/s counts every input and the "
        "output once."
    )
    report.table(("method", "eager, ns per element", "eager, GB/s", "kernels, ns per element"), rows)
    report.write(options.results)


if __name__ == "__main__":
    main()
