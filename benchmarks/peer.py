"""The peer, mergekit 0.1.5, in a virtual environment of its own, run as its users run it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from kept_file import WORK
from processes import Run, run

VERSION = "0.1.5"
_PACKAGES = (f"mergekit=={VERSION}", "torch==2.13.0")


def peer_python(given: Path | None) -> Path:
    """Return the interpreter that has the peer: the one given, or that of `.bench/peer`, made if absent."""
    if given is not None:
        return given.absolute()
    folder = WORK / "peer"
    python = folder / "bin" / "python"
    if not (folder / ".installed").exists():
        shutil.rmtree(folder, ignore_errors=True)
        print(f"installing {' '.join(_PACKAGES)} into {os.path.relpath(folder)}", file=sys.stderr)
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-qq", *_PACKAGES], check=True, stdout=sys.stderr)
        (folder / ".installed").touch()
    return python


def peer_versions(python: Path) -> str:
    """Return the versions that matter, for the report."""
    code = (
        "import importlib.metadata as m;"
        "print(', '.join(f'{p} {m.version(p)}' for p in ('mergekit', 'torch', 'transformers', 'numpy')))"
    )
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def peer_merge(python: Path, recipe: Path, out: Path) -> Run:
    """Merge with the peer's command and its default options."""
    return run(
        [python.parent / "mergekit-yaml", recipe, out, "--quiet", "--random-seed", "0"],
        variables={"HF_HUB_OFFLINE": "1"},
    )
