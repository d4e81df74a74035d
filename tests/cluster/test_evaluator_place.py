"""How many evaluators there are, and what each gets: from nodes and options alone."""

from __future__ import annotations

from typing import Any

import pytest

from raymerge.cluster.evaluator_gpus import Node, parse_gpu_bytes
from raymerge.cluster.evaluator_place import place_evaluators
from raymerge.cluster.grid_options import GridOptions
from raymerge.merge_actors.errors import ClusterError, RecipeError
from raymerge.stats.evaluation.parts import ModelNeeds

TWO_MACHINES = [Node(0, 0), Node(16, 0), Node(12, 0)]
TWO_GPU_NODES = [Node(8, 0), Node(32, 4), Node(32, 4)]


@pytest.mark.parametrize(
    ("nodes", "options", "expected"),
    [
        (TWO_MACHINES, {}, (2, "cpu", 12, 0, 12, 1.0)),
        (TWO_MACHINES, {"workers": 4}, (4, "cpu", 6, 0, 6, 0.5)),
        (TWO_MACHINES, {"workers": 3}, (3, "cpu", 6, 0, 6, 0.5)),
        (TWO_MACHINES, {"threads_per_evaluator": 2}, (2, "cpu", 2, 0, 2, 1.0)),
        ([Node(2, 0)], {"workers": 8}, (8, "cpu", 1, 0, 1, 0.125)),
        (TWO_GPU_NODES, {}, (8, "cuda", 1, 1.0, 2, 1.0)),
        (TWO_GPU_NODES, {"gpus_per_evaluator": 0.5}, (16, "cuda", 1, 0.5, 2, 0.5)),
        (TWO_GPU_NODES, {"gpus_per_evaluator": 0.3}, (24, "cuda", 1, 0.3, 2, 1 / 3)),
        (TWO_GPU_NODES, {"gpus_per_evaluator": 2}, (4, "cuda", 1, 2, 4, 1.0)),
        (TWO_GPU_NODES, {"gpus_per_evaluator": 3}, (2, "cuda", 1, 3, 6, 1.0)),
        ([Node(8, 4), Node(8, 2)], {"gpus_per_evaluator": 4}, (1, "cuda", 1, 4, 8, 1.0)),
        (TWO_GPU_NODES, {"gpus_per_evaluator": 4, "workers": 1}, (1, "cuda", 1, 4, 8, 1.0)),
        (TWO_GPU_NODES, {"workers": 2}, (2, "cuda", 1, 1.0, 2, 1.0)),
        (TWO_GPU_NODES, {"device": "cpu"}, (3, "cpu", 8, 0, 8, 1.0)),
    ],
)
def test_placement(nodes: list[Node], options: dict[str, Any], expected: tuple[Any, ...]) -> None:
    found = place_evaluators(nodes, GridOptions(**options))
    assert (
        found.num_evaluators,
        found.device,
        found.num_cpus,
        found.num_gpus,
        found.num_threads,
        found.share,
    ) == expected
    assert found.num_slots == (2 if found.device == "cuda" else 1)


def test_what_cannot_be_placed() -> None:
    with pytest.raises(ClusterError, match="no GPU is to be seen"):
        place_evaluators(TWO_MACHINES, GridOptions(device="cuda"))
    with pytest.raises(ClusterError, match="no CPU"):
        place_evaluators([Node(0, 0)], GridOptions())
    with pytest.raises(
        ClusterError, match=r"evaluator is 6, but no node has more than 4 GPUs; .* of one node"
    ):
        place_evaluators(TWO_GPU_NODES, GridOptions(gpus_per_evaluator=6))
    for share in (0, -1, 1.5):
        with pytest.raises(RecipeError, match="gpus-per-evaluator is"):
            GridOptions(gpus_per_evaluator=share)


GIB = 1 << 30
#: 140 GiB of weights and some room: a model of 70 billion parameters in bfloat16.
LARGE = ModelNeeds(
    home_weights=4 * GIB,
    block_weights=(17 * GIB // 10,) * 80,
    home_activations=3 * GIB,
    block_activations=GIB,
    dtype="bfloat16",
)


def gpus(nodes: list[Node], needs: ModelNeeds = LARGE, **options: Any) -> tuple[float, int]:
    found = place_evaluators(nodes, GridOptions(**options), needs)
    assert found.num_devices == max(1, found.num_gpus)
    return found.num_gpus, found.num_evaluators


def test_as_few_gpus_as_hold_the_model_and_leave_room() -> None:
    eight_of_80 = Node(64, 8, 80 * GIB)
    assert gpus([eight_of_80, eight_of_80]) == (3, 4)  # on two they would be 73.5 GiB full, of 80
    assert gpus([Node(64, 8, 192 * GIB)]) == (1, 8)
    assert gpus([Node(64, 2, 80 * GIB)]) == (2, 1)  # no third one: without room to spare, but it fits
    assert gpus([eight_of_80], gpus_per_evaluator=2) == (2, 4)
    # Where the memory is not known nothing is refused.
    assert gpus([Node(64, 8)]) == (1, 8)


def test_every_node_that_an_evaluator_may_come_to_has_to_hold_the_model() -> None:
    assert gpus([Node(64, 8, 192 * GIB), Node(64, 4, 80 * GIB)]) == (3, 3)
    assert gpus([Node(64, 8, 80 * GIB), Node(64, 2, 24 * GIB)]) == (3, 2)  # the small node is never asked


def test_a_model_that_does_not_fit_is_refused_with_both_numbers() -> None:
    with pytest.raises(
        ClusterError,
        match=r"needs 145\.0 GiB and has 80\.0 GiB on 1 GPU: .* takes 140\.0 GiB for weights \(it runs in bfloat16\)"
        r".*; use --gpus-per-evaluator 2",
    ):
        gpus([Node(64, 8, 80 * GIB)], gpus_per_evaluator=1)
    with pytest.raises(
        ClusterError,
        match=r"needs 7\d\.\d GiB and has 48\.0 GiB on each of 2 GPUs: .*; no node has more than 2 GPUs: use",
    ):
        gpus([Node(64, 2, 48 * GIB)])
    small = ModelNeeds(home_weights=GIB, block_weights=(GIB,) * 24, dtype="float16")
    assert gpus([Node(64, 4, 80 * GIB)], small, gpus_per_evaluator=0.5) == (0.5, 8)
    with pytest.raises(ClusterError, match=r"has 20\.0 GiB on 0\.25 GPU: .* use --gpus-per-evaluator 1"):
        gpus([Node(64, 4, 80 * GIB)], small, gpus_per_evaluator=0.25)


def test_what_the_driver_says_of_its_gpus() -> None:
    assert parse_gpu_bytes("81559, Disabled\n143771, Disabled\n") == 81559 << 20
    assert parse_gpu_bytes("24576, [N/A]\n") == 24576 << 20
    assert parse_gpu_bytes("81559, Enabled\n") is None  # cut into several: torch is asked what is there
    assert parse_gpu_bytes("No devices were found\n") is None
    assert parse_gpu_bytes("") is None
