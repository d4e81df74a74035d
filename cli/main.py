"""The `raymerge` command: a group of commands that are imported when they are used."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
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


#: A command that is interrupted has so long to put things in order.
SECONDS_TO_END = 20.0


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
        """Run the command; one that SIGTERM ended exits as a shell says it, with 143."""
        with _interruptible() as came:
            try:
                return super().invoke(ctx)
            except (SystemExit, KeyboardInterrupt):
                if signal.SIGTERM in came:
                    raise SystemExit(128 + signal.SIGTERM) from None
                raise
            except RaymergeError as error:
                if ctx.params.get("debug"):
                    raise
                raise click.ClickException(str(error)) from error


@contextlib.contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Let SIGTERM (of `ray job stop`, a batch system, Kubernetes) end a command as Ctrl-C does.

    What can go on later is kept then. What does not come to its end in time, an upload to a store that does not
    answer, is given up as it would be by SIGKILL.

    Yields:
        the signals that came.
    """
    if threading.current_thread() is not threading.main_thread():
        yield []
        return
    came: list[int] = []
    over = threading.Event()

    def interrupt(number: int, frame: object) -> None:
        if came and number == signal.SIGTERM:  # a second one comes while the first is being obeyed
            return
        came.append(number)
        over.set()
        raise KeyboardInterrupt

    def watch() -> None:
        over.wait()
        if came:  # until the process has ended: Python itself waits for threads when all is done
            time.sleep(SECONDS_TO_END)
            sys.stderr.write(f"\nended in the middle: something did not stop in {SECONDS_TO_END:g} s\n")
            sys.stderr.flush()
            os._exit(128 + came[0])

    handlers = {signal.SIGTERM: signal.signal(signal.SIGTERM, interrupt)}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored: in the background
        handlers[signal.SIGINT] = signal.signal(signal.SIGINT, interrupt)
    # Started now: a signal may come while this thread holds what starting one needs.
    threading.Thread(target=watch, name="interruption", daemon=True).start()
    try:
        yield came
    finally:
        over.set()
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)


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
