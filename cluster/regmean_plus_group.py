"""The workers of RegMean++'s passes: in the merge workers' own actors, on the devices that these hold.

Passes and solves take turns, so a device serves both, and no second set of actors has to find room.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from raymerge.cluster.activation_group import ActivationGroup, OnTokens, ThreadGroup, WorkersLost, results_of
from raymerge.cluster.worker_group import InProcessGroup, WorkerGroup
from raymerge.merge_actors.task import RunContext
from raymerge.stats.regmean_plus_worker import RegMeanPlusJob, RegMeanPlusWorker


def passes_group(group: WorkerGroup, num_workers: int, context: RunContext) -> ActivationGroup:
    """Return workers for passes beside, or in, those that merge."""
    if isinstance(group, InProcessGroup):
        return ThreadGroup(num_workers, RegMeanPlusWorker)
    return HostedGroup(group, context)


class HostedGroup:
    """Workers hosted by the actors of a Ray group of merge workers."""

    def __init__(self, group: Any, context: RunContext) -> None:
        """Host workers.

        Args:
            group: a `RayGroup`.
            context: of the run, to start the actors with.
        """
        self.num_workers = 0
        self.pids: list[int] = []
        """Process ids of the actors."""
        self._group, self._context = group, context
        self._actors: list[Any] = []
        self._is_broken = False

    def start(self, job: RegMeanPlusJob) -> None:
        """Make a worker in every actor and let them meet; after a loss, in new actors."""
        if self._is_broken:
            self._group.close()  # those that are left are still in a broken group of processes
            self._is_broken = False
        self._group.start(self._context)
        self._actors = self._group.hosts()
        self.num_workers = len(self._actors)
        made = [actor.host.remote(RegMeanPlusWorker, job, rank) for rank, actor in enumerate(self._actors)]
        alive = [actor.is_alive.remote for actor in self._actors]
        places = self._guarded(lambda: results_of(made, alive, lambda _: None))
        self.pids = [pid for pid, _ in places]
        if self.num_workers > 1:
            host = places[0][1]
            [port] = self.call("open_store", [(host, self.num_workers)], lambda _: None)
            self.call("join", [(host, port, self.num_workers)] * self.num_workers, lambda _: None)

    def call(self, method: str, arguments: Sequence[tuple[Any, ...]], on_tokens: OnTokens) -> list[Any]:
        """Call a method of every hosted worker."""
        pairs = zip(self._actors, arguments, strict=False)
        called = [actor.hosted.remote(method, *each) for actor, each in pairs]
        return self._guarded(lambda: results_of(called, self._token_counts(), on_tokens))

    def close(self) -> None:
        """Leave the actors to the group that they belong to."""
        self._actors = []

    def _token_counts(self) -> list[Callable[[], Any]]:
        return [functools.partial(actor.hosted_value.remote, "num_tokens") for actor in self._actors]

    def _guarded(self, wait: Any) -> list[Any]:
        from ray.exceptions import OutOfMemoryError, RayActorError

        try:
            found: list[Any] = wait()
            return found
        except WorkersLost:
            self._is_broken = True
            raise
        except (RayActorError, OutOfMemoryError) as error:
            self._is_broken = True
            raise WorkersLost(str(error).strip().splitlines()[0]) from error
