"""The plots of a report. Each takes the data and an empty figure, and returns what a blind reader is told."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from raymerge.cluster.report_data import AxisData, ReportData
from raymerge.cluster.report_drawing import (
    BEST_COLOUR,
    COLOUR_MAP,
    COLOURS,
    MARKERS,
    best_of_each,
    legend,
    level_ticks,
    norm_of,
    scale,
    share_of,
    shown_levels,
    spread,
    written,
)
from raymerge.cluster.report_lines import line_through_best, median_of_trials

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: More points than this are drawn as a picture inside the plot.
_RASTER = 1500
#: Levels that a heat map has at most.
_MOST_CELLS = 60


def along_axes(data: ReportData, figure: Figure, metric: str | None = None) -> str:
    """Draw the objective, or a metric, along every axis: all points, and what report_lines.py lets a line join."""
    hue = data.hue()
    columns = min(3, len(data.axes))
    rows = math.ceil(len(data.axes) / columns)
    figure.set_size_inches(4.2 * columns, 3.1 * rows + 0.3)
    told = []
    for number, axis in enumerate(data.axes):
        plot = figure.add_subplot(rows, columns, number + 1)
        told.append(_along_axis(data, axis, hue if hue is not axis else None, plot, metric))
        if number % columns == 0:
            plot.set_ylabel(_directed(data, metric) if metric else data.label)
    if hue and len(data.axes) > 1:
        legend(figure, hue, "--" if data.kind == "search" else "-")
    if not any(axis.is_numeric for axis in data.axes):
        return f"{metric or data.label} along {'; '.join(told)}"
    if data.kind == "search":
        lines = "dashed: the median of neighbouring trials"
    else:
        lines = (
            "a line joins points that differ in its axis alone: those with the other values of the best point"
        )
    return f"{metric or data.label} along {'; '.join(told)}; {lines}"


def _along_axis(
    data: ReportData, axis: AxisData, hue: AxisData | None, plot: Axes, metric: str | None
) -> str:
    every = data.metrics[metric] if metric else data.objective
    is_max = data.higher_is_better[metric] if metric else data.is_max
    groups: Iterable[tuple[int, Any]] = enumerate(hue.levels) if hue else [(0, None)]
    for number, level in groups:
        chosen = [i for i in range(len(data.points)) if hue is None or hue.values[i] == level]
        places = [axis.place(axis.values[i]) for i in chosen]
        values = [every[i] for i in chosen]
        colour = COLOURS[number]
        if not axis.is_numeric:  # side by side, so that points of one value do not hide each other
            places = [place + 0.5 * (spread(i) - 0.5) for place, i in zip(places, chosen, strict=True)]
        plot.scatter(
            places, values, s=11, c=colour, alpha=0.4, linewidths=0, rasterized=len(places) > _RASTER
        )
        marker = MARKERS[number]
        if not axis.is_numeric:
            best = best_of_each([axis.place(axis.values[i]) for i in chosen], values, is_max)
            plot.plot(list(best), list(best.values()), color=colour, marker=marker, linestyle="none")
        elif data.kind == "search":
            line = median_of_trials(axis, chosen, every)
            plot.plot(list(line), list(line.values()), color=colour, linestyle="--", linewidth=1.2)
        else:
            line = line_through_best(data, axis, chosen, every, is_max=is_max)
            marker = marker if len(line) <= _MOST_CELLS else ""
            plot.plot(list(line), list(line.values()), color=colour, marker=marker)
    scale(plot.xaxis, axis, plot)
    plot.set_xlabel(axis.name)
    known = [i for i in range(len(every)) if not math.isnan(every[i])]
    best_index = (max if is_max else min)(known, key=lambda i: every[i])
    return f"{axis.name}: best {every[best_index]:.4g} at {written(axis.values[best_index])}"


def heat_maps(data: ReportData, figure: Figure, first: AxisData, second: AxisData) -> str:
    """Draw the best objective over the other axes for each pair of values; one map per value of the hue."""
    hue = data.hue()
    if hue in (first, second):
        hue = None
    levels: Sequence[Any] = hue.levels if hue else (None,)
    values = [value for value in data.objective if not math.isnan(value)]
    low, high = min(values), max(values)
    figure.set_size_inches(min(13.0, 3.9 * len(levels) + 1.1), 3.5)
    plots = figure.subplots(1, len(levels), squeeze=False, sharey=True)[0]
    is_small = _are_small(first, second)
    shown: Any = None
    for plot, level in zip(plots, levels, strict=True):
        chosen = [i for i in range(len(data.points)) if hue is None or hue.values[i] == level]
        if is_small:
            shown = _cells(data, chosen, first, second, plot, low, high)
        else:
            shown = plot.scatter(
                [first.place(first.values[i]) for i in chosen], [second.place(second.values[i]) for i in chosen],
                c=[data.objective[i] for i in chosen], s=16, cmap=COLOUR_MAP, vmin=low, vmax=high, linewidths=0,
            )  # fmt: skip
            scale(plot.xaxis, first, plot)
            scale(plot.yaxis, second, plot)
        plot.set_xlabel(first.name)
        if level is not None:
            plot.set_title(f"{level}", fontsize=10)
    plots[0].set_ylabel(second.name)
    bar = figure.colorbar(shown, ax=list(plots), pad=0.02)
    bar.set_label(data.label)
    bar.outline.set_visible(False)
    best = data.row_of(data.ranked[0].point)
    return (
        f"{data.label} over {first.name} and {second.name}, from {low:.4g} to {high:.4g}; best at "
        f"{written(first.values[best])} and {written(second.values[best])}"
    )


def _cells(
    data: ReportData,
    chosen: Sequence[int],
    first: AxisData,
    second: AxisData,
    plot: Axes,
    low: float,
    high: float,
) -> Any:
    import numpy as np
    from matplotlib.patches import Rectangle

    grid = np.full((len(second.levels), len(first.levels)), np.nan)
    for i in chosen:
        row, column = second.levels.index(second.values[i]), first.levels.index(first.values[i])
        value = data.objective[i]
        is_better = np.isnan(grid[row, column]) or (value > grid[row, column]) == data.is_max
        if not math.isnan(value) and is_better:
            grid[row, column] = value
    shown = plot.imshow(grid, origin="lower", aspect="auto", cmap=COLOUR_MAP, vmin=low, vmax=high)
    level_ticks(plot.xaxis, first)
    level_ticks(plot.yaxis, second)
    plot.tick_params(length=0)
    plot.spines[:].set_visible(False)
    if not np.all(np.isnan(grid)):
        best = np.unravel_index(np.nanargmax(grid if data.is_max else -grid), grid.shape)
        corner = (best[1] - 0.48, best[0] - 0.46)
        plot.add_patch(Rectangle(corner, 0.96, 0.92, fill=False, edgecolor=BEST_COLOUR, linewidth=2.5))
    if grid.size <= 100:
        for (row, column), value in np.ndenumerate(grid):
            if not np.isnan(value) and high > low:
                colour = "black" if (value - low) / (high - low) > 0.6 else "white"
                plot.annotate(
                    f"{value:.3g}", (column, row), ha="center", va="center", fontsize=7, color=colour
                )
    return shown


def trade_off(data: ReportData, figure: Figure, first: str, second: str) -> str:
    """Draw two tasks' metrics against each other with the Pareto front, coloured by an axis."""
    figure.set_size_inches(5.7, 4.0)
    plot = figure.add_subplot()
    x, y = data.metrics[first], data.metrics[second]
    known = [i for i in range(len(x)) if not math.isnan(x[i]) and not math.isnan(y[i])]
    hue = data.hue()
    numeric = [axis for axis in data.axes if axis.is_numeric]
    colours = max(numeric, key=lambda axis: _explained(data, axis, (first, second)), default=None)
    if colours is not None:
        shown: Any = None
        for number, level in enumerate(hue.levels if hue else (None,)):
            members = [i for i in known if hue is None or hue.values[i] == level]
            shown = plot.scatter(
                [x[i] for i in members], [y[i] for i in members], c=[colours.place(colours.values[i]) for i in members],
                marker=MARKERS[number], s=26, cmap=COLOUR_MAP, alpha=0.85, linewidths=0, norm=norm_of(colours),
                rasterized=len(members) > _RASTER, label=level,
            )  # fmt: skip
        bar = figure.colorbar(shown, pad=0.02)
        bar.set_label(colours.name)
        bar.outline.set_visible(False)
    else:
        for number, level in enumerate(hue.levels if hue else (None,)):
            members = [i for i in known if hue is None or hue.values[i] == level]
            plot.scatter(
                [x[i] for i in members], [y[i] for i in members], c=COLOURS[number], marker=MARKERS[number], s=26,
                alpha=0.85, linewidths=0, label=level,
            )  # fmt: skip
    front = _front(data, first, second, known)
    plot.plot(
        [x[i] for i in front], [y[i] for i in front], color=BEST_COLOUR, linewidth=1.4, drawstyle="default",
        marker="o", markersize=7, markerfacecolor="none", label="Pareto front",
    )  # fmt: skip
    _name_front(data, plot, front, x, y, colours)
    plot.set_xlabel(_directed(data, first))
    plot.set_ylabel(_directed(data, second))
    plot.legend(frameon=False, fontsize=8)
    return (
        f"{second} against {first}; Pareto front of {len(front)} points, from {x[front[0]]:.4g} and "
        f"{y[front[0]]:.4g} to {x[front[-1]]:.4g} and {y[front[-1]]:.4g}"
    )


def parallel_coordinates(data: ReportData, figure: Figure) -> str:
    """Draw every point as a line across all axes, coloured by the objective; the best ones on top."""
    import matplotlib
    from matplotlib.collections import LineCollection
    from matplotlib.colors import Normalize

    columns = [*data.axes]
    figure.set_size_inches(max(7.0, 1.7 * (len(columns) + 1)), 4.2)
    plot = figure.add_subplot()
    values = [value for value in data.objective if not math.isnan(value)]
    low, high = min(values), max(values)
    order = sorted(
        (i for i in range(len(data.points)) if not math.isnan(data.objective[i])),
        key=lambda i: data.objective[i] if data.is_max else -data.objective[i],
    )
    norm = Normalize(low, high)
    colours = matplotlib.colormaps[COLOUR_MAP]
    lines, of_lines, widths = [], [], []
    num_best = max(1, len(order) // 20)
    for position, i in enumerate(order):
        heights = [share_of(axis, axis.values[i]) + 0.02 * (spread(i) - 0.5) for axis in columns]
        heights.append((data.objective[i] - low) / (high - low) if high > low else 0.5)
        lines.append(list(enumerate(heights)))
        is_best = position >= len(order) - num_best
        of_lines.append((*colours(norm(data.objective[i]))[:3], 0.95 if is_best else 0.25))
        widths.append(1.8 if is_best else 0.7)
    shown = LineCollection(lines, colors=of_lines, linewidths=widths)
    shown.set_rasterized(len(lines) > _RASTER)
    plot.add_collection(shown)
    _draw_columns(data, columns, plot, low, high)
    names = ", ".join(axis.name for axis in columns)
    return f"each point as a line over {names} to {data.label}; the best 5 % are bold"


def _draw_columns(data: ReportData, columns: Sequence[AxisData], plot: Axes, low: float, high: float) -> None:
    """Draw the upright lines of parallel coordinates, and what stands beside them."""
    from matplotlib import rcParams

    for position, axis in enumerate(columns):
        plot.axvline(position, color=rcParams["axes.edgecolor"], linewidth=0.8)
        for level in shown_levels(axis):
            plot.annotate(
                written(level), (position, share_of(axis, level)), xytext=(-4, 0), textcoords="offset points",
                ha="right", va="center", fontsize=7,
            )  # fmt: skip
    plot.axvline(len(columns), color=rcParams["axes.edgecolor"], linewidth=0.8)
    for value, height in ((low, 0.0), (high, 1.0)):
        plot.annotate(
            f"{value:.4g}",
            (len(columns), height),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    plot.set_xlim(-0.6, len(columns) + 0.5)
    plot.set_ylim(-0.06, 1.06)
    plot.set_xticks(range(len(columns) + 1), [*(axis.name for axis in columns), data.label])
    plot.set_yticks([])
    plot.tick_params(length=0)
    plot.spines[:].set_visible(False)


def history(data: ReportData, figure: Figure) -> str:
    """Draw the objective trial by trial, and the best so far."""
    figure.set_size_inches(7.4, 3.3)
    plot = figure.add_subplot()
    order = sorted(
        (i for i in range(len(data.points)) if not math.isnan(data.objective[i])),
        key=lambda i: data.points[i],
    )
    numbers, values = [data.points[i] for i in order], [data.objective[i] for i in order]
    best = list(itertools.accumulate(values, max if data.is_max else min))
    plot.scatter(numbers, values, s=14, c=COLOURS[0], alpha=0.5, linewidths=0, label="trial")
    plot.step(numbers, best, where="post", color=BEST_COLOUR, linewidth=1.8, label="best so far")
    plot.set_xlabel("trial")
    plot.set_ylabel(data.label)
    plot.legend(frameon=False, fontsize=8)
    return f"{data.label} by trial; the best of {len(values)} trials is {best[-1]:.4g}"


def pairs_of_axes(data: ReportData, most: int = 6) -> list[tuple[AxisData, AxisData]]:
    """Return the pairs of axes that are worth a map, those that matter most first."""
    hue = data.hue()
    label = data.selection.objectives[0].weights
    names = [name for name, _ in label]
    axes = [axis for axis in data.axes if axis is not hue] if len(data.axes) > 2 else list(data.axes)
    axes.sort(key=lambda axis: -_explained(data, axis, names))
    pairs = itertools.combinations(axes, 2)
    return [pair for pair in pairs if _are_small(*pair) or all(axis.is_numeric for axis in pair)][:most]


def _are_small(*axes: AxisData) -> bool:
    return all(len(axis.levels) <= _MOST_CELLS for axis in axes)


def _explained(data: ReportData, axis: AxisData, names: Sequence[str]) -> float:
    """Return the share of the variance of some metrics that lies between the values of an axis."""
    shares = []
    for name in names:
        groups: dict[Any, list[float]] = {}
        steps = len(axis.levels) > 20
        for value, metric in zip(axis.values, data.metrics.get(name, ()), strict=False):
            if not math.isnan(metric):
                groups.setdefault(int(10 * share_of(axis, value)) if steps else value, []).append(metric)
        every = [metric for group in groups.values() for metric in group]
        if len(every) < 2 or (spread := statistics.pvariance(every)) == 0:
            continue
        mean = statistics.fmean(every)
        between = sum(len(group) * (statistics.fmean(group) - mean) ** 2 for group in groups.values()) / len(
            every
        )
        shares.append(between / spread)
    return statistics.fmean(shares) if shares else 0.0


def _front(data: ReportData, first: str, second: str, known: Sequence[int]) -> list[int]:
    from raymerge.cluster.select import pareto_front

    signs = [-1 if data.higher_is_better[name] else 1 for name in (first, second)]
    costs = {i: (signs[0] * data.metrics[first][i], signs[1] * data.metrics[second][i]) for i in known}
    return pareto_front(costs)


def _name_front(
    data: ReportData,
    plot: Axes,
    front: Sequence[int],
    x: Sequence[float],
    y: Sequence[float],
    axis: AxisData | None,
) -> None:
    """Write the value of the colouring axis beside some points of the front."""
    if axis is None:
        return
    step = max(1, math.ceil(len(front) / 8))
    last = None
    for i in front[::step]:
        text = written(axis.values[i])
        if text != last:
            plot.annotate(text, (x[i], y[i]), xytext=(6, 5), textcoords="offset points", fontsize=8)
        last = text


def _directed(data: ReportData, metric: str) -> str:
    return metric if data.higher_is_better[metric] else f"{metric} (low is good)"


def plots_of(data: ReportData) -> Mapping[str, Any]:
    """Return the plots that a report of this data has: title -> function of an empty figure."""
    plots: dict[str, Any] = {}
    if data.kind == "search" and len(data.points) > 1:
        plots["Trial by trial"] = lambda figure: history(data, figure)
    if data.axes:
        plots[f"{data.label} along each axis"] = lambda figure: along_axes(data, figure)
    tasks = [name for name in data.tasks() if name in data.metrics]
    for metric in [name for name in tasks if name != data.label][:6] if data.axes else []:
        plots[f"{metric} along each axis"] = lambda figure, m=metric: along_axes(data, figure, m)
    for first, second in itertools.islice(itertools.combinations(tasks, 2), 6):
        plots[f"Trade-off of {first} and {second}"] = lambda figure, a=first, b=second: trade_off(
            data, figure, a, b
        )
    if len(data.axes) >= 2:
        for a_axis, b_axis in pairs_of_axes(data):
            plots[f"Over {a_axis.name} and {b_axis.name}"] = lambda figure, a=a_axis, b=b_axis: heat_maps(
                data, figure, a, b
            )
    if len(data.axes) >= 3:
        plots["All axes at once"] = lambda figure: parallel_coordinates(data, figure)
    return plots
