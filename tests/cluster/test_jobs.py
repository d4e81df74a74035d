"""The client of a job server that comes and goes: a real HTTP server that speaks Ray's job API as far as needed."""

from __future__ import annotations

import http.server
import json
import os
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from raymerge.cluster import jobs as jobs_module
from raymerge.cluster.jobs import Jobs, check_no_secret
from raymerge.merge_actors.errors import ClusterError, RecipeError

DETAILS = {"type": "SUBMISSION", "submission_id": "job", "entrypoint": "sleep 1", "status": "RUNNING"}


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server: Any = self.server
        server.paths.append(self.path)
        if self.path.startswith("/api/jobs/"):
            server.num_asked += 1
            trouble = server.troubles.pop(0) if server.troubles else None
            if trouble == "cut":
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            if trouble is not None:
                self._answer(int(trouble), "no such thing")
                return
        known = {"/api/version": {"version": "4", "ray_version": "2.60.0"}, "/api/jobs/job": server.details}
        found = known.get(self.path)
        self._answer(404 if found is None else 200, json.dumps(found))

    def do_POST(self) -> None:
        server: Any = self.server
        self._answer(*server.answers.pop(0))

    def do_DELETE(self) -> None:
        server: Any = self.server
        self._answer(*server.deletions.pop(0))

    def do_PUT(self) -> None:
        self._answer(200, "{}")

    def _answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(jobs_module, "_POLL_SECONDS", 0.01)
    made: Any = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    made.details, made.troubles, made.num_asked, made.answers, made.deletions, made.paths = (
        dict(DETAILS),
        [],
        0,
        [],
        [],
        [],
    )
    thread = threading.Thread(target=made.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    made.jobs = Jobs(f"http://127.0.0.1:{made.server_address[1]}")
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


def test_a_server_that_is_gone_for_a_while_does_not_end_the_wait(server: Any) -> None:
    server.troubles += ["cut", "503", "cut", "cut", "502"]
    server.details["status"] = "SUCCEEDED"
    assert server.jobs.wait("job").state == "SUCCEEDED"
    assert server.num_asked == 6


def test_a_server_that_stays_away_is_an_error_in_one_sentence(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs_module, "_MOST_SECONDS_UNREACHABLE", 0.1)
    server.troubles += ["cut"] * 100_000
    for ask in (server.jobs.wait, server.jobs.get, server.jobs.stop, server.jobs.logs):
        with pytest.raises(ClusterError, match=r"^no Ray job server answers at http://127.0.0.1:\d+; it is"):
            ask("job")


def test_what_does_not_pass_is_not_waited_for(server: Any) -> None:
    with pytest.raises(ClusterError, match="knows no job other"):
        server.jobs.wait("other")
    server.troubles += ["500"]
    with pytest.raises(ClusterError, match=r"refused: .*no such thing"):
        server.jobs.wait("job")
    assert server.num_asked == 2


def test_the_log_of_a_job_that_is_unknown_is_not_asked_for(server: Any) -> None:
    """Ray's dashboard would answer with an error, and write the request with its token into a log of its own."""
    with pytest.raises(ClusterError, match="knows no job other"):
        server.jobs.follow("other", lambda text: None)
    assert "/api/jobs/other" in server.paths
    assert not [path for path in server.paths if path.endswith("/logs/tail")]


def test_who_follows_a_job_that_waits_for_a_gpu_hears_so(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs_module, "_REMARK_SECONDS", 0.05)
    server.details |= {"status": "PENDING", "message": "It may be waiting for resources."}
    remarks: list[str] = []

    def remark(line: str) -> None:
        remarks.append(line)
        if len(remarks) == 2:
            server.details["status"] = "FAILED"

    assert server.jobs.follow("job", lambda text: None, remark).state == "FAILED"
    assert remarks == ["job job is PENDING: It may be waiting for resources."] * 2


def test_whoever_stops_reading_a_log_is_no_lost_connection(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`raymerge jobs logs --follow JOB | head`: the pipe is closed, the job server is not."""
    taken: list[str] = []

    async def tail(submission_id: str) -> AsyncIterator[str]:
        yield "one\n"
        yield "two\n"

    def write(text: str) -> None:
        taken.append(text)
        raise BrokenPipeError("nobody reads")

    monkeypatch.setattr(server.jobs._client, "tail_job_logs", tail)
    with pytest.raises(BrokenPipeError, match="nobody reads"):
        server.jobs.follow("job", write)
    assert taken == ["one\n"]


def test_a_token_in_an_answer_is_not_repeated(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef")
    for answer in (
        "{'Authorization': 'Bearer fedcba98', 'Host': 'x'} broke",
        "the token 0123456789abcdef broke",
    ):
        server.troubles += ["404"]
        server.answers += [(500, answer)]
        with pytest.raises(ClusterError, match=r"refused: .*\*\*\*.* broke") as caught:
            server.jobs.submit("job", "sleep 1", "", environment={}, metadata={})
        assert "fedcba98" not in str(caught.value) and "0123456789abcdef" not in str(caught.value)


def test_a_name_that_another_takes_at_the_same_moment_is_not_an_error(server: Any, tmp_path: Any) -> None:
    """Two people submit the same command: both see no job of its name, and the second one's submission comes late."""
    server.troubles += ["404"]
    server.answers += [(500, "ValueError: Job with submission_id job already exists. Please use another.")]
    assert not server.jobs.submit("job", "sleep 1", "", environment={}, metadata={})


@pytest.mark.parametrize(
    ("answer", "is_ours"),
    [((404, "Job job does not exist"), True), ((500, "it is in a non-terminal state RUNNING."), False)],
)
def test_a_failed_job_that_two_submit_again_at_the_same_moment_is_not_an_error(
    answer: tuple[int, str], is_ours: bool, server: Any
) -> None:
    """Both have seen it failed; the other has already freed its name, or has even begun it anew."""
    server.details["status"] = "FAILED"
    server.deletions += [answer]
    server.answers += [(200, json.dumps({"job_id": "job", "submission_id": "job"}))]
    assert server.jobs.submit("job", "sleep 1", "", environment={}, metadata={}) == is_ours
    assert not server.deletions


def test_the_address_that_is_given_counts_and_not_the_environments(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's client prefers its variables: the job would run on another cluster than the one named."""
    for variable in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.setenv(variable, "http://127.0.0.1:1")
        assert Jobs(server.jobs.address).find("job") is not None
        with pytest.raises(ClusterError, match=r"answers at http://127\.0\.0\.1:1;"):
            Jobs(None)
        monkeypatch.setenv(variable, server.jobs.address)
        assert Jobs(None).address == server.jobs.address
        assert os.environ[variable] == server.jobs.address
        monkeypatch.delenv(variable)


def test_an_address_of_another_kind_is_refused_in_one_sentence() -> None:
    with pytest.raises(ClusterError, match=r"^gcs://head:6379 is no address of a Ray job server"):
        Jobs("gcs://head:6379")


def test_a_head_that_has_just_started_is_waited_for(server: Any) -> None:
    server.troubles += ["404"]
    server.answers += [(500, "No available agent to submit job, please try again later.")] * 3
    server.answers += [(200, json.dumps({"job_id": "job", "submission_id": "job"}))]
    assert server.jobs.submit("job", "sleep 1", "", environment={}, metadata={})
    assert not server.answers
    server.troubles += ["404"]
    server.answers += [(500, "no room")]
    with pytest.raises(ClusterError, match=r"refused: .*no room"):
        server.jobs.submit("job", "sleep 1", "", environment={}, metadata={})


@pytest.mark.parametrize(
    ("variables", "text", "message"),
    [
        ({"HF_TOKEN": "x"}, "", r"--env HF_TOKEN: "),
        ({"some_api_key": "x"}, "", r"--env some_api_key: "),
        ({"AZURE_STORAGE_CONNECTION_STRING": "x"}, "", r"--env AZURE_STORAGE_CONNECTION_STRING: "),
        ({"AZURE_STORAGE_SAS": "x"}, "", r"--env AZURE_STORAGE_SAS: "),
        (
            {"HTTPS_PROXY": "http://me:pass@proxy"},
            "",
            r"reads it: HTTPS_PROXY=http://\*\*\*@proxy; leave it out",
        ),
        ({}, "merge s3://me:pass@bucket/x out", r"reads it: merge s3://\*\*\*@bucket/x out; leave it out"),
        (
            {},
            "a: 1\nmodel: https://h/x?X-Amz-Signature=pass\n",
            r"reads it: model: https://h/x\?X-Amz-Signature=\*\*\*;",
        ),
        ({}, "merge --seed a-secret-of-mine", r"reads it: merge --seed \*\*\*; leave it out"),
    ],
)
def test_secrets_do_not_travel(
    variables: dict[str, str], text: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_SECRET", "a-secret-of-mine")
    with pytest.raises(RecipeError, match=message) as caught:
        check_no_secret(variables, [text])
    assert "pass" not in str(caught.value)
    check_no_secret(
        {"AWS_REGION": "eu-1", "TOKENIZERS_PARALLELISM": "false"},
        ["merge abfs://container@account.dfs.core.windows.net/x out"],
    )
