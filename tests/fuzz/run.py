"""Fuzz one target by coverage, from its corpus: `python tests/fuzz/run.py header -max_total_time=60`.

Needs the package atheris. Inputs that reach new code are added to the corpus folder; a finding is written to the
working folder as crash-*. Further arguments go to libFuzzer.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["raymerge"]):
    sys.path.insert(0, str(Path(__file__).parent))
    from targets import TARGETS


def main() -> None:
    """Fuzz the target that the first argument names."""
    name, *arguments = sys.argv[1:]
    corpus = Path(__file__).parent / "corpus" / name
    atheris.Setup([sys.argv[0], str(corpus), *arguments], TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
