"""A Ray head node of our own on this machine, beside whatever else runs on it.

Ports are free ones, the session lies in a temporary folder of its own, and only processes that
this cluster started are ended: never `ray stop`, which ends every Ray on the machine.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from processes import CommandError, descendants

#: The cluster listens on this machine for minutes only; without a token no file is left in the home folder.
AUTHENTICATION = {"RAY_AUTH_MODE": "disabled"}
_START_SECONDS = 60
_STOP_SECONDS = 15


@dataclass(frozen=True, slots=True)
class LocalCluster:
    """A running head node."""

    pid: int
    """Of `ray start`; every process of the cluster descends from it."""
    variables: dict[str, str]
    """What a client's environment needs to reach it."""


@contextmanager
def local_cluster(num_cpus: int) -> Iterator[LocalCluster]:
    """Start a head node and end it afterwards."""
    # Ray's sockets lie in here and a socket's path may have 107 bytes at most: a short path.
    folder = Path(tempfile.mkdtemp(prefix="rmb", dir="/tmp"))
    log = folder / "start.log"
    with open(log, "w") as out:
        process = subprocess.Popen(
            _start_command(folder, num_cpus), stdout=out, stderr=out, env={**os.environ, **AUTHENTICATION}
        )
    try:
        address = _wait_for_address(process, folder, log)
        yield LocalCluster(process.pid, {"RAY_ADDRESS": address, **AUTHENTICATION})
    finally:
        _stop(process)
        shutil.rmtree(folder, ignore_errors=True)


def _start_command(folder: Path, num_cpus: int) -> list[str]:
    # --block keeps the node's processes under `ray start`, which takes them along when it is ended.
    return [
        os.fspath(Path(sys.executable).parent / "ray"),
        *("start", "--head", "--block", "--disable-usage-stats", "--include-dashboard=false"),
        f"--temp-dir={folder}",
        f"--num-cpus={num_cpus}",
        f"--object-store-memory={100 << 20}",
        "--port=0",
        f"--dashboard-port={_free_port()}",
        f"--ray-client-server-port={_free_port()}",
        "--dashboard-agent-listen-port=0",
    ]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for_address(process: subprocess.Popen[bytes], folder: Path, log: Path) -> str:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        if "Ray runtime started" in log.read_text():
            return (folder / "ray_current_cluster").read_text().strip()
        time.sleep(0.2)
    raise CommandError(f"no Ray head node within {_START_SECONDS} s:\n{log.read_text()}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    family = descendants([process.pid])
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    deadline = time.monotonic() + _STOP_SECONDS
    while (alive := family & descendants(family)) and time.monotonic() < deadline:
        time.sleep(0.2)
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
