"""A merge against what its storage gives to a plain concurrent reader and writer: on the disk and on an S3 server.

    python benchmarks/storage.py                              # small models, an S3 server of its own (moto)
    python benchmarks/storage.py --uri s3://bucket/scratch    # another store; credentials from the environment

The plain program reads every input once, 8 MiB a request, and writes as many bytes as the output has, in as many
files: on the disk as `floor.py` does, in a store with pyarrow alone, as many requests in flight as the merge has.
The merge is `Session.merge` of three fine-tunes by task arithmetic, headers, journal and commit included, on workers
that have merged before, so that neither side starts anything. The disk is measured twice: with the inputs dropped
from the page cache before every run, which is the disk, and with them in it, which is memory against arithmetic.
The aim is a merge within 1.3 times the plain program.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from floor import BUFFER_BYTES, evict, floor_seconds, weight_files
from kept_file import Report, Spread, add_folder_options
from make_models import make_models
from model_shapes import LLAMA_SHAPES
from recipes import write_recipe

import raymerge
from raymerge.merge_actors.storage.objects import delete_folder
from raymerge.merge_actors.storage.ranges import NUM_IN_FLIGHT
from raymerge.merge_actors.storage.staged_outputs import PART_BYTES, PARTS_IN_FLIGHT
from raymerge.merge_actors.storage.store import store_of

TARGET = 1.3
#: Name, bytes read and written, seconds of the plain program, seconds of the merge.
_Row = tuple[str, int, Spread, Spread]
_BUCKET = "benchmark"
#: Ends with whoever started it, however that ends: its input is then at its end.
_SERVER = """
import os, sys, threading
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
from moto.server import main
main(sys.argv[1:])
"""


def main() -> None:
    """Parse the options, measure both places, keep the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--disk-shape", choices=LLAMA_SHAPES, default="1.1b", help="of models on the disk")
    parser.add_argument("--shape", choices=LLAMA_SHAPES, default="small", help="of models in the store")
    parser.add_argument(
        "--shard-size",
        default="16MB",
        help="of files in the store; moto reads an object whole for any range",
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--uri", help="folder in a store [default: an S3 server started here]")
    add_folder_options(parser)
    options = parser.parse_args()
    report = Report(
        "storage",
        "A merge against a plain reader and writer",
        {
            "on the disk": f"{options.disk_shape} (base and 3 fine-tunes, bf16)",
            "in the store": f"{options.shape}, in files of {options.shard_size}",
            "workers": options.workers,
            "runs": options.runs,
            "store": "given" if options.uri else "moto, one process on loopback",
        },
    )
    rows = _on_disk(options)
    with _store(options.uri) as uri:
        rows.append(_in_store(uri, options))
    table = []
    for name, num_bytes, plain, merged in rows:
        ratio = merged.median / plain.median
        rate = num_bytes / merged.median / 1e9
        report.data[name] = {"bytes": num_bytes, "plain": plain, "merge": merged, "ratio": ratio}
        table.append((name, f"{num_bytes / 1e9:.2f}", plain, merged, f"{ratio:.2f}", f"{rate:.2f}"))
    report.text("GB are read and written. Seconds: least / median / greatest.")
    report.table(("place", "GB", "plain (s)", "merge (s)", "ratio", "merge GB/s"), table)
    report.text(f"The aim is a ratio of at most {TARGET}.")
    report.write(options.results)


def _on_disk(options: argparse.Namespace) -> list[_Row]:
    base, fine_tunes = make_models(
        options.work / "models" / options.disk_shape, LLAMA_SHAPES[options.disk_shape]
    )
    models = [base, *fine_tunes]
    files = [file for model in models for file in weight_files(model)]
    recipe = write_recipe(options.work / "storage.yaml", "task_arithmetic", base, fine_tunes)
    out = options.work / "storage-out"
    rows: list[_Row] = []
    with raymerge.Session(workers=options.workers, device="cpu") as session:
        for name, is_cold in (("disk", True), ("page cache", False)):

            def prepare(is_cold: bool = is_cold) -> None:
                shutil.rmtree(out, ignore_errors=True)
                if is_cold:
                    evict(files)

            floor = floor_seconds(
                models, options.work, workers=options.workers, runs=options.runs, is_cold=is_cold
            )
            plain = Spread(
                min=floor["min_seconds"],
                median=floor["median_seconds"],
                max=floor["max_seconds"],
                runs=options.runs,
            )
            merged = _time(lambda: session.merge(recipe, out), options.runs, prepare)
            rows.append((name, int(floor["bytes_read"] + floor["bytes_written"]), plain, merged))
    shutil.rmtree(out)
    return rows


def _in_store(uri: str, options: argparse.Namespace) -> _Row:
    base, fine_tunes = make_models(
        options.work / "models" / f"{options.shape}-{options.shard_size}",
        LLAMA_SHAPES[options.shape],
        shard_size=options.shard_size,
    )
    models = [base, *fine_tunes]
    for model in models:
        for path in model.iterdir():
            store_of(uri).write(f"{uri}/{model.name}/{path.name}", [path.read_bytes()], blocks_in_flight=1)
    text = write_recipe(options.work / "storage.yaml", "task_arithmetic", base, fine_tunes).read_text()
    for model in models:
        text = text.replace(os.fspath(model), f"{uri}/{model.name}")
    sizes = {
        f"{uri}/{model.name}/{file.name}": file.stat().st_size
        for model in models
        for file in weight_files(model)
    }
    written = [file.stat().st_size for file in weight_files(base)]
    plain = _time(lambda: _plain(sizes, written, f"{uri}/plain", options.workers), options.runs)
    # Workers that start now see the store's address and credentials in their environment.
    with raymerge.Session(workers=options.workers, device="cpu") as session:
        merged = _time(
            lambda: session.merge(text, f"{uri}/out", overwrite=True, out_shard_size=options.shard_size),
            options.runs,
        )
    delete_folder(uri)
    return "store", sum(sizes.values()) + sum(written), plain, merged


def _plain(sizes: dict[str, int], written: list[int], out: str, workers: int) -> None:
    """Read all ranges, then write all files, with nothing but the store's client."""

    def read(place: tuple[str, int, int]) -> None:
        name, begin, num_bytes = place
        reader = store_of(name).open(name)
        assert reader.read_into(begin, memoryview(bytearray(num_bytes))) == num_bytes
        reader.close()

    def write(place: tuple[int, int]) -> None:
        number, num_bytes = place
        blocks = (bytes(min(PART_BYTES, num_bytes - at)) for at in range(0, num_bytes, PART_BYTES))
        store_of(out).write(f"{out}/{number}", blocks, blocks_in_flight=PARTS_IN_FLIGHT)

    places = [
        (name, begin, min(BUFFER_BYTES, num_bytes - begin))
        for name, num_bytes in sizes.items()
        for begin in range(0, num_bytes, BUFFER_BYTES)
    ]
    with concurrent.futures.ThreadPoolExecutor(NUM_IN_FLIGHT) as pool:
        list(pool.map(read, places))
    with concurrent.futures.ThreadPoolExecutor(2 * workers) as pool:  # a worker makes two files at once
        list(pool.map(write, enumerate(written)))


def _time(action: Callable[[], object], runs: int, prepare: Callable[[], object] = lambda: None) -> Spread:
    prepare()
    action()  # warms caches and connections
    seconds = []
    for _ in range(runs):
        prepare()
        begin = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - begin)
    return Spread.of(seconds)


@contextmanager
def _store(uri: str | None) -> Iterator[str]:
    """Give the folder to work in, on a server of our own if none is named."""
    if uri is not None:
        yield uri.rstrip("/")
        return
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    endpoint = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-W", "ignore", "-c", _SERVER, "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.environ |= {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "benchmark",
        "AWS_SECRET_ACCESS_KEY": "benchmark",
    }
    try:
        for _ in range(300):
            try:
                request = urllib.request.Request(f"{endpoint}/{_BUCKET}", method="PUT")
                urllib.request.urlopen(request, timeout=5).close()
                break
            except OSError:
                time.sleep(0.1)
        yield f"s3://{_BUCKET}/storage"
    finally:
        server.kill()
        server.communicate()


if __name__ == "__main__":
    main()
