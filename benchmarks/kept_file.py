"""Write a benchmark's result as a dated file: what was measured, on what, with what.

`results/<what>_<hardware>_<yyyymm>.md` for reading and the same name with .json for programs. A
second run in the same month on the same hardware replaces the first. No absolute path of the
machine goes into them.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
#: Everything that benchmarks make and need not keep: models, outputs, the peer's environment.
WORK = REPOSITORY / ".bench"
RESULTS = REPOSITORY / "benchmarks" / "results"
_PACKAGES = ("raymerge", "ray", "torch", "numpy", "safetensors", "transformers")


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Repeated measurements of one quantity."""

    min: float
    median: float
    max: float
    runs: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise the values."""
        return cls(min=min(values), median=statistics.median(values), max=max(values), runs=len(values))

    def __str__(self) -> str:
        return f"{self.min:.2f} / {self.median:.2f} / {self.max:.2f}"


@dataclass(slots=True)
class Report:
    """A result under construction: Markdown for the reader, `data` for programs."""

    what: str
    """Enters the file's name: "versus_peer"."""
    title: str
    configuration: dict[str, Any]
    """Every option that can change a figure; no paths of the machine."""
    hardware: str = ""
    """Name of the hardware; default: the CPU and the number of its cores."""
    data: dict[str, Any] = field(default_factory=dict)
    _parts: list[str] = field(default_factory=list)

    def text(self, paragraph: str) -> None:
        """Add a paragraph."""
        self._parts.append(paragraph)

    def table(self, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Add a table; the first column is text, the others are figures."""
        lines = [list(header), ["---", *["---:"] * (len(header) - 1)], *rows]
        self._parts.append("\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines))

    def path(self, folder: Path = RESULTS) -> Path:
        """Return the name of the Markdown file; pictures take its stem and an ending of their own."""
        slug = re.sub(r"[^a-z0-9]+", "-", self._hardware().lower()).strip("-")
        return folder / f"{self.what}_{slug}_{time.strftime('%Y%m')}.md"

    def _hardware(self) -> str:
        return self.hardware or f"{_cpu()} {len(os.sched_getaffinity(0))} cores"

    def write(self, folder: Path = RESULTS) -> Path:
        """Write both files and say where they are; returns the Markdown one."""
        facts, hardware, path = environment(), self._hardware(), self.path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
        top = [
            f"# {self.title}",
            f"{facts['date']}, commit {facts['commit']}. {hardware}, {facts['memory_gib']} GiB memory, "
            f"{facts['platform']}. {versions}.",
            "Configuration: " + ", ".join(f"{key} {value}" for key, value in self.configuration.items()),
        ]
        path.write_text("\n\n".join([*top, *self._parts]) + "\n")
        document = {"environment": facts, "configuration": self.configuration, "results": self.data}
        path.with_suffix(".json").write_text(json.dumps(document, indent=1, default=_plain) + "\n")
        print(path.read_text())
        print(f"kept in {os.path.relpath(path)} and .json", file=sys.stderr)
        return path


def add_folder_options(parser: argparse.ArgumentParser) -> None:
    """Add --results, the folder of the kept files, and --work, that of models and outputs."""
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the kept files")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of models and outputs")


def environment() -> dict[str, Any]:
    """Return date, commit, hardware and versions."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": _commit(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30),
        "platform": f"Linux {platform.release()}, Python {platform.python_version()}",
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def _commit() -> str:
    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=REPOSITORY, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changes = " with changes" if git("status", "--porcelain", "-uno") else ""
        return git("rev-parse", "--short=12", "HEAD") + changes
    except (OSError, subprocess.CalledProcessError):
        return "unknown"  # an unpacked archive


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _cpu() -> str:
    names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return names[0] if names else platform.machine()


def _plain(value: object) -> object:
    if isinstance(value, Spread):
        return {name: getattr(value, name) for name in Spread.__slots__}
    raise TypeError(f"{type(value).__name__} cannot stand in a result")
