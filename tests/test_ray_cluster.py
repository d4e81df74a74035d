"""The shipped cluster files are ones that Ray takes, and say what the documentation says."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
FILES = ["ray_cluster.yaml", *(f"deploy/{name}.yaml" for name in ("on_premise", "gcp", "azure"))]
KUBERNETES = ["deploy/kuberay/raycluster.yaml", "deploy/kuberay/rayjob.yaml"]


def _load(name: str) -> dict:
    return yaml.safe_load((ROOT / name).read_text())


def _pins() -> str:
    return (ROOT / "requirements" / "constraints.txt").read_text()


def _ray_pin() -> str:
    found = re.search(r"^ray==(\S+)", _pins(), re.M)
    assert found
    return found[1]


@pytest.fixture(scope="module")
def schema() -> dict:
    import ray.autoscaler

    return json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())


@pytest.mark.parametrize("name", FILES)
def test_ray_accepts_the_file(name, schema):
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = _load(name)
    jsonschema.validate(config, schema)
    validate_config(prepare_config(copy.deepcopy(config)))


def test_a_misspelt_key_is_refused(schema):
    import jsonschema

    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        jsonschema.validate({**_load(FILES[0]), "max_worker": 3}, schema)


@pytest.mark.parametrize("name", FILES)
def test_the_start_commands_are_safe_and_complete(name):
    config = _load(name)
    head = " ".join(config["head_start_ray_commands"])
    worker = " ".join(config["worker_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in head
    assert "--num-cpus=0" in head
    assert "--autoscaling-config=" in head
    assert _health_checks(head) == {
        "period_ms": "1000",
        "timeout_ms": "3000",
    }  # what test_faults.py loses a node with
    assert "$RAY_HEAD_IP" in worker
    options = " ".join(config.get("docker", {}).get("run_options", []))
    for commands in (head, worker):
        assert "RAY_AUTH_MODE=token" in commands + options
        assert "ulimit -n 65536" in commands


def _health_checks(text: str) -> dict:
    return dict(re.findall(r"RAY_health_check_(\w+)=(\d+)", text))


@pytest.mark.parametrize("name", FILES)
def test_the_nodes_get_this_clone_at_its_pins_and_the_token(name):
    config = _load(name)
    mounts = config["file_mounts"]
    assert "~/.ray/auth_token" in mounts.values()
    source = next(there for there, here in mounts.items() if here == ".")
    setup = " ".join(config["setup_commands"])
    if (
        "docker" in config
    ):  # installed from a copy: pip leaves `build` behind, and the files are the host user's
        assert f"rm -rf /tmp/raymerge-source && cp -r {source} /tmp/raymerge-source" in setup
        assert "sudo chown $(id -u):$(id -g) /home/ray/.ray /home/ray/.ray/auth_token && chmod 600" in setup
        source = "/tmp/raymerge-source"
    assert f"-c {source}/requirements/constraints.txt {source}" in setup
    assert "chmod 600" in setup
    assert (ROOT / "requirements" / "constraints.txt").exists()


@pytest.mark.parametrize("name", [name for name in FILES if "on_premise" not in name])
def test_clouds_scale_gpu_workers_beside_a_head_that_does_no_work(name):
    config = _load(name)
    assert config["available_node_types"]["head"]["resources"] == {"CPU": 0}
    gpu = config["available_node_types"]["gpu"]
    assert gpu["resources"]["GPU"] >= 1
    assert gpu["min_workers"] < gpu["max_workers"] <= config["max_workers"]
    options = " ".join(config["docker"]["run_options"])
    assert "--shm-size=" in options and "nofile=65536" in options
    for image in (config["docker"]["head_image"], config["docker"]["worker_image"]):
        assert f":{_ray_pin()}-" in image


def test_aws_takes_the_machines_as_they_are_described():
    """Ray's own default image is of 2022: its driver does not run today's torch."""
    text, config = (ROOT / FILES[0]).read_text(), _load(FILES[0])
    for node_type in config["available_node_types"].values():
        node = node_type["node_config"]
        assert f"ImageId: {node['ImageId']}        # EDIT" in text
        for volume in (each["Ebs"] for each in node["BlockDeviceMappings"]):
            assert volume["VolumeType"] == "gp3"
            # EC2 refuses more than 0.25 MiB/s for each operation a second, of which 3000 come unasked.
            assert volume.get("Throughput", 125) <= 0.25 * volume.get("Iops", 3000)


def test_google_takes_the_machines_as_they_are_described():
    """A G2 machine takes no standard disk, which is the default; the driver may only come with the first start."""
    config = _load("deploy/gcp.yaml")
    node = config["available_node_types"]["gpu"]["node_config"]
    parameters = node["disks"][0]["initializeParams"]
    zone = config["provider"]["availability_zone"]
    assert node["machineType"].startswith("g2-")
    assert parameters["diskType"] == f"zones/{zone}/diskTypes/pd-balanced"
    assert {"key": "install-nvidia-driver", "value": "True"} in node["metadata"]["items"]
    (wait,) = config["initialization_commands"]
    assert wait.startswith("if lspci | grep -qi nvidia; then timeout")


@pytest.mark.parametrize("name", [FILES[0], "deploy/gcp.yaml", "deploy/azure.yaml", KUBERNETES[0]])
def test_the_example_asks_for_gpus_where_none_is_up_yet(name):
    """Without, a merge takes what there is: CPUs, on the first GPU machine that comes."""
    (example,) = [line for line in (ROOT / name).read_text().splitlines() if "raymerge submit" in line]
    assert "--num-gpus" in example


@pytest.mark.parametrize("name", KUBERNETES)
def test_the_kubernetes_files_have_the_operators_shape(name):
    document = _load(name)
    assert document["apiVersion"] == "ray.io/v1"
    cluster = document["spec"] if document["kind"] == "RayCluster" else document["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == _ray_pin()
    assert cluster["authOptions"] == {"mode": "token"}
    start = cluster["headGroupSpec"]["rayStartParams"]
    assert start["num-cpus"] == "0"
    # The operator asks the dashboard how its job stands; else nobody outside the pod does.
    assert start.get("dashboard-host") == (None if document["kind"] == "RayJob" else "127.0.0.1")
    (head,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    settings = " ".join(f"{each['name']}={each['value']}" for each in head["env"])
    assert _health_checks(settings) == {"period_ms": "1000", "timeout_ms": "3000"}
    (group,) = cluster["workerGroupSpecs"]
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    (worker,) = group["template"]["spec"]["containers"]
    assert (
        worker["resources"]["limits"]["nvidia.com/gpu"] == worker["resources"]["requests"]["nvidia.com/gpu"]
    )
    volumes = {volume["name"]: volume for volume in group["template"]["spec"]["volumes"]}
    mounts = {mount["mountPath"]: mount["name"] for mount in worker["volumeMounts"]}
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)
    assert version and worker["image"].endswith(f":{version[1]}")


def test_the_image_has_the_pinned_ray():
    text = (ROOT / "deploy" / "Dockerfile").read_text()
    assert f"rayproject/ray:{_ray_pin()}-" in text
