"""An address where no cluster listens is one sentence and not a wait."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from raymerge.cluster import ray_address
from raymerge.cluster.ray_address import check_listens
from raymerge.merge_actors.errors import ClusterError


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_address, "ANSWER_SECONDS", 1.0)


@pytest.mark.parametrize("host", ["127.0.0.1", "nowhere.invalid"])
def test_nothing_listens(host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(ClusterError, match=f"no Ray cluster answers at {host}:{port}: .*give HOST:PORT"):
        check_listens(f"{host}:{port}")


@pytest.mark.parametrize("address", ["127.0.0.1:99999", "head..cluster:6379"])
def test_a_port_or_a_host_that_there_cannot_be(address: str) -> None:
    with pytest.raises(ClusterError, match=f"no Ray cluster answers at {address}"):
        check_listens(address)


def test_a_head_that_begins_to_listen_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_address, "ANSWER_SECONDS", 60.0)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        threading.Timer(0.3, server.listen).start()
        begun = time.monotonic()
        check_listens(f"127.0.0.1:{server.getsockname()[1]}")
        assert time.monotonic() - begun > 0.2


@pytest.mark.parametrize("address", ["auto", "local", "ray://127.0.0.1:1"])
def test_other_addresses_are_rays(address: str) -> None:
    check_listens(address)


def test_a_job_servers_address_is_none_to_attach_to() -> None:
    with pytest.raises(ClusterError, match=r"raymerge submit --address http://head:8265 -- \.\.\.;"):
        check_listens("http://head:8265")


def test_a_token_that_is_wanted_and_missing_is_told_in_one_sentence(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "HOME": str(tmp_path)}
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        code = f"from raymerge.cluster.connect import ray_session\nwith ray_session({address!r}): pass"
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert last.endswith("put the cluster's own token into RAY_AUTH_TOKEN or ~/.ray/auth_token"), done.stderr
