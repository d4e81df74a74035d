"""Prove a CUDA device's results equal to the CPU's, and time every method and a whole merge on it.

    python benchmarks/gpu.py

Checks: the words of the random masks, bit for bit; every method's output in bf16, within one unit
in the last place of the CPU's; a whole merge, file against file, likewise. Rates: every method
against the device's own copy, and the whole merge (in-process backend) against pinned copies over
PCIe and against reading the files. Needs torch with CUDA and no Ray. Exit code 0 when all checks
hold, 1 when one fails, 2 without a device.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from comparison import Differences, compare, ulps
from floor import evict, floor_seconds, weight_files
from kept_file import Report, Spread, add_folder_options
from make_models import make_models
from method_examples import example, make_tensors
from model_shapes import LLAMA_SHAPES
from recipes import inputs, write_recipe

from raymerge.merge_actors.methods import METHODS
from raymerge.merge_actors.randomness import fill_words, stream_key

#: (begin, count) of compared words: one, across a run's edge, many, and far into a stream.
_RANGES = ((0, 1), (65_530, 100), (12_345, 5 << 20), ((1 << 40) + 7, 3 << 20))
_CACHES = ("cold", "warm")
_MERGED = ("task_arithmetic", "dare_linear", "ties")


def main() -> None:
    """Parse the options, check, measure, keep the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=LLAMA_SHAPES, default="1.1b", help="of the whole merge")
    parser.add_argument("--mebi-elements", type=int, default=256, help="of the tensors that methods run on")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1, help="of the whole merge")
    add_folder_options(parser)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu.py needs a CUDA device, and torch sees none.", file=sys.stderr)
        sys.exit(2)
    device = torch.device("cuda")
    report = Report(
        "gpu",
        "CPU and CUDA: equality and rates",
        {
            "shape": f"{options.shape} (base and 3 fine-tunes, bf16)",
            "elements per method": f"{options.mebi_elements << 20:,}",
            "runs": options.runs,
            "workers": options.workers,
            "cuda": torch.version.cuda,
        },
        hardware=torch.cuda.get_device_name(),
    )
    failures = _check_masks(report, device)
    failures += _check_methods(report, device)
    _time_methods(report, device, options)
    failures += _whole_merges(report, options)
    report.data["failures"] = failures
    report.text("All checks hold." if not failures else "FAILED: " + "; ".join(failures))
    report.write(options.results)
    sys.exit(1 if failures else 0)


def _check_masks(report: Report, device: torch.device) -> list[str]:
    """Compare words for short, long and unaligned ranges at low and high offsets."""
    num_words = 0
    failures = []
    for seed, (begin, count) in enumerate(_RANGES):
        on_cpu, on_cuda = (_words(seed, begin, count, where) for where in (torch.device("cpu"), device))
        num_words += count
        num_different = int((on_cpu != on_cuda).sum())
        if num_different:
            failures.append(f"{num_different:,} mask words of {count:,} from {begin:,} differ")
    report.text(f"## Masks\n\n{num_words:,} words compared; {len(failures)} of {len(_RANGES)} ranges differ.")
    return failures


def _words(seed: int, begin: int, count: int, device: torch.device) -> torch.Tensor:
    words_P = torch.empty(count, dtype=torch.int32, device=device)
    key = stream_key(seed, "model", "tensor")
    return fill_words(words_P, torch.empty_like(words_P), key, begin).cpu()


def _check_methods(report: Report, device: torch.device) -> list[str]:
    """Compare each method's bf16 output on both devices, for a matrix and for an odd vector."""
    rows = []
    failures = []
    for shape in ((1024, 4096), (1_000_003,)):
        on_cpu = make_tensors(shape, torch.device("cpu"))
        on_cuda = [tensor.to(device) for tensor in on_cpu]
        for name in METHODS:
            outs = []
            for tensors in (on_cpu, on_cuda):
                out_P = torch.empty(on_cpu[0].numel(), dtype=torch.bfloat16, device=tensors[0].device)
                example(name, tensors).merge_into(out_P)
                outs.append(out_P.cpu())
            apart = ulps(*outs)
            worst, share = int(apart.max()), float((apart == 0).double().mean())
            rows.append((name, " x ".join(map(str, shape)), worst, f"{share:.5%}"))
            report.data[f"equality {name} {shape}"] = {"max_ulps": worst, "equal_fraction": share}
            if worst > 1:
                failures.append(f"{name} on {shape} is {worst} units in the last place from the CPU's")
    report.text("## Methods: CUDA against CPU, bf16 output")
    report.table(("method", "shape", "greatest ulps", "equal"), rows)
    return failures


def _time_methods(report: Report, device: torch.device, options: argparse.Namespace) -> None:
    tensors = make_tensors((options.mebi_elements << 8, 4096), device)
    out_P = torch.empty(tensors[0].numel(), dtype=torch.bfloat16, device=device)
    moved = 2 * out_P.numel() * out_P.element_size()
    copy = _rate(lambda: out_P.copy_(tensors[0].reshape(-1)), moved, options.runs)
    rows: list[tuple[object, ...]] = [("(copy on the device)", copy, "1.00")]
    report.data["device copy GB/s"] = copy
    for name in METHODS:
        made = example(name, tensors)
        rate = _rate(partial(made.merge_into, out_P), made.moved_bytes, options.runs)
        rows.append((name, rate, f"{rate.median / copy.median:.2f}"))
        report.data[f"{name} GB/s"] = rate
    report.text("## Methods: rate\n\nGB/s of inputs and output, each once; least / median / greatest.")
    report.table(("method", "GB/s", "of the device's copy"), rows)


def _rate(action: Callable[[], object], moved_bytes: int, runs: int) -> Spread:
    """Time an action on the device after one warm-up; GB/s."""
    action()
    rates = []
    for _ in range(runs):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        action()
        torch.cuda.synchronize()
        rates.append(moved_bytes / (time.perf_counter() - begin) / 1e9)
    return Spread.of(rates)


def _whole_merges(report: Report, options: argparse.Namespace) -> list[str]:
    """Merge files on both devices; compare the outputs, and the times with PCIe and storage."""
    base, fine_tunes = make_models(options.work / "models" / options.shape, LLAMA_SHAPES[options.shape])
    out = options.work / "out"
    out.mkdir(parents=True, exist_ok=True)
    pcie = _pcie(options.runs)
    report.text("## Whole merges\n\nIn process, no Ray. GB/s of inputs and output.")
    report.data |= {f"PCIe {direction} GB/s": rate for direction, rate in pcie.items()}
    report.table(("pinned copy", "GB/s"), list(pcie.items()))
    rows = []
    failures = []
    for method in _MERGED:
        recipe = write_recipe(out / f"{method}.yaml", method, base, fine_tunes)
        models = inputs(method, base, fine_tunes)
        read = sum(file.stat().st_size for model in models for file in weight_files(model))
        written = read // len(models)
        sizes = {"workers": options.workers, "runs": options.runs}
        floors = {cache: floor_seconds(models, out, **sizes, is_cold=cache == "cold") for cache in _CACHES}
        # What the wire allows: inputs go up and the output comes down at the same time.
        wire = read / pcie["host to device"].median / 1e9
        for device in ("cpu", "cuda"):
            for cache in _CACHES:
                spread = _merge_seconds(recipe, out / device, device, cache == "cold", models, options)
                limit = floors[cache]["median_seconds"]
                rate = f"{(read + written) / spread.median / 1e9:.2f}"
                rows.append((method, device, cache, spread, rate, f"{limit:.2f}", f"{wire:.2f}"))
                report.data[f"merge {method} {device} {cache}"] = {"seconds": spread, "floor": floors[cache]}
        found = compare(out / "cpu", out / "cuda", method, base, fine_tunes)
        if found.num_within_one_ulp < found.num_elements or found.only_in_one:
            failures.append(f"merged files of {method} differ: {_difference(found)}")
        report.data[f"files {method}"] = _difference(found)
    shutil.rmtree(out)
    header = ("method", "device", "page cache", "seconds", "GB/s", "storage floor s", "PCIe floor s")
    report.table(header, rows)
    return failures


def _difference(found: Differences) -> dict[str, Any]:
    return {
        "elements": found.num_elements,
        "equal": found.num_equal,
        "within_one_ulp": found.num_within_one_ulp,
        "only_in_one": found.only_in_one,
    }


def _merge_seconds(
    recipe: Path, out: Path, device: str, is_cold: bool, models: list[Path], options: argparse.Namespace
) -> Spread:
    import raymerge

    seconds = []
    for _ in range(options.runs):
        shutil.rmtree(out, ignore_errors=True)
        os.sync()
        if is_cold:
            evict([file for model in models for file in weight_files(model)])
        begin = time.perf_counter()
        raymerge.merge(recipe, out, workers=options.workers, device=device, in_process=True, overwrite=True)
        seconds.append(time.perf_counter() - begin)
    return Spread.of(seconds)


def _pcie(runs: int) -> dict[str, Spread]:
    count = 1 << 30
    host = torch.empty(count, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(count, dtype=torch.uint8, device="cuda")
    return {
        "host to device": _rate(lambda: device.copy_(host, non_blocking=True), count, runs),
        "device to host": _rate(lambda: host.copy_(device, non_blocking=True), count, runs),
    }


if __name__ == "__main__":
    main()
