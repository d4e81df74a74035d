"""How long a run waits until a cluster gives it a worker, and what there is meanwhile."""

from __future__ import annotations

#: From a cluster that is busy with other work.
BUSY_SECONDS = 3600.0
#: From one that lacks what is asked for: a cloud starts a machine, pulls an image and installs torch in ten minutes.
START_SECONDS = 1200.0
#: How often to say that we wait.
REMARK_SECONDS = 60.0


def seconds_to_wait(*, num_cpus: float, num_gpus: float) -> float:
    """Return how many seconds to wait for a first worker."""
    import ray

    total = ray.cluster_resources()
    fits = total.get("CPU", 0) >= num_cpus and total.get("GPU", 0) >= num_gpus
    return BUSY_SECONDS if fits else START_SECONDS


def resources() -> str:
    """Return what the cluster has, such as "0 of 2 CPU free, 0 of 0 GPU free"."""
    import ray

    total, free = ray.cluster_resources(), ray.available_resources()
    return ", ".join(
        f"{free.get(kind, 0):g} of {total.get(kind, 0):g} {kind} free" for kind in ("CPU", "GPU")
    )
