"""raymerge submit and jobs: the words of a command, and a real job server with token authentication."""

from __future__ import annotations

import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from raymerge.cli.main import main
from raymerge.cluster.jobs import check_no_secret
from raymerge.merge_actors.errors import RecipeError


@pytest.fixture
def recipe(tiny_checkpoints, tmp_path, monkeypatch):
    """Write a recipe that names its models by relative paths."""
    monkeypatch.chdir(tmp_path)
    family = tiny_checkpoints("llama")
    for model, name in zip(family.models, "ab", strict=False):
        os.symlink(model, name)
    Path("average.yaml").write_text(
        "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n"
    )
    return tmp_path


def test_a_command_is_checked_before_a_cluster_is_asked(recipe):
    run = CliRunner().invoke
    address = ["submit", "--address", "http://127.0.0.1:1"]
    assert "no command that runs on a cluster" in run(main, [*address, "--", "report", "x"]).output
    assert "No such option" in run(main, [*address, "--", "merge", "average.yaml", "out", "--bogus"]).output
    assert "No such option" in run(main, [*address, "--bogus", "--", "merge", "average.yaml", "out"]).output
    assert "no Ray job" in run(main, [*address, "merge", "average.yaml", "out", "--seed", "1"]).output
    assert (
        "leave --address"
        in run(main, [*address, "--", "merge", "average.yaml", "out", "--in-process"]).output
    )
    Path("bad.yaml").write_text("merge_method: lineer\nmodels: [{model: a}]\n")
    assert "lineer" in run(main, [*address, "--", "merge", "bad.yaml", "out"]).output
    Path("gone.yaml").write_text(
        "merge_method: linear\nmodels: [{model: ./gone}, {model: a}]\nparameters: {weight: 1}\n"
    )
    assert "gone" in run(main, [*address, "--", "merge", "gone.yaml", "out"]).output
    done = run(main, [*address, "--", "merge", "average.yaml", "out"])
    assert done.exit_code == 1 and "no Ray job server answers at http://127.0.0.1:1" in done.output


class _NoCluster:
    """Takes a job and notes what it is."""

    sent: dict[str, tuple[str, int]]
    address = "http://nowhere"

    def __init__(self, address):
        self.address = address or self.address

    def find(self, identity):
        return None

    def submit(self, identity, entrypoint, folder, *, num_gpus, **rest):
        if self.interrupted:
            raise KeyboardInterrupt
        self.sent[identity] = (entrypoint.removeprefix("exec python -m raymerge "), num_gpus)
        return True


@pytest.fixture
def sent(monkeypatch, recipe):
    """Return a function that submits a command, and says what would run and on how many GPUs of its own."""
    _NoCluster.sent, _NoCluster.interrupted = {}, False
    monkeypatch.setattr("raymerge.cluster.jobs.Jobs", _NoCluster)
    monkeypatch.setattr("raymerge.cluster.job_bundle.copy_package", lambda folder: None)

    def submit(*words):
        done = CliRunner().invoke(main, ["submit", "--no-wait", *words])
        return _NoCluster.sent[done.stdout.strip()] if done.exit_code == 0 else done.output

    return submit


def test_what_was_typed_runs_as_it_was_typed(sent, recipe):
    """Numbers between commas are not an option said twice; files that do not exist yet are not the job's own."""
    Path("rows.jsonl").write_text('{"text": "a"}\n')
    command, _ = sent(
        "--no-check", "--", "stats", "a", "--data", "rows.jsonl", "--out", "s", "--samples-at", "2,4"
    )
    assert command == f"stats {recipe}/a --data {recipe}/rows.jsonl --samples-at 2,4 --out {recipe}/s"
    command, _ = sent("--no-check", "--", "evaluate", "a", "--tasks", "average.yaml", "--scores", "it's.npz")
    assert shlex.split(command)[-2:] == ["--scores", f"{recipe}/it's.npz"]
    command, _ = sent("--", "merge", "average.yaml", "--stage", "st", "--trace", "t.json", "--", "-out")
    assert command == f"merge average.yaml {recipe}/-out --stage {recipe}/st --trace {recipe}/t.json"
    command, _ = sent("--", "verify", "a", "--no-load")
    assert command == f"verify {recipe}/a --no-load"


def test_commands_without_a_dry_run_are_checked_before_they_are_sent(sent, recipe):
    assert "folder-that-is-gone" in sent(
        "--", "stats", "folder-that-is-gone", "--data", "d.jsonl", "--out", "s"
    )
    assert "the data 'd.jsonl' do not exist here" in sent(
        "--", "stats", "a", "--data", "d.jsonl", "--out", "s"
    )
    stats = ("--", "stats", "a", "--data", "org/data", "--out", "s")
    assert sent(*stats)[0] == f"stats {recipe}/a --data org/data --out {recipe}/s"
    tasks = "evaluate:\n  tasks:\n    - {name: web, kind: loss, validation: rows.jsonl}\n"
    Path("tasks.yaml").write_text(tasks)
    evaluate = ("--", "evaluate", "a", "--tasks", "tasks.yaml")
    assert "rows.jsonl" in sent(*evaluate)
    assert isinstance(sent("--no-check", *evaluate), tuple)
    Path("rows.jsonl").write_text('{"text": "word1 word2 word3"}\n')
    assert isinstance(sent(*evaluate), tuple)
    head = "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: $w}\n"
    search = f"{head}grid: {{w: {{low: 0.1, high: 1}}}}\nsearch: {{trials: 3}}\n{tasks}select: {{metric: web.loss}}\n"
    Path("search.yaml").write_text(search)
    assert isinstance(sent("--", "search", "search.yaml", "out"), tuple)
    Path("search.yaml").write_text(search.replace("web.loss", "web.gain"))
    assert "web.gain" in sent("--", "search", "search.yaml", "out")
    Path("search.yaml").write_text(search.replace("model: b", "model: ./gone"))
    assert "gone" in sent("--", "search", "search.yaml", "out")


def test_gpus_are_of_the_workers_or_of_a_command_without(sent, recipe):
    two = "--num-gpus", "2"
    merge, verify = ("merge", "average.yaml", "out"), ("verify", "a")
    assert sent(*two, "--", *merge) == (f"merge average.yaml {recipe}/out --workers 2 --device cuda", 0)
    command, own_gpus = sent(*two, "--no-check", "--", "evaluate", "a", "--tasks", "average.yaml")
    assert own_gpus == 2 and command.endswith(" --device cuda") and "--workers" not in command
    assert "verify runs on no GPU" in sent(*two, "--", *verify)
    assert "leave --workers away" in sent(*two, "--", *merge, "--workers", "3")
    assert "leave --device away" in sent(*two, "--", *merge, "--device", "cpu")
    assert "0 is not in the range" in sent("--num-gpus", "0", "--", *merge)


def test_an_interruption_while_a_job_is_sent_says_so(sent):
    """It may have arrived."""
    _NoCluster.interrupted = True
    assert "whether it runs says: raymerge jobs status raymerge-merge-average-" in sent(
        "--", "merge", "average.yaml", "out"
    )


def test_secrets_are_not_put_into_a_job():
    check_no_secret({"HF_HUB_OFFLINE": "1", "AWS_REGION": "eu-1"})
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "db_password"):
        with pytest.raises(RecipeError, match=name):
            check_no_secret({name: "x"})


@pytest.fixture(scope="module")
def job_server():
    """Start a head node with dashboard and token; give the environment of its users."""
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        port, dashboard = one.getsockname()[1], two.getsockname()[1]
    scripts = os.path.dirname(sys.executable)
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "PATH": f"{scripts}:{os.environ['PATH']}",
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
    }
    folder = tempfile.mkdtemp(prefix="rj", dir="/tmp")
    head = subprocess.Popen(
        [
            f"{scripts}/ray",
            *("start", "--head", "--block", f"--port={port}", "--num-cpus=2", "--include-dashboard=true"),
            *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--temp-dir={folder}"),
            f"--object-store-memory={80 * 2**20}",
            "--dashboard-agent-listen-port=0",  # another Ray on this machine has the usual one
        ],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        _wait_for(lambda: _raymerge(environment, "jobs", "list").returncode == 0)
        yield environment
    finally:
        head.send_signal(signal.SIGTERM)
        try:
            head.wait(60)
        except subprocess.TimeoutExpired:  # a slow machine: it stops its processes one after another
            os.killpg(head.pid, signal.SIGKILL)
            head.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _raymerge(environment, *words, **options):
    command = [sys.executable, "-m", "raymerge", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, **options)


def _wait_for(condition, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)


@pytest.mark.timeout(900)
def test_a_job_runs_is_the_same_job_twice_and_passes_its_exit_code_on(recipe, job_server):
    words = ("submit", "--", "merge", "average.yaml", "out", "--workers", "1")
    first = _raymerge(job_server, *words)
    assert first.returncode == 0, first.stderr
    assert f"merged into {recipe / 'out'}" in first.stdout
    assert (recipe / "out" / "model.safetensors").exists()

    again = _raymerge(job_server, *words)
    assert again.returncode == 0
    assert "submitted before and is SUCCEEDED" in again.stderr and "another --name" in again.stderr

    listed = json.loads(_raymerge(job_server, "jobs", "list", "--json").stdout)
    assert [job["state"] for job in listed] == ["SUCCEEDED"]
    assert job_server["RAY_AUTH_TOKEN"] not in json.dumps(listed)

    # OUT exists by now, which only the cluster finds out.
    refused = _raymerge(job_server, *words, "--slice-mib", "8")
    assert refused.returncode == 1
    assert "exists" in refused.stdout

    stranger = _raymerge({**job_server, "RAY_AUTH_TOKEN": "x" * 32}, "jobs", "list")
    assert stranger.returncode == 1 and "refuses our token" in stranger.stderr


@pytest.fixture
def all_cores_taken(job_server):
    """Let another job hold all cores of the cluster until its user stops it."""
    ray = [str(Path(sys.executable).with_name("ray")), "job"]
    holder = ["--submission-id", "holder", "--no-wait", "--entrypoint-num-cpus", "2", "--", "sleep", "10000"]
    subprocess.run([*ray, "submit", *holder], env=job_server, check=True, capture_output=True, timeout=240)
    _wait_for(lambda: "RUNNING" in _raymerge(job_server, "jobs", "status", "holder").stdout)
    return lambda: _raymerge(job_server, "jobs", "stop", "holder")


@pytest.mark.timeout(900)
def test_a_stopped_job_can_be_submitted_again(recipe, job_server, all_cores_taken):
    """The first one waits for a core, so that it cannot be done before it is stopped."""
    words = (
        "submit",
        "--no-wait",
        "--name",
        "stopped",
        "--",
        "merge",
        "average.yaml",
        "other",
        "--workers",
        "1",
        "--resume",  # wherever the stop finds it: before its first task, or in the middle
    )
    name = _raymerge(job_server, *words).stdout.strip()
    assert name.startswith("stopped-")
    assert _raymerge(job_server, "jobs", "stop", name).stdout.strip() == f"stopping {name}"
    assert _raymerge(job_server, "jobs", "wait", name).returncode != 0
    assert "STOPPED" in _raymerge(job_server, "jobs", "status", name).stdout
    assert not (recipe / "other").exists()
    all_cores_taken()
    assert _raymerge(job_server, *words).stdout.strip() == name
    waited = _raymerge(job_server, "jobs", "wait", name, "--timeout", "200")
    assert waited.returncode == 0, _raymerge(job_server, "jobs", "logs", name).stdout
    assert (recipe / "other" / "model.safetensors").exists()
    assert "merged into" in _raymerge(job_server, "jobs", "logs", "--follow", name).stdout
