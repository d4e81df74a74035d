"""The tables of `versus_peer.py`: time, memory, outputs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from comparison import HEADER, Differences, has_exact_result, summary_of
from kept_file import Report, Spread
from peer import peer_versions
from processes import Run
from recipes import DENSITIES, WEIGHTS

#: What was promised: peer / whole process, peer / on a running cluster, in a session / floor.
TARGETS = {
    "task_arithmetic": (2.5, 10.0, 2.0),
    "dare_linear": (7.0, 20.0, 2.5),
    "ties": (15.0, 30.0, 5.0),
}


@dataclass(slots=True)
class MethodResult:
    """All measurements of one method."""

    floor: dict[str, float]
    whole: list[Run] = field(default_factory=list)
    on_cluster: list[Run] = field(default_factory=list)
    in_session: list[Run] = field(default_factory=list)
    peer: Run | None = None
    differences: Differences | None = None
    dare: dict[str, Any] = field(default_factory=dict)


def report_on(results: dict[str, MethodResult], python: Path | None, options: argparse.Namespace) -> Report:
    """Put the measurements of all methods into tables."""
    densities = ", ".join(f"{method} {density}" for method, density in DENSITIES.items())
    report = Report(
        "versus_peer",
        "raymerge against mergekit 0.1.5",
        {
            "shape": f"{options.shape} (base and {len(WEIGHTS)} fine-tunes, bf16)",
            "weights": " ".join(map(str, WEIGHTS)),
            "densities": densities,
            "dtype": "bfloat16",
            "workers": options.workers,
            "runs": options.runs,
            "page cache": "warm",
            "peer": peer_versions(python) + ", default options, one run" if python else "not run",
        },
    )
    _time_tables(report, results)
    _memory_table(report, results)
    if python:
        _comparison_tables(report, results)
    report.data = {method: _plain(result) for method, result in results.items()}
    return report


def _time_tables(report: Report, results: dict[str, MethodResult]) -> None:
    report.text(
        "## Time\n\nSeconds, least / median / greatest. Whole process and cluster are wall clock of the "
        "command from start to exit; `in a session` is the call of `Session.merge` on the cluster, on workers "
        "that have merged before, from the recipe to the commit, with its GB/s of inputs and output."
    )
    report.table(
        ("method", "floor", "whole process", "on a running cluster", "in a session", "GB/s", "mergekit"),
        [
            (
                method,
                " / ".join(f"{r.floor[f'{which}_seconds']:.2f}" for which in ("min", "median", "max")),
                Spread.of([done.seconds for done in r.whole]),
                Spread.of([done.seconds for done in r.on_cluster]),
                Spread.of(calls := [done.seconds for done in r.in_session]),
                f"{(r.floor['bytes_read'] + r.floor['bytes_written']) / Spread.of(calls).median / 1e9:.2f}",
                f"{r.peer.seconds:.2f}" if r.peer else "-",
            )
            for method, r in results.items()
        ],
    )
    report.text("Ratios of medians; in brackets what was promised.")
    report.table(
        (
            "method",
            "mergekit / whole process",
            "mergekit / on a cluster",
            "mergekit / in a session",
            "in a session / floor",
        ),
        [(method, *_ratios(method, result)) for method, result in results.items()],
    )


def _ratios(method: str, result: MethodResult) -> list[str]:
    values = ratios(result)
    whole, cluster, floor = TARGETS.get(method, (None, None, None))
    targets: Sequence[float | None] = (whole, cluster, cluster, floor)
    signs = (">=", ">=", ">=", "<=")
    return [
        "-" if value is None else f"{value:.2f}" + (f" ({sign} {target:g})" if target else "")
        for value, sign, target in zip(values, signs, targets, strict=True)
    ]


def ratios(result: MethodResult) -> tuple[float | None, float | None, float | None, float]:
    """Return peer / whole process, / on a cluster, / in a session, and in a session / floor, of medians."""
    whole = Spread.of([done.seconds for done in result.whole]).median
    on_cluster = Spread.of([done.seconds for done in result.on_cluster]).median
    call = Spread.of([done.seconds for done in result.in_session]).median
    peer = result.peer.seconds if result.peer else None
    return (
        peer / whole if peer else None,
        peer / on_cluster if peer else None,
        peer / call if peer else None,
        call / result.floor["median_seconds"],
    )


def _memory_table(report: Report, results: dict[str, MethodResult]) -> None:
    report.text("## Memory\n\nGreatest resident set of any one process over all runs, in MiB.")
    report.table(
        ("method", "driver", "an actor", "actor, private", "mergekit"),
        [
            (
                method,
                max(done.peak_bytes("driver") for done in r.whole + r.on_cluster) >> 20,
                max(done.peak_bytes("actor") for done in r.whole + r.on_cluster) >> 20,
                max(
                    (
                        peak.peak_private_bytes
                        for done in r.whole + r.on_cluster
                        for peak in done.peaks
                        if peak.role == "actor"
                    ),
                    default=0,
                )
                >> 20,
                r.peer.peak_bytes("driver") >> 20 if r.peer else "-",
            )
            for method, r in results.items()
        ],
    )


def _comparison_tables(report: Report, results: dict[str, MethodResult]) -> None:
    report.text(
        "## Outputs\n\nAll elements of all tensors. `exact`: equal to the formula in float64, rounded once. "
        "Under `dtype: bfloat16` the peer adds in bf16. Random masks of DARE differ; TIES cuts equal "
        "magnitudes at the threshold by index, the peer in the order its sort leaves them."
    )
    report.table(
        HEADER,
        [
            r.differences.row(method, has_exact=has_exact_result(method))
            for method, r in results.items()
            if r.differences
        ],
    )
    for method, result in results.items():
        if result.dare:
            report.text(f"What the masks of {method} did:")
            report.table(
                ("program", "dropped by all models", "expected", "scale per model (expected 1)"),
                [
                    (
                        name,
                        f"{d['dropped_by_all']:.4%}",
                        f"{d['expected_dropped_by_all']:.4%}",
                        " ".join(map(str, d["scale"])),
                    )
                    for name, d in result.dare.items()
                ],
            )


def _plain(result: MethodResult) -> dict[str, Any]:
    def plain(done: Run) -> dict[str, Any]:
        peaks = [
            {"role": p.role, "peak_bytes": p.peak_bytes, "private": p.peak_private_bytes} for p in done.peaks
        ]
        return {"seconds": done.seconds, "peaks": peaks}

    return {
        "floor": result.floor,
        "whole_process": [plain(done) for done in result.whole],
        "on_cluster": [plain(done) for done in result.on_cluster],
        "in_session": [plain(done) for done in result.in_session],
        "peer": plain(result.peer) if result.peer else None,
        "ratios": ratios(result),
        "differences": summary_of({"all": result.differences})["all"] if result.differences else None,
        "dare": result.dare,
    }
