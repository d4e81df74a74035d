"""A group of activation workers as the driver sees it: on threads of this process, or Ray actors.

All workers get an instruction together and the answers come together. Sums live in the workers, so a
group lives and dies as one: if a worker is lost, the whole group is taken down (`WorkersLost`)
and started anew, and the driver repeats the layer group that was under way.
"""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from raymerge.cluster import patience, signs_of_life
from raymerge.cluster.signs_of_life import SignsOfLife
from raymerge.merge_actors.errors import ClusterError
from raymerge.merge_actors.versions import installed_versions
from raymerge.stats.activation_worker import ActivationWorker
from raymerge.stats.exchange import NoExchange, ThreadExchange, ThreadMeeting
from raymerge.stats.measure_job import MeasureJob

#: How long to wait for all of them.
GATHER_SECONDS = 60.0
_POLL_SECONDS = 0.5

#: Called now and then with the tokens that all workers have passed since the group was started.
OnTokens = Callable[[int], None]


class WorkersLost(Exception):
    """A worker died; the group is gone."""


class ActivationGroup(Protocol):
    """Workers that carry out instructions together."""

    num_workers: int

    def start(self, job: Any) -> None:
        """Start the workers, or start them anew after one was lost."""

    def call(self, method: str, arguments: Sequence[tuple[Any, ...]], on_tokens: OnTokens) -> list[Any]:
        """Call a method of the workers, each with its own arguments, and return the results in order.

        Fewer arguments than workers call only the first ones.

        Raises:
            WorkersLost: a worker died.
        """

    def close(self) -> None:
        """Stop the workers."""


class ThreadGroup:
    """Workers on threads of this process."""

    def __init__(self, num_workers: int, make_worker: Callable[[Any, int], Any] = ActivationWorker) -> None:
        self.num_workers = num_workers
        self._make_worker = make_worker
        self._workers: list[Any] = []
        self._pool = concurrent.futures.ThreadPoolExecutor(num_workers, thread_name_prefix="stats")

    def start(self, job: Any) -> None:
        """Make the workers and let them meet."""
        self._workers = [self._make_worker(job, rank) for rank in range(self.num_workers)]
        meeting = ThreadMeeting(self.num_workers)
        for rank, worker in enumerate(self._workers):
            worker.exchange = ThreadExchange(meeting, rank) if self.num_workers > 1 else NoExchange()

    def call(self, method: str, arguments: Sequence[tuple[Any, ...]], on_tokens: OnTokens) -> list[Any]:
        """Call a method of every worker on its thread; the first error ends the wait of the others."""
        pairs = zip(self._workers, arguments, strict=False)
        futures = [self._pool.submit(getattr(worker, method), *each) for worker, each in pairs]
        waiting = set(futures)
        while waiting:
            done, waiting = concurrent.futures.wait(
                waiting, _POLL_SECONDS, return_when=concurrent.futures.FIRST_EXCEPTION
            )
            for future in done:
                if error := future.exception():
                    self._wake()
                    raise error
            on_tokens(sum(worker.num_tokens for worker in self._workers))
        return [future.result() for future in futures]

    def close(self) -> None:
        """Let what is under way end."""
        self._wake()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._workers = []

    def _wake(self) -> None:
        """Give an error to workers that wait for each other."""
        for worker in self._workers:
            worker.exchange.close()


class RayActivationGroup:
    """Workers as actors of the Ray cluster that this process is connected to."""

    def __init__(
        self, num_workers: int, *, num_gpus: float, on_remark: Callable[[str], None] = lambda line: None
    ) -> None:
        self.num_workers = num_workers
        self.pids: list[int] = []
        """Process ids of the actors."""
        self._on_remark = on_remark
        self._options: dict[str, Any] = {"num_cpus": 1, "num_gpus": num_gpus}
        self._actors: list[Any] = []

    def start(self, job: MeasureJob) -> None:
        """Start all actors and let them join a process group.

        A cluster that does not give all of them soon is shared with others: the group then makes do with those it
        gave, so that two groups which hold half of the cluster each do not wait for each other.

        Raises:
            ClusterError: the cluster gives none of them in time.
        """
        self.close()
        self.pids = self._gather(job)
        if self.num_workers > 1:
            [(host, port)] = self.call("open_store", [(self.num_workers,)], lambda _: None)
            self.call("join", [(host, port, self.num_workers)] * self.num_workers, lambda _: None)

    def _gather(self, job: MeasureJob) -> list[int]:
        """Start as many actors as the cluster has room for, and return their process ids."""
        import ray

        from raymerge.stats.ray_activation_worker import RayActivationWorker

        skin: Any = RayActivationWorker  # the decorator's type is Ray's own
        while True:
            self._actors = [
                skin.options(**self._options).remote(job, rank, installed_versions())
                for rank in range(self.num_workers)
            ]
            ready = [actor.begin.remote() for actor in self._actors]
            done, _ = ray.wait(ready, num_returns=len(ready), timeout=GATHER_SECONDS)
            if not done and self._waited(ready):
                done, _ = ray.wait(ready, num_returns=len(ready), timeout=GATHER_SECONDS)
            if len(done) == len(ready):
                return self._get(ready, lambda _: None)
            self.close()
            if not done:
                raise ClusterError(f"no worker could be started in time: {self._shortage()}")
            self.num_workers = len(done)  # ranks have no gaps: so many are started anew

    def _waited(self, ready: list[Any]) -> bool:
        """Wait for the first actor, and say so; return whether it came."""
        import ray

        deadline = time.monotonic() + patience.seconds_to_wait(**self._options)
        while time.monotonic() < deadline:
            self._on_remark(f"waiting for workers: {self._shortage()}")
            seconds = min(patience.REMARK_SECONDS, max(0.0, deadline - time.monotonic()))
            if ray.wait(ready, num_returns=1, timeout=seconds)[0]:
                return True
        return False

    def _shortage(self) -> str:
        """Say what was asked of the cluster and what it has."""
        each = f"1 CPU and {self._options['num_gpus']:g} GPU"
        return f"asked for {self.num_workers} workers of {each} each, the cluster has {patience.resources()}"

    def call(self, method: str, arguments: Sequence[tuple[Any, ...]], on_tokens: OnTokens) -> list[Any]:
        """Call a method of every actor; if one dies, kill all."""
        pairs = zip(self._actors, arguments, strict=False)
        return self._get([getattr(actor, method).remote(*each) for actor, each in pairs], on_tokens)

    def close(self) -> None:
        """Kill every actor."""
        import ray

        for actor in self._actors:
            ray.kill(actor)
        self._actors = []

    def _get(self, references: list[Any], on_tokens: OnTokens) -> list[Any]:
        try:
            return results_of(references, [actor.num_tokens.remote for actor in self._actors], on_tokens)
        except WorkersLost:
            self.close()
            raise


def results_of(
    references: list[Any], questions: Sequence[Callable[[], Any]], on_tokens: OnTokens
) -> list[Any]:
    """Wait for calls to actors that work together, and return their results.

    Args:
        references: of the calls.
        questions: ask each actor for its tokens, which it tells while it works; asked again and again.
        on_tokens: told of their sum.

    Raises:
        WorkersLost: an actor died, or does not answer.
    """
    import ray
    from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

    waiting, tokens = set(references), dict.fromkeys(range(len(questions)), 0)
    life = SignsOfLife(lambda number: questions[number](), quiet_seconds=_POLL_SECONDS)
    try:
        while waiting:
            life.look(tokens.keys())
            asked = [*waiting, *life.questions()]
            ray.wait(asked, num_returns=1, timeout=_POLL_SECONDS)
            done, _ = ray.wait(asked, num_returns=len(asked), timeout=0)
            for reference in done:
                found = ray.get(reference, timeout=60)
                number = life.answered(reference)
                if number is not None:
                    tokens[number] = found
            waiting -= set(done)
            on_tokens(sum(tokens.values()))
            if waiting and (silent := life.silent()):
                raise WorkersLost(
                    f"worker {silent[0]} hangs: no answer in {signs_of_life.SILENT_SECONDS:g} s"
                )
        results: list[Any] = ray.get(references, timeout=60)
        return results
    except RayTaskError as error:
        _raise_if_lost(references)
        raise error.cause if isinstance(error.cause, BaseException) else error from None
    except (RayActorError, OutOfMemoryError) as error:
        raise WorkersLost(str(error).strip().splitlines()[0]) from error


def _raise_if_lost(references: list[Any]) -> None:
    """Tell an error of ours from the broken connection that a dead peer leaves behind."""
    import ray
    from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

    for reference in references:
        try:
            ray.get(reference, timeout=5)
        except (RayActorError, OutOfMemoryError) as error:
            raise WorkersLost(str(error).strip().splitlines()[0]) from error
        except (RayTaskError, ray.exceptions.GetTimeoutError):
            continue
