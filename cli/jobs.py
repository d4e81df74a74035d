"""raymerge jobs: what was submitted to a cluster."""

from __future__ import annotations

import dataclasses
import time

import click

from raymerge.cli.main import print_json

_ADDRESS = click.option(
    "--address", help="Of the job server [default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, this machine]."
)


@click.group("jobs", epilog="Example: raymerge jobs logs --follow raymerge-merge-ties-0123456789")
def jobs_command() -> None:
    """List, follow and stop submitted jobs."""


@jobs_command.command("list")
@_ADDRESS
@click.option("--json", "as_json", is_flag=True, help="Print the jobs as one JSON document.")
def list_command(address: str | None, as_json: bool) -> None:
    """List the jobs of a cluster, the latest first."""
    from raymerge.cluster.jobs import Jobs

    found = Jobs(address).all()
    if as_json:
        print_json([dataclasses.asdict(job) for job in found])
        return
    for job in found:
        begun = time.strftime("%F %T", time.localtime(job.start_time)) if job.start_time else "-"
        click.echo(f"{job.submission_id}  {job.state:9}  {begun}  {job.command}")


@jobs_command.command("status")
@_ADDRESS
@click.argument("job")
@click.option("--json", "as_json", is_flag=True, help="Print the job as one JSON document.")
def status_command(address: str | None, job: str, as_json: bool) -> None:
    """Show one job."""
    from raymerge.cluster.jobs import Jobs

    found = Jobs(address).get(job)
    if as_json:
        print_json(dataclasses.asdict(found))
        return
    click.echo(f"{found.submission_id}: {found.state}; {found.command}")
    if found.message:
        click.echo(found.message)


@jobs_command.command("logs")
@_ADDRESS
@click.argument("job")
@click.option("--follow", "-f", is_flag=True, help="Go on until the job ends, and exit as it does.")
def logs_command(address: str | None, job: str, follow: bool) -> None:
    """Print a job's log."""
    from raymerge.cli.submit import follow as follow_job
    from raymerge.cluster.jobs import Jobs

    if follow:
        follow_job(address, job)
    click.echo(Jobs(address).logs(job), nl=False)


@jobs_command.command("stop")
@_ADDRESS
@click.argument("job")
def stop_command(address: str | None, job: str) -> None:
    """Stop a job; a merge can go on later with --resume."""
    from raymerge.cluster.jobs import Jobs

    jobs = Jobs(address)
    click.echo(f"stopping {job}" if jobs.stop(job) else f"{job} had ended: {jobs.get(job).state}")


@jobs_command.command("wait")
@_ADDRESS
@click.argument("job")
@click.option("--timeout", "timeout_seconds", type=float, help="Seconds to wait at most [default: no limit].")
def wait_command(address: str | None, job: str, timeout_seconds: float | None) -> None:
    """Wait for a job to end, and exit as it does."""
    from raymerge.cli.submit import exit_code
    from raymerge.cluster.jobs import Jobs

    status = Jobs(address).wait(job, timeout_seconds)
    click.echo(f"{status.submission_id}: {status.state}")
    raise SystemExit(exit_code(status.state, status.exit_code))
