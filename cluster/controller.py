"""The controller of a run: hands out instructions and takes in reports until all is done.

Written as if there were one worker. Phases: a state that the driver must gather is asked for
in rounds of measure tasks (a few tensors at a time, so that their slices are still in the page
cache when they are merged); a merge task is ready when its states are known; each worker has a
few instructions in flight. Instructions of a worker that died go back to the front of the
queue; when the queue is empty, idle workers are given the tasks of slow ones as well. Nothing
here touches a tensor or a file but the journal.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from raymerge.cluster.in_flight import InFlight
from raymerge.cluster.journal import Journal
from raymerge.cluster.plan import Plan, StatePlan
from raymerge.cluster.recipe_failures import recipes_left_out, recipes_to_blame, without
from raymerge.cluster.totals import Totals
from raymerge.cluster.worker_group import (
    DEPTH,
    Done,
    Event,
    Failed,
    Instruction,
    Lost,
    WorkerGroup,
)
from raymerge.merge_actors.errors import ClusterError, RaymergeError
from raymerge.merge_actors.known_states import KnownStates
from raymerge.merge_actors.methods import METHODS, SPARSIFIERS
from raymerge.merge_actors.methods.prepare import (
    Preparation,
    Round,
    TensorState,
    model_wide_preparation,
    model_wide_steps,
    preparation,
)
from raymerge.merge_actors.task import (
    FileTask,
    MeasureReport,
    MeasureTask,
    MergeTask,
    SolveTask,
    TaskReport,
)

#: How often the same instruction may be lost with its worker before the run gives up.
MOST_ATTEMPTS = 4
_WAIT_SECONDS = 0.5
#: Whole files are made on a node's disk and uploaded: a second upload competes with the first, so it comes later.
_FILE_PATIENCE = 10.0


@dataclass
class _Gathering:
    """A state under way: its generator, and the answers of the current round by place."""

    plan: StatePlan
    questions: Preparation
    known: TensorState
    answers: dict[tuple[str, int], MeasureReport] = field(default_factory=dict)


class Controller:
    """Drives a plan through a worker group."""

    def __init__(
        self,
        plan: Plan,
        group: WorkerGroup,
        journal: Journal,
        on_progress: Callable[[Totals], None] = lambda totals: None,
        in_flight: InFlight | None = None,
        on_done: Callable[[Done], None] = lambda done: None,
        known: KnownStates | None = None,
        may_drop: bool = False,
    ) -> None:
        """Take a plan.

        Args:
            plan: what is to be done.
            group: who does it.
            journal: what has been done already.
            on_progress: called now and then with what was done in this run.
            in_flight: remembers who has which task.
            on_done: told of each finished instruction.
            known: what earlier runs measured on the same models.
            may_drop: go on without a recipe that fails, as long as there is another.
        """
        self._known = known
        self._plan, self._group, self._journal, self._on_progress = plan, group, journal, on_progress
        self._on_done = on_done
        self.totals = Totals()
        self._may_drop = may_drop
        #: recipes that failed, and why; None for those that an earlier run had given up
        self.dropped: dict[int, RaymergeError | None] = {}
        if may_drop:
            self.dropped = dict.fromkeys(recipes_left_out(plan, journal.done))
        rest = (without(task, self.dropped) for task in plan.tasks if task.number not in journal.done)
        self._waiting = deque(task for task in rest if task is not None and not isinstance(task, MeasureTask))
        #: tasks whose states are being gathered, in the order of the plan
        self._aside: list[MergeTask | SolveTask | FileTask] = []
        #: states that some unfinished task still needs -> how many tasks
        self._needed: dict[int, int] = {}
        self._states: dict[int, TensorState] = {}
        self._gathering: dict[int, _Gathering] = {}
        self._urgent: deque[Instruction] = deque()
        self._load: dict[int, int] = {}
        self._tasks = {task.number: task for task in self._waiting}
        #: questions under way, by numbers below those of tasks, which no other question ever has
        self._measures: dict[int, MeasureTask] = {}
        self._answered: set[int] = set()
        self._next_measure = -1
        #: numbers of the tasks that are not done
        self._unfinished = set(self._tasks)
        self._needed = self._count_needed()
        self._in_flight = in_flight or InFlight()
        self._attempts: dict[int, int] = {}

    def run(self) -> Totals:
        """Carry out every task that the journal does not hold.

        Raises:
            RaymergeError: what a worker raised for the user; nothing is committed then.
            ClusterError: workers were lost too often.
        """
        while self._unfinished:
            self._hand_out()
            for event in self._group.wait(_WAIT_SECONDS):
                self._take_in(event)
            self._on_progress(self.totals)
        for worker in sorted(self._in_flight.workers()):  # still busy with what another has done by now
            self._group.abandon(worker)
        return self.totals

    def _hand_out(self) -> None:
        """Give every worker something to do, the least busy first."""
        idle = [(self._load.get(worker, 0), worker) for worker in self._group.workers()]
        heapq.heapify(idle)
        while idle and idle[0][0] < DEPTH:
            load, worker = heapq.heappop(idle)
            instruction = self._next() or self._again(worker, load)
            if instruction is None:
                if load == 0:
                    continue  # what is overdue with this worker may be done by the next
                return
            needed = () if isinstance(instruction, MeasureTask) else instruction.states
            self._group.submit(worker, instruction, {state: self._states[state] for state in needed})
            patience = _FILE_PATIENCE if isinstance(instruction, FileTask) else 1.0
            self._in_flight.begin(instruction.number, worker, patience)
            self._load[worker] = load + 1
            heapq.heappush(idle, (load + 1, worker))

    def _again(self, worker: int, load: int) -> Instruction | None:
        """Return a task of a slow worker for an idle one: nothing else is left, or all waits for that task."""
        if load or (number := self._in_flight.overdue(worker)) is None:
            return None
        task = self._measures.get(number) or self._tasks.get(number)
        again = without(task, self.dropped) if task is not None else None
        if again is not None:
            self.totals = dataclasses.replace(self.totals, num_speculated=self.totals.num_speculated + 1)
        return again

    def _next(self) -> Instruction | None:
        """Return what to do next: what was lost or asked first, then the first ready merge task.

        A task whose states are unknown starts their gathering and steps aside; as soon as one is
        known it is looked at again, before the tasks behind it. A few may be gathered at once.
        """
        while not self._urgent:
            if not self._waiting:
                return None
            task = self._waiting[0]
            missing = [state for state in task.states if state not in self._states]
            if not missing:
                return self._waiting.popleft()
            has_room = self._gather(missing)
            if self._waiting[0] is not task:
                continue  # a state was known at once: what had stepped aside is in front again
            if not has_room:
                return None
            if any(state not in self._states for state in missing):
                self._aside.append(self._waiting.popleft())
        return self._urgent.popleft()

    def _gather(self, states: list[int]) -> bool:
        """Start gathering states if not too many are under way; False if there is no room."""
        most = 2 * max(1, len(self._group.workers()))
        for number in states:
            plan = self._plan.states[number]
            if number in self._gathering or number in self._states:
                continue
            if plan.known is not None and plan.known not in self._states:
                if not self._gather([plan.known]):
                    return False
                continue
            if len(self._gathering) >= most:
                return False
            name, settings = self._plan.settings[plan.settings]
            known = self._states.get(plan.known) if plan.known is not None else None
            if self._known is not None:
                known = self._recall(plan, known or TensorState())
                if plan.is_model_wide:
                    if self._is_complete(plan, known):
                        self._states[number] = known
                        continue
                    known = None
            questions = (
                model_wide_preparation(METHODS[name], settings, plan.num_elements, SPARSIFIERS)
                if plan.is_model_wide
                else preparation(METHODS[name], settings, plan.num_elements, SPARSIFIERS, known)
            )
            self._gathering[number] = _Gathering(plan, questions, known or TensorState())
            self._ask(number, lambda questions=questions: next(questions))  # type: ignore[misc]
        return True

    def _ask(self, number: int, advance: Callable[[], Round]) -> None:
        """Send the next round of a gathering to the workers, or store its state if it is done."""
        gathering = self._gathering[number]
        try:
            asked = advance()
        except StopIteration as stop:
            self._states[number] = stop.value
            self._keep(gathering, stop.value)
            del self._gathering[number]
            self._waiting.extendleft(reversed(self._aside))
            self._aside.clear()
            return
        gathering.answers.clear()
        for piece in gathering.plan.pieces:
            self._next_measure -= 1
            task = MeasureTask(state=number, piece=piece, round=asked, number=self._next_measure)
            self._measures[task.number] = task
            self._urgent.append(task)

    def _recall(self, plan: StatePlan, known: TensorState) -> TensorState:
        """Return what an earlier run measured of a state."""
        assert self._known is not None
        name, settings = self._plan.settings[plan.settings]
        tensors = [(piece, piece.jobs[0]) for piece in plan.pieces]
        return self._known.recall(tensors, METHODS[name], settings, known)

    def _is_complete(self, plan: StatePlan, known: TensorState) -> bool:
        """Return whether every model's threshold over the whole model is known."""
        name, settings = self._plan.settings[plan.settings]
        return known.stages.keys() >= set(model_wide_steps(METHODS[name], settings, SPARSIFIERS))

    def _keep(self, gathering: _Gathering, state: TensorState) -> None:
        """Keep what was measured for later runs."""
        if self._known is not None:
            name, settings = self._plan.settings[gathering.plan.settings]
            tensors = [(piece, piece.jobs[0]) for piece in gathering.plan.pieces]
            self._known.keep(tensors, METHODS[name], settings, state, gathering.known)

    def _take_in(self, event: Event) -> None:
        if isinstance(event, Lost):
            self._load.pop(event.worker, None)
            self._retry(event)
            return
        self._load[event.worker] = self._load.get(event.worker, 1) - 1
        number = event.instruction.number
        is_known = number in self._journal.done or number in self._answered  # another worker was faster
        if isinstance(event, Failed):
            self._in_flight.lose(number, event.worker)  # not done: it is handed out again without what failed
            if not is_known:
                self._drop(event)
            return
        self._in_flight.end(number, event.worker)
        if not is_known:
            self._finish(event)

    def _drop(self, failed: Failed) -> None:
        """Go on without the recipes that an instruction failed for.

        Raises:
            RaymergeError: the error, if no recipe is to blame for it, or all have failed by now.
        """
        blamed = recipes_to_blame(failed.instruction, failed.error) if self._may_drop else frozenset()
        everyone = self.dropped.keys() | blamed
        if not blamed or len(everyone) == len(self._plan.recipes):
            raise failed.error
        if blamed - self.dropped.keys():
            assert isinstance(failed.error, RaymergeError)
            self.dropped |= dict.fromkeys(blamed - self.dropped.keys(), failed.error)
            self._forget_dropped()
        again = without(failed.instruction, self.dropped)
        if again is not None:
            self._urgent.append(again)

    def _forget_dropped(self) -> None:
        """Take the dropped recipes out of everything that is still to be done."""
        stripped = {number: without(task, self.dropped) for number, task in self._tasks.items()}
        self._tasks = {
            number: task
            for number, task in stripped.items()
            if task is not None and not isinstance(task, MeasureTask)
        }
        self._unfinished &= self._tasks.keys()
        waiting = [*self._aside, *self._waiting]  # what stepped aside for a dropped state is ready now
        self._waiting = deque(self._tasks[task.number] for task in waiting if task.number in self._tasks)
        self._aside.clear()
        urgent = (without(instruction, self.dropped) for instruction in self._urgent)
        self._urgent = deque(instruction for instruction in urgent if instruction is not None)
        for number, gathering in list(self._gathering.items()):
            if gathering.plan.pieces[0].jobs[0].recipe in self.dropped:
                del self._gathering[number]
        self._needed = self._count_needed()

    def _count_needed(self) -> dict[int, int]:
        """Count for each state the unfinished tasks that need it."""
        needed: dict[int, int] = {}
        for number in self._unfinished:
            for state in self._tasks[number].states:
                needed[state] = needed.get(state, 0) + 1
        return needed

    def _finish(self, done: Done) -> None:
        report = done.report
        self._on_done(done)
        self.totals = self.totals.plus(report)
        if isinstance(report, TaskReport):
            self._journal.add(report)
            self._unfinished.discard(report.number)
            task = self._tasks.get(report.number)  # None if its recipes were dropped meanwhile
            for state in task.states if task else ():
                self._needed[state] -= 1
                if self._needed[state] == 0 and not self._plan.states[state].is_model_wide:
                    del self._states[state]
            return
        self._measures.pop(done.instruction.number, None)
        self._answered.add(done.instruction.number)
        if report.state not in self._gathering:
            return  # of a recipe that was dropped meanwhile
        gathering = self._gathering[report.state]
        assert isinstance(done.instruction, MeasureTask)
        job = done.instruction.piece.jobs[0]
        gathering.answers[job.tensor, report.begin] = report
        if len(gathering.answers) == len(gathering.plan.pieces):
            in_order = [
                gathering.answers[piece.jobs[0].tensor, piece.begin] for piece in gathering.plan.pieces
            ]
            answers = [list(column) for column in zip(*(r.summaries for r in in_order), strict=True)]
            self._ask(report.state, lambda: gathering.questions.send(answers))

    def _retry(self, lost: Lost) -> None:
        for instruction in lost.instructions:
            number = instruction.number
            is_elsewhere = self._in_flight.lose(number, lost.worker)
            if is_elsewhere or number in self._journal.done or number in self._answered:
                continue
            self._attempts[number] = self._attempts.get(number, 1) + 1
            if self._attempts[number] > MOST_ATTEMPTS:
                raise ClusterError(
                    f"a task was lost with its worker {MOST_ATTEMPTS} times, the last time: {lost.reason}; "
                    "use a smaller --slice-mib if memory ran out"
                )
            again = without(instruction, self.dropped)
            if again is not None:
                self._urgent.append(again)
        retries = self.totals.num_retries + len(lost.instructions)
        self.totals = dataclasses.replace(self.totals, num_retries=retries)
