"""Shared inputs by identity, calls that count, and what makes a follower stand on its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from raymerge.stats.batches import Batch, batch_tensors
from raymerge.stats.calibration_data import Example
from raymerge.stats.input_capture import InputCapture, Key, NeedsSeparation
from raymerge.stats.linear_maps import LinearMap


class _Config:
    is_encoder_decoder = False


class _Net(torch.nn.Module):
    """Two linear maps that are called as a script says: a list of (name, which tensor)."""

    def __init__(self, script: list[tuple[str, str]]) -> None:
        super().__init__()
        self.config, self.script = _Config(), script
        self.a, self.b = torch.nn.Linear(3, 2), torch.nn.Linear(3, 4)

    def forward(self, x_BTI: torch.Tensor) -> None:
        tensors = {"x": x_BTI, "copy": x_BTI.clone(), "doubled": x_BTI * 2}
        for name, which in self.script:
            if which == "changed":
                x_BTI.mul_(2)
                which = "x"
            getattr(self, name)(tensors[which])


def _map(name: str, out_features: int) -> LinearMap:
    weight = f"{name}.weight"
    return LinearMap(
        module=name,
        parameter=weight,
        kind="linear",
        tensors=(weight,),
        in_features=3,
        out_features=out_features,
    )


def _batch(lengths: tuple[int, ...] = (2, 1)) -> Batch:
    examples = [Example(number=i, input_ids=(1,) * length) for i, length in enumerate(lengths)]
    return batch_tensors(examples, pad_id=0, start_id=None, device="cpu")


def _run(
    script: list[tuple[str, str]], separate: frozenset[str] = frozenset()
) -> tuple[InputCapture, dict[Key, Any]]:
    net = _Net(script)
    sums: dict[Key, Any] = {}

    def accumulate(key: Key, rows_RI: torch.Tensor, weight: int) -> None:
        sums[key] = sums.get(key, 0) + weight * rows_RI.T @ rows_RI

    capture = InputCapture(net, [_map("a", 2), _map("b", 4)], accumulate, separate)
    capture.begin(_batch())
    with torch.no_grad():
        net(torch.arange(12.0).reshape(2, 2, 3))
    try:
        capture.end()
    finally:
        capture.close()
    assert not net.a._forward_pre_hooks
    return capture, sums


def test_one_tensor_is_summed_once() -> None:
    capture, sums = _run([("a", "x"), ("b", "x")])
    assert capture.leaders == {"b.weight": "a.weight"}
    assert list(sums) == [("a.weight", 0)]
    assert capture.num_rows == {("a.weight", 0): 3, ("b.weight", 0): 3}
    rows_RI = torch.tensor(
        [[0.0, 1, 2], [3, 4, 5], [6, 7, 8]]
    )  # the padding of the second example is left out
    assert torch.equal(sums["a.weight", 0], rows_RI.T @ rows_RI)


def test_equal_values_in_another_tensor_are_not_the_same_input() -> None:
    capture, sums = _run([("a", "x"), ("b", "copy")])
    assert not capture.leaders
    assert torch.equal(sums["a.weight", 0], sums["b.weight", 0])


def test_a_tensor_that_was_changed_in_place_is_not_the_same_input() -> None:
    capture, sums = _run([("a", "x"), ("b", "changed")])
    assert not capture.leaders
    assert torch.equal(sums["b.weight", 0], 4 * sums["a.weight", 0])


def test_every_call_of_a_module_counts() -> None:
    capture, sums = _run([("a", "x"), ("a", "doubled")])
    assert capture.num_calls == {"a.weight": 2}
    assert capture.num_rows == {("a.weight", 0): 6}
    once = _run([("a", "x")])[1]
    assert torch.equal(sums["a.weight", 0], 5 * once["a.weight", 0])


def test_modules_that_share_every_call_share_their_sums() -> None:
    capture, sums = _run([("a", "x"), ("b", "x"), ("a", "doubled"), ("b", "doubled")])
    assert capture.leaders == {"b.weight": "a.weight"}
    assert list(sums) == [("a.weight", 0)]
    assert capture.num_rows["b.weight", 0] == 6


@pytest.mark.parametrize(
    "script",
    [
        [("a", "x"), ("b", "x"), ("b", "doubled")],
        [("a", "x"), ("b", "x"), ("a", "doubled")],
        [("a", "x"), ("b", "x"), ("a", "doubled"), ("b", "x")],
    ],
    ids=["another tensor", "fewer calls", "an earlier tensor"],
)
def test_a_follower_that_leaves_its_leader_is_reported_and_then_stands_alone(
    script: list[tuple[str, str]],
) -> None:
    with pytest.raises(NeedsSeparation) as found:
        _run(script)
    assert found.value.parameters == {"b.weight"}
    capture, sums = _run(script, separate=frozenset({"b.weight"}))
    assert not capture.leaders
    num_calls = sum(name == "b" for name, _ in script)
    assert capture.num_rows["b.weight", 0] == 3 * num_calls
    assert ("b.weight", 0) in sums
