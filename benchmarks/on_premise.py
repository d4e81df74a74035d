"""Bring deploy/on_premise.yaml up on hosts of this machine, run submitted merges on it, and take it down again.

    python benchmarks/on_premise.py

The shipped file is used as it is, but for its lines marked EDIT: `ray up`, `ray dashboard`, `raymerge submit`, `ray
down`, as its head says. The hosts are Linux namespaces (`linux_hosts.py`), each with a home, processes and an sshd of
its own; each installs the pinned requirements, which takes most of the time. One merge goes from a shared folder to a
shared folder, one from an S3 server to the S3 server; both must give the bytes of one process, and of the second the
server tells which ranges it was asked for: every byte of the inputs' weights once, whoever asked. Needs root.
"""

from __future__ import annotations

import argparse
import configparser
import contextlib
import hashlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from kept_file import REPOSITORY, RESULTS, Report
from linux_hosts import GATEWAY, is_possible, linux_hosts
from make_models import make_models
from model_shapes import LLAMA_SHAPES

_SCRIPTS = Path(sys.executable).parent
_S3_PORT = 9123
_ASKED = "asked.jsonl"
#: Of a tensor, when planning looks at how far models are from their base; those of fingerprints are smaller.
_SAMPLE_BYTES = 16 << 10
#: So that there is something to do for every host: a file of an output is made by one of them.
_SHARD_SIZE = "16MB"
_CREDENTIALS = {"AWS_ACCESS_KEY_ID": "on-premise", "AWS_SECRET_ACCESS_KEY": "on-premise"}
_UP_SECONDS, _DOWN_SECONDS = 1500.0, 30.0
#: Moto, which writes down every range that it is asked for.
_SERVER = """
import json, sys
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple
moto = DomainDispatcherApplication(create_backend_app)
asked = open(sys.argv[3], "a", buffering=1)
def app(environ, start_response):
    if environ["REQUEST_METHOD"] == "GET" and "HTTP_RANGE" in environ:
        asked.write(json.dumps([environ["PATH_INFO"], environ["HTTP_RANGE"]]) + "\\n")
    return moto(environ, start_response)
run_simple(sys.argv[1], int(sys.argv[2]), app, threaded=True)
"""


def main() -> None:
    """Bring the cluster up, merge, take it down, keep the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=1, help="hosts beside the head")
    parser.add_argument("--pip-cache", type=Path, help="folder that the hosts share, so that one downloads")
    parser.add_argument("--keep", action="store_true", help="leave the work folder, for a look at its logs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the kept files")
    options = parser.parse_args()
    if (missing := is_possible()) is not None:
        parser.error(f"{missing} is missing")
    work = Path(tempfile.mkdtemp(prefix="rmhosts", dir="/var/tmp"))  # hosts have a /tmp of their own
    seconds: dict[str, float] = {}
    checks: dict[str, bool] = {}
    try:
        names = ["rm-head", *(f"rm-gpu{number + 1}" for number in range(options.workers))]
        environment = _administrator(work)
        with linux_hosts(work, names, work / "admin/.ssh/id_ed25519.pub", REPOSITORY) as addresses:
            for name in names:
                _configure(work / name, options.pip_cache)
            config = _edited(work, list(addresses.values()))
            _on_cluster(work, config, environment, addresses, seconds, checks)
    finally:
        if not options.keep:
            shutil.rmtree(work, ignore_errors=True)
    _report(options.workers, seconds, checks).write(options.results)
    sys.exit(0 if checks and all(checks.values()) else 1)


def _on_cluster(
    work: Path,
    config: Path,
    environment: dict[str, str],
    addresses: dict[str, str],
    seconds: dict[str, float],
    checks: dict[str, bool],
) -> None:
    """Carry out what the head of the file says."""
    with _timed(seconds, "ray up"):
        _ray(environment, "up", "-y", "--no-config-cache", str(config))
    try:
        with _timed(seconds, "until all hosts have joined"):
            _wait_for_hosts(environment, config, len(addresses))
        with _dashboard(environment, config) as url, _s3_server(work) as endpoint:
            _merges(work, {**environment, "RAY_API_SERVER_ADDRESS": url}, endpoint, seconds, checks)
    finally:
        with _timed(seconds, "ray down"):
            _ray(environment, "down", "-y", str(config))
    # `ray down` stops the head alone.
    for address in list(addresses.values())[1:]:
        _stop_worker(work, environment, address)
    with _timed(seconds, "until no Ray process is left"):
        deadline = time.monotonic() + _DOWN_SECONDS
        while _ray_processes() and time.monotonic() < deadline:
            time.sleep(1)
    left = _ray_processes()
    checks["no Ray process is left after ray down"] = not left
    for command in left:
        print(f"left: {command[:200]}", file=sys.stderr, flush=True)


def _stop_worker(work: Path, environment: dict[str, str], address: str) -> None:
    """Stop Ray on a worker, as the file's head says."""
    known = ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]
    key = str(work / "admin/.ssh/id_ed25519")
    _command(["ssh", "-i", key, *known, f"root@{address}", "raymerge/bin/ray", "stop"], environment)


def _merges(
    work: Path, environment: dict[str, str], endpoint: str, seconds: dict[str, float], checks: dict[str, bool]
) -> None:
    """Submit merges and compare them with those of one process here."""
    base, tuned = make_models(
        work / "shared" / "models", LLAMA_SHAPES["small"], num_fine_tunes=2, shard_size=_SHARD_SIZE
    )
    reaching = {**environment, **_CREDENTIALS, "AWS_ENDPOINT_URL": endpoint}
    os.environ |= {**_CREDENTIALS, "AWS_ENDPOINT_URL": endpoint}
    from raymerge.merge_actors.storage.store import store_of

    folders = [base, *tuned]
    uris = [f"s3://premises/models/{folder.name}" for folder in folders]
    for folder, uri in zip(folders, uris, strict=True):
        for path in folder.iterdir():
            store_of(uri).write(f"{uri}/{path.name}", [path.read_bytes()], blocks_in_flight=1)
    places = {
        "shared folder": ([str(folder) for folder in folders], str(work / "shared" / "merged"), []),
        "S3 server": (uris, "s3://premises/merged", ["--env", f"AWS_ENDPOINT_URL={endpoint}"]),
    }
    size = ["--out-shard-size", _SHARD_SIZE]
    for place, (models, out, flags) in places.items():
        recipe = work / "admin" / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(_recipe(models)))
        alone = work / "alone" / place.replace(" ", "-")
        _raymerge(reaching, "merge", str(recipe), str(alone), *size, "--in-process", "--quiet")
        asked = work / _ASKED
        asked.write_bytes(b"")
        with _timed(seconds, f"submitted merge, {place}"):
            said = _raymerge(reaching, "submit", *flags, "--", "merge", str(recipe), out, *size)
        print(said, flush=True)
        weights = {path.name: path.read_bytes() for path in alone.glob("*.safetensors")}
        found = {name: _read(f"{out}/{name}") for name in weights}
        checks[f"the merge in the {place} has the bytes of one process"] = bool(weights) and found == weights
        if "://" in out:
            checks["every byte of the inputs' weights was fetched from the S3 server once"] = _fetched_once(
                asked, folders
            )
        status = _raymerge(reaching, "status", out)
        checks[f"raymerge status of it ({place}) says finished"] = "finished" in status


def _fetched_once(asked: Path, folders: list[Path]) -> bool:
    """Tell whether tasks asked for the weights of some models once.

    What planning reads, here and in the job, does not count: a file's beginning, and samples.
    """
    ranges: dict[str, list[tuple[int, int]]] = {}
    for line in asked.read_text().splitlines():
        key, asked_for = json.loads(line)
        begin, end = map(int, asked_for.removeprefix("bytes=").split("-"))
        if begin > 0 and end + 1 - begin > _SAMPLE_BYTES:
            ranges.setdefault(key.removeprefix("/premises/models/"), []).append((begin, end + 1))
    for folder in folders:
        for file in folder.glob("*.safetensors"):
            with open(file, "rb") as stream:
                at = 8 + int.from_bytes(stream.read(8), "little")
            for begin, end in sorted(ranges.get(f"{folder.name}/{file.name}", [])):
                if begin != at:
                    print(f"{file}: {begin} is asked for after {at}", file=sys.stderr, flush=True)
                    return False
                at = end
            if at != file.stat().st_size:
                return False
    return True


def _recipe(models: list[str]) -> dict[str, Any]:
    return {
        "merge_method": "dare_ties",
        "base_model": models[0],
        "models": [{"model": model, "parameters": {"weight": 0.5}} for model in models[1:]],
        "parameters": {"density": 0.5},
        "dtype": "bfloat16",
    }


def _read(place: str) -> bytes:
    from raymerge.merge_actors.storage.folders import read_bytes

    return bytes(read_bytes(place)) if "://" in place else Path(place).read_bytes()


def _administrator(work: Path) -> dict[str, str]:
    """Make the home of who runs `ray up`, with a key and a token; return the environment."""
    home = work / "admin"
    (home / ".ssh").mkdir(parents=True, mode=0o700)
    key = home / ".ssh" / "id_ed25519"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text(secrets.token_hex(32))
    (work / "shared").mkdir()
    return {
        **os.environ,
        "HOME": str(home),
        "PATH": f"{_SCRIPTS}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": str(home),  # the state of what is up lies in it
        "HF_HUB_OFFLINE": "1",
    }


def _configure(home: Path, pip_cache: Path | None) -> None:
    """Give a host its storage credentials, which no job carries, and its way to the package registries."""
    (home / ".aws").mkdir()
    lines = ["[default]", *(f"{name.lower()} = {value}" for name, value in _CREDENTIALS.items())]
    (home / ".aws" / "credentials").write_text("\n".join(lines) + "\n")
    pip = configparser.ConfigParser()
    pip.read(Path.home() / ".config" / "pip" / "pip.conf")
    if pip_cache is not None:
        pip["global"] = {**(pip["global"] if "global" in pip else {}), "cache-dir": str(pip_cache.resolve())}
    (home / ".config" / "pip").mkdir(parents=True)
    with open(home / ".config" / "pip" / "pip.conf", "w", encoding="utf-8") as file:
        pip.write(file)


def _edited(work: Path, addresses: list[str]) -> Path:
    """Write the shipped file with its lines marked EDIT changed, and no other."""
    values = {
        "head_ip": addresses[0],
        "worker_ips": f"[{', '.join(addresses[1:])}]",
        "ssh_user": "root",
        "ssh_private_key": str(work / "admin/.ssh/id_ed25519"),
        "max_workers": str(len(addresses) - 1),
    }
    lines = []
    for line in (REPOSITORY / "deploy" / "on_premise.yaml").read_text().splitlines():
        key = line.strip().partition(":")[0]
        if "# EDIT" in line:
            indent = line[: len(line) - len(line.lstrip())]
            line = f"{indent}{key}: {values.pop(key)}"
        lines.append(line)
    assert not values, f"no line to edit for {values}"
    config = work / "admin" / "on_premise.yaml"
    config.write_text("\n".join(lines) + "\n")
    return config


def _wait_for_hosts(environment: dict[str, str], config: Path, count: int) -> None:
    """Wait until Ray counts all hosts as active."""
    deadline = time.monotonic() + _UP_SECONDS
    code = (
        "import ray; ray.init(address='auto', log_to_driver=False, logging_level='ERROR'); "
        "print('UP', sum(node['Alive'] for node in ray.nodes()))"
    )
    while True:
        said = _ray(environment, "exec", str(config), f'python -c "{code}"', check=False)
        if f"UP {count}" in said:
            return
        if time.monotonic() > deadline:
            raise RuntimeError(f"the hosts have not joined: {said}")
        time.sleep(5)


@contextlib.contextmanager
def _dashboard(environment: dict[str, str], config: Path) -> Iterator[str]:
    """Tunnel to the head's dashboard, as the file says."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    tunnel = subprocess.Popen(
        [_SCRIPTS / "ray", "dashboard", "--port", str(port), str(config)],
        env=environment, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(tunnel.pid, 15)
        tunnel.wait()


@contextlib.contextmanager
def _s3_server(work: Path) -> Iterator[str]:
    """Run an S3 server on this machine, where all hosts reach it."""
    endpoint = f"http://{GATEWAY}:{_S3_PORT}"
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _SERVER, GATEWAY, str(_S3_PORT), str(work / _ASKED)],
        stdout=subprocess.DEVNULL, stderr=(work / "s3.log").open("wb"),
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                request = urllib.request.Request(f"{endpoint}/premises", method="PUT")
                urllib.request.urlopen(request, timeout=5).close()
                break
            time.sleep(0.2)
        yield endpoint
    finally:
        server.kill()
        server.wait()


def _ray_processes() -> list[str]:
    """Return the Ray processes of the hosts."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                command = Path("/proc", entry, "cmdline").read_bytes().replace(b"\0", b" ").decode()
                namespace = os.readlink(f"/proc/{entry}/ns/pid")
                if "/raymerge/bin/" in command and namespace != os.readlink("/proc/self/ns/pid"):
                    found.append(command)
    return found


def _ray(environment: dict[str, str], *words: str, check: bool = True) -> str:
    return _command([str(_SCRIPTS / "ray"), *words], environment, check=check)


def _raymerge(environment: dict[str, str], *words: str) -> str:
    return _command([str(_SCRIPTS / "raymerge"), *words], environment)


def _command(words: list[str], environment: dict[str, str], *, check: bool = True) -> str:
    """Run a command from the clone, as the file says; return what it prints."""
    done = subprocess.run(
        words, env=environment, cwd=REPOSITORY, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(words)} exited with {done.returncode}:\n{done.stdout[-6000:]}")
    return done.stdout


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    seconds[name] = time.monotonic() - started
    print(f"{name}: {seconds[name]:.0f} s", file=sys.stderr, flush=True)


def _report(num_workers: int, seconds: dict[str, float], checks: dict[str, bool]) -> Report:
    shipped = hashlib.sha256((REPOSITORY / "deploy" / "on_premise.yaml").read_bytes()).hexdigest()
    report = Report(
        "on_premise",
        "deploy/on_premise.yaml brought up",
        {"hosts": f"{num_workers + 1} (Linux namespaces)", "file": f"sha256 {shipped[:12]}"},
    )
    report.data |= {"seconds": seconds, "checks": checks}
    report.table(("step", "seconds"), [(name, f"{value:.1f}") for name, value in seconds.items()])
    report.table(("check", "holds"), [(name, "yes" if holds else "NO") for name, holds in checks.items()])
    return report


if __name__ == "__main__":
    main()
