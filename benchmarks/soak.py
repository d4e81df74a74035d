"""Run many small merges where something always breaks: every output must be right, and nothing hang or leak.

    python benchmarks/soak.py --merges 20                      # a trial
    python benchmarks/soak.py --minutes 4 --record soak.jsonl  # 200 merges in parts: again until it says it is done

Each merge draws a recipe (task arithmetic, DARE-TIES, TIES, SLERP, or three recipes at once), where its inputs and its
output lie (a folder or an S3 server), and its faults: actors killed (SIGKILL) or frozen (SIGSTOP), a node lost, a node
that joins, storage that answers 503 or 500, cuts a body, drops a connection or is away for longer than retries last,
a driver that is killed, or ended by SIGTERM or Ctrl-C, and resumed. After each: the weights are compared with a merge
that nothing disturbed, `status` is asked, leftovers are looked for. At the end: actors, processes, files.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

from kept_file import REPOSITORY, RESULTS, Report, Spread
from soak_faults import MARK, BadCluster, HostileGroup, actor_processes, marked_processes, wait_until

DEADLINE_SECONDS = 150.0
_SETTLE_SECONDS = 30.0
NUM_WORKERS = 3


def main() -> None:
    """Parse the options, merge, keep the result; exit code 1 if anything went wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--merges", type=int, default=200, help="in all parts; no more than there are already: report"
    )
    parser.add_argument("--minutes", type=float, help="stop this part after so long")
    parser.add_argument("--record", type=Path, help="file of the merges so far, to go on with")
    parser.add_argument("--only", type=int, help="repeat the merge of this number and nothing else")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the kept files")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="rms", dir="/tmp"))  # short: Ray's sockets lie in it
    _set_environment(work)
    record = options.record or work / "record.jsonl"
    rows = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    done = [row for row in rows if row["kind"] == "merge"]
    numbers = (
        range(options.only, options.only + 1)
        if options.only is not None
        else range(len(done), options.merges)
    )
    try:
        if numbers:
            _part(work, numbers, options, record)
        rows = [json.loads(line) for line in record.read_text().splitlines()]
    finally:
        shutil.rmtree(work, ignore_errors=True)
    num_done = sum(row["kind"] == "merge" for row in rows)
    has_failed = any(row["problems"] for row in rows)
    if num_done >= options.merges:
        _report(rows, options.seed).write(options.results)
    elif options.only is None:
        print(f"{num_done} of {options.merges} merges; run it again to go on", file=sys.stderr)
    sys.exit(1 if has_failed else 0)


def _set_environment(work: Path) -> None:
    (work / "tmp").mkdir()
    os.environ |= {
        MARK: uuid.uuid4().hex,
        "TMPDIR": str(work / "tmp"),
        "RAY_TMPDIR": str(work),
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_IGNORE_UNHANDLED_ERRORS": "1",
        "RAYMERGE_CACHE": str(work / "cache"),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "AWS_ACCESS_KEY_ID": "soak",
        "AWS_SECRET_ACCESS_KEY": "soak",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    tempfile.tempdir = None  # read TMPDIR again


def _part(work: Path, numbers: range, options: argparse.Namespace, record: Path) -> None:
    """Run merges on one cluster, one line of the record for each and one for the part."""
    import socket

    sys.path.insert(0, str(REPOSITORY / "tests" / "support"))
    from object_store import running_object_store

    from raymerge.cluster.connect import connected

    listening = socket.create_server(("127.0.0.1", 0))
    os.environ["AWS_ENDPOINT_URL"] = "http://{}:{}".format(*listening.getsockname())
    servers = running_object_store(listening)
    store = next(servers)
    from soak_merges import Soak

    problems: list[str] = []
    cluster = BadCluster()
    started = time.monotonic()
    open_files, threads = [], []
    try:
        with connected(address=cluster.address, in_process=False, workers=NUM_WORKERS, device="cpu") as (
            group,
            placement,
        ):
            hostile = HostileGroup(group, cluster)
            soak = Soak(work, store, cluster, hostile, placement, options.seed)
            for number in numbers:
                soak.prepare(number)
                row = _with_deadline(soak, number)
                _append(record, row)
                print(_line(row), file=sys.stderr, flush=True)
                open_files.append(len(os.listdir("/proc/self/fd")))
                threads.append(threading.active_count())
                if row["hung"]:
                    os._exit(1)  # what hangs cannot be ended; the record says which merge it was
                if options.minutes and time.monotonic() - started > 60 * options.minutes:
                    break
        if not wait_until(lambda: not actor_processes(), _SETTLE_SECONDS):
            problems.append(f"{len(actor_processes())} actors leaked")
    finally:
        cluster.close()
        servers.close()  # type: ignore[attr-defined]
        listening.close()
    if not wait_until(lambda: not marked_processes(), _SETTLE_SECONDS):
        problems.append(f"processes leaked: {sorted(marked_processes().values())}")
    left = sorted(path.name for path in (work / "tmp").iterdir() if path.name.startswith("raymerge-"))
    row = {
        "kind": "part",
        "problems": problems,
        "num_joined": cluster.num_joined,
        "open_files": open_files,
        "threads": threads,
        "num_temporary_folders": len(left),
        "seconds": time.monotonic() - started,
    }
    num_killed = sum("SIGKILL" in fault for fault in soak.driver_faults)
    if len(left) > num_killed:  # a killed driver leaves the folder of its small files
        problems.append(f"{len(left)} temporary folders leaked, {num_killed} drivers were killed")
    _append(record, row)
    print(json.dumps({key: row[key] for key in ("problems", "num_joined", "seconds")}), file=sys.stderr)


def _with_deadline(soak: Any, number: int) -> dict[str, Any]:
    """Run a merge on a thread, so that one that hangs is seen."""
    found: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: found.append(soak.merge(number)), daemon=True)
    thread.start()
    thread.join(DEADLINE_SECONDS)
    if found:
        return found[0]
    faulthandler.dump_traceback(all_threads=True)
    return {**soak.row, "hung": thread.is_alive(), "problems": ["hung" if thread.is_alive() else "crashed"]}


def _append(record: Path, row: dict[str, Any]) -> None:
    with open(record, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def _line(row: dict[str, Any]) -> str:
    faults = ", ".join(f"{kind} x{count}" if count > 1 else kind for kind, count in row["faults"].items())
    said = "; ".join(row["problems"]) or "right"
    return (
        f"{row['number']:4} {row['recipe']:15} {row['places']:14} {row.get('seconds', 0):6.1f} s "
        f"{said} | {faults}"
    )


def _report(rows: list[dict[str, Any]], seed: int) -> Report:
    merges = [row for row in rows if row["kind"] == "merge"]
    parts = [row for row in rows if row["kind"] == "part"]
    faults: Counter[str] = Counter()
    for row in merges:
        faults.update(row["faults"])
    faults["node joined"] = sum(part["num_joined"] for part in parts)
    growth = [
        statistics.median(part["open_files"][-5:]) - part["open_files"][4]
        for part in parts
        if len(part["open_files"]) > 9
    ]
    counts = {
        "merges": len(merges),
        "wrong outputs": sum(row["is_wrong"] for row in merges),
        "hangs": sum(row["hung"] for row in merges),
        "other problems": sum(
            bool(row["problems"]) and not row["is_wrong"] and not row["hung"]
            for row in rows
            if row["kind"] == "merge"
        ),
        "leaked actors, processes or folders": sum(len(part["problems"]) for part in parts),
        "tasks done again": sum(row["num_retries"] for row in merges),
        "tasks given to a second worker": sum(row["num_speculated"] for row in merges),
        "most open files gained by the driver in a part": max(growth, default=0),
    }
    report = Report(
        "soak",
        "Merges on a cluster where something always breaks",
        {"merges": len(merges), "parts": len(parts), "seed": seed, "nodes": "3 of 2 workers each and a head"},
    )
    report.data |= {"counts": counts, "faults": dict(faults), "merges": merges, "parts": parts}
    report.table(("what", "count"), list(counts.items()))
    report.table(("fault", "times"), sorted(faults.items()))
    by_recipe = {}
    for row in merges:
        by_recipe.setdefault(row["recipe"], []).append(row["seconds"])
    report.table(
        ("recipe", "merges", "seconds (least / median / greatest)"),
        [(name, len(seconds), Spread.of(seconds)) for name, seconds in sorted(by_recipe.items())],
    )
    undisturbed = sum(not row["faults"] for row in merges)
    report.text(
        f"{undisturbed} merges had no fault. Every merge's weights were compared byte by byte with a merge of the same "
        f"recipe that nothing disturbed; a hang is a merge that takes more than {DEADLINE_SECONDS:g} s."
    )
    for row in rows:
        if row["problems"]:
            report.text(f"{row.get('number', 'part')}: {'; '.join(row['problems'])}")
    return report


if __name__ == "__main__":
    main()
