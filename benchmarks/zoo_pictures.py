"""Pictures of the zoo studies: one look, written as PNG files beside the page."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

COLOURS = ("#2a6f97", "#d1495b", "#edae49", "#3d5a45", "#66418c", "#9aa0a6")


@contextlib.contextmanager
def one_panel(path: Path, width: float = 7.0, height: float = 4.4) -> Iterator[Any]:
    """Give axes to draw on, and save the picture."""
    with panels(path, [""], width, height) as (axes,):
        yield axes


@contextlib.contextmanager
def panels(path: Path, titles: Sequence[str], width: float, height: float) -> Iterator[list[Any]]:
    """Give axes side by side, one for each title, and save the picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, found = pyplot.subplots(
        1, len(titles), figsize=(width * len(titles), height), layout="constrained", squeeze=False
    )
    for axes, title in zip(found[0], titles, strict=True):
        axes.set_title(title, loc="left", fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    yield list(found[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
