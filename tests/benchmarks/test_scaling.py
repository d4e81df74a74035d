"""The simulation of scaling: a real plan and the real controller in virtual time."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def scaling():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("scaling")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def plan(scaling, tmp_path_factory):
    return scaling.make_plan(
        tmp_path_factory.mktemp("scaling"), scaling.LLAMA_SHAPES["small"], 3, slice_mib=1
    )


def _rates(scaling, **changed):
    rates = {"node_read": 1.0, "node_write": 1.0, "device": 1.0, "storage": 1e6, "task_seconds": 0.0}
    return scaling.Rates(**{**rates, **changed})


def test_every_byte_is_moved_once_whatever_the_number_of_workers(scaling, plan):
    for workers in (1, 3, 16):
        group = scaling.simulate(plan, workers, 4, _rates(scaling))
        nodes = group.node_bytes()
        assert len(nodes) == math.ceil(workers / 4)
        assert sum(read for read, _ in nodes) == plan.read_bytes
        assert sum(wrote for _, wrote in nodes) == plan.write_bytes


def test_time_is_that_of_the_resource_that_is_short(scaling, plan):
    moved = (plan.read_bytes + plan.write_bytes) / 1e9
    slow_device = scaling.simulate(plan, 2, 1, _rates(scaling, device=0.01))
    assert slow_device.now == pytest.approx(moved / 0.02, rel=0.1)
    slow_storage = scaling.simulate(plan, 8, 1, _rates(scaling, storage=0.01))
    assert slow_storage.now == pytest.approx(moved / 0.01, rel=0.02)
    slow_driver = scaling.simulate(plan, 8, 1, _rates(scaling, task_seconds=1.0))
    assert slow_driver.now == pytest.approx(len(plan.tasks), rel=0.1)


def test_twice_the_workers_take_half_the_time_until_something_else_is_short(scaling, plan):
    times = [
        scaling.simulate(plan, n, 1, _rates(scaling, device=0.1, storage=0.5)).now for n in (1, 2, 4, 32)
    ]
    assert times[0] / times[1] == pytest.approx(2, rel=0.05)
    assert times[1] / times[2] == pytest.approx(2, rel=0.1)
    assert times[3] == pytest.approx((plan.read_bytes + plan.write_bytes) / 0.5e9, rel=0.1)
