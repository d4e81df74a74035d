"""Match the names in an adapter with those of a base checkpoint, whose prefixes may differ.

An adapter trained on `AutoModelForCausalLM` says `model.layers.0...` where a checkpoint saved from
`AutoModel` says `layers.0...`; a vision-language model puts `language_model.` in front.
"""

from __future__ import annotations

import difflib
from functools import cached_property

from raymerge.merge_actors.checkpoint.folder import Checkpoint
from raymerge.merge_actors.errors import CheckpointError

#: Leading parts of a name that may differ: "model.language_model."
_MAX_PREFIX_PARTS = 2


class BaseNames:
    """The tensor names of a base, found with or without their leading parts."""

    def __init__(self, base: Checkpoint) -> None:
        self.base = base
        #: tied aliases are names too: an adapter may mean them
        self._names = dict.fromkeys([*base.tensors, *base.tied])

    def find(self, name: str, path: str) -> str | None:
        """Return the base's name for an adapter's: the same, or the one that differs in its prefix.

        Raises:
            CheckpointError: two tensors of the base differ from it only in the prefix.
        """
        if name in self._names:
            return name
        for ending in _endings(name):
            candidates = self._by_ending.get(ending, [])
            if len(candidates) > 1:
                raise CheckpointError(
                    f"adapter {path!r} changes {name!r}, which may mean {candidates[0]!r} or "
                    f"{candidates[1]!r} in {self.base.path!r}; give the base that it was trained on."
                )
            if candidates:
                return candidates[0]
        return None

    def nearest(self, module: str) -> str:
        """Name the base's tensor that looks most like a module's, in brackets."""
        close = difflib.get_close_matches(f"{module}.weight", self._names, n=1, cutoff=0.8)
        return f" (the closest is {close[0]})" if close else ""

    @cached_property
    def _by_ending(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name in self._names:
            for ending in _endings(name):
                found.setdefault(ending, []).append(name)
        return found


def _endings(name: str) -> list[str]:
    """Return the name and what is left without its leading parts; at least two parts remain."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(min(_MAX_PREFIX_PARTS, max(len(parts) - 2, 0)) + 1)]
