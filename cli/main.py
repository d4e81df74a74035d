"""The `raymerge` command: a group of commands that are imported when they are used."""

from __future__ import annotations

import importlib
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import click

from raymerge.merge_actors.errors import RaymergeError

#: command -> module in raymerge.cli that holds `NAME_command`
_COMMANDS = {
    "merge": "raymerge.cli.merge",
    "plan": "raymerge.cli.plan",
    "inspect": "raymerge.cli.inspect",
    "verify": "raymerge.cli.verify",
    "stats": "raymerge.cli.stats",
    "evaluate": "raymerge.cli.evaluate",
    "grid": "raymerge.cli.grid",
    "search": "raymerge.cli.search",
    "report": "raymerge.cli.report",
    "status": "raymerge.cli.status",
    "submit": "raymerge.cli.submit",
    "jobs": "raymerge.cli.jobs",
}


class _LazyGroup(click.Group):
    """Imports a command's module when the command is asked for, and maps our errors to exits."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command = getattr(importlib.import_module(_COMMANDS[cmd_name]), f"{cmd_name}_command")
        assert isinstance(command, click.Command)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        was_terminated = _terminate_as_interrupt()
        try:
            return super().invoke(ctx)
        except (SystemExit, KeyboardInterrupt):
            if was_terminated():
                raise SystemExit(128 + signal.SIGTERM) from None
            raise
        except RaymergeError as error:
            if ctx.params.get("debug"):
                raise
            raise click.ClickException(str(error)) from error


def _terminate_as_interrupt() -> Callable[[], bool]:
    """Let SIGTERM (of `ray job stop`, a batch system, Kubernetes) end a command as Ctrl-C does.

    What can go on later is kept then.

    Returns:
        whether that happened.
    """
    came: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        if not came:  # a second one comes while the first is being obeyed
            came.append(number)
            raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, interrupt)
    return lambda: bool(came)


@click.command(
    cls=_LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Example: raymerge merge recipe.yaml merged/",
)
@click.version_option(package_name="raymerge")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Merge language-model checkpoints: sharded over workers, out of core, resumable."""
    del debug


def remark(line: str) -> None:
    """Print a remark for the user on stderr."""
    click.echo(line if line.startswith("note:") else f"warning: {line}", err=True)


def print_json(value: Any) -> None:
    """Print one JSON document on stdout."""
    import json

    json.dump(value, sys.stdout, indent=2)
    sys.stdout.write("\n")
