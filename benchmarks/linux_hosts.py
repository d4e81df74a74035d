"""Hosts made of Linux namespaces on this machine: network, processes, mounts and name of their own, with an sshd.

A host has its own address, /root, /tmp and /dev/shm; it sees the machine's other files, but not this repository. It
reaches the package registries through the machine's own link. Needs root, iproute2, iptables and openssh-server.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

_BRIDGE = "raymerge0"
_NETWORK = "10.213.0"
#: Of this machine, as the hosts see it.
GATEWAY = f"{_NETWORK}.1"
_FORWARDING = Path("/proc/sys/net/ipv4/ip_forward")


@contextlib.contextmanager
def linux_hosts(work: Path, names: Sequence[str], public_key: Path, hidden: Path) -> Iterator[dict[str, str]]:
    """Give hosts by name, with their addresses; root logs in with a key.

    Args:
        work: every host has its files in a folder of its name here, and sees this folder.
        names: of the hosts.
        public_key: of the one who may log in.
        hidden: a folder of this machine that hosts do not see.
    """
    addresses = {name: f"{_NETWORK}.{number + 2}" for number, name in enumerate(names)}
    with contextlib.ExitStack() as stack:
        _run("ip", "link", "add", _BRIDGE, "type", "bridge")
        stack.callback(_run, "ip", "link", "del", _BRIDGE)
        _run("ip", "addr", "add", f"{GATEWAY}/24", "dev", _BRIDGE)
        _run("ip", "link", "set", _BRIDGE, "up")
        stack.enter_context(_way_out())
        for name, address in addresses.items():
            stack.enter_context(_host(work, name, address, public_key, hidden))
        yield addresses


@contextlib.contextmanager
def _way_out() -> Iterator[None]:
    """Let the hosts reach what this machine reaches."""
    before = _FORWARDING.read_text()
    rule = ("POSTROUTING", "-s", f"{_NETWORK}.0/24", "!", "-d", f"{_NETWORK}.0/24", "-j", "MASQUERADE")
    _FORWARDING.write_text("1")
    _run("iptables", "-t", "nat", "-A", *rule)
    try:
        yield
    finally:
        _run("iptables", "-t", "nat", "-D", *rule)
        _FORWARDING.write_text(before)


@contextlib.contextmanager
def _host(work: Path, name: str, address: str, public_key: Path, hidden: Path) -> Iterator[None]:
    home = work / name
    (home / ".ssh").mkdir(parents=True, mode=0o700)
    (home / "tmp").mkdir(mode=0o1777)
    shutil.copy(public_key, home / ".ssh" / "authorized_keys")
    shutil.copy("/etc/skel/.bashrc", home)
    _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(home / "host_key"))
    _run("ip", "netns", "add", name)
    link = f"rmv{address.rpartition('.')[2]}"
    server: subprocess.Popen[bytes] | None = None
    try:
        _run("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
        _run("ip", "link", "set", link, "master", _BRIDGE, "up")
        _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
        _run("ip", "-n", name, "link", "set", "eth0", "up")
        _run("ip", "-n", name, "link", "set", "lo", "up")
        _run("ip", "-n", name, "route", "add", "default", "via", GATEWAY)
        server = _start_sshd(home, name, address, hidden)
        yield
    finally:
        if server is not None:
            server.kill()  # the first process of its namespace: all others end with it
            server.wait()
        _run("ip", "netns", "del", name)  # and its link


def _start_sshd(home: Path, name: str, address: str, hidden: Path) -> subprocess.Popen[bytes]:
    script = (
        f"set -e; mount --make-rprivate /; hostname {name}; mkdir -p /run/sshd; mount --bind {home} /root; "
        f"mount --bind {home}/tmp /tmp; mount -t tmpfs none /dev/shm; "
        f"if [ -d {hidden} ]; then mount -t tmpfs none {hidden}; fi; cd /root; "  # else its own /tmp hides it
        f"exec /usr/sbin/sshd -D -e -h ~root/host_key -o ListenAddress={address} -o PidFile=none -o UsePAM=no "
        "-o StrictModes=no -o PermitRootLogin=yes"
    )
    unshare = ["unshare", "--pid", "--mount", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc"]
    environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
    with (home / "sshd.log").open("wb") as log:
        server = subprocess.Popen(
            ["ip", "netns", "exec", name, *unshare, "bash", "-c", script],
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            env=environment,
        )
    deadline = time.monotonic() + 20
    while b"Server listening" not in (home / "sshd.log").read_bytes():
        if server.poll() is not None or time.monotonic() > deadline:
            server.kill()
            raise RuntimeError(f"host {name} does not start: {(home / 'sshd.log').read_text()}")
        time.sleep(0.1)
    return server


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")


def is_possible() -> str | None:
    """Return what is missing for hosts on this machine; None if nothing is."""
    if os.geteuid():
        return "root"
    return next(
        (name for name in ("ip", "iptables", "unshare", "ssh-keygen", "rsync") if not shutil.which(name)),
        None,
    )
