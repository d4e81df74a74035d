"""The log of an actor: what it is, whose run it works for, and that it has begun.

Each actor has a file of its own under Ray's session, `ray logs actor --id ID` and the dashboard show it.
"""

from __future__ import annotations

import logging
import os
import sys

#: Ray takes the lines after one that begins so for those of the actor of that name.
_RAY_MARK = ":actor_name:"
#: The logger of all that is ours.
LOGGER = "raymerge"
#: Set by `raymerge submit` for all processes of a job.
JOB_VARIABLE = "RAYMERGE_JOB"


def begin_log(name: str) -> None:
    """Let the lines that this process logs from now on begin with a name, warnings among them.

    Args:
        name: what the actor is and of which run, such as "merge worker, run 0123456789ab". The name of a
            submitted job is added.
    """
    if job := os.environ.get(JOB_VARIABLE):
        name = f"{name}, job {job}"
    for stream in (sys.stdout, sys.stderr):
        print(f"{_RAY_MARK}{name}", file=stream, flush=True)
    escaped = name.replace("%", "%%")
    logging.basicConfig(
        format=f"{escaped}: %(asctime)s %(levelname)s %(message)s", stream=sys.stderr, force=True
    )
    logging.captureWarnings(True)
    logger = logging.getLogger(LOGGER)
    logger.setLevel(logging.INFO)
    logger.info("begins")
