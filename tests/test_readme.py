"""Commands shown in the documentation exist: every `raymerge ...` line names real commands and real flags."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
]
FENCE = re.compile(r"^```(console|bash|sh)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def _commands(page: Path) -> Iterator[list[str]]:
    """Yield the words of each shell command in a page; in ```console blocks the lines after `$ `."""
    for block in FENCE.finditer(page.read_text(encoding="utf-8")):
        lines = block[2].replace("\\\n", " ").splitlines()
        if block[1] == "console":
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        for line in lines:
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"\w+=.*", words[0]):  # VARIABLE=value before the command
                del words[0]
            if words:
                yield words


def _fault(words: list[str], command: click.Command) -> str | None:
    """Return what is wrong with the arguments of a click command line, reading only names, never values."""
    context = click.Context(command)
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        found = command.get_command(context, words[0])
        if found is None:
            return f"no command {words[0]!r}; known: {', '.join(command.list_commands(context))}"
        command, words = found, words[1:]
        context = click.Context(command, parent=context)
    flags = {
        flag
        for parameter in command.get_params(context)
        for flag in (*parameter.opts, *parameter.secondary_opts)
    }
    if "--" in words:  # another command of ours follows, as submit takes it
        end = words.index("--")
        return _fault(words[:end], command) or _fault(words[end + 1 :], context.find_root().command)
    for word in words:
        flag = word.split("=")[0]
        if flag.startswith("-") and flag not in flags and not re.fullmatch(r"-[\d.]+", flag):
            return f"{command.name} has no flag {flag!r}"
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_in_the_documentation_exist(page: Path) -> None:
    from raymerge.cli.main import main

    makefile = (ROOT / "Makefile").read_text()
    for words in _commands(page):
        if words[0] == "raymerge":
            fault = _fault(words[1:], main)
            assert fault is None, f"{shlex.join(words)}: {fault}"
        if words[0] == "make":
            for target in [word for word in words[1:] if "=" not in word and not word.startswith("-")]:
                assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), (
                    f"no make target {target!r}"
                )


def test_faults_are_found(tmp_path: Path) -> None:
    @click.group()
    def main() -> None: ...

    @main.command()
    @click.argument("out")
    @click.option("--seed", type=int)
    @click.option("--resume/--overwrite")
    def merge(out: str, seed: int, resume: bool) -> None: ...

    page = tmp_path / "page.md"
    page.write_text("```console\n$ A=1 raymerge merge out \\\n  --sed 3\nraymerge printed this\n```\n")
    assert list(_commands(page)) == [["raymerge", "merge", "out", "--sed", "3"]]
    assert _fault(["merge", "out", "--sed", "3"], main) == "merge has no flag '--sed'"
    assert _fault(["merg", "out"], main) == "no command 'merg'; known: merge"
    assert _fault(["merge", "out", "--seed=-3", "--overwrite"], main) is None
    assert _fault(["--help"], main) is None
    assert _fault(["merge", "--seed", "3", "--", "merge", "--sed"], main) == "merge has no flag '--sed'"
