"""What the group of actors makes of Ray's errors, without a cluster; with one see test_faults.py."""

from __future__ import annotations

from typing import Any

import pytest
from ray.exceptions import (
    ActorDiedError,
    ActorUnschedulableError,
    GetTimeoutError,
    NodeDiedError,
    ObjectReconstructionFailedError,
    OwnerDiedError,
    RayError,
    RuntimeEnvSetupError,
)

from raymerge.cluster import ray_group
from raymerge.cluster.ray_group import RayGroup
from raymerge.cluster.worker_group import Lost
from raymerge.merge_actors.errors import ClusterError
from raymerge.merge_actors.task import MergeTask

TASK = MergeTask(number=7, pieces=())


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a group of one actor that is never started; the killed and the launched are counted."""
    made: Any = RayGroup(1, num_cpus=1, num_gpus=0)
    made.killed, made.num_launched = [], 0
    made._losses_left = 2

    def launch() -> None:
        made.num_launched += 1

    monkeypatch.setattr(made, "_launch", launch)
    monkeypatch.setattr(made, "_count_loss", lambda num_tasks: None)
    monkeypatch.setattr(ray_group.ray, "kill", made.killed.append)
    return made


def fail_with(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def get(reference: object, timeout: float) -> None:
        raise error

    monkeypatch.setattr(ray_group.ray, "get", get)


@pytest.mark.parametrize(
    "error",
    [
        ActorDiedError(),
        GetTimeoutError("60 s"),
        NodeDiedError("the node is gone"),
        # The node died after its actor had finished and before the driver had fetched a large answer.
        OwnerDiedError("0" * 56, None, ""),
        ObjectReconstructionFailedError("0" * 56),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_answer_that_is_lost_is_a_task_that_is_done_again(
    group: Any, error: RayError, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(monkeypatch, error)
    group._actors, group._in_flight = {0: "actor"}, {"reference": (0, TASK)}
    [event] = group._finished("reference")
    assert isinstance(event, Lost) and event.instructions == (TASK,)
    assert (group.killed, group.num_launched, group._in_flight) == (["actor"], 1, {})


@pytest.mark.parametrize(
    "error",
    [
        ActorDiedError(),
        RuntimeEnvSetupError("pip failed"),
        ActorUnschedulableError("its node is gone"),
        GetTimeoutError("30 s"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_actor_that_does_not_start_is_replaced_and_at_last_a_sentence(
    group: Any, error: RayError, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(monkeypatch, error)
    for number in range(2):
        group._starting = {"reference": (number, f"actor {number}")}
        [event] = group._joined("reference")
        assert isinstance(event, Lost) and event.instructions == ()
    group._starting = {"reference": (2, "actor 2")}
    with pytest.raises(
        ClusterError, match="workers died too often, the last one with: worker 2 did not start"
    ):
        group._joined("reference")
    assert (group.num_launched, len(group.killed)) == (2, 3)


def test_a_run_grows_by_what_is_free_and_asks_for_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """An actor that waits for a GPU of another job would make a cluster add machines, and the run grow again."""
    free = {"CPU": 7.0, "GPU": 2.0}
    monkeypatch.setattr(ray_group.ray, "available_resources", lambda: free)
    group = RayGroup(4, num_cpus=1, num_gpus=1, how_many=lambda: 10)
    launched: list[int] = []
    monkeypatch.setattr(group, "_launch", lambda: launched.append(1))
    group._actors = {0: object()}
    for available, expected in ((2.0, 2), (0.0, 2), (7.0, 6)):
        free["GPU"], group._last_look = available, -1e9
        group._look_after_the_cluster()
        assert len(launched) == expected
    assert group._num_workers == 10
