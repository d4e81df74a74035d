"""A Ray cluster on this machine that is treated badly, and a worker group through which merges feel it.

Faults come after a chosen number of finished tasks, not after a chosen time: so they hit a merge in its middle on
any machine, and the same seed does the same again.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from processes import descendants

from raymerge.cluster.worker_group import Done, Event, Instruction
from raymerge.merge_actors.methods.prepare import TensorState
from raymerge.merge_actors.task import RunContext

NUM_NODES = 3
CPUS_PER_NODE = 2
#: Every process of the soak inherits it: what still carries it at the end was leaked.
MARK = "RAYMERGE_SOAK"
#: A dead node is found after a few of these, and a busy machine does not look like a dead one.
_HEALTH_CHECKS = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 3000,
    "health_check_failure_threshold": 3,
}
_STORE_BYTES = 80 << 20


@dataclass(frozen=True, slots=True)
class Strike:
    """One fault."""

    kind: str
    """"actor killed", "actor frozen" or "node lost"."""
    after: int
    """Finished instructions of a merge until it comes."""


class BadCluster:
    """A head without work and some nodes, which come and go."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": _STORE_BYTES}
        self._cluster: Any = Cluster(
            initialize_head=True, head_node_args={**head, "_system_config": _HEALTH_CHECKS}
        )
        self.address = str(self._cluster.address)
        self.num_joined = 0
        self.mend()
        self.num_joined = 0

    def lose_node(self, rng: random.Random) -> bool:
        """Kill a node's processes; False if it would be the last."""
        nodes = list(self._cluster.worker_nodes)
        if len(nodes) < 2:
            return False
        node = nodes[rng.randrange(len(nodes))]
        everything = descendants([process.process.pid for (process,) in node.all_processes.values()])
        self._cluster.remove_node(node, allow_graceful=False)
        for pid in everything:  # a machine that is gone takes its frozen processes along
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return True

    def mend(self) -> None:
        """Add nodes until all are there again."""
        for node in list(self._cluster.worker_nodes):
            if not node.any_processes_alive():
                self._cluster.remove_node(node, allow_graceful=False)
        while len(self._cluster.worker_nodes) < NUM_NODES:
            self._cluster.add_node(num_cpus=CPUS_PER_NODE, object_store_memory=_STORE_BYTES)
            self.num_joined += 1

    def close(self) -> None:
        """End every process of the cluster."""
        self._cluster.shutdown()


class HostileGroup:
    """A group of Ray actors, struck while it works."""

    def __init__(self, group: Any, cluster: BadCluster) -> None:
        self._group, self._cluster = group, cluster
        self._strikes: list[Strike] = []
        self._rng = random.Random()
        self._num_done = 0
        self.struck: Counter[str] = Counter()

    def plan(self, strikes: list[Strike], rng: random.Random) -> None:
        """Say what happens to the next merge."""
        self._strikes = sorted(strikes, key=lambda strike: strike.after)
        self._rng, self._num_done, self.struck = rng, 0, Counter()

    def start(self, context: RunContext) -> None:
        """See `RayGroup.start`."""
        self._group.start(context)

    def workers(self) -> tuple[int, ...]:
        """See `RayGroup.workers`."""
        workers: tuple[int, ...] = self._group.workers()
        return workers

    def submit(self, worker: int, instruction: Instruction, states: Mapping[int, TensorState]) -> None:
        """See `RayGroup.submit`."""
        self._group.submit(worker, instruction, states)

    def wait(self, timeout_seconds: float) -> list[Event]:
        """See `RayGroup.wait`; then strike if it is time."""
        events: list[Event] = self._group.wait(timeout_seconds)
        self._num_done += sum(isinstance(event, Done) for event in events)
        while self._strikes and self._strikes[0].after <= self._num_done:
            strike = self._strikes.pop(0)
            if self._carry_out(strike.kind):
                self.struck[strike.kind] += 1
        return events

    def abandon(self, worker: int) -> None:
        """See `RayGroup.abandon`."""
        self._group.abandon(worker)

    def close(self) -> None:
        """See `RayGroup.close`."""
        self._group.close()

    @property
    def num_actors(self) -> int:
        """Return how many actors the group believes to have."""
        return len(self._group._actors) + len(self._group._starting)

    def _carry_out(self, kind: str) -> bool:
        if kind == "node lost":
            return self._cluster.lose_node(self._rng)
        actors = self._group._actors
        if not actors or (kind == "actor frozen" and len(actors) < 2):
            return False
        pid = _pid_of(actors[self._rng.choice(sorted(actors))])
        if pid is None:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL if kind == "actor killed" else signal.SIGSTOP)
        return True


def _pid_of(actor: Any) -> int | None:
    """Return an actor's process; None if it has been struck already."""
    import ray
    from ray.exceptions import RayError

    try:
        return int(ray.get(actor.__ray_call__.remote(lambda self: os.getpid()), timeout=5))
    except (RayError, TimeoutError):
        return None


def marked_processes() -> dict[int, str]:
    """Return the living processes that descend from this one, with their command lines; zombies do not count."""
    mark = f"{MARK}={os.environ[MARK]}".encode()
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            with contextlib.suppress(OSError):
                folder = Path("/proc", entry)
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    if command.strip():
                        found[int(entry)] = command.strip()
    return found


def actor_processes() -> list[int]:
    """Return the processes that are merge workers."""
    return [pid for pid, name in marked_processes().items() if name.startswith("ray::RayMergeWorker")]


def wait_until(condition: Any, seconds: float) -> bool:
    """Return whether a condition comes true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True
