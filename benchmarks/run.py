"""Run benchmarks one after another, each with its defaults: `make bench ARGS="versus_peer methods"`.

Without names it runs those of `_DEFAULT`, about an hour on two cores, most of it the peer.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

#: In order.
_DEFAULT = (
    "methods",
    "plan_scale",
    "storage",
    "versus_peer",
    "grid_versus_peer",
    "campaign_floor",
    "grid_overhead",
    "memory",
    "statistics_passes",
    "scaling",
)
#: By name only: they need a GPU, root, or break things on purpose for as long as they are let.
_ON_REQUEST = ("gpu", "on_premise", "soak")


def main() -> None:
    """Run the named benchmarks; the exit code is that of the first that fails."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    known = (*_DEFAULT, *_ON_REQUEST)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}")
    names = parser.parse_args().names or _DEFAULT
    if unknown := [name for name in names if name not in known]:
        parser.error(f"unknown benchmark {unknown[0]!r}; known: {', '.join(known)}")
    for name in names:
        code = subprocess.run([sys.executable, Path(__file__).with_name(f"{name}.py")]).returncode
        if code:
            sys.exit(code)


if __name__ == "__main__":
    main()
