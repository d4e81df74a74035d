"""Driver and workers of one version."""

import pytest

from raymerge.merge_actors.errors import ClusterError
from raymerge.merge_actors.versions import check_versions, installed_versions


def test_this_process_agrees_with_itself():
    versions = installed_versions()
    assert set(versions) == {"python", "raymerge", "ray", "torch"}
    assert "+" not in versions["torch"]
    check_versions(versions)


@pytest.mark.parametrize("name", ["python", "raymerge", "ray", "torch"])
def test_a_version_that_differs_is_named_with_its_pair(name):
    driver = {**installed_versions(), name: "0.0.1"}
    with pytest.raises(ClusterError, match=rf"driver has {name} 0\.0\.1, node \S+ has {name} "):
        check_versions(driver)


def test_what_a_driver_lacks_is_not_compared():
    check_versions({"python": installed_versions()["python"]})
