"""The page of all --help texts, docs/cli.md: `python -m raymerge.cli.help_page > docs/cli.md`."""

from __future__ import annotations

import click

from raymerge.cli.main import main


def help_page() -> str:
    """Return the page as Markdown."""
    parts = [
        "# Command line\n\nWritten by `python -m raymerge.cli.help_page > docs/cli.md`; a test compares.\n",
        _section("raymerge", main, None),
    ]
    context = click.Context(main, info_name="raymerge", **main.context_settings)
    for name in main.list_commands(context):
        command = main.get_command(context, name)
        assert command is not None
        parts.append(_section(f"raymerge {name}", command, context))
    return "\n".join(parts)


def _section(title: str, command: click.Command, parent: click.Context | None) -> str:
    settings = {**main.context_settings, "terminal_width": 100}
    context = click.Context(command, info_name=title.split()[-1], parent=parent, **settings)
    return f"## {title}\n\n```text\n{command.get_help(context)}\n```\n"


if __name__ == "__main__":
    click.echo(help_page(), nl=False)
