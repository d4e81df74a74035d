"""Actors that hang are told from those that are slow, and a driver that was stopped itself blames nobody."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from raymerge.cluster.signs_of_life import QUIET_SECONDS, SILENT_SECONDS, SignsOfLife


class Clock:
    """Seconds that a test lets pass."""

    def __init__(self) -> None:
        self.seconds = 100.0
        self.asked: list[int] = []

    def __call__(self) -> float:
        return self.seconds

    def ask(self, worker: int) -> str:
        self.asked.append(worker)
        return f"answer {len(self.asked)}"

    def listen(self, life: SignsOfLife, seconds: float, on_question: Callable[[str], None]) -> None:
        """Look twice a second, as a driver does."""
        for _ in range(int(2 * seconds)):
            self.seconds += 0.5
            life.look({0, 1})
            for reference in life.questions():
                on_question(reference)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_one_that_works_long_and_answers_is_never_given_up(clock: Clock) -> None:
    life = SignsOfLife(clock.ask, clock=clock)
    clock.listen(life, 3600, lambda reference: life.answered(reference))
    assert life.silent() == []
    assert 200 < len(clock.asked) <= 2 * 3600 / QUIET_SECONDS


def test_one_that_does_not_answer_is_given_up(clock: Clock) -> None:
    life = SignsOfLife(clock.ask, clock=clock)

    def answer_of_one(reference: str) -> None:
        if clock.asked[int(reference.split()[1]) - 1] == 1:
            assert life.answered(reference) == 1

    clock.listen(life, QUIET_SECONDS + SILENT_SECONDS, answer_of_one)
    assert life.silent() == []
    clock.listen(life, 2, answer_of_one)
    assert life.silent() == [0]
    assert clock.asked.count(0) == 1


def test_what_an_actor_sends_is_an_answer_too(clock: Clock) -> None:
    life = SignsOfLife(clock.ask, clock=clock)
    clock.listen(life, QUIET_SECONDS + SILENT_SECONDS, lambda _: None)
    life.heard(0)
    clock.listen(life, 2, lambda _: None)
    assert life.silent() == [1]


def test_idle_ones_are_not_asked_and_begin_anew_with_their_next_work(clock: Clock) -> None:
    life = SignsOfLife(clock.ask, clock=clock)
    clock.listen(life, QUIET_SECONDS + SILENT_SECONDS + 2, lambda _: None)
    life.look(())
    assert life.silent() == [] and life.questions() == []
    clock.listen(life, QUIET_SECONDS - 1, lambda _: None)
    assert life.questions() == []


def test_time_in_which_the_driver_stood_still_does_not_count(clock: Clock) -> None:
    life = SignsOfLife(clock.ask, clock=clock)
    clock.listen(life, QUIET_SECONDS + 2, lambda _: None)
    assert life.questions()
    clock.seconds += 100_000
    life.look({0, 1})
    assert life.silent() == []


def test_an_answer_is_taken_once(clock: Clock) -> None:
    life = SignsOfLife(clock.ask, quiet_seconds=0.0, clock=clock)
    life.look({7})
    [reference] = life.questions()
    assert (life.answered(reference), life.answered(reference), life.answered("none")) == (7, None, None)
