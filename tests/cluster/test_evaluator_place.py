"""How many evaluators there are, and what each gets: from nodes and options alone."""

from __future__ import annotations

from typing import Any

import pytest

from raymerge.cluster.evaluator_place import Node, place_evaluators
from raymerge.cluster.grid_options import GridOptions
from raymerge.merge_actors.errors import ClusterError, RecipeError

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
    for share in (0, 2.0):
        with pytest.raises(RecipeError, match="gpus-per-evaluator is"):
            GridOptions(gpus_per_evaluator=share)
