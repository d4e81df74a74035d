"""Check that a process may work for a driver: the same versions, and a GPU that torch can use if one is wanted."""

from __future__ import annotations

import os
from collections.abc import Mapping

from raymerge.merge_actors.errors import ClusterError
from raymerge.merge_actors.versions import check_versions


def check_place(versions: Mapping[str, str], device: str) -> None:
    """Check this process.

    Args:
        versions: of the driver.
        device: "cpu" or "cuda".

    Raises:
        ClusterError: two versions differ, or torch cannot use the GPU; it names the node.
    """
    check_versions(versions)
    if device != "cuda":
        return
    import torch

    if torch.cuda.is_available():
        return
    reason = "it finds none"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
    raise ClusterError(
        f"Ray gives a GPU of node {os.uname().nodename}, but torch {torch.__version__} cannot use it: {reason}; "
        "its driver must be as new as torch's CUDA wants (580 or newer for CUDA 13), or say --device cpu"
    )
