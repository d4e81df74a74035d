"""In which order points run, and on which evaluator: neighbours share what an evaluator remembers.

Points are sorted into families. Those of one family differ in nothing but scales of the merged task
vector (lambda, alpha) and weights; the scales change fastest. An evaluator works through a family by itself, and
helps with somebody else's when none is left that nobody has begun. Pure: nothing here knows what a merge is.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from raymerge.cluster.grid_points import Point, fingerprint

#: Parameters that leave everything as it is which is dear to compute.
_SCALES = frozenset({"lambda", "scaling", "alpha", "name"})
#: Parameters that leave masks and thresholds as they are.
_WEIGHTS = frozenset({"weight", "normalize"}) | _SCALES


class PointQueue:
    """Which point comes next on an evaluator; holds numbers, no recipes."""

    def __init__(self, points: Sequence[Point]) -> None:
        """Sort the points; each is made once and let go."""
        families: dict[str, int] = {}
        without_scales: dict[str, int] = {}
        keys = []
        for index in range(len(points)):
            recipe = points[index].recipe
            family = families.setdefault(fingerprint(_without(recipe, _WEIGHTS)), len(families))
            rest = without_scales.setdefault(fingerprint(_without(recipe, _SCALES)), len(without_scales))
            keys.append((family, rest, index))
        members: list[array[int]] = [array("q") for _ in families]
        for family, _, index in sorted(keys):
            members[family].append(index)
        #: of each point, which of the names it has; a name is "" where a point is the only one
        self._of_group = array("q", (rest for _, rest, _ in sorted(keys, key=lambda each: each[2])))
        alone = array("q", (0,) * len(without_scales))
        for rest in self._of_group:
            alone[rest] += 1
        self._group_names = [name if alone[rest] > 1 else "" for name, rest in without_scales.items()]
        self._waiting: deque[deque[int]] = deque(deque(each) for each in members)
        self._own: dict[int, deque[int]] = {}
        self._again: deque[int] = deque()

    def next(self, evaluator: int) -> int | None:
        """Return the index of the next point for an evaluator; None when all were handed out."""
        if self._again:
            return self._again.popleft()
        own = self._own.get(evaluator)
        if own:
            return own.popleft()
        if self._waiting:
            own = self._own[evaluator] = self._waiting.popleft()
            return own.popleft()
        longest = max(self._own.values(), key=len, default=None)
        # From the end: the owner goes on with what it remembers.
        return longest.pop() if longest else None

    def group(self, index: int) -> str | None:
        """Return the name of the points that differ from one in scales alone; None if there are no others."""
        return self._group_names[self._of_group[index]] or None

    def put_back(self, index: int) -> None:
        """Hand a point out again, before the others."""
        self._again.append(index)

    def leave(self, evaluator: int) -> None:
        """Take the family of an evaluator that is gone back."""
        own = self._own.pop(evaluator, None)
        if own:
            self._waiting.appendleft(own)


def _without(value: Any, names: frozenset[str]) -> Any:
    if isinstance(value, Mapping):
        return {name: _without(each, names) for name, each in value.items() if name not in names}
    return [_without(each, names) for each in value] if isinstance(value, list | tuple) else value
