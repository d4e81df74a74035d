"""`python -m raymerge`: the command, where its script is not on the PATH."""

from raymerge.cli.main import main

main(prog_name="raymerge")
