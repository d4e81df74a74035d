"""The controller against a scripted worker group: no threads, no Ray, every event in a chosen order."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from raymerge.cluster.campaign import plan_wave
from raymerge.cluster.controller import MOST_ATTEMPTS, Controller
from raymerge.cluster.in_flight import LEAST_SECONDS, UNKNOWN_SECONDS, InFlight
from raymerge.cluster.journal import Journal
from raymerge.cluster.options import MergeOptions
from raymerge.cluster.plan import Plan, make_plan
from raymerge.cluster.recipe import load_recipes
from raymerge.cluster.run_folder import RunFolder
from raymerge.cluster.worker_group import DEPTH, Done, Event, Failed, Instruction, Lost
from raymerge.merge_actors.errors import ClusterError, NotFiniteError
from raymerge.merge_actors.methods import METHODS, SPARSIFIERS
from raymerge.merge_actors.methods.block import UNIT
from raymerge.merge_actors.methods.prepare import TensorState
from raymerge.merge_actors.methods.slices import merge_tensors
from raymerge.merge_actors.task import MeasureTask, MergeTask, PieceReport, RunContext, TaskReport
from raymerge.merge_actors.worker import MergeWorker

#: Shapes of a little over three units and of two, of which a slice of the tests holds one.
LONG = (3 * UNIT // 1024 + 1, 1024)
CUT = (2 * UNIT // 1024, 1024)
#: what happens to the next instruction of a worker: it is done, it raises, its worker dies
Fate = BaseException | str | None


class ScriptedGroup:
    """Workers that answer one instruction per `wait`, in an order and with faults that a test chooses."""

    def __init__(
        self,
        num_workers: int,
        answer: Callable[[Instruction, Mapping[int, TensorState]], Any],
        *,
        pick: Callable[[int], int] = lambda count: 0,
        fate: Callable[[Instruction, int], Fate] = lambda instruction, worker: None,
    ) -> None:
        self.answer, self.pick, self.fate = answer, pick, fate
        self.alive = list(range(num_workers))
        self.in_flight: list[tuple[int, Instruction, Mapping[int, TensorState]]] = []
        self.log: list[tuple[int, Instruction]] = []
        self.most_in_flight = 0
        self.num_waits = 0

    def start(self, context: RunContext) -> None:
        raise AssertionError("the controller gets a group that has started")

    def workers(self) -> tuple[int, ...]:
        return tuple(self.alive)

    def submit(self, worker: int, instruction: Instruction, states: Mapping[int, TensorState]) -> None:
        assert worker in self.alive
        self.in_flight.append((worker, instruction, states))
        self.log.append((worker, instruction))
        own = sum(1 for entry in self.in_flight if entry[0] == worker)
        self.most_in_flight = max(self.most_in_flight, own)

    def wait(self, timeout_seconds: float) -> list[Event]:
        assert self.in_flight, "the controller waits although nothing is under way"
        self.num_waits += 1
        worker, instruction, states = self.in_flight.pop(self.pick(len(self.in_flight)))
        fate = self.fate(instruction, worker)
        if isinstance(fate, BaseException):
            return [Failed(worker, instruction, fate)]
        if isinstance(fate, str):
            lost = [instruction, *(entry[1] for entry in self.in_flight if entry[0] == worker)]
            self.in_flight = [entry for entry in self.in_flight if entry[0] != worker]
            self.alive.remove(worker)
            self.alive.append(1 + max([worker, *self.alive]))
            return [Lost(worker, tuple(lost), fate)]
        return [Done(worker, instruction, self.answer(instruction, states))]

    def abandon(self, worker: int) -> None:
        raise AssertionError("nothing is left under way")

    def close(self) -> None:
        raise AssertionError("the controller does not own the group")

    def merges(self) -> list[int]:
        """Return the numbers of the merge tasks in the order in which they were handed out."""
        return [instruction.number for _, instruction in self.log if isinstance(instruction, MergeTask)]


def done_at_once(instruction: Instruction, states: Mapping[int, TensorState]) -> TaskReport:
    """Answer a merge task without doing it."""
    assert isinstance(instruction, MergeTask)
    pieces = tuple(
        PieceReport(recipe=job.recipe, tensor=job.tensor, checksum=1, sum_squares=0.0, num_nonfinite=0)
        for piece in instruction.pieces
        for job in piece.jobs
    )
    return TaskReport(
        number=instruction.number,
        pieces=pieces,
        read_bytes=instruction.read_bytes,
        write_bytes=instruction.write_bytes,
        read_seconds=0.5,
        merge_seconds=0.25,
        write_seconds=0.125,
    )


def write_models(folder: Path, shapes: Mapping[str, Sequence[int]], count: int = 3) -> list[str]:
    """Write a base and some models that differ from it; return their folders."""
    generator = torch.Generator().manual_seed(5)
    base = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    names = ["base", *(f"model{i}" for i in range(1, count))]
    for name in names:
        (folder / name).mkdir()
        tensors = base
        if name != "base":
            tensors = {k: v + torch.randn(v.shape, generator=generator) * 0.1 for k, v in base.items()}
        save_file(tensors, folder / name / "model.safetensors")
    return [str(folder / name) for name in names]


def make(tmp_path: Path, recipe: dict[str, Any], slice_bytes: int = 4 * UNIT) -> Plan:
    """Plan a recipe and preallocate its output, as a run does."""
    (read,), _ = load_recipes({"name": "merged", **recipe})
    run = RunFolder(str(tmp_path / "out"))
    wave = plan_wave([read], {"merged": run.output("merged")}, MergeOptions(), {})
    plan = make_plan(wave.plan.recipes, slice_bytes=slice_bytes)
    run.preallocate(plan.recipes[0].folder, plan.recipes[0].layout)
    return plan


def ties_recipe(models: Sequence[str], **shared: Any) -> dict[str, Any]:
    entries = [{"model": model, "parameters": {"weight": 1.0, "density": 0.3}} for model in models[1:]]
    return {"merge_method": "ties", "base_model": models[0], "models": entries, "parameters": shared}


def linear_plan(tmp_path: Path, num_tensors: int) -> Plan:
    """Return a plan of one task per tensor, none of which needs a state."""
    models = write_models(tmp_path, {f"t{i}": (64, 64) for i in range(num_tensors)})
    entries = [{"model": model, "parameters": {"weight": 1.0}} for model in models]
    plan = make(tmp_path, {"merge_method": "linear", "models": entries}, 1 << 14)
    assert len(plan.tasks) == num_tensors
    return plan


@pytest.fixture(autouse=True)
def closed_journals(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Close every journal that a test opens: an open file is a warning, and a warning an error."""
    opened: list[Journal] = []
    make_journal = Journal.__init__

    def make_and_remember(self: Journal, *args: Any, **kwargs: Any) -> None:
        make_journal(self, *args, **kwargs)
        opened.append(self)

    monkeypatch.setattr(Journal, "__init__", make_and_remember)
    yield
    for journal in opened:
        journal.close()


def journal_of(folder: Path) -> Journal:
    return Journal.create(str(folder / "journal.jsonl"), "fingerprint", {})


def worker_of(plan: Plan) -> Callable[[Instruction, Mapping[int, TensorState]], Any]:
    """Return a real worker as the one who answers."""
    worker = MergeWorker(RunContext(run_id="r", settings=plan.settings, device="cpu", num_threads=1))

    def answer(instruction: Instruction, states: Mapping[int, TensorState]) -> Any:
        if isinstance(instruction, MergeTask):
            assert set(states) == set(instruction.states)
            return worker.merge(instruction, states)
        return worker.measure(instruction)

    return answer


def expected_ties(models: Sequence[str], plan: Plan) -> dict[str, torch.Tensor]:
    tensors = [load_file(f"{model}/model.safetensors") for model in models]
    (settings,) = {id(value): value for _, value in plan.settings}.values()
    return {
        name: merge_tensors(
            METHODS["ties"], [t[name] for t in tensors[1:]], base, settings, sparsifiers=SPARSIFIERS
        )
        for name, base in tensors[0].items()
    }


def assert_merged(plan: Plan, expected: Mapping[str, torch.Tensor]) -> None:
    merged = load_file(f"{plan.recipes[0].folder}/model.safetensors")
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(merged[name], tensor), name


def test_one_worker_gets_every_task_once_in_the_order_of_the_plan(tmp_path: Path) -> None:
    plan = linear_plan(tmp_path, 7)
    group = ScriptedGroup(1, done_at_once)
    journal = journal_of(tmp_path)
    totals = Controller(plan, group, journal).run()
    assert group.merges() == list(range(7))
    assert sorted(journal.done) == list(range(7))
    assert group.most_in_flight == DEPTH
    assert group.num_waits == 7
    assert (totals.num_tasks, totals.num_retries) == (7, 0)
    assert (totals.read_bytes, totals.write_bytes) == (plan.read_bytes, plan.write_bytes)
    assert (totals.read_seconds, totals.merge_seconds, totals.write_seconds) == (3.5, 1.75, 0.875)


def test_tasks_are_spread_over_the_workers(tmp_path: Path) -> None:
    """With nine tasks and three idle workers everybody gets three, turn by turn."""
    group = ScriptedGroup(3, done_at_once, pick=lambda count: count - 1)
    Controller(linear_plan(tmp_path, 9), group, journal_of(tmp_path)).run()
    assert [worker for worker, _ in group.log] == [0, 1, 2] * 3
    assert group.most_in_flight == DEPTH


def test_progress_is_told_after_every_event(tmp_path: Path) -> None:
    told: list[int] = []
    group = ScriptedGroup(2, done_at_once)
    plan = linear_plan(tmp_path, 5)
    Controller(plan, group, journal_of(tmp_path), lambda totals: told.append(totals.num_tasks)).run()
    assert told == [1, 2, 3, 4, 5]


def test_instructions_of_a_lost_worker_are_done_again_first(tmp_path: Path) -> None:
    deaths = iter([None, "out of memory"])
    group = ScriptedGroup(1, done_at_once, fate=lambda *_: next(deaths, None))
    journal = journal_of(tmp_path)
    totals = Controller(linear_plan(tmp_path, 8), group, journal).run()
    # 0 is done; then 1, 2 and 3 are under way when their worker dies.
    assert group.merges() == [0, 1, 2, 3, 1, 2, 3, 4, 5, 6, 7]
    assert [worker for worker, _ in group.log] == [0] * 4 + [1] * 7
    assert sorted(journal.done) == list(range(8))
    assert totals.num_retries == 3


def test_other_workers_go_on_when_one_is_lost(tmp_path: Path) -> None:
    is_lost = iter([True])
    group = ScriptedGroup(
        3, done_at_once, fate=lambda _, worker: "gone" if worker == 1 and next(is_lost, False) else None
    )
    journal = journal_of(tmp_path)
    Controller(linear_plan(tmp_path, 20), group, journal).run()
    assert sorted(journal.done) == list(range(20))
    assert {worker for worker, _ in group.log} == {0, 1, 2, 3}


def test_run_gives_up_when_a_task_takes_every_worker_with_it(tmp_path: Path) -> None:
    """Only the poisonous task counts: the others finish between its attempts."""
    group = ScriptedGroup(1, done_at_once, fate=lambda task, _: "killed" if task.number == 2 else None)
    with pytest.raises(ClusterError, match=r"lost with its worker 4 times, the last time: killed"):
        Controller(linear_plan(tmp_path, 3), group, journal_of(tmp_path)).run()
    assert group.merges().count(2) == MOST_ATTEMPTS


def test_error_of_a_worker_is_raised_and_finished_tasks_are_kept(tmp_path: Path) -> None:
    error = NotFiniteError("tensor t3 of model one holds 1 NaN")
    group = ScriptedGroup(2, done_at_once, fate=lambda task, _: error if task.number == 3 else None)
    journal = journal_of(tmp_path)
    with pytest.raises(NotFiniteError) as caught:
        Controller(linear_plan(tmp_path, 9), group, journal).run()
    assert caught.value is error
    assert sorted(journal.done) == [0, 1, 2]


def test_finished_tasks_of_a_journal_are_not_repeated(tmp_path: Path) -> None:
    plan = linear_plan(tmp_path, 6)
    journal = journal_of(tmp_path)
    for number in (0, 1, 4):
        journal.add(done_at_once(plan.tasks[number], {}))
    journal.close()
    resumed = Journal.resume(journal.path, "fingerprint")
    group = ScriptedGroup(1, done_at_once)
    totals = Controller(plan, group, resumed).run()
    assert group.merges() == [2, 3, 5]
    assert totals.num_tasks == 3
    resumed.close()
    assert sorted(Journal.resume(journal.path, "fingerprint").done) == list(range(6))


def test_nothing_is_measured_for_finished_tasks(tmp_path: Path) -> None:
    """A run that was killed after the cut tensor does not measure it again."""
    models = write_models(tmp_path, {"cut": CUT, "small": (8, 8)})
    plan = make(tmp_path, ties_recipe(models))
    journal = journal_of(tmp_path)
    for task in plan.tasks:
        if task.states:
            journal.add(done_at_once(task, {}))
    group = ScriptedGroup(1, done_at_once)
    Controller(plan, group, journal).run()
    assert all(isinstance(instruction, MergeTask) for _, instruction in group.log)
    assert len(group.log) == 1


@pytest.mark.parametrize("order", ["first", "last", "random"])
@pytest.mark.parametrize("num_workers", [1, 3])
def test_cut_tensor_is_measured_in_rounds_and_merged_exactly(
    tmp_path: Path, order: str, num_workers: int
) -> None:
    """The driver's threshold, found in rounds over slices, is that of the whole tensor."""
    models = write_models(tmp_path, {"cut": LONG, "small": (40, 8), "other": CUT})
    plan = make(tmp_path, ties_recipe(models))
    assert len(plan.states) == 2
    chance = random.Random(3)
    pick = {"first": lambda n: 0, "last": lambda n: n - 1, "random": chance.randrange}[order]
    group = ScriptedGroup(num_workers, worker_of(plan), pick=pick)
    controller = Controller(plan, group, journal_of(tmp_path))
    totals = controller.run()
    assert_merged(plan, expected_ties(models, plan))
    measures = [instruction for _, instruction in group.log if isinstance(instruction, MeasureTask)]
    rounds = {(m.state, id(m.round)) for m in measures}
    assert len(measures) == sum(len(plan.states[state].pieces) for state, _ in rounds)
    assert totals.num_tasks == len(plan.tasks)
    assert totals.read_bytes == plan.read_bytes + sum(m.read_bytes for m in measures)


def test_answers_that_come_in_another_order_are_put_in_that_of_the_tensor(tmp_path: Path) -> None:
    """Of equals at the threshold the first ones are kept: those of the tensor, not of who answered first."""
    models = write_models(tmp_path, {"cut": LONG})
    generator = torch.Generator().manual_seed(6)
    base = torch.zeros(LONG)
    for model in models:
        signs = torch.randint(0, 2, LONG, generator=generator).float() * 2 - 1
        save_file({"cut": base if model == models[0] else signs}, f"{model}/model.safetensors")
    plan = make(tmp_path, ties_recipe(models))
    assert len(plan.states) == 1 and len(plan.states[0].pieces) > 2
    group = ScriptedGroup(3, worker_of(plan), pick=lambda count: count - 1)
    Controller(plan, group, journal_of(tmp_path)).run()
    assert_merged(plan, expected_ties(models, plan))


@pytest.mark.parametrize("seed", range(6))
def test_lost_workers_change_no_byte(tmp_path: Path, seed: int) -> None:
    """Workers die at random, while measuring and while merging; each task is done at last."""
    models = write_models(tmp_path, {"cut": LONG, "small": (40, 8), "other": CUT})
    plan = make(tmp_path, ties_recipe(models))
    chance = random.Random(seed)
    group = ScriptedGroup(
        2,
        worker_of(plan),
        pick=chance.randrange,
        fate=lambda *_: "killed" if chance.random() < 0.08 else None,
    )
    controller = Controller(plan, group, journal_of(tmp_path))
    totals = controller.run()
    assert_merged(plan, expected_ties(models, plan))
    assert totals.num_tasks == len(plan.tasks)


def test_tensors_are_merged_soon_after_they_are_measured(tmp_path: Path) -> None:
    """A cut tensor's slices are merged while they are in the page cache, not after all measuring.

    With one worker two tensors are gathered at a time: the last slice of a tensor is merged
    before the tensor three places behind it is measured.
    """
    models = write_models(tmp_path, {f"t{i}": CUT for i in range(8)})
    plan = make(tmp_path, ties_recipe(models))
    group = ScriptedGroup(1, worker_of(plan))
    Controller(plan, group, journal_of(tmp_path)).run()
    first_measured: dict[int, int] = {}
    last_merged: dict[int, int] = {}
    for at, (_, instruction) in enumerate(group.log):
        if isinstance(instruction, MeasureTask):
            first_measured.setdefault(instruction.state, at)
        else:
            last_merged[instruction.states[0]] = at
    assert all(last_merged[state] < first_measured[state + 3] for state in range(5))
    assert group.merges() == list(range(len(plan.tasks)))


def test_states_are_dropped_when_nobody_needs_them(tmp_path: Path) -> None:
    models = write_models(tmp_path, {f"t{i}": CUT for i in range(6)})
    plan = make(tmp_path, ties_recipe(models))
    most = 0

    def watch(_: Any) -> None:
        nonlocal most
        most = max(most, len(controller._states))

    controller = Controller(plan, ScriptedGroup(1, worker_of(plan)), journal_of(tmp_path), watch)
    controller.run()
    assert controller._states == {}
    assert 0 < most <= 3


@pytest.mark.parametrize("order", ["first", "random"])
def test_model_wide_trim_measures_all_tensors_before_any_is_merged(tmp_path: Path, order: str) -> None:
    """One threshold over the model, the same for any slicing: every slice is measured first."""
    models = write_models(tmp_path, {"cut": LONG, "small": (40, 8), "other": CUT})
    chance = random.Random(11)
    merged = []
    for number, slice_bytes in enumerate((4 * UNIT, 1 << 30)):
        folder = tmp_path / str(number)
        folder.mkdir()
        plan = make(folder, ties_recipe(models, trim="model"), slice_bytes)
        pick = chance.randrange if order == "random" else lambda count: 0
        group = ScriptedGroup(2, worker_of(plan), pick=pick)
        Controller(plan, group, journal_of(folder)).run()
        kinds = [isinstance(instruction, MergeTask) for _, instruction in group.log]
        assert kinds == sorted(kinds)
        measured = {
            (m.piece.jobs[0].tensor, m.piece.begin) for _, m in group.log if isinstance(m, MeasureTask)
        }
        assert {tensor for tensor, _ in measured} == {"cut", "small", "other"}
        merged.append(load_file(f"{plan.recipes[0].folder}/model.safetensors"))
    assert all(torch.equal(merged[0][name], merged[1][name]) for name in merged[0])


def test_lost_worker_during_model_wide_measuring(tmp_path: Path) -> None:
    models = write_models(tmp_path, {"cut": LONG, "small": (40, 8)})
    merged = []
    for number, deaths in enumerate(([], [None, None, "killed", None, None, "killed"])):
        folder = tmp_path / str(number)
        folder.mkdir()
        plan = make(folder, ties_recipe(models, trim="model"))
        fates = iter(deaths)
        group = ScriptedGroup(2, worker_of(plan), fate=lambda *_, fates=fates: next(fates, None))  # type: ignore[misc]
        Controller(plan, group, journal_of(folder)).run()
        merged.append(load_file(f"{plan.recipes[0].folder}/model.safetensors"))
    assert all(torch.equal(merged[0][name], merged[1][name]) for name in merged[0])


def test_many_waiting_tasks_are_not_searched_again_and_again(tmp_path: Path) -> None:
    """While one state is gathered thousands of tasks wait aside: looking at them once is enough."""
    models = write_models(tmp_path, {"cut": LONG, **{f"t{i}": (16, 16) for i in range(300)}})
    plan = make(tmp_path, ties_recipe(models, trim="model"), 1 << 10)
    looks = 0

    class Counting(dict[int, Any]):
        def __contains__(self, key: object) -> bool:
            nonlocal looks
            looks += 1
            return super().__contains__(key)

    controller = Controller(plan, ScriptedGroup(1, worker_of(plan)), journal_of(tmp_path))
    controller._states = Counting()
    controller.run()
    assert looks < 12 * len(plan.tasks)


class SlowGroup(ScriptedGroup):
    """Workers of which some do not answer; a wait without an answer lets a second pass."""

    def __init__(self, num_workers: int, slow: set[int], answer: Any = done_at_once, **options: Any) -> None:
        super().__init__(num_workers, answer, **options)
        self.slow, self.seconds, self.abandoned = slow, 0.0, list[int]()

    def wait(self, timeout_seconds: float) -> list[Event]:
        ready = [at for at, entry in enumerate(self.in_flight) if entry[0] not in self.slow]
        if not ready:
            self.seconds += 1.0
            assert self.seconds < 1000, "nobody takes a task over"
            return []
        self.in_flight.insert(0, self.in_flight.pop(ready[0]))
        return super().wait(timeout_seconds)

    def abandon(self, worker: int) -> None:
        self.abandoned.append(worker)


def test_tasks_of_a_slow_worker_are_given_to_an_idle_one_and_the_first_result_counts(tmp_path: Path) -> None:
    group = SlowGroup(2, slow={1})
    journal = journal_of(tmp_path)
    in_flight = InFlight(clock=lambda: group.seconds)
    totals = Controller(linear_plan(tmp_path, 9), group, journal, in_flight=in_flight).run()
    assert sorted(journal.done) == list(range(9))
    slow = {instruction.number for worker, instruction in group.log if worker == 1}
    assert len(slow) == DEPTH
    assert totals.num_speculated == len(slow)
    assert totals.num_tasks == 9
    assert LEAST_SECONDS < group.seconds < LEAST_SECONDS + 3
    assert group.abandoned == [1]


def test_a_task_whose_second_worker_hangs_too_is_given_to_a_third(tmp_path: Path) -> None:
    class Hanging(SlowGroup):
        def submit(self, worker: int, instruction: Instruction, states: Mapping[int, TensorState]) -> None:
            if worker == 2 and any(entry[0] == 1 and entry[1] == instruction for entry in self.in_flight):
                self.slow.add(2)
            super().submit(worker, instruction, states)

    group = Hanging(3, slow={1}, pick=lambda count: 0)
    journal = journal_of(tmp_path)
    in_flight = InFlight(clock=lambda: group.seconds)
    Controller(linear_plan(tmp_path, 9), group, journal, in_flight=in_flight).run()
    assert sorted(journal.done) == list(range(9))
    assert group.slow == {1, 2} and sorted(group.abandoned) == [1, 2]
    assert group.seconds < 4 * LEAST_SECONDS


def test_nothing_is_speculated_while_there_is_other_work_or_time(tmp_path: Path) -> None:
    group = ScriptedGroup(3, done_at_once)
    clock = iter(range(1000))
    totals = Controller(
        linear_plan(tmp_path, 9),
        group,
        journal_of(tmp_path),
        in_flight=InFlight(clock=lambda: next(clock) * 1e-3),
    ).run()
    assert totals.num_speculated == 0
    assert sorted(group.merges()) == list(range(9))


def test_a_late_answer_or_error_of_the_slow_worker_changes_nothing(tmp_path: Path) -> None:
    """The slow worker wakes up when its first task is done elsewhere, and reports an error for it."""
    plan = linear_plan(tmp_path, 4)

    def fate(task: Instruction, worker: int) -> Fate:
        if worker == 0 and task.number in slow_tasks:
            group.slow.clear()
        return NotFiniteError("late") if worker == 1 and task.number in journal.done else None

    group = SlowGroup(2, slow={1}, fate=fate)
    slow_tasks = {1, 3}
    journal = journal_of(tmp_path)
    Controller(plan, group, journal, in_flight=InFlight(clock=lambda: group.seconds)).run()
    assert sorted(journal.done) == list(range(4))


@pytest.mark.parametrize("wakes_up", [False, True])
def test_questions_of_a_slow_worker_are_asked_again(tmp_path: Path, wakes_up: bool) -> None:
    """All waits for the answers of a worker that hangs; if it wakes up, its old answers change nothing."""
    models = write_models(tmp_path, {"cut": CUT, "long": LONG})
    plan = make(tmp_path, ties_recipe(models))
    own, seen = worker_of(plan), set[int]()

    def answer(task: Instruction, states: Mapping[int, TensorState]) -> Any:
        if isinstance(task, MeasureTask) and wakes_up:
            seen.add(task.number)
            if len(seen) == 7:  # rounds after those that the slow worker still has
                group.slow.clear()
        return own(task, states)

    group = SlowGroup(2, slow={1}, answer=answer)
    journal = journal_of(tmp_path)
    in_flight = InFlight(clock=lambda: group.seconds)
    totals = Controller(plan, group, journal, in_flight=in_flight).run()
    assert any(isinstance(task, MeasureTask) for worker, task in group.log if worker == 1)
    assert totals.num_speculated > 0
    assert wakes_up or group.abandoned == [1]
    assert_merged(plan, expected_ties(models, plan))


def test_each_more_worker_of_a_task_is_waited_for_twice_as_long() -> None:
    """Whatever makes a task slow may hold everybody up: not all workers are to end up in it at once."""
    now = 0.0
    in_flight = InFlight(clock=lambda: now)
    in_flight.begin(-1, 0)
    in_flight.end(-1, 0)  # tasks take no time
    in_flight.begin(1, 0)
    for worker, times in ((1, 1), (2, 2), (3, 4)):
        now += 0.9 * times * LEAST_SECONDS
        assert in_flight.overdue(worker) is None
        now += 0.2 * times * LEAST_SECONDS
        assert in_flight.overdue(worker) == 1
        in_flight.begin(1, worker)
        assert in_flight.overdue(worker) is None


def test_what_is_overdue_depends_on_the_others_and_on_patience() -> None:
    now = 0.0
    in_flight = InFlight(clock=lambda: now)
    in_flight.begin(1, 0, patience=10.0)
    in_flight.begin(2, 0)
    now = UNKNOWN_SECONDS - 1
    assert in_flight.overdue(1) is None  # nothing to compare with
    now = UNKNOWN_SECONDS + 1
    assert in_flight.overdue(1) == 1
    in_flight.begin(3, 1)
    now += 2 * LEAST_SECONDS
    in_flight.end(3, 1)
    in_flight.end(1, 0)
    in_flight.end(2, 0)
    in_flight.begin(4, 0, patience=1000.0)
    in_flight.begin(5, 0)
    now += 1000 * LEAST_SECONDS
    assert in_flight.overdue(1) == 5  # the other is older, and may take its time
    assert in_flight.overdue(0) is None


def test_what_is_left_of_a_task_that_failed_is_taken_over_from_a_slow_worker(tmp_path: Path) -> None:
    """Half of a task's recipes fail; the rest is handed out again, and its second worker hangs."""
    plan = linear_plan(tmp_path, 1)
    (task,) = plan.tasks
    assert isinstance(task, MergeTask)
    pieces = tuple(
        dataclasses.replace(
            piece, jobs=(*piece.jobs, *(dataclasses.replace(job, recipe=1) for job in piece.jobs))
        )
        for piece in task.pieces
    )
    task = dataclasses.replace(task, pieces=pieces)
    plan = dataclasses.replace(plan, recipes=plan.recipes * 2, tasks=(task,))
    error = NotFiniteError("bad")
    error.recipe = 0
    failures = iter([error])

    def fate(task: Instruction, worker: int) -> Fate:
        found = next(failures, None)
        if found is not None:
            group.slow.add(worker)  # the least busy worker gets what is left: this one
        return found

    group = SlowGroup(2, slow=set(), fate=fate)
    in_flight = InFlight(clock=lambda: group.seconds)
    in_flight.begin(-1, 7)
    in_flight.end(-1, 7)  # something to compare with
    journal = journal_of(tmp_path)
    totals = Controller(plan, group, journal, in_flight=in_flight, may_drop=True).run()
    assert [piece.recipe for piece in journal.done[0].pieces] == [1]
    assert totals.num_speculated == 1 and group.abandoned == [0]


def test_the_death_of_a_slow_worker_repeats_nothing_that_another_has_taken_over(tmp_path: Path) -> None:
    group = SlowGroup(2, slow={1})
    in_flight = InFlight(clock=lambda: group.seconds)
    in_flight.begin(5, 1)
    in_flight.begin(5, 0)
    assert in_flight.lose(5, 1)
    assert not in_flight.lose(5, 0)
    assert in_flight.overdue(0) is None
