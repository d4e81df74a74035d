"""docs/cli.md is what --help prints, and every command's help shows an example."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from raymerge.cli.help_page import help_page
from raymerge.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
CONTEXT = click.Context(main, info_name="raymerge", **main.context_settings)


def test_the_page_is_up_to_date():
    assert (ROOT / "docs" / "cli.md").read_text() == help_page(), (
        "run: python -m raymerge.cli.help_page > docs/cli.md"
    )


@pytest.mark.parametrize("name", main.list_commands(CONTEXT))
def test_every_command_shows_an_example(name: str):
    command = main.get_command(CONTEXT, name)
    assert command is not None
    assert f"Example: raymerge {name} " in command.get_help(CONTEXT).replace("\n", " ")
