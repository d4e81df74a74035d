"""Lay an inspection out as text: models, comparisons, a table of deltas, a table of task vectors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from raymerge.cluster.inspect import Comparison, Inspection
from raymerge.cluster.measure import QUANTILES
from raymerge.cluster.progress import gib


def inspection_text(found: Inspection, num_tensors: int = 0) -> str:
    """Return the text of an inspection.

    Args:
        found: what to lay out.
        num_tensors: list so many tensors of each comparison, those that moved most first.
    """
    return "\n".join(_lines(found, num_tensors))


def _lines(found: Inspection, num_tensors: int) -> Iterator[str]:
    for model in found.models:
        dtypes = ", ".join(
            f"{dtype} {count / model.num_parameters:.0%}" for dtype, count in model.dtypes.items()
        )
        vocabulary = (
            "no embeddings" if model.vocabulary_rows is None else f"{model.vocabulary_rows:,} vocabulary rows"
        )
        yield f"{model.model}" + ("  (base)" if model.model == found.base else "")
        yield (
            f"  {model.architecture}: {model.num_parameters:,} parameters in {model.num_tensors:,} tensors, "
            f"{gib(model.num_bytes)}"
        )
        yield f"  {model.num_layers} layers, {vocabulary}; {dtypes or 'no elements'}"
        for alias, kept in model.tied.items():
            yield f"  {alias} is tied to {kept}"
    for comparison in found.comparisons:
        yield ""
        yield f"{comparison.model} against {comparison.base}: {comparison.verdict}"
        yield f"  {comparison.reason}"
        for difference in comparison.differences:
            yield f"  differs: {difference.text}"
        if comparison.num_nonfinite:
            yield f"  {comparison.num_nonfinite:,} elements are NaN or infinite in one of the two"
        yield from _largest(comparison, num_tensors)
    yield from _delta_table(found.comparisons)
    if found.pairs:
        yield ""
        rows = [["task vectors", "cosine", "both moved", "sign conflicts"]]
        for pair in found.pairs:
            figures = (
                [
                    _figure(pair.cosine, ".3f"),
                    _figure(pair.both_moved_fraction, ".1%"),
                    _figure(pair.conflict_fraction, ".1%"),
                ]
                if not math.isnan(pair.both_moved_fraction)
                else ["nothing in common"]
            )
            rows.append([f"{pair.first} and {pair.second}", *figures])
        yield from _table(rows)


def _delta_table(comparisons: Sequence[Comparison]) -> Iterator[str]:
    if not comparisons:
        return
    yield ""
    heads = [
        "|delta|",
        *(f"{fraction:.1%}" for fraction in QUANTILES),
        "max",
        "norm",
        "/ base",
        "cosine",
        "equal",
    ]
    rows = [heads]
    for each in comparisons:
        if not each.num_elements:
            rows.append([f"{each.model} - {each.base}", each.verdict])
            continue
        figures = [*each.quantiles, each.max_magnitude, each.norm, each.relative_norm]
        name = f"{each.model} - {each.base}"
        rows.append(
            [name, *(f"{x:.2g}" for x in figures), f"{each.cosine:.3f}", f"{each.equal_fraction:.1%}"]
        )
    yield from _table(rows)


def _largest(comparison: Comparison, count: int) -> Iterator[str]:
    ordered = sorted(comparison.tensors, key=lambda tensor: -tensor.relative_norm)
    for tensor in ordered[: max(count, 0)]:
        yield (
            f"  {tensor.name}: ||delta||/||base|| {tensor.relative_norm:.2g}, max {tensor.max_magnitude:.2g}"
        )


def _figure(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lay out rows, the first of which names the columns; a row of two cells says something instead of figures."""
    widths = [
        max(len(row[column]) for row in rows if column == 0 or len(row) == len(rows[0]))
        for column in range(len(rows[0]))
    ]
    for row in rows:
        cells = row[1:]
        if len(row) == len(rows[0]):
            cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        yield "  ".join([row[0].ljust(widths[0]), *cells])
