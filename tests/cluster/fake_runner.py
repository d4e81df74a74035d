"""Evaluators that make scores up from a point's axes, for tests of what happens around them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from raymerge.cluster.grid import OnRow, OpenRunner, ShouldStop
from raymerge.cluster.grid_points import Point

Score = Callable[[Mapping[str, Any]], float]


class FakeRunner:
    """Takes points and gives rows, in the opposite order; counts what it was asked."""

    def __init__(self, score: Score, metric: str = "topic.accuracy") -> None:
        self.score, self.metric = score, metric
        self.ran: list[int] = []
        self.tested: list[int] = []
        self.stopped: list[tuple[int, float]] = []
        #: raised after so many rows
        self.interrupt_after: int | None = None

    def run(
        self,
        points: Sequence[Point],
        on_row: OnRow,
        *,
        split: str = "validation",
        should_stop: ShouldStop | None = None,
        rungs: Sequence[float] = (),
    ) -> None:
        for point in reversed(points):
            if self.interrupt_after is not None and len(self.ran) >= self.interrupt_after:
                raise KeyboardInterrupt
            (self.tested if split == "test" else self.ran).append(point.number)
            row: dict[str, Any] = {"point": point.number, "key": point.key, "split": split, "error": None}
            row |= {"seconds": 0.01, "seed": point.recipe.get("seed", 0), "same_as": None, "status": "ok"}
            try:
                value = self.score(point.axes)
            except ArithmeticError as error:
                on_row(row | {"status": "failed", "error": repr(error)})
                continue
            # At a rung a point looks the better the more of it is seen, in the order of the points.
            for rung in rungs:
                if should_stop and should_stop(point, rung, {self.metric: value * rung}):
                    self.stopped.append((point.number, rung))
                    row |= {"status": "pruned"}
                    value *= rung
                    break
            on_row(row | {f"metric.{self.metric}": value, f"stderr.{self.metric}": 0.01})

    def opener(self) -> OpenRunner:
        """Return what starts the evaluators: this one."""

        @contextlib.contextmanager
        def open_runner(*_: Any) -> Iterator[FakeRunner]:
            yield self

        return open_runner
