"""raymerge submit: run a command on a cluster as a job."""

from __future__ import annotations

import contextlib
import getpass
import importlib.metadata
import io
import os
import shlex
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from raymerge.cli.main import main, print_json
from raymerge.merge_actors.errors import RecipeError

if TYPE_CHECKING:
    from raymerge.cluster.job_bundle import JobBundle
    from raymerge.cluster.jobs import Jobs

#: Commands that work on a cluster; the others look at files or at jobs.
_NOT_AS_A_JOB = {"submit", "jobs", "status", "report"}
#: Set on the nodes as they are set here: they change what is fetched, not who may.
_PASSED_ON = (
    *("HF_HUB_OFFLINE", "HF_ENDPOINT", "HF_DATASETS_OFFLINE"),
    *("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION"),
)
#: Not installed for a job: they belong to the nodes, and to each other.
_OF_THE_NODES = {"ray", "torch"}


@click.command(
    "submit",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    epilog="Example: raymerge submit --address http://127.0.0.1:8265 -- merge ties.yaml /shared/merged",
)
@click.option(
    "--address", help="Of the job server [default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, this machine]."
)
@click.option("--name", help="Beginning of the job's name [default: from the command and its recipe].")
@click.option("--no-wait", is_flag=True, help="Print the job's name and return; do not follow it.")
@click.option("--num-gpus", type=int, help="Run on so many GPUs: --workers N --device cuda for the command.")
@click.option("--no-check", is_flag=True, help="Do not plan here first: the inputs are only visible there.")
@click.option("--installed", is_flag=True, help="Use the raymerge of the nodes; do not send this one along.")
@click.option("--install-dependencies", is_flag=True, help="Install what raymerge needs but Ray and torch.")
@click.option(
    "--env", "environment", multiple=True, metavar="NAME=VALUE", help="Set on the nodes; not for secrets."
)
@click.option("--json", "as_json", is_flag=True, help="Print the job as one JSON document; with --no-wait.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.pass_context
def submit_command(
    context: click.Context,
    command: tuple[str, ...],
    address: str | None,
    name: str | None,
    no_wait: bool,
    num_gpus: int | None,
    no_check: bool,
    installed: bool,
    install_dependencies: bool,
    environment: tuple[str, ...],
    as_json: bool,
) -> None:
    """Run `raymerge COMMAND ...` on a cluster, and follow it.

    The command is checked and planned here first. Recipes travel with the job; other paths must be visible to the
    cluster. The same command is the same job: submitted twice, the second one follows the first. Ctrl-C leaves
    the job running.
    """
    from raymerge.cluster.job_bundle import JobBundle
    from raymerge.cluster.jobs import Jobs, check_no_secret

    variables = {name: os.environ[name] for name in _PASSED_ON if name in os.environ} | _parse_environment(
        environment
    )
    check_no_secret(variables)
    files: dict[str, str] = {}
    words = _checked_words(context, list(command), num_gpus, files, plan=not no_check)
    check_no_secret({}, [*words, *files.values()])
    bundle = JobBundle(command=words, files=files)
    jobs = Jobs(address)
    identity = bundle.submission_id(name)
    earlier = jobs.find(identity)
    if earlier is not None and (earlier.state == "SUCCEEDED" or not earlier.is_ended):
        click.echo(f"job {identity} was submitted before and is {earlier.state}; following it", err=True)
    else:
        pip = _dependencies() if install_dependencies else None
        if not _send(jobs, identity, bundle, variables, installed=installed, pip=pip):
            click.echo(f"job {identity} was submitted by somebody else just now; following it", err=True)
    if as_json and no_wait:
        print_json({"job": identity, "address": jobs.address, "command": words})
    elif no_wait:
        click.echo(identity)
    else:
        click.echo(f"job {identity} at {jobs.address}", err=True)
        follow(jobs.address, identity)


def _send(
    jobs: Jobs,
    identity: str,
    bundle: JobBundle,
    variables: dict[str, str],
    *,
    installed: bool,
    pip: list[str] | None,
) -> bool:
    """Send a job with its files; return whether it is ours, and not somebody else's of just now."""
    # exec: the cluster signals the process it started; a shell in between would die alone and leave ours running.
    entry = "exec raymerge" if installed else "exec python -m raymerge"
    metadata = {
        "user": _user(),
        "raymerge": importlib.metadata.version("raymerge"),
        "command": bundle.command[0],
    }
    with tempfile.TemporaryDirectory(prefix="raymerge-job-") as folder:
        bundle.write(folder, with_package=not installed)
        return jobs.submit(
            identity,
            f"{entry} {shlex.join(bundle.command)}",
            folder,
            environment=variables,
            metadata=metadata,
            pip=pip,
        )


def follow(address: str | None, identity: str) -> None:
    """Print a job's log until it ends, and exit as it did; Ctrl-C leaves it running."""
    from raymerge.cluster.jobs import Jobs

    try:
        status = Jobs(address).follow(identity, lambda text: click.echo(text, nl=False))
    except KeyboardInterrupt:
        click.echo(
            f"\nleft job {identity} running; follow it again with: raymerge jobs logs --follow {identity}; "
            f"stop it with: raymerge jobs stop {identity}",
            err=True,
        )
        raise SystemExit(130) from None
    if status.state != "SUCCEEDED":
        click.echo(f"job {identity} {status.state.lower()}: {status.message}", err=True)
    raise SystemExit(exit_code(status.state, status.exit_code))


def exit_code(state: str, of_command: int | None) -> int:
    """Return the exit code of a command that waits for a job."""
    if state == "SUCCEEDED":
        return 0
    return of_command if of_command is not None and of_command > 0 else 1


def _checked_words(
    context: click.Context, command: list[str], num_gpus: int | None, files: dict[str, str], *, plan: bool
) -> list[str]:
    """Check a command as if it ran here, plan it if it can be, and return it with its paths absolute."""
    from raymerge.cluster.job_bundle import bundle_words

    name, *arguments = command
    assert isinstance(main, click.Group)
    found = main.get_command(context, name)
    if found is None or name in _NOT_AS_A_JOB:
        known = ", ".join(sorted(set(main.list_commands(context)) - _NOT_AS_A_JOB))
        raise click.UsageError(f"{name!r} is no command that runs on a cluster; those are {known}")
    options = {option for parameter in found.params for option in parameter.opts}
    if num_gpus is not None and "--workers" in options:
        arguments += ["--workers", str(num_gpus), "--device", "cuda"]
    with found.make_context(name, list(arguments), parent=context.parent) as checked:
        if checked.params.get("in_process") or checked.params.get("address"):
            raise RecipeError("submit says where the command runs: leave --address and --in-process away")
        words = list(_words(checked))
    if plan and "--dry-run" in options and "--dry-run" not in arguments:
        with found.make_context(name, [*arguments, "--dry-run"], parent=context.parent) as dry:
            # The job will say all of it again; only an error counts here.
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                found.invoke(dry)
    return [name, *bundle_words(words, files=files)]


def _words(checked: click.Context) -> Iterator[tuple[str, bool]]:
    """Yield the words of a parsed command in a normal order, each with whether it must be a path."""
    for parameter in checked.command.params:
        assert parameter.name is not None
        value = checked.params.get(parameter.name)
        if checked.get_parameter_source(parameter.name) in (ParameterSource.DEFAULT, None) or value is None:
            continue
        is_path = isinstance(parameter.type, click.Path)
        values = value if isinstance(value, tuple) else (value,)
        for one in values:
            if isinstance(parameter, click.Argument):
                yield str(one), is_path
            elif isinstance(one, bool):
                flags = parameter.opts if one else parameter.secondary_opts
                if flags:
                    yield flags[0], False
            else:
                yield parameter.opts[0], False
                yield str(one), is_path


def _parse_environment(pairs: tuple[str, ...]) -> dict[str, str]:
    variables = {}
    for pair in pairs:
        name, is_pair, value = pair.partition("=")
        if not is_pair or not name:
            raise click.UsageError(f"--env is {pair!r}; it must be NAME=VALUE")
        variables[name] = value
    return variables


def _dependencies() -> list[str]:
    """Return what raymerge needs, as installed here, without what belongs to the nodes."""
    from packaging.requirements import Requirement

    found = []
    for line in importlib.metadata.requires("raymerge") or []:
        requirement = Requirement(line)
        if requirement.name not in _OF_THE_NODES and (
            not requirement.marker or requirement.marker.evaluate({"extra": ""})
        ):
            found.append(f"{requirement.name}=={importlib.metadata.version(requirement.name)}")
    return found


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user has no name
        return str(os.getuid())
