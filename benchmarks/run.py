"""Run benchmarks one after another, each with its defaults: `make bench ARGS="versus_peer methods"`.

Without names it runs all that need no GPU, about half an hour on two cores, most of it the peer.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

#: In order; gpu.py is left out of the default, as few machines have one.
_ON_CPU = (
    "methods",
    "plan_scale",
    "storage",
    "versus_peer",
    "grid_versus_peer",
    "campaign_floor",
    "grid_overhead",
    "memory",
)


def main() -> None:
    """Run the named benchmarks; the exit code is that of the first that fails."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(_ON_CPU)}, gpu")
    names = parser.parse_args().names or _ON_CPU
    if unknown := [name for name in names if name not in (*_ON_CPU, "gpu")]:
        parser.error(f"unknown benchmark {unknown[0]!r}; known: {', '.join(_ON_CPU)}, gpu")
    for name in names:
        code = subprocess.run([sys.executable, Path(__file__).with_name(f"{name}.py")]).returncode
        if code:
            sys.exit(code)


if __name__ == "__main__":
    main()
