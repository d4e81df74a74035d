"""The shipped cluster file is one that Ray takes, and says what the documentation says."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def config() -> dict:
    return yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())


def test_ray_accepts_the_file(config):
    import jsonschema
    import ray.autoscaler
    from ray.autoscaler._private.util import prepare_config, validate_config

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    validate_config(prepare_config(copy.deepcopy(config)))


def test_a_misspelt_key_is_refused(config):
    import jsonschema
    import ray.autoscaler

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        jsonschema.validate({**config, "max_worker": 3}, schema)


def test_the_start_commands_are_safe_and_complete(config):
    head = " ".join(config["head_start_ray_commands"])
    worker = " ".join(config["worker_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in head
    assert "--autoscaling-config=" in head
    assert "$RAY_HEAD_IP" in worker
    for commands in (head, worker):
        assert "RAY_AUTH_MODE=token" in commands
        assert "ulimit -n 65536" in commands


def test_the_pins_are_the_projects(config):
    import re

    setup = " ".join(config["setup_commands"])
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)
    assert version and f"raymerge=={version[1]}" in setup
    pins = "\n".join(path.read_text() for path in (ROOT / "requirements").glob("*.txt"))
    ray_pin = re.search(r"^ray(?:\[default\])?==(\S+)", pins, re.M)
    assert ray_pin and f"ray[default]=={ray_pin[1]}" in setup
