"""The metrics that actors export, and the dashboard that draws them."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from pathlib import Path

import raymerge
from raymerge.merge_actors.ray_metrics import DriverMetrics

ROOT = Path(__file__).resolve().parents[2]


def _exported() -> str:
    import ray

    pages = []
    for node in ray.nodes():
        address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(address, timeout=30) as page:
            pages.append(page.read().decode())
    return "\n".join(pages)


def _total(name: str) -> float:
    """Sum a counter over all runs and actors."""
    return sum(
        float(each) for each in re.findall(rf"^ray_raymerge_{name}_total{{.*}} (\S+)$", _exported(), re.M)
    )


def test_bytes_tasks_and_losses_of_a_merge_are_exported(ray_session, tiny_checkpoints, tmp_path):
    family = tiny_checkpoints("llama")
    entries = [{"model": str(model), "parameters": {"weight": 1}} for model in family.models]
    with raymerge.Session(workers=1) as session:
        result = session.merge({"merge_method": "linear", "models": entries}, tmp_path / "out")
        lost = DriverMetrics()  # as the driver counts when workers die: one with three tasks, one with none
        before = _total("lost_workers"), _total("retries")
        lost.count_loss("0123456789abcdef", 3)
        lost.count_loss("0123456789abcdef", 0)
        deadline = time.monotonic() + 120
        while (
            _total("read_bytes") < result.totals.read_bytes  # Ray exports every few seconds
            or (_total("lost_workers"), _total("retries")) < (before[0] + 2, before[1] + 3)
        ):
            assert time.monotonic() < deadline
            time.sleep(0.5)
    page = _exported()
    assert re.search(r'^ray_raymerge_task_seconds_bucket\{.*phase="merge".*\}', page, re.M)


def test_the_dashboard_draws_metrics_that_exist():
    dashboard = json.loads((ROOT / "deploy" / "grafana" / "raymerge.json").read_text())
    source = (ROOT / "merge_actors" / "ray_metrics.py").read_text()
    known = {
        f"raymerge_{name.removeprefix('raymerge_')}"
        for name in re.findall(r'(?:counter|Counter|Gauge|Histogram)\(\s*f?"(\w+)"', source)
    }
    assert len(known) >= 6
    drawn = set()
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            drawn |= set(re.findall(r"ray_(raymerge_\w+?)(?:_total|_bucket|_sum)?\{", target["expr"]))
    assert drawn and drawn <= known
