"""What the plots of a report share: colours, marks, and where the values of an axis are drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from raymerge.cluster.report_data import AxisData

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Okabe and Ito's colours, which people with any colour vision can tell apart; on light and dark ground.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
MARKERS = "os^Dvp"
BEST_COLOUR = "#d55e00"
COLOUR_MAP = "viridis"


def best_of_each(places: Sequence[float], values: Sequence[float], is_max: bool) -> dict[float, float]:
    """Return the best value at each place, places ascending."""
    best: dict[float, float] = {}
    for place, value in zip(places, values, strict=True):
        if not math.isnan(value) and (place not in best or (value > best[place]) == is_max):
            best[place] = value
    return dict(sorted(best.items()))


def legend(figure: Figure, hue: AxisData, line: str) -> None:
    """Name the colours of an axis above the plots, beside the line that is drawn in them."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=COLOURS[number], marker=MARKERS[number], linestyle=line, label=str(level))
        for number, level in enumerate(hue.levels)
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), frameon=False, fontsize=9)


def scale(direction: Any, axis: AxisData, plot: Axes) -> None:
    """Set the scale of one direction of a plot: a log one, or texts at their positions."""
    if not axis.is_numeric:
        direction.set_ticks(range(len(axis.levels)), [written(level) for level in axis.levels])
        if direction is plot.xaxis and sum(len(written(level)) for level in axis.levels) > 34:
            plot.tick_params(axis="x", rotation=35)
            for label in plot.get_xticklabels():
                label.set_horizontalalignment("right")
    elif axis.is_log:
        (plot.set_xscale if direction is plot.xaxis else plot.set_yscale)("log")


def level_ticks(direction: Any, axis: AxisData) -> None:
    """Mark the values of an axis at their positions in a heat map."""
    step = max(1, math.ceil(len(axis.levels) / 12))
    direction.set_ticks(range(0, len(axis.levels), step), [written(level) for level in axis.levels[::step]])


def shown_levels(axis: AxisData) -> Sequence[Any]:
    """Return the values that are written beside an axis of parallel coordinates."""
    if not axis.is_numeric:
        return axis.levels if len(axis.levels) <= 12 else (axis.levels[0], axis.levels[-1])
    if len(axis.levels) > 24:
        return (axis.levels[0], axis.levels[-1])
    step = max(1, math.ceil(len(axis.levels) / 6))
    return sorted({*axis.levels[::step], axis.levels[-1]})


def share_of(axis: AxisData, value: Any) -> float:
    """Return where a value lies between the ends of its axis, in [0, 1]."""
    low, high = axis.place(axis.levels[0]), axis.place(axis.levels[-1])
    place = axis.place(value)
    if axis.is_log:
        return math.log(place / low) / math.log(high / low)
    return (place - low) / (high - low)


def norm_of(axis: AxisData) -> Any:
    """Return what turns a place on an axis into a colour."""
    from matplotlib.colors import LogNorm, Normalize

    kind: Any = LogNorm if axis.is_log else Normalize
    return kind(axis.place(axis.levels[0]), axis.place(axis.levels[-1]))


def spread(index: int) -> float:
    """Return a number in [0, 1) that neighbours do not share, the same in every report."""
    return (index * 0.6180339887498949) % 1.0


def written(value: Any) -> str:
    """Write a value beside a plot."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
