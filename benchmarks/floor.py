"""The floor of any merge: read every input once, write the output's size once, compute nothing.

    python benchmarks/floor.py .bench/models/1.1b/base .bench/models/1.1b/fine_tune_*

Reads are positioned reads of 8 MiB into one reused buffer per worker; the output is preallocated
and written with positioned writes. Workers are threads: both calls release the interpreter, and
so the start of processes is not counted. Warm page cache unless --cold, which drops the inputs
from the cache before each run (posix_fadvise needs no privilege).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

BUFFER_BYTES = 8 << 20


def floor_seconds(
    models: Sequence[Path],
    scratch: Path,
    *,
    workers: int,
    runs: int = 3,
    is_cold: bool = False,
    num_outputs: int = 1,
) -> dict[str, float]:
    """Time the floor for merging `models` into one or more models of the first one's size.

    Args:
        models: the folders of all inputs.
        scratch: an existing folder on the file system that a merge would write to.
        workers: number of threads.
        runs: how often to measure, after one run that warms the cache (none when cold).
        is_cold: drop the inputs from the page cache before each run.
        num_outputs: how many models are written.

    Returns:
        bytes read and written, and the least, median and greatest seconds.
    """
    files = [weights for model in models for weights in weight_files(model)]
    sizes = [file.stat().st_size for file in files]
    written = num_outputs * sum(file.stat().st_size for file in weight_files(models[0]))
    if not is_cold:
        _one_run(files, sizes, written, scratch, workers)
    seconds = []
    for _ in range(runs):
        if is_cold:
            evict(files)
        seconds.append(_one_run(files, sizes, written, scratch, workers))
    return {
        "bytes_read": sum(sizes),
        "bytes_written": written,
        "min_seconds": min(seconds),
        "median_seconds": statistics.median(seconds),
        "max_seconds": max(seconds),
    }


def weight_files(model: Path) -> list[Path]:
    """Return a model folder's weight files."""
    return sorted(model.glob("*.safetensors"))


def evict(files: Sequence[Path]) -> None:
    """Drop files from the page cache; dirty pages are written first."""
    for file in files:
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _one_run(files: Sequence[Path], sizes: Sequence[int], written: int, scratch: Path, workers: int) -> float:
    # Buffers exist before the clock starts: a merge's workers reuse theirs as well.
    buffers = [bytearray(BUFFER_BYTES) for _ in range(workers)]
    for buffer in buffers:
        buffer[::4096] = bytes(len(buffer[::4096]))
    inputs = [os.open(file, os.O_RDONLY) for file in files]
    with tempfile.TemporaryFile(dir=scratch) as out:
        reads = [
            (source, at, min(BUFFER_BYTES, size - at))
            for source, size in zip(inputs, sizes, strict=True)
            for at in range(0, size, BUFFER_BYTES)
        ]
        writes = [(at, min(BUFFER_BYTES, written - at)) for at in range(0, written, BUFFER_BYTES)]
        threads = [
            threading.Thread(target=_work, args=(reads[i::workers], writes[i::workers], out.fileno(), buffer))
            for i, buffer in enumerate(buffers)
        ]
        begin = time.perf_counter()
        os.posix_fallocate(out.fileno(), 0, written)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - begin
    for source in inputs:
        os.close(source)
    return seconds


def _work(
    reads: Sequence[tuple[int, int, int]], writes: Sequence[tuple[int, int]], out: int, buffer: bytearray
) -> None:
    view = memoryview(buffer)
    for source, at, count in reads:
        done = 0
        while done < count:
            done += os.preadv(source, [view[done:count]], at + done)
    for at, count in writes:
        done = 0
        while done < count:
            done += os.pwrite(out, view[done:count], at + done)


def main() -> None:
    """Parse the options, measure, print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", type=Path, nargs="+", help="the folders of all inputs")
    parser.add_argument("--scratch", type=Path, help="folder of the output (default: beside the first model)")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--cold", action="store_true")
    options = parser.parse_args()
    scratch = options.scratch or options.models[0].parent
    result = floor_seconds(
        options.models, scratch, workers=options.workers, runs=options.runs, is_cold=options.cold
    )
    moved = result["bytes_read"] + result["bytes_written"]
    print(json.dumps({**result, "gb_per_s": round(moved / result["min_seconds"] / 1e9, 2)}))


if __name__ == "__main__":
    main()
