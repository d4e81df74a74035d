"""An output never takes the place of what it is made from."""

from __future__ import annotations

import os
from collections.abc import Iterable

from raymerge.merge_actors.errors import OutputError
from raymerge.merge_actors.storage.uris import is_remote


def refuse_inputs_in_output(out: str, inputs: Iterable[str]) -> None:
    """Refuse an output folder that is an input, or holds one: `--overwrite` would delete it.

    Raises:
        OutputError: naming both.
    """
    place = _real(out)
    for path in inputs:
        if (_real(path) + "/").startswith(place + "/"):
            raise OutputError(
                f"{out} would be replaced, but {path}, which is read, lies there; choose another folder for the output"
            )


def _real(path: str) -> str:
    return path.rstrip("/") if is_remote(path) else os.path.realpath(path).rstrip("/")
