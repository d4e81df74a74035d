"""Connect to Ray: a cluster by address, or an embedded one on this machine.

Also decides how many workers a run gets and on what. `ray` is imported here when it is needed,
so that planning and `--help` never wait for it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Literal

from raymerge.cluster.ray_address import check_listens
from raymerge.cluster.worker_group import InProcessGroup, WorkerGroup
from raymerge.merge_actors.errors import ClusterError, RecipeError

if TYPE_CHECKING:
    from raymerge.cluster.activation_group import ActivationGroup

#: An embedded Ray holds no tensors, only instructions: the least store that Ray takes.
_OBJECT_STORE_BYTES = 80 * 2**20
#: Devices of NVIDIA's driver, of AMD's, and of Windows below Linux.
_GPU_DRIVERS = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/nvhost-gpu", "/dev/kfd", "/dev/dxg")
#: Beyond this many CPU workers on one machine, memory bandwidth and not cores is the limit.
_MOST_CPU_WORKERS = 16

Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True, slots=True)
class Placement:
    """Workers of a run and what each of them gets."""

    num_workers: int
    device: Literal["cpu", "cuda"]
    threads_per_worker: int


@contextlib.contextmanager
def connected(
    *,
    address: str | None,
    in_process: bool,
    workers: int | None,
    device: Device,
    on_remark: Callable[[str], None] = lambda line: None,
) -> Iterator[tuple[WorkerGroup, Placement]]:
    """Give a worker group, not started yet, and take it down at the end.

    Args:
        address: of a Ray cluster; None means RAY_ADDRESS, and without that an embedded Ray.
        in_process: run the workers on threads of this process, without Ray.
        workers: how many; None means all GPUs, or on CPUs one a core up to 16.
        device: where tensors are merged; "auto" takes GPUs if there are any.
        on_remark: told what a user who waits for workers should know.

    Raises:
        ClusterError: the cluster cannot be reached, or has no GPU when one is asked for.
    """
    if workers is not None and workers < 1:
        raise RecipeError(f"--workers is {workers}; it must be at least 1")
    if in_process:
        placement = _place(workers, device, *local_resources())
        group: WorkerGroup = InProcessGroup(placement.num_workers)
        try:
            yield group, placement
        finally:
            group.close()
        return
    with ray_session(address):
        from raymerge.cluster.ray_group import RayGroup

        placement = _place_on_cluster(workers, device)
        # Nodes that join take work too, unless the user said how many workers there are.
        grows = workers is None
        group = RayGroup(
            placement.num_workers,
            num_cpus=1,
            num_gpus=1 if placement.device == "cuda" else 0,
            how_many=(lambda: _num_places(placement.device, *_cluster_resources())) if grows else None,
            on_remark=on_remark,
        )
        try:
            yield group, placement
        finally:
            group.close()


@contextlib.contextmanager
def connected_for_statistics(
    *,
    address: str | None,
    in_process: bool,
    workers: int | None,
    device: Device,
    on_remark: Callable[[str], None] = lambda line: None,
) -> Iterator[tuple[ActivationGroup, Placement]]:
    """Give a group of activation workers, not started yet, and take it down at the end.

    Args:
        address: as for `connected`.
        in_process: as for `connected`.
        workers: as for `connected`.
        device: where the model runs.
        on_remark: told what a user who waits for workers should know.

    Raises:
        ClusterError: the cluster cannot be reached, or has no GPU when one is asked for.
    """
    from raymerge.cluster.activation_group import RayActivationGroup, ThreadGroup

    if workers is not None and workers < 1:
        raise RecipeError(f"--workers is {workers}; it must be at least 1")
    with contextlib.ExitStack() as stack:
        if in_process:
            placement = _place(workers, device, *local_resources())
            group: ActivationGroup = ThreadGroup(placement.num_workers)
        else:
            stack.enter_context(ray_session(address))
            placement = _place_on_cluster(workers, device)
            num_gpus = 1 if placement.device == "cuda" else 0
            group = RayActivationGroup(placement.num_workers, num_gpus=num_gpus, on_remark=on_remark)
        stack.callback(group.close)
        yield group, placement


def choose_device(device: Device, num_gpus: int) -> Literal["cpu", "cuda"]:
    """Return where tensors are worked on.

    Raises:
        ClusterError: a GPU is asked for and there is none.
    """
    chosen: Literal["cpu", "cuda"] = "cuda" if device == "cuda" or (device == "auto" and num_gpus) else "cpu"
    if chosen == "cuda" and not num_gpus:
        raise ClusterError("--device cuda: no GPU is to be seen here; use --device cpu, or another cluster")
    return chosen


def _place_on_cluster(workers: int | None, device: Device) -> Placement:
    """Return where a run goes on the cluster that this process is connected to.

    GPUs that are asked for by number may still have to be started, by a cluster that scales.
    """
    num_cpus, num_gpus = _cluster_resources()
    if device == "cuda" and workers is not None and not num_gpus:
        return Placement(workers, "cuda", 1)
    return _place(workers, device, num_cpus, num_gpus)


def _cluster_resources() -> tuple[int, int]:
    """Return the CPU cores and GPUs of the cluster; none while those of its nodes that had some are gone."""
    import ray

    resources = ray.cluster_resources()
    return int(resources.get("CPU", 0)), int(resources.get("GPU", 0))


def _place(workers: int | None, device: Device, num_cpus: int, num_gpus: int) -> Placement:
    chosen = choose_device(device, num_gpus)
    return Placement(workers or _num_places(chosen, num_cpus, num_gpus), chosen, 1)


def _num_places(device: Literal["cpu", "cuda"], num_cpus: int, num_gpus: int) -> int:
    return num_gpus if device == "cuda" else max(1, min(num_cpus, _MOST_CPU_WORKERS))


def local_resources() -> tuple[int, int]:
    """Return the CPU cores and GPUs of this process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Where the kernel drives no GPU, torch, which takes seconds to import, has none to find either.
    if sys.platform == "linux" and not any(os.path.exists(driver) for driver in _GPU_DRIVERS):
        return cores, 0
    import torch

    return cores, torch.cuda.device_count()


@contextlib.contextmanager
def ray_session(address: str | None) -> Iterator[None]:
    """Attach to a cluster, or start an embedded Ray and stop it again."""
    address = address or os.environ.get("RAY_ADDRESS")
    _set_ray_environment(is_embedded=address is None)
    import ray
    from ray.exceptions import RayError

    if ray.is_initialized():
        yield
        return
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM) if is_main else None
    try:
        if address:
            check_listens(address)
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        else:
            with _on_loopback():
                ray.init(
                    address="local",
                    include_dashboard=False,
                    object_store_memory=_OBJECT_STORE_BYTES,
                    log_to_driver=False,
                    logging_level="ERROR",
                )
    except ConnectionError as error:
        raise ClusterError(
            f"no Ray cluster answers at {address}, or it wants another token than RAY_AUTH_TOKEN or "
            f"~/.ray/auth_token has: {error}"
        ) from error
    except RayError as error:  # AuthenticationError, which older versions do not have
        raise ClusterError(
            f"Ray refuses to attach to {address or 'a Ray of its own'}: {str(error).partition('. ')[0]}; put the "
            "cluster's own token into RAY_AUTH_TOKEN or ~/.ray/auth_token"
        ) from error
    except RuntimeError as error:
        if "Version mismatch" not in str(error):
            raise
        raise ClusterError(" ".join(str(error).split())) from error  # names both versions of Ray and Python
    finally:
        if handler is not None:  # Ray puts its own in place, which ends the process in the middle
            signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """Let the processes of a Ray that is started here listen on 127.0.0.1 and nowhere else.

    As Ray does by itself on macOS and Windows; on Linux it takes an address that others reach, and listens on all.

    Raises:
        ClusterError: this version of Ray has no such switch.
    """
    from ray._private import ray_constants

    usual = getattr(ray_constants, "ENABLE_RAY_CLUSTER", None)
    if usual is None:
        raise ClusterError(
            f"Ray {metadata.version('ray')} cannot be kept from listening on all interfaces; install ray==2.60.0, or "
            "run `ray start --head --node-ip-address 127.0.0.1` and name it: --address 127.0.0.1:6379"
        )
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = usual


def _set_ray_environment(*, is_embedded: bool) -> None:
    """Set what Ray reads when it is imported.

    An embedded Ray listens on this machine only (`_on_loopback`) and lives as long as the command, so its
    token authentication is left as the user set it, else a token is made for this process
    alone: Ray would write one into HOME, which may be read-only, and switch it on for good.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # A call that a session gave up may fail later; every call that counts is looked at.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if is_embedded and "RAY_AUTH_MODE" not in os.environ and "RAY_AUTH_TOKEN" not in os.environ:
        import secrets

        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    if not os.access(os.environ.get("HOME", "/"), os.W_OK):
        os.environ.setdefault("RAY_TMPDIR", tempfile.gettempdir())
