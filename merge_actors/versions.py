"""Versions that must agree between the driver and its workers, or the same bytes are not promised."""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from raymerge.merge_actors.errors import ClusterError

_PACKAGES = ("raymerge", "ray", "torch")


@functools.cache
def installed_versions() -> Mapping[str, str]:
    """Return the versions of Python and of the packages that are installed here; nothing is imported.

    Without the build's name: a head without GPUs has torch 2.13.0+cpu where its workers have 2.13.0+cu130.
    """
    major, minor, _ = platform.python_version_tuple()
    found = {"python": f"{major}.{minor}"}
    for name in _PACKAGES:
        try:
            found[name] = version(name).partition("+")[0]
        except PackageNotFoundError:
            continue  # a driver without torch is one; a raymerge that came with a job has no metadata
    return found


def check_versions(driver: Mapping[str, str], here: Mapping[str, str] | None = None) -> None:
    """Compare a driver's versions with those of this process.

    Raises:
        ClusterError: two differ; it names the pair and the node.
    """
    for name, own in (here or installed_versions()).items():
        if driver.get(name, own) != own:
            raise ClusterError(
                f"the driver has {name} {driver[name]}, node {os.uname().nodename} has {name} {own}; "
                "install one version on both (requirements/constraints.txt)"
            )
