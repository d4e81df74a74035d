"""Every point gets one row, whatever happens to evaluators; metrics do not depend on who computed them."""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from raymerge.cluster.evaluator import MergeReport, ScoreReport
from raymerge.cluster.evaluator_group import Call, Event, Failure, Gone, Raised, Returned
from raymerge.cluster.grid_options import GridOptions
from raymerge.cluster.grid_points import Point
from raymerge.cluster.grid_run import MOST_ATTEMPTS, Row, Runner, open_runner, run_points
from raymerge.stats.evaluation.tasks import EvaluationSpec


class FakeGroup:
    """Evaluators whose merges and scores are looked up; they answer in the order of the calls."""

    def __init__(
        self,
        digests: Mapping[int, str],
        *,
        num_evaluators: int = 1,
        num_slots: int = 1,
        raises: Mapping[int, str] = {},
        kills: Mapping[int, int] = {},
        full_slots: Sequence[int] = (),
    ) -> None:
        self.num_slots, self.digests, self.raises, self.kills = num_slots, digests, raises, dict(kills)
        self.full_slots = full_slots
        self.calls: list[tuple[int, str, int, Any]] = []
        self._alive = list(range(num_evaluators))
        self._next = num_evaluators
        self._events: deque[Callable[[], Event]] = deque()
        self._held: dict[tuple[int, int], int] = {}

    def start(self) -> None:
        pass

    def close(self) -> None:
        pass

    def evaluators(self) -> tuple[int, ...]:
        return tuple(self._alive)

    def submit(self, evaluator: int, call: Call) -> None:
        assert evaluator in self._alive
        self._events.append(lambda: self._answer(evaluator, call))

    def wait(self, timeout_seconds: float) -> list[Event]:
        return [self._events.popleft()()] if self._events else []

    def _answer(self, evaluator: int, call: Call) -> Event:
        if evaluator not in self._alive:
            return Gone(evaluator, "it is gone")
        place = (evaluator, call.slot)
        if call.method == "merge":
            number = call.arguments[0]["number"]
            self.calls.append((evaluator, "merge", call.slot, number))
            if call.slot in self.full_slots:
                return Raised(evaluator, call, Failure("no room", is_full=True))
            if self.kills.get(number, 0) > 0:
                self.kills[number] -= 1
                self._alive.remove(evaluator)
                self._alive.append(self._next)
                self._next += 1
                return Gone(evaluator, "out of memory")
            if number in self.raises:
                return Raised(evaluator, call, Failure(self.raises[number]))
            self._held[place] = number
            report: Any = MergeReport(
                digest=self.digests.get(number, str(number)),
                recipe_fingerprint="f",
                seed=0,
                seconds=0.1,
                bytes_read=0,
            )
            return Returned(evaluator, call, report)
        number = self._held[place]
        self.calls.append((evaluator, "score", call.slot, (number, call.arguments[1])))
        value = float(sum(map(ord, self.digests.get(number, str(number)))))
        report = ScoreReport(metrics={"t.accuracy": (value, 0.5)}, num_forward_passes=3, seconds=0.2)
        return Returned(evaluator, call, report)


def points(count: int) -> list[Point]:
    return [
        Point(number=i, axes={}, recipe={"number": i, "parameters": {"lambda": i}}, key=f"k{i}")
        for i in range(count)
    ]


def run(group: FakeGroup, count: int, **options: Any) -> list[Row]:
    rows: list[Row] = []
    Runner(group).run(points(count), rows.append, **options)
    assert sorted(row["point"] for row in rows) == list(range(count))
    return sorted(rows, key=lambda row: row["point"])


def test_one_row_for_each_point() -> None:
    rows = run(FakeGroup({}, num_evaluators=3), 20)
    assert {row["status"] for row in rows} == {"ok"}
    assert rows[7]["metric.t.accuracy"] == ord("7")
    assert rows[7]["stderr.t.accuracy"] == 0.5
    assert rows[7]["key"] == "k7" and rows[7]["split"] == "validation" and rows[7]["num_forward_passes"] == 3
    assert rows[7]["seconds"] == pytest.approx(0.3)


@pytest.mark.parametrize("num_evaluators", [1, 3])
def test_one_model_is_scored_once(num_evaluators: int) -> None:
    group = FakeGroup({2: "twin", 5: "twin", 6: "twin"}, num_evaluators=num_evaluators)
    rows = run(group, 8)
    twins = [rows[number] for number in (2, 5, 6)]
    original = next(row for row in twins if row["same_as"] is None)
    assert all(row["same_as"] == original["point"] for row in twins if row is not original)
    assert len({row["metric.t.accuracy"] for row in twins}) == 1
    assert sum(row["num_forward_passes"] for row in twins) == 3
    assert len([call for call in group.calls if call[1] == "score"]) == 6


def test_a_point_that_raises_is_a_row_and_the_others_go_on() -> None:
    rows = run(FakeGroup({}, raises={1: "Traceback ...\nValueError: no such thing"}), 4)
    assert [row["status"] for row in rows] == ["ok", "failed", "ok", "ok"]
    assert rows[1]["error"].endswith("ValueError: no such thing")
    assert "metric.t.accuracy" not in rows[1]


def test_a_point_of_a_dead_evaluator_runs_again() -> None:
    rows = run(FakeGroup({}, num_evaluators=2, kills={3: 2}), 6)
    assert {row["status"] for row in rows} == {"ok"}


def test_a_point_that_kills_every_evaluator_is_given_up() -> None:
    rows = run(FakeGroup({}, num_evaluators=2, kills={3: 99}), 6)
    assert [row["status"] for row in rows] == ["ok", "ok", "ok", "failed", "ok", "ok"]
    assert f"{MOST_ATTEMPTS} times" in rows[3]["error"] and "out of memory" in rows[3]["error"]


def test_twins_of_a_model_that_was_lost_are_scored_themselves() -> None:
    group = FakeGroup({0: "twin", 1: "twin"}, num_evaluators=2)
    original_wait = group.wait
    waits = 0

    def wait(timeout_seconds: float) -> list[Event]:
        nonlocal waits
        waits += 1
        if waits == 3:  # both are merged, and the first is being scored
            group._alive.remove(0)
            group._alive.append(9)
            group._events.clear()
            return [Gone(0, "killed")]
        return original_wait(timeout_seconds)

    group.wait = wait  # type: ignore[method-assign]
    rows = run(group, 2)
    assert [row["status"] for row in rows] == ["ok", "ok"]
    assert sorted(row["same_as"] is None for row in rows) == [False, True]


def test_twins_of_a_model_whose_scoring_raises_are_scored_themselves() -> None:
    group = FakeGroup({0: "twin", 1: "twin"}, num_evaluators=2)
    answer, failures = group._answer, [Failure("Traceback ...\nRuntimeError: once")]
    num_waits = 0

    def fail_once(evaluator: int, call: Call) -> Event:
        if call.method == "score" and failures:
            return Raised(evaluator, call, failures.pop())
        return answer(evaluator, call)

    def wait(timeout_seconds: float) -> list[Event]:
        nonlocal num_waits
        num_waits += 1
        assert num_waits < 100, "a point waits for ever"
        return FakeGroup.wait(group, timeout_seconds)

    group._answer, group.wait = fail_once, wait  # type: ignore[method-assign]
    rows = run(group, 2)
    assert sorted(row["status"] for row in rows) == ["failed", "ok"]


def test_what_is_known_of_one_split_is_not_taken_for_another() -> None:
    """The test score of a model is never the one that it was chosen by."""
    group, rows = FakeGroup({}), list[Row]()
    runner = Runner(group)
    for split in ("validation", "test", "test"):
        runner.run(points(1), rows.append, split=split)
    assert [(row["split"], row["same_as"]) for row in rows] == [
        ("validation", None),
        ("test", None),
        ("test", 0),
    ]
    assert [row["num_forward_passes"] for row in rows] == [3, 3, 0]


def test_the_next_point_is_merged_while_one_is_scored() -> None:
    group = FakeGroup({}, num_slots=2)
    run(group, 4)
    kinds = [(kind, slot) for _, kind, slot, _ in group.calls]
    assert kinds[:4] == [("merge", 0), ("merge", 1), ("score", 0), ("score", 1)] or kinds[:3] == [
        ("merge", 0),
        ("score", 0),
        ("merge", 1),
    ]
    assert {slot for _, slot in kinds} == {0, 1}


def test_a_slot_that_does_not_fit_is_left_alone() -> None:
    group = FakeGroup({}, num_slots=2, full_slots=[1])
    rows = run(group, 4)
    assert {row["status"] for row in rows} == {"ok"}
    assert len([call for call in group.calls if call[1:3] == ("merge", 1)]) == 1


def test_pruned_points_keep_what_was_seen() -> None:
    asked: list[tuple[int, float, float]] = []

    def should_stop(point: Point, fraction: float, metrics: Mapping[str, float]) -> bool:
        asked.append((point.number, fraction, metrics["t.accuracy"]))
        return point.number == 1 and fraction > 0.2

    group = FakeGroup({})
    rows = run(group, 3, should_stop=should_stop, rungs=(1 / 9, 1 / 3))
    assert [row["status"] for row in rows] == ["ok", "pruned", "ok"]
    assert rows[1]["metric.t.accuracy"] == ord("1")
    assert [row["num_forward_passes"] for row in rows] == [9, 6, 9]
    assert [(number, fraction) for number, fraction, _ in asked if number == 1] == [(1, 1 / 9), (1, 1 / 3)]


def test_the_driver_keeps_no_point() -> None:
    alive = 0
    most = 0

    class Lazy(Sequence[Point]):  # type: ignore[misc]
        def __len__(self) -> int:
            return 2_000

        def __getitem__(self, index: Any) -> Any:
            nonlocal alive, most
            alive += 1
            most = max(most, alive)

            class Counted(dict[str, Any]):
                def __del__(self) -> None:
                    nonlocal alive
                    alive -= 1

            recipe = Counted(number=index, parameters={"lambda": index})
            return Point(number=index, axes={}, recipe=recipe, key=str(index))

    group = FakeGroup({}, num_evaluators=4)
    group.calls = deque(maxlen=1)  # type: ignore[assignment]
    num_rows = 0

    def count(row: Row) -> None:
        nonlocal num_rows
        num_rows += 1

    Runner(group).run(Lazy(), count)
    assert num_rows == 2_000
    assert most <= 8


def grid(family: Any) -> list[Point]:
    """Twelve points: method x density x lambda; linear and the mean by task vectors are one model."""
    found = []
    base = {"base_model": str(family.base)}
    for method, density in (("ties", 0.3), ("dare_linear", 0.5)):
        for scale in (0.5, 1.0, 4.0):
            models = [
                {"model": str(model), "parameters": {"weight": 0.5, "density": density}}
                for model in family.models
            ]
            found.append({"merge_method": method, **base, "models": models, "parameters": {"lambda": scale}})
    for weight in (1.0, 2.0):  # normalised: the same model twice
        models = [{"model": str(model), "parameters": {"weight": weight}} for model in family.models]
        found.append({"merge_method": "linear", "models": models})
    return [
        Point(number=i, axes={}, recipe=recipe | {"name": f"point-{i}"}, key=str(i))
        for i, recipe in enumerate(found)
    ]


def metrics_of(rows: Sequence[Row]) -> dict[int, dict[str, float]]:
    assert {row["status"] for row in rows} == {"ok"}, [row["error"] for row in rows]
    return {
        row["point"]: {name: value for name, value in row.items() if name.startswith(("metric.", "stderr."))}
        for row in rows
    }


@pytest.fixture(scope="module")
def alone(tiny_checkpoints: Callable[..., Any], evaluation: EvaluationSpec) -> dict[int, dict[str, float]]:
    """Metrics of every point, each run by an evaluator of its own."""
    found: dict[int, dict[str, float]] = {}
    for point in grid(tiny_checkpoints("bert")):
        rows: list[Row] = []
        run_points([point], evaluation, GridOptions(in_process=True, device="cpu"), rows.append)
        found |= metrics_of(rows)
    return found


@pytest.mark.parametrize("workers", [1, 4])
def test_metrics_are_those_of_each_point_alone(
    workers: int,
    tiny_checkpoints: Callable[..., Any],
    evaluation: EvaluationSpec,
    alone: dict[int, dict[str, float]],
) -> None:
    rows: list[Row] = []
    options = GridOptions(in_process=True, device="cpu", workers=workers)
    run_points(grid(tiny_checkpoints("bert")), evaluation, options, rows.append)
    assert metrics_of(rows) == alone
    assert len({tuple(each.values()) for each in alone.values()}) > 3  # the data tell models apart
    same = [row for row in rows if row["same_as"] is not None]
    assert [row["point"] for row in same] in ([6], [7]) and same[0]["num_forward_passes"] == 0
    files = [
        file
        for model in (tiny_checkpoints("bert").base, *tiny_checkpoints("bert").models)
        for file in model.glob("*.safetensors")
    ]
    assert sum(row["bytes_read"] for row in rows) <= workers * sum(file.stat().st_size for file in files)
    assert sum(row["num_merges"] for row in rows) == len(rows)


def test_evaluators_stay_between_runs(
    tiny_checkpoints: Callable[..., Any], evaluation: EvaluationSpec, alone: dict[int, dict[str, float]]
) -> None:
    rows: list[Row] = []
    with open_runner(evaluation, GridOptions(in_process=True, device="cpu", workers=1)) as runner:
        for point in grid(tiny_checkpoints("bert"))[:3]:
            runner.run([point], rows.append)
    assert metrics_of(rows) == {number: alone[number] for number in range(3)}
    assert [row["bytes_read"] > 0 for row in rows] == [True, False, False]


def test_a_bad_model_fails_its_own_point(
    tiny_checkpoints: Callable[..., Any], evaluation: EvaluationSpec
) -> None:
    three = grid(tiny_checkpoints("bert"))[:3]
    bad = {**three[1].recipe, "base_model": "/nowhere"}
    three[1] = Point(number=1, axes={}, recipe=bad, key="bad")
    rows: list[Row] = []
    run_points(three, evaluation, GridOptions(in_process=True, device="cpu"), rows.append)
    status = {row["point"]: row["status"] for row in rows}
    assert status == {0: "ok", 1: "failed", 2: "ok"}
    (failed,) = (row for row in rows if row["status"] == "failed")
    assert failed["error"].startswith("Traceback") and "/nowhere" in failed["error"]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_an_evaluator_that_is_killed_or_stopped_costs_nothing_but_time(
    ray_session: None,
    tiny_checkpoints: Callable[..., Any],
    evaluation: EvaluationSpec,
    alone: dict[int, dict[str, float]],
    monkeypatch: pytest.MonkeyPatch,
    how: signal.Signals,
) -> None:
    monkeypatch.setattr("raymerge.cluster.signs_of_life.QUIET_SECONDS", 0.5)
    monkeypatch.setattr("raymerge.cluster.signs_of_life.SILENT_SECONDS", 3.0)
    rows: list[Row] = []
    killed: list[int] = []
    options = GridOptions(device="cpu", workers=2, threads_per_evaluator=1)
    with open_runner(evaluation, options) as runner:

        def kill_one(row: Row) -> None:
            rows.append(row)
            if len(rows) == 2:
                group: Any = runner._group
                killed.append(next(iter(group.pids.values())))
                os.kill(killed[0], how)

        runner.run(grid(tiny_checkpoints("bert")), kill_one)
    assert killed
    assert metrics_of(rows) == alone
    assert len(rows) == len(alone)
