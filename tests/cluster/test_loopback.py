"""What listens because of us: nothing that another machine reaches."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from raymerge.cluster.connect import _on_loopback
from raymerge.merge_actors.errors import ClusterError
from raymerge.stats.exchange import join_store, make_store

#: Prints the addresses on which an embedded Ray, its actor and this process listen.
EMBEDDED = """
from raymerge.cluster.connect import ray_session
with ray_session(None):
    import os, ray, psutil
    from ray._private import ray_constants

    @ray.remote
    class Actor:
        def pid(self):
            return os.getpid()

    actor = Actor.remote()
    assert ray.get(actor.pid.remote(), timeout=60) != os.getpid()
    own = psutil.Process()
    listening = [
        (process.name(), each.laddr.ip)
        for process in [own, *own.children(recursive=True)]
        for each in process.net_connections(kind="tcp")
        if each.status == psutil.CONN_LISTEN
    ]
    print(len(listening), sorted({ip.removeprefix("::ffff:") for _, ip in listening}))
    assert ray_constants.ENABLE_RAY_CLUSTER  # a cluster that this process attaches to later is none of it
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere Ray does so by itself")
def test_an_embedded_ray_listens_on_this_machine_only():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", EMBEDDED], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    number, _, addresses = done.stdout.strip().partition(" ")
    assert int(number) >= 4  # gcs, raylet, actor, driver
    assert addresses == "['127.0.0.1']"


def test_workers_that_measure_together_meet_at_their_nodes_address_only(monkeypatch):
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(variable, raising=False)
    pytest.importorskip("ray")  # which brings psutil
    import psutil

    own = psutil.Process()

    def listening():
        return {each.laddr for each in own.net_connections(kind="tcp") if each.status == psutil.CONN_LISTEN}

    before = listening()
    store = make_store("127.0.0.1", 2)
    (new,) = listening() - before
    assert new == ("127.0.0.1", store.port)
    join_store("127.0.0.1", store.port, 2).set("key", "value")
    assert store.get("key") == b"value"
    if sys.platform == "linux":
        assert os.environ["GLOO_SOCKET_IFNAME"] == os.environ["NCCL_SOCKET_IFNAME"] == "lo"


def test_a_ray_that_cannot_be_kept_to_this_machine_is_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private import ray_constants

    monkeypatch.delattr(ray_constants, "ENABLE_RAY_CLUSTER")
    with pytest.raises(ClusterError, match="cannot be kept from listening on all interfaces"), _on_loopback():
        pass
