"""A session: workers that stay up between merges.

Starting Ray, its actors and torch in them takes seconds, which a merge of a small model does
not. A session pays for that once.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from raymerge.cluster.campaign import RecipeSource
from raymerge.cluster.connect import Device, Placement, connected
from raymerge.cluster.merge import merge
from raymerge.cluster.merge_result import MergeResult
from raymerge.cluster.options import MergeOptions
from raymerge.cluster.worker_group import WorkerGroup

_WHERE = frozenset({"address", "in_process", "workers", "device"})


class Session:
    """Workers on a Ray cluster, on an embedded Ray, or in this process.

        with raymerge.Session(workers=8) as session:
            for recipe in recipes:
                session.merge(recipe, out)

    One merge at a time; to run several recipes at once, hand them to one `merge`.
    """

    def __init__(
        self,
        *,
        address: str | None = None,
        in_process: bool = False,
        workers: int | None = None,
        device: Device = "auto",
    ) -> None:
        """Describe the workers; they start when the session is entered.

        Args:
            address: of a Ray cluster; None means RAY_ADDRESS, and without that an embedded Ray.
            in_process: run on threads of this process, without Ray.
            workers: how many; None means all GPUs, or one a core up to 16.
            device: "auto", "cpu" or "cuda".
        """
        self._connect = functools.partial(
            connected, address=address, in_process=in_process, workers=workers, device=device
        )
        self._open = contextlib.ExitStack()
        self._workers: tuple[WorkerGroup, Placement] | None = None

    def __enter__(self) -> Session:
        assert self._workers is None, "the session is entered already"
        self._workers = self._open.enter_context(self._connect())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._workers = None
        self._open.__exit__(kind, error, traceback)

    def merge(
        self,
        recipe: RecipeSource | Sequence[RecipeSource],
        out: str | os.PathLike[str],
        *,
        strict: bool = False,
        **options: Any,
    ) -> MergeResult:
        """Merge on the session's workers; arguments as for `raymerge.merge`, but where to run.

        Raises:
            RaymergeError: with one sentence for the user; `out` is then as it was before.
        """
        assert self._workers is not None, "the session is not entered: use it in a with statement"
        for name in _WHERE & options.keys():
            raise TypeError(f"{name} is the session's: give it to Session(), not to its merge()")
        recipes = [recipe] if isinstance(recipe, str | os.PathLike | Mapping) else list(recipe)
        return merge(
            recipes,
            out,
            MergeOptions(**options),
            strict=strict,
            workers=contextlib.nullcontext(self._workers),
        )
