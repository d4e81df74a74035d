"""Write a report: one HTML page that needs nothing else, and the same plots as PNG files.

Text and lines of the plots take the page's colour, so the page reads well on light and on dark
ground. Nothing is fetched: no script, no font, no picture from elsewhere.
"""

from __future__ import annotations

import contextlib
import html
import io
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from raymerge.cluster.report_data import ReportData
from raymerge.cluster.report_text import axis_rows, best_rows, summary
from raymerge.cluster.text_tables import cell
from raymerge.merge_actors.errors import OutputError, RecipeError
from raymerge.merge_actors.files import write_error
from raymerge.merge_actors.storage.folders import entries
from raymerge.merge_actors.storage.objects import delete_objects, write_object
from raymerge.merge_actors.storage.uris import absolute, is_remote

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE_NAME = "report.html"
PLOTS_FOLDER = "plots"
#: Stands for the colour of the page's text while a plot is drawn.
_INK = "#010203"
_PNG_INK = "#222222"
_PNG_DPI = 130

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --ground: #ffffff; --faint: #57606a; --line: #d0d7de;
  --best: #fff4e5; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --ground: #0d1117; --faint: #9aa4af; --line: #30363d; --best: #33260f; }
}
body { margin: 0 auto; padding: 1.5rem; max-width: 76rem; color: var(--ink); background: var(--ground);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .5rem; }
p { margin: .25rem 0; } .faint { color: var(--faint); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .3rem .75rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; } tbody tr:first-child { background: var(--best); }
td.text, th.text { text-align: left; }
figure { margin: 0; overflow-x: auto; } figcaption { color: var(--faint); font-size: .85rem; }
figure svg { max-width: 100%; height: auto; color: var(--ink); }
.plots { display: flex; flex-wrap: wrap; column-gap: 2rem; } .plots section { max-width: 100%; }
.plots figcaption { width: 0; min-width: 100%; }
.tables { display: flex; flex-wrap: wrap; gap: 2rem; } .tables tbody tr:first-child { background: none; }
"""


def write_report(data: ReportData, out: str) -> list[str]:
    """Write the page and the pictures into the folder of a grid.

    Returns:
        the files, the page first.

    Raises:
        RecipeError: matplotlib is not installed.
        OutputError: the files cannot be written.
    """
    figures, pictures = [], {}
    for number, (title, draw) in enumerate(_plots(data).items(), 1):
        svg, told = _svg(title, draw)
        figures.append((title, told, svg))
        pictures[f"{PLOTS_FOLDER}/{number:02d}-{_file_name(title)}.png"] = _png(draw)
    place = absolute(out)
    for entry in entries(f"{place}/{PLOTS_FOLDER}"):
        if entry.name.endswith(".png"):  # of an earlier report
            _remove(f"{place}/{PLOTS_FOLDER}/{entry.name}")
    files = {**pictures, PAGE_NAME: _page(data, figures).encode()}
    for name, content in files.items():
        _write(f"{place}/{name}", content)
    return [os.path.join(out, name) for name in (PAGE_NAME, *pictures)]


def _write(path: str, content: bytes) -> None:
    if is_remote(path):
        write_object(path, content)
        return
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(f"{path}.new", "wb") as file:
            file.write(content)
        os.replace(f"{path}.new", path)
    except OSError as error:
        raise write_error(path, error) from error


def _remove(path: str) -> None:
    if is_remote(path):
        delete_objects([path])
        return
    try:
        os.remove(path)
    except OSError as error:
        raise write_error(path, error) from error


def _plots(data: ReportData) -> Mapping[str, Callable[[Figure], str]]:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise RecipeError(
            "a report is drawn with matplotlib; install it with pip install 'raymerge[report]', or take the tables: "
            "raymerge report --text"
        ) from error
    from raymerge.cluster.report_plots import plots_of

    if not data.points:
        raise OutputError("no point has a result yet")
    return plots_of(data)


@contextlib.contextmanager
def _figure(ink: str, salt: str) -> Iterator[Figure]:
    """Give an empty figure that draws texts and lines in one colour; no window, no global state."""
    import matplotlib
    from matplotlib.figure import Figure

    style = {
        "font.family": "sans-serif",
        "font.size": 9.5,
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.8,
        "image.interpolation": "nearest",
        **dict.fromkeys(
            (
                "text.color",
                "axes.edgecolor",
                "axes.labelcolor",
                "axes.titlecolor",
                "xtick.color",
                "ytick.color",
            ),
            ink,
        ),
    }
    with matplotlib.rc_context(style):
        figure = Figure(layout="constrained")
        figure.patch.set_alpha(0)
        yield figure


def _svg(title: str, draw: Callable[[Figure], str]) -> tuple[str, str]:
    """Return a plot as an SVG element, and what it shows in words."""
    buffer = io.StringIO()
    with _figure(_INK, title) as figure:
        told = draw(figure)
        for plot in figure.axes:
            plot.patch.set_alpha(0)
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    name = re.sub(r"\W+", "-", title)
    # matplotlib gives every picture the same ids; a page has each only once
    text = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", text)
    head = f'<title id="t-{name}">{html.escape(title)}</title><desc id="d-{name}">{html.escape(told)}</desc>'
    labelled = f'<svg role="img" aria-labelledby="t-{name} d-{name}"'
    return re.sub(r">", f">{head}", text.replace("<svg", labelled, 1), count=1), told


def _png(draw: Callable[[Figure], str]) -> bytes:
    buffer = io.BytesIO()
    with _figure(_PNG_INK, "") as figure:
        draw(figure)
        figure.savefig(buffer, format="png", dpi=_PNG_DPI, facecolor="white")
    return buffer.getvalue()


def _page(data: ReportData, figures: Sequence[tuple[str, str, str]]) -> str:
    direction = "" if data.selection.is_pareto else f" ({'high' if data.is_max else 'low'} is good)"
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(data.name)}: raymerge report</title>",
        f"<style>{_STYLE}</style></head><body>",
        f"<h1>{html.escape(data.name)}</h1>",
        f'<p class="faint">{html.escape(summary(data))}</p>',
        "<h2>Best points</h2>",
        f"<p>Chosen by {html.escape(' and '.join(o.label for o in data.selection.objectives))} on validation "
        f"data{direction}; &plusmn; is one standard error.</p>",
        _table(best_rows(data)),
    ]
    parts.append('<div class="plots">')
    for title, told, svg in figures:
        parts.append(
            f"<section><h2>{html.escape(title)}</h2>"
            f"<figure>{svg}<figcaption>{html.escape(told)}.</figcaption></figure></section>"
        )
    parts.append("</div>")
    if data.axes:
        parts += ["<h2>Each axis in numbers</h2>", '<div class="tables">']
        parts += [_table(axis_rows(data, axis)) for axis in data.axes]
        parts.append("</div>")
    parts.append("</body></html>")
    return "\n".join(parts) + "\n"


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    texts = {name for name in names if any(isinstance(row.get(name), str) for row in rows)}

    def kind(name: str) -> str:
        return ' class="text"' if name in texts else ""

    head = "".join(f'<th scope="col"{kind(name)}>{html.escape(name)}</th>' for name in names)
    body = "\n".join(
        "<tr>" + "".join(f"<td{kind(name)}>{_cell(row, name)}</td>" for name in names) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _cell(row: Mapping[str, Any], name: str) -> str:
    return html.escape(cell(row[name])).replace("+-", "&plusmn;") if name in row else ""


def _file_name(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
