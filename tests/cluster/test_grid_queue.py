"""Points come in an order that lets an evaluator use what it remembers, each exactly once."""

from __future__ import annotations

from typing import Any

from raymerge.cluster.grid_points import Point
from raymerge.cluster.grid_queue import PointQueue


def point(number: int, **settings: Any) -> Point:
    of_model = {name: settings.pop(name) for name in ("weight", "density") if name in settings}
    recipe = {
        "name": f"point-{number}",
        "merge_method": "ties",
        "models": [{"model": "m", "parameters": of_model}],
        "parameters": settings,
    }
    return Point(number=number, axes={}, recipe=recipe, key=str(number))


def drain(queue: PointQueue, evaluator: int = 0) -> list[int]:
    found = []
    while (index := queue.next(evaluator)) is not None:
        found.append(index)
    return found


def test_scales_change_fastest_then_weights() -> None:
    grid = [
        point(i, **{"lambda": lam, "weight": weight, "density": density})
        for i, (lam, weight, density) in enumerate(
            (lam, weight, density) for lam in (0.5, 1.0) for weight in (0.1, 0.2) for density in (0.3, 0.4)
        )
    ]
    # numbers: lambda * 4 + weight * 2 + density
    assert drain(PointQueue(grid)) == [0, 4, 2, 6, 1, 5, 3, 7]


def test_each_evaluator_has_a_family_and_then_helps() -> None:
    grid = [point(i, **{"lambda": i / 10, "density": 0.1 if i < 4 else 0.2}) for i in range(8)]
    queue = PointQueue(grid)
    assert [queue.next(0), queue.next(1), queue.next(0), queue.next(1)] == [0, 4, 1, 5]
    # Evaluator 2 finds no family that nobody has begun: it takes from the end of one.
    assert queue.next(2) in (3, 7)
    rest = drain(queue)
    assert sorted(rest) == sorted(set(range(8)) - {0, 4, 1, 5} - ({3} if 7 in rest else {7}))


def test_what_was_lost_comes_first_and_a_family_finds_a_new_owner() -> None:
    grid = [point(i, **{"lambda": float(i)}) for i in range(3)]
    queue = PointQueue(grid)
    assert queue.next(0) == 0
    queue.leave(0)
    queue.put_back(0)
    assert drain(queue, evaluator=1) == [0, 1, 2]


def test_every_point_comes_once_whoever_asks() -> None:
    grid = [point(i, **{"lambda": i % 3, "density": (i % 7) / 10}) for i in range(50)]
    queue = PointQueue(grid)
    found: list[int] = []
    turn = 0
    while (index := queue.next(turn % 4)) is not None:
        found.append(index)
        turn += 1
    assert sorted(found) == list(range(50))
