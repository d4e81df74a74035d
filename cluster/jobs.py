"""Submitted commands on a Ray cluster: submit, follow, list, stop, wait.

A thin skin over Ray's job client that speaks of states and errors in words. The client authenticates by Ray's own
rules (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token): a token never passes through here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from raymerge.merge_actors.errors import ClusterError, RecipeError
from raymerge.merge_actors.storage.uris import redacted

#: States in which a job has come to its end.
ENDED = frozenset({"SUCCEEDED", "FAILED", "STOPPED"})
_POLL_SECONDS = 1.0
#: How often to say that a job has not started yet.
_REMARK_SECONDS = 30.0
#: How often a lost connection to a job's log is taken up again, and nothing new comes, before we give up.
_MOST_RECONNECTIONS = 20
#: For so long a job server may be out of reach while we wait for a job: a tunnel or the head starts again.
_MOST_SECONDS_UNREACHABLE = 120.0
#: The cluster's watcher of an ended job looks once a second; a job that takes the name before it has looked is failed.
_SECONDS_UNTIL_NAME_IS_FREE = 3.0
#: So long after it answers first a head may need until it can start jobs.
_MOST_SECONDS_UNTIL_AGENT = 30.0
#: Of a job that ended so long ago it is free for certain, though the cluster's clock may not be ours.
_SECONDS_SINCE_FREE = 60.0
#: Where Ray's client looks for a job server, before it looks at what it was told.
_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_CHATTY = (
    "ray.dashboard.modules.job.sdk",
    "ray.dashboard.modules.dashboard_sdk",
    "ray._private.runtime_env.packaging",
)
#: Names of variables that say that their values are secrets; TOKENIZERS_PARALLELISM is none.
_SECRET = re.compile(
    r"TOKEN(?!IZER)|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|KEY|CONNECTION_STRING|(^|_)SAS(_|$)",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobStatus:
    """A submitted command as the cluster sees it."""

    submission_id: str
    state: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    command: str
    message: str
    start_time: float | None
    """Seconds since 1970."""
    end_time: float | None
    exit_code: int | None
    """Of the command; None while it runs, or if it never started."""

    @property
    def is_ended(self) -> bool:
        """Return whether the job has come to its end."""
        return self.state in ENDED


class Jobs:
    """The jobs of one cluster."""

    def __init__(self, address: str | None) -> None:
        """Connect to a cluster's job server.

        Args:
            address: such as http://127.0.0.1:8265; None means RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or a
                cluster on this machine.

        Raises:
            ClusterError: nobody answers, or the token is missing or wrong.
        """
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        from ray.exceptions import RayError
        from ray.job_submission import JobSubmissionClient

        # Uploads and closed connections are Ray's own business; what matters is said by us.
        for name in _CHATTY:
            logging.getLogger(name).setLevel(logging.WARNING)
        variables = [os.environ.get(name) for name in _ADDRESS_VARIABLES]
        address = address or next(filter(None, variables), None)
        if address and "://" in address and not address.startswith(("http://", "https://", "ray://")):
            raise ClusterError(f"{address} is no address of a Ray job server; one is http://127.0.0.1:8265")
        try:
            with _without_variables(_ADDRESS_VARIABLES):
                self._client: Any = JobSubmissionClient(address)
        except (ConnectionError, RuntimeError, ValueError, RayError) as error:
            raise _cluster_error(error, address) from error
        self.address = str(self._client.get_address())

    def find(self, submission_id: str) -> JobStatus | None:
        """Return a job's status, or None if the cluster does not know it."""
        with self._spoken():
            try:
                return _status(self._client.get_job_info(submission_id))
            except RuntimeError as error:
                if "404" in str(error) or "does not exist" in str(error):
                    return None
                raise

    def get(self, submission_id: str) -> JobStatus:
        """Return a job's status.

        Raises:
            ClusterError: the cluster does not know the job.
        """
        found = self.find(submission_id)
        if found is None:
            raise ClusterError(
                f"the cluster at {self.address} knows no job {submission_id}; see raymerge jobs list"
            )
        return found

    def all(self) -> list[JobStatus]:
        """Return all jobs that were submitted to the cluster, the latest first."""
        with self._spoken():
            details = self._client.list_jobs()
        found = [_status(each) for each in details if each.submission_id]
        return sorted(found, key=lambda job: -(job.start_time or 0.0))

    def submit(
        self,
        submission_id: str,
        entrypoint: str,
        folder: str,
        *,
        environment: Mapping[str, str],
        metadata: Mapping[str, str],
        pip: list[str] | None = None,
        num_gpus: int = 0,
    ) -> bool:
        """Submit a command; return False if another has taken the name meanwhile.

        Args:
            submission_id: the job's name; one that failed or was stopped gives its name up.
            entrypoint: a shell command, which runs in a copy of `folder`.
            folder: on this machine.
            environment: variables of the command and of its workers.
            metadata: what to note beside the job.
            pip: requirements to install on the nodes for this job, beside what they have.
            num_gpus: which the command itself has, and its node; without, it runs on the head.

        Raises:
            ClusterError: the cluster refuses it.
        """
        check_no_secret(environment, [entrypoint])
        runtime: dict[str, Any] = {"working_dir": folder, "env_vars": dict(environment)}
        if pip:
            runtime["pip"] = pip
        with self._spoken():
            if not self._free(submission_id):
                return False
            deadline = time.monotonic() + _MOST_SECONDS_UNTIL_AGENT
            while True:
                try:
                    self._client.submit_job(
                        entrypoint=entrypoint,
                        submission_id=submission_id,
                        runtime_env=runtime,
                        metadata=dict(metadata),
                        entrypoint_num_gpus=num_gpus or None,
                    )
                    return True
                except RuntimeError as error:
                    if "already exists" in str(error):
                        return False
                    # A head that has just started answers before its own agent, which starts jobs, has reported.
                    if "No available agent" not in str(error) or time.monotonic() > deadline:
                        raise
                time.sleep(_POLL_SECONDS)

    def _free(self, submission_id: str) -> bool:
        """Free the name of an ended job; return False if another has begun a job of that name meanwhile."""
        earlier = self.find(submission_id)
        if earlier is None or not earlier.is_ended:
            return True
        if time.time() - (earlier.end_time or 0.0) < _SECONDS_SINCE_FREE:
            time.sleep(_SECONDS_UNTIL_NAME_IS_FREE)
        try:
            self._client.delete_job(submission_id)
        except RuntimeError as error:
            if "non-terminal" in str(error):
                return False
            if "does not exist" not in str(error):  # else another has freed it
                raise
        return True

    def follow(
        self,
        submission_id: str,
        write: Callable[[str], None],
        on_remark: Callable[[str], None] = lambda line: None,
    ) -> JobStatus:
        """Hand on a job's log from its beginning until the job ends; return how it ended.

        Args:
            submission_id: the job.
            write: takes pieces of the log.
            on_remark: told now and then why the job has not started yet.

        Raises:
            ClusterError: the job is gone, or the connection breaks again and again.
        """
        # Ray's dashboard writes the token into its log if it is asked for the log of a job that it does not know.
        said = time.monotonic()
        while (status := self._reached(submission_id)).state == "PENDING":
            if time.monotonic() - said > _REMARK_SECONDS:
                said = time.monotonic()
                on_remark(f"job {submission_id} is {status.state}: {status.message}")
            time.sleep(_POLL_SECONDS)
        asyncio.run(self._follow(submission_id, write))
        return self.wait(submission_id)

    async def _follow(self, submission_id: str, write: Callable[[str], None]) -> None:
        async with contextlib.aclosing(self._pieces(submission_id)) as pieces:
            async for text in pieces:  # what `write` raises, a closed pipe, is no lost connection
                write(text)

    async def _pieces(self, submission_id: str) -> AsyncGenerator[str, None]:
        """Yield a job's log piece by piece until it ends, each once, over lost connections."""
        num_seen, num_failures = 0, 0
        while True:
            num_here = 0
            try:
                async for text in self._client.tail_job_logs(submission_id):
                    begin = max(0, num_seen - num_here)  # the log begins anew after a lost connection
                    num_here += len(text)
                    if num_here > num_seen:
                        num_seen, num_failures = num_here, 0
                        yield text[begin:]
                return
            except Exception as error:  # whatever aiohttp and the client raise for a broken connection
                num_failures += 1
                if self._reached(submission_id).is_ended:  # or gone: then it raises, and nobody asks again
                    return
                if num_failures > _MOST_RECONNECTIONS:
                    raise _cluster_error(error, self.address) from error
                await asyncio.sleep(_POLL_SECONDS)

    def wait(self, submission_id: str, timeout_seconds: float | None = None) -> JobStatus:
        """Return a job's status when it has ended.

        Raises:
            ClusterError: it has not ended in time.
        """
        started = time.monotonic()
        while not (status := self._reached(submission_id)).is_ended:
            if timeout_seconds is not None and time.monotonic() - started > timeout_seconds:
                raise ClusterError(
                    f"job {submission_id} is still {status.state} after {timeout_seconds:g} s; it goes on"
                )
            time.sleep(_POLL_SECONDS)
        return status

    def _reached(self, submission_id: str) -> JobStatus:
        """Return a job's status, and bear that the server is out of reach for a while.

        Raises:
            ClusterError: for too long nobody answers, or the cluster does not know the job.
        """
        deadline = time.monotonic() + _MOST_SECONDS_UNREACHABLE
        while True:
            try:
                return self.get(submission_id)
            except ClusterError as error:
                if not _may_pass(error.__cause__) or time.monotonic() > deadline:
                    raise
            time.sleep(_POLL_SECONDS)

    def logs(self, submission_id: str) -> str:
        """Return a job's log as it stands."""
        self.get(submission_id)
        with self._spoken():
            return str(self._client.get_job_logs(submission_id))

    def stop(self, submission_id: str) -> bool:
        """Ask a job to end (SIGTERM, seconds later SIGKILL); return whether it was running."""
        if self.get(submission_id).is_ended:
            return False
        with self._spoken():
            return bool(self._client.stop_job(submission_id))

    @contextlib.contextmanager
    def _spoken(self) -> Iterator[None]:
        """Turn what the client raises into one sentence."""
        from ray.exceptions import RayError

        try:
            yield
        except (
            OSError,
            RuntimeError,
            ValueError,
            RayError,
        ) as error:  # OSError: a connection that fails or breaks
            raise _cluster_error(error, self.address) from error


def check_no_secret(environment: Mapping[str, str], texts: Iterable[str] = ()) -> None:
    """Refuse what holds a secret: everybody with the dashboard reads a job's variables, words and files.

    Args:
        environment: variables; those whose names say that they are secret, or whose values hold one, are refused.
        texts: the command, and the files that travel with it.

    Raises:
        RecipeError: naming the variable, or the place without the secret.
    """
    for name in environment:
        if _SECRET.search(name):
            raise RecipeError(
                f"--env {name}: a job's variables stand in the cluster's dashboard and logs; put secrets into the "
                "nodes' own environment, an instance role or a mounted file instead"
            )
    for text in (*(f"{name}={value}" for name, value in environment.items()), *texts):
        for line in text.splitlines():
            if (clean := redacted(line)) != line:
                raise RecipeError(
                    f"a secret must not travel with a job, whoever sees the dashboard reads it: {clean[:300]}"
                    "; leave it out, the nodes find their credentials themselves (docs/storage.md)"
                )


@contextlib.contextmanager
def _without_variables(names: Iterable[str]) -> Iterator[None]:
    """Hide variables of the environment for a moment."""
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _status(details: Any) -> JobStatus:
    # Ray counts milliseconds.
    start, end = (None if t is None else t / 1000 for t in (details.start_time, details.end_time))
    return JobStatus(
        submission_id=str(details.submission_id),
        state=str(getattr(details.status, "value", details.status)),
        command=str(details.entrypoint),
        message=str(details.message or "").partition(", last available logs")[0],
        start_time=start,
        end_time=end,
        exit_code=details.driver_exit_code,
    )


def _may_pass(error: BaseException | None) -> bool:
    """Return whether a job server may answer if it is asked again: it, or the way to it, is down."""
    return isinstance(error, OSError) or re.search(r"status code 50[234]", str(error)) is not None


def _cluster_error(error: BaseException, address: str | None) -> ClusterError:
    """Say in one sentence what a job server's answer means."""
    text = re.sub(r"(?i)bearer [^\s'\"]+", "***", redacted(str(error)))
    place = address or "this machine (neither --address, RAY_API_SERVER_ADDRESS nor RAY_ADDRESS says another)"
    if "401" in text or "403" in text or "uthenticat" in text:
        return ClusterError(
            f"the cluster at {place} refuses our token; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or "
            "~/.ray/auth_token to the cluster's own"
        )
    if isinstance(error, OSError) or "connect" in text.lower() or "waiting for GCS" in text:
        return ClusterError(
            f"no Ray job server answers at {place}; it is the dashboard's address, such as http://127.0.0.1:8265 "
            "(through `ray dashboard ray_cluster.yaml` if the cluster is elsewhere)"
        )
    last = next((line for line in reversed(text.splitlines()) if line.strip()), text)
    return ClusterError(f"the cluster at {place} refused: {last.strip()[:500]}")
