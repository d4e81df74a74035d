"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

trust_option = click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Run Python files of a checkpoint (auto_map) where transformers has no class of its own; what is run is "
    "printed.",
)

_RECIPE_OPTIONS = (
    click.option(
        "--slice-mib",
        type=int,
        default=32,
        show_default=True,
        help="MiB of one input that a task holds; memory grows with it.",
    ),
    click.option("--dtype", help="Type of the output, such as bfloat16 [default: the recipe's]."),
    click.option(
        "--out-shard-size",
        default="5GB",
        show_default=True,
        help="The most that an output file holds: 5GB is bytes, 5B counts parameters.",
    ),
    click.option("--seed", type=int, help="Seed of the random masks [default: the recipe's, else 0]."),
    click.option("--allow-pickle", is_flag=True, help="Read PyTorch .bin files, weights only."),
    trust_option,
    click.option(
        "--strict",
        is_flag=True,
        help="Refuse recipe keys without effect, and heads of labels that may differ.",
    ),
)


def recipe_options(command: F) -> F:
    """Add the options that change what a plan looks like."""
    for option in reversed(_RECIPE_OPTIONS):
        command = option(command)
    return command


_RUN_OPTIONS = (
    click.option("--address", help="Address of a Ray cluster [default: RAY_ADDRESS, else a Ray of its own]."),
    click.option("--in-process", is_flag=True, help="Merge and evaluate in this process, without Ray."),
    click.option("--workers", type=int, help="Evaluators [default: one per share of a GPU, or per machine]."),
    click.option(
        "--gpus-per-evaluator",
        type=float,
        help="0.5 puts two evaluators on each GPU, 4 spreads a model over four [default: as few as hold it].",
    ),
    click.option(
        "--threads-per-evaluator",
        type=int,
        help="Threads on CPUs [default: the machine's cores over its evaluators]; no result depends on it.",
    ),
    click.option(
        "--device",
        type=click.Choice(["auto", "cpu", "cuda"]),
        default="auto",
        show_default=True,
        help="Where to merge and evaluate.",
    ),
    click.option(
        "--slice-mib",
        type=int,
        default=32,
        show_default=True,
        help="MiB of one input that a merge holds; memory grows with it.",
    ),
    click.option("--allow-nan", is_flag=True, help="Merge inputs that hold NaN or infinity."),
    click.option("--allow-pickle", is_flag=True, help="Read PyTorch .bin files, weights only."),
    trust_option,
)


def run_options(command: F) -> F:
    """Add the options that say where and how points are run."""
    for option in reversed(_RUN_OPTIONS):
        command = option(command)
    return command
