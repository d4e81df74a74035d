"""raymerge submit: run a command on a cluster as a job."""

from __future__ import annotations

import contextlib
import getpass
import importlib.metadata
import io
import os
import shlex
import tempfile
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

from raymerge.cli.main import main, print_json
from raymerge.cli.submit_check import check_without_running
from raymerge.merge_actors.actor_log import JOB_VARIABLE
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
    context_settings={"allow_interspersed_args": False},
    epilog="Example: raymerge submit --address http://127.0.0.1:8265 -- merge ties.yaml /shared/merged",
)
@click.option(
    "--address", help="Of the job server [default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, this machine]."
)
@click.option("--name", help="Beginning of the job's name [default: from the command and its recipe].")
@click.option("--no-wait", is_flag=True, help="Print the job's name and return; do not follow it.")
@click.option(
    "--num-gpus",
    type=click.IntRange(min=1),
    help="Run on so many GPUs: --workers N --device cuda for the command. A command without workers (evaluate) "
    "is placed where so many are.",
)
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
    if as_json and not no_wait:
        raise click.UsageError("--json prints the job; it needs --no-wait, which does not print its log")
    files: dict[str, str] = {}
    words, own_gpus = _checked_words(context, list(command), num_gpus, files, plan=not no_check)
    check_no_secret({}, [*words, *files.values(), name or ""])
    way = "installed" if installed else "with dependencies" if install_dependencies else "staged"
    bundle = JobBundle(command=words, files=files, num_gpus=own_gpus, environment=variables, way=way)
    jobs = Jobs(address)
    identity = bundle.submission_id(name)
    earlier = jobs.find(identity)
    if earlier is not None and (earlier.state == "SUCCEEDED" or not earlier.is_ended):
        again = "; to run it once more give it another --name" if earlier.is_ended else ""
        click.echo(
            f"job {identity} was submitted before and is {earlier.state}; this is its log{again}", err=True
        )
    else:
        pip = _dependencies() if install_dependencies else None
        try:
            is_ours = _send(jobs, identity, bundle, variables, installed=installed, pip=pip)
        except KeyboardInterrupt:
            click.echo(
                f"\ninterrupted while job {identity} was sent; whether it runs says: raymerge jobs status {identity}",
                err=True,
            )
            raise SystemExit(130) from None
        if not is_ours:
            click.echo(f"job {identity} was submitted by somebody else just now; following it", err=True)
    if as_json:
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
            environment={**variables, JOB_VARIABLE: identity},
            metadata=metadata,
            pip=pip,
            num_gpus=bundle.num_gpus,
        )


def follow(address: str | None, identity: str) -> None:
    """Print a job's log until it ends, and exit as it did; Ctrl-C leaves it running."""
    from raymerge.cluster.jobs import Jobs

    try:
        status = Jobs(address).follow(
            identity, lambda text: click.echo(text, nl=False), lambda line: click.echo(line, err=True)
        )
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
) -> tuple[list[str], int]:
    """Check a command as if it ran here, plan it if it can be.

    Returns:
        the command with its paths absolute, and the GPUs that it needs for itself.
    """
    from raymerge.cluster.job_bundle import bundle_words

    name, *arguments = command
    assert isinstance(main, click.Group)
    found = main.get_command(context, name)
    if found is None or name in _NOT_AS_A_JOB:
        known = ", ".join(sorted(set(main.list_commands(context)) - _NOT_AS_A_JOB))
        raise click.UsageError(f"{name!r} is no command that runs on a cluster; those are {known}")
    with found.make_context(name, list(arguments), parent=context.parent) as checked:
        given, parameters = _given(checked, arguments), dict(checked.params)
    if given.get("in_process") or given.get("address"):
        raise RecipeError("submit says where the command runs: leave --address and --in-process away")
    own_gpus = 0
    if num_gpus is not None:
        own_gpus = _put_on_gpus(found, given, num_gpus)
    if plan:
        check_without_running(name, parameters)
    if plan and "dry_run" in parameters and not given.get("dry_run"):
        words = [word for word, _ in _words(found, {**given, "dry_run": True})]
        with found.make_context(name, words, parent=context.parent) as dry:
            # The job will say all of it again; only an error counts here.
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                found.invoke(dry)
    return [name, *bundle_words(_words(found, given), files=files)], own_gpus


def _given(checked: click.Context, arguments: list[str]) -> dict[str, Any]:
    """Return what was typed by parameter, as it was typed: what a type makes of it need not be a word again."""
    inner = click.Context(checked.command, info_name=checked.info_name, parent=checked.parent)
    typed, _, _ = checked.command.make_parser(inner).parse_args(list(arguments))
    return {name: value for name, value in typed.items() if isinstance(value, (str, bool, list, tuple))}


def _put_on_gpus(found: click.Command, given: dict[str, Any], num_gpus: int) -> int:
    """Add what --num-gpus means for a command; return the GPUs that it needs for itself, having no workers."""
    names = {parameter.name for parameter in found.params}
    if "device" not in names:
        raise click.UsageError(f"--num-gpus {num_gpus}: {found.name} runs on no GPU")
    if twice := sorted({"device", "workers"} & given.keys()):
        raise click.UsageError(
            f"--num-gpus {num_gpus} says how many workers there are, and that they run on GPUs: leave "
            f"{' and '.join('--' + name for name in twice)} away"
        )
    given["device"] = "cuda"
    if "workers" not in names:
        return num_gpus
    given["workers"] = str(num_gpus)
    return 0


def _words(command: click.Command, given: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    """Yield the words of a command in a normal order, each with whether it must be a path."""
    for parameter in command.params:
        assert parameter.name is not None
        is_path = isinstance(parameter.type, click.Path)
        value = given.get(parameter.name)
        for one in value if isinstance(value, (list, tuple)) else () if value is None else (value,):
            if isinstance(parameter, click.Argument):
                yield (f"./{one}" if one.startswith("-") else one), is_path  # else it reads as an option
            elif isinstance(one, bool):
                flags = parameter.opts if one else parameter.secondary_opts
                yield flags[0], False
            else:
                yield parameter.opts[0], False
                yield one, is_path


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
