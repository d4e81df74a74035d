"""Reports: tables that say what the rows say, and a page that stands alone."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from raymerge.cluster.report_data import ReportData, read_report
from raymerge.cluster.report_lines import line_through_best, median_of_trials
from raymerge.cluster.report_text import axis_rows, best_rows, report_mapping, report_text
from raymerge.cluster.results import ResultsWriter
from raymerge.cluster.text_tables import text_table
from raymerge.merge_actors.errors import OutputError

METHODS = ["ties", "dare_linear"]


def _write(
    folder: Path,
    points: Sequence[Mapping[str, Any]],
    score: Callable[[Mapping[str, Any]], Mapping[str, float]],
    **more: Any,
) -> str:
    names = {"a.accuracy": True, "b.loss": False}
    axes = {
        name: {"values": list(dict.fromkeys(point[name] for point in points)), "range": None}
        for name in points[0]
    }
    select = {"objectives": [{"weights": [["a.accuracy", 1.0]], "mode": "max"}], "average_over": []}
    description = {
        "kind": "grid",
        "name": "<study>",
        "num_points": len(points),
        "axes": axes,
        "metrics": names,
    }
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps({**description, "select": select, **more}))
    writer = ResultsWriter(str(folder))
    for number, point in enumerate(points):
        row = {"point": number, "split": "validation", "status": "ok", "same_as": None, "seconds": 2.0}
        try:
            metrics = score(point)
        except ValueError:
            row["status"], metrics = "failed", {}
        writer.append(
            row
            | {f"axis.{name}": value for name, value in point.items()}
            | {f"metric.{name}": value for name, value in metrics.items()}
            | {f"stderr.{name}": 0.01 for name in metrics}
        )
    writer.close()
    return str(folder)


def _score(point: Mapping[str, Any]) -> dict[str, float]:
    if point["w"] == 4:
        raise ValueError
    bonus = 0.1 * (point["method"] == "ties")
    return {"a.accuracy": bonus + 0.5 - 0.1 * abs(point["w"] - 2) + point["p"], "b.loss": float(point["w"])}


POINTS = [{"method": m, "w": w, "p": p} for m in METHODS for w in (1, 2, 3, 4) for p in (0.0, 0.1)]


def test_the_tables(tmp_path: Path) -> None:
    data = read_report(_write(tmp_path / "out", POINTS, _score), top=2)
    assert dict(data.counts) == {"ok": 12, "failed": 4, "pruned": 0}
    first, second = best_rows(data)
    assert first == {
        "rank": 1,
        "point": 3,
        "method": "ties",
        "w": 2,
        "p": 0.1,
        "a.accuracy": (0.7, 0.01),
        "b.loss": (2.0, 0.01),
    }
    assert second["point"] in (1, 5)
    [ties, dare] = axis_rows(data, data.axis("method"))
    assert ties == {"method": "ties", "points": 6, "best": 0.7, "median": pytest.approx(0.6)}
    assert dare["best"] == pytest.approx(0.6)
    assert [row["w"] for row in axis_rows(data, data.axis("w"))] == [1, 2, 3]
    text = report_text(data)
    assert "grid <study>: 16 of 16 points; 4 failed; 32 s of work" in text
    assert re.search(r"1 +3 +ties +2 +0\.1 +0\.7 \+-0\.01 +2 \+-0\.01", text)
    json.dumps(report_mapping(data))


class _Page(HTMLParser):
    """Collects what matters: elements left open, references to elsewhere, ids, texts."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.svgs: list[dict[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)
        if values.get("id"):
            self.ids.append(str(values["id"]))
        self.links += [str(value) for name, value in attrs if name in ("src", "href", "xlink:href") and value]
        if tag == "svg":
            self.svgs.append(values)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in ("meta", "br", "img"):
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_stands_alone_and_is_labelled(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from raymerge.cluster.report import write_report

    out = _write(tmp_path / "out", POINTS, _score)
    page_path, *pictures = write_report(read_report(out), out)
    text = Path(page_path).read_text()
    page = _Page()
    page.feed(text)
    assert page.open == []
    assert all(link.startswith(("#", "data:")) for link in page.links), "nothing comes from elsewhere"
    assert "<script" not in text
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    assert {name for name in re.findall(r"url\(#([^)]*)\)", text)} <= set(page.ids)
    assert len(page.svgs) == len(pictures) >= 5
    for svg in page.svgs:
        assert svg["role"] == "img"
        assert set(str(svg["aria-labelledby"]).split()) <= set(page.ids)
    assert "<study>" in page.text
    assert "#010203" not in text
    assert all(Path(path).read_bytes().startswith(b"\x89PNG") for path in pictures)
    again = write_report(read_report(out), out)
    assert again == [page_path, *pictures]
    assert Path(page_path).read_text() == text, "the same results make the same page"


@pytest.mark.parametrize("points", [[{"w": 1}], [{"w": 1}, {"w": 2}], [{"w": w / 7} for w in range(1, 90)]])
def test_small_and_one_sided_grids_can_be_drawn(points: list[dict[str, Any]], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from raymerge.cluster.report import write_report

    out = _write(tmp_path / "out", points, lambda point: {"a.accuracy": 1.0, "b.loss": math.nan})
    data = read_report(out)
    assert write_report(data, out)
    assert report_text(data)


def test_paths_are_short_where_they_can_be(tmp_path: Path) -> None:
    points = [{"pair": pair} for pair in ("m/a, m/b", "m/a, m/c", "n/a, m/b")]
    data = read_report(_write(tmp_path / "out", points[:2], lambda point: {"a.accuracy": 1.0}))
    assert data.axis("pair").levels == ("a, b", "a, c")
    data = read_report(_write(tmp_path / "more", points, lambda point: {"a.accuracy": 1.0}))
    assert data.axis("pair").levels == ("m/a, m/b", "m/a, m/c", "n/a, m/b")


def test_the_front_of_several_objectives(tmp_path: Path) -> None:
    objectives = [
        {"weights": [["a.accuracy", 1.0]], "mode": "max"},
        {"weights": [["b.loss", 1.0]], "mode": "min"},
    ]
    select = {"objectives": objectives, "average_over": []}
    points = [{"method": "ties", "w": w, "p": 0.1} for w in (1, 2, 3)]
    data = read_report(_write(tmp_path / "out", points, _score, select=select))
    assert data.front == (1, 0)
    assert "Pareto front over a.accuracy and b.loss: points 1, 0" in report_text(data)


def test_folders_without_results_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"no run\.json in it"):
        read_report(str(tmp_path))
    out = _write(tmp_path / "out", [{"method": "ties", "w": 4, "p": 0}], _score)
    with pytest.raises(OutputError, match=r"no point in .* has a result yet: 1 failed"):
        read_report(out)


def _grid(tmp_path: Path, points: list[dict[str, Any]], average_over: tuple[str, ...] = ()) -> ReportData:
    select = {
        "objectives": [{"weights": [["a.accuracy", 1.0]], "mode": "max"}],
        "average_over": list(average_over),
    }
    out = _write(tmp_path / "out", points, lambda point: {"a.accuracy": point["score"]}, select=select)
    data = read_report(out)
    return dataclasses.replace(data, axes=tuple(axis for axis in data.axes if axis.name != "score"))


def _line(data: ReportData, axis: str) -> dict[float, float]:
    return line_through_best(
        data, data.axis(axis), range(len(data.points)), data.metrics["a.accuracy"], is_max=True
    )


def test_a_line_of_a_grid_holds_the_other_axes_at_the_best_point(tmp_path: Path) -> None:
    scores = {(1, 0.1): 0.2, (2, 0.1): 0.9, (3, 0.1): 0.1, (1, 0.5): 0.7, (2, 0.5): 0.3, (3, 0.5): 0.8}
    points = [{"w": w, "p": p, "score": score} for (w, p), score in scores.items()]
    data = _grid(tmp_path, points)
    assert _line(data, "w") == {1: 0.2, 2: 0.9, 3: 0.1}, "not 0.7, 0.9, 0.8, the best of each"
    assert _line(data, "p") == {0.1: 0.9, 0.5: 0.3}


def test_axes_that_change_together_are_one_line_and_seeds_are_averaged(tmp_path: Path) -> None:
    points = [
        {"w": w, "v": -w, "seed": seed, "score": 0.1 * w + 0.02 * seed} for w in (1, 2, 3) for seed in (0, 1)
    ]
    data = _grid(tmp_path, points)
    assert _line(data, "w") == pytest.approx({1: 0.11, 2: 0.21, 3: 0.31})
    assert _line(data, "seed") == {}, "nothing lies between two seeds"


def test_trials_of_a_search_are_not_joined(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    from raymerge.cluster.report_plots import along_axes

    drawn = random.Random(3)
    points = [{"w": drawn.uniform(0, 1), "p": drawn.uniform(0, 1)} for _ in range(60)]
    out = _write(
        tmp_path / "out", points, lambda point: {"a.accuracy": point["w"] * point["p"]}, kind="search"
    )
    data = read_report(out)
    figure = Figure()
    told = along_axes(data, figure)
    for plot in figure.axes:
        assert len(plot.collections[0].get_offsets()) == 60, "every trial is a point"
        [line] = plot.lines
        assert line.get_marker() in ("None", "") and line.get_linestyle() == "--"
        assert len(line.get_xdata()) == 8, "steps of many trials"
    assert "the median of neighbouring trials" in told


def test_a_median_of_few_trials_is_not_drawn(tmp_path: Path) -> None:
    points = [{"w": w / 7, "p": 0} for w in range(9)]
    out = _write(tmp_path / "out", points, lambda point: {"a.accuracy": point["w"]}, kind="search")
    data = read_report(out)
    axis = data.axis("w")
    assert median_of_trials(axis, range(9), data.objective) == {}
    few = [{"w": w, "p": p} for w in (1, 2) for p in range(5)]
    data = read_report(_write(tmp_path / "few", few, lambda point: {"a.accuracy": point["p"]}, kind="search"))
    assert median_of_trials(data.axis("w"), range(10), data.objective) == {1: 2, 2: 2}


def test_a_table_that_is_too_wide_lies_on_its_side() -> None:
    rows = [{"": f"best-{i}", "point": str(i), "axis": "x" * 10, "metric": f"0.{i}"} for i in range(1, 4)]
    assert text_table(rows, most_columns=40).splitlines() == [
        "        point        axis  metric",
        "---------------------------------",
        "best-1      1  xxxxxxxxxx     0.1",
        "best-2      2  xxxxxxxxxx     0.2",
        "best-3      3  xxxxxxxxxx     0.3",
    ]
    assert text_table(rows, most_columns=30).splitlines() == [
        "            best-1      best-2",
        " point           1           2",
        "  axis  xxxxxxxxxx  xxxxxxxxxx",
        "metric         0.1         0.2",
        "",
        "            best-3",
        " point           3",
        "  axis  xxxxxxxxxx",
        "metric         0.3",
    ]
    assert text_table(rows[:1], most_columns=1).splitlines()[0] == "            best-1"
    assert text_table([]) == ""
