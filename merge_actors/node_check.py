"""Check that a node sees what a run reads and writes, before it is given a task."""

from __future__ import annotations

import os

from raymerge.merge_actors.checkpoint.hub import locate
from raymerge.merge_actors.errors import CheckpointError, ClusterError, OutputError
from raymerge.merge_actors.files import Files
from raymerge.merge_actors.storage.folders import entries, exists
from raymerge.merge_actors.storage.objects import delete_objects
from raymerge.merge_actors.storage.retry import with_retries
from raymerge.merge_actors.storage.store import store_of
from raymerge.merge_actors.storage.uris import is_remote
from raymerge.merge_actors.task import RunContext

#: Beginning of the name of what a node writes to see whether it may.
_MARK = "node-"


def check_node(context: RunContext, files: Files) -> str:
    """Check that this node sees every path and bucket of the run; return the node's host name.

    Models from the Hub that are not where the driver has them are fetched, once per node.

    Raises:
        ClusterError: a path is missing here, or a store refuses this node.
        CheckpointError: the Hub does not give a model to this node.
    """
    host = os.uname().nodename
    for model in context.hub_models:
        if not os.path.exists(model.folder):
            files.move(model.folder, os.path.realpath(locate(model.path, model.revision)))
    for path in context.visible_paths:
        if is_remote(path):
            _check_reachable(host, path)
        elif not os.path.exists(path):
            raise ClusterError(
                f"node {host} does not see {path}; inputs and output must lie on a file system "
                "that every node mounts at the same path, or in an object store"
            )
    for uri in context.writable_folders:
        _check_writable(host, uri)
    return host


def _check_reachable(host: str, uri: str) -> None:
    try:
        is_there = exists(uri)
    except CheckpointError as error:
        raise ClusterError(f"node {host} does not reach {uri}: {error}") from error
    if not is_there:
        raise ClusterError(
            f"node {host} does not see {uri}; check the endpoint and the credentials of that node's environment"
        )


def _check_writable(host: str, folder: str) -> None:
    """Write a small object: a node may be allowed to read a bucket and not to write it.

    The run takes it away with its folder. A worker that comes late may write it when that is done, and finds nothing
    there of a run that goes on.
    """
    uri = f"{folder}/{_MARK}{host}"
    try:
        with_retries(
            lambda: store_of(uri).write(uri, [host.encode()], blocks_in_flight=1), f"write {uri}", OutputError
        )
    except OutputError as error:
        raise ClusterError(f"node {host} cannot write under {folder}: {error}") from error
    if all(entry.name.startswith(_MARK) for entry in entries(folder)):
        delete_objects([uri])
