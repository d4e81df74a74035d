"""What the commands of the zoo studies share: their options, the folders they run in, the head of their reports."""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from kept_file import RESULTS, Report
from transformers.utils import logging
from zoo_points import Point


def read_options(doc: str) -> argparse.Namespace:
    """Parse the command line and make the zoo the working folder: recipes name models and data relative to it.

    Args:
        doc: docstring of the command; its first line is the help.
    """
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("zoo", type=Path, metavar="ZOO", help="folder of models and data")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of statistics and answers")
    parser.add_argument("--settings", nargs="+", help="of the zoo [all that the study is about]")
    parser.add_argument(
        "--skip", nargs="+", default=[], metavar="PATTERN", help='points to leave out: "fisher_*"'
    )
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="of the evaluation's matrix products; bf16 (autocast) is faster where the processor has it",
    )
    parser.add_argument("--threads", type=int, default=2, help="of torch, for the evaluation")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the kept files")
    options = parser.parse_args()
    for name in ("zoo", "out", "results"):
        setattr(options, name, getattr(options, name).resolve())
    if not (options.zoo / "zoo.json").exists():
        parser.error(f"{options.zoo} is no zoo: it has no zoo.json")
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["RAYMERGE_CACHE"] = str(options.out / "cache")
    os.chdir(options.zoo)
    logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    return options


def without_skipped(points: Iterable[Point], patterns: Iterable[str]) -> list[Point]:
    """Leave out the points whose names match a pattern."""
    patterns = list(patterns)
    return [point for point in points if not any(fnmatch.fnmatch(point.name, each) for each in patterns)]


def new_report(
    what: str, title: str, options: argparse.Namespace, more: Mapping[str, Any] | None = None
) -> Report:
    """Return a report that names the zoo by its contents and the command that made it."""
    about = json.loads((options.zoo / "zoo.json").read_text())
    words = [Path(sys.argv[0]).name, "ZOO", "OUT", "--precision", options.precision]
    for name in ("settings", "skip"):
        if getattr(options, name):
            words += [f"--{name}", *getattr(options, name)]
    return Report(
        what,
        title,
        {
            "command": f"`python benchmarks/{' '.join(words)}`",
            "zoo.json": hashlib.sha256((options.zoo / "zoo.json").read_bytes()).hexdigest()[:16],
            "tokens of a text": about["max_length"],
            "evaluation": f"{options.precision} on {options.threads} threads",
            **(more or {}),
        },
    )
