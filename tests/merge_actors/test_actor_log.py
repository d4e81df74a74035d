"""What an actor's log says of itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys

CODE = """
import logging, warnings
from raymerge.merge_actors.actor_log import begin_log
begin_log("merge worker, run 5%d")
logging.getLogger("some.library").warning("100 % of it")
logging.getLogger("some.library").info("not worth a line")
warnings.warn("old")
begin_log("merge worker, run 2")
"""


def test_every_line_begins_with_the_run_and_the_job_and_ray_is_told():
    environment = {**os.environ, "RAYMERGE_JOB": "ties-01"}
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True
    )
    marks = [":actor_name:merge worker, run 5%d, job ties-01", ":actor_name:merge worker, run 2, job ties-01"]
    assert done.stdout.splitlines() == marks
    lines = [line for line in done.stderr.splitlines() if not line.startswith("  warnings.warn(")]
    assert [line for line in lines if line.startswith(":")] == marks
    first, second, third, fourth = (line for line in lines if line and not line.startswith(":"))
    time = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+"
    assert re.fullmatch(rf"merge worker, run 5%d, job ties-01: {time} INFO begins", first)
    assert re.fullmatch(rf"merge worker, run 5%d, job ties-01: {time} WARNING 100 % of it", second)
    assert re.match(rf"merge worker, run 5%d, job ties-01: {time} WARNING .*UserWarning: old", third)
    assert re.fullmatch(rf"merge worker, run 2, job ties-01: {time} INFO begins", fourth)
