"""What the workers of a run did, summed over its tasks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from raymerge.merge_actors.task import MeasureReport, TaskReport


@dataclass(frozen=True, slots=True)
class Totals:
    """What the workers did in this run, summed over tasks."""

    num_tasks: int = 0
    read_bytes: int = 0
    write_bytes: int = 0
    read_seconds: float = 0.0
    merge_seconds: float = 0.0
    write_seconds: float = 0.0
    num_retries: int = 0
    num_speculated: int = 0
    """Tasks that were given to a second worker because the first was slow."""
    fetched_bytes: int = 0
    """Bytes that came from object stores."""

    def plus(self, report: TaskReport | MeasureReport) -> Totals:
        """Return the totals with one more report."""
        is_merge = isinstance(report, TaskReport)
        return Totals(
            num_tasks=self.num_tasks + is_merge,
            read_bytes=self.read_bytes + report.read_bytes,
            write_bytes=self.write_bytes + (report.write_bytes if isinstance(report, TaskReport) else 0),
            read_seconds=self.read_seconds + report.read_seconds,
            merge_seconds=self.merge_seconds + report.merge_seconds,
            write_seconds=self.write_seconds
            + (report.write_seconds if isinstance(report, TaskReport) else 0.0),
            num_retries=self.num_retries,
            num_speculated=self.num_speculated,
            fetched_bytes=self.fetched_bytes + report.fetched_bytes,
        )

    def plus_totals(self, other: Totals) -> Totals:
        """Return the sum of two runs' totals."""
        names = [field.name for field in dataclasses.fields(self)]
        return Totals(**{name: getattr(self, name) + getattr(other, name) for name in names})
