"""Statistics whose folder lies in an object store: measured into a local folder, then uploaded.

Workers exchange hidden states and repeat layer groups in their work folder, which a store cannot be. With several
nodes that folder, under RAYMERGE_CACHE, has to be one that all of them see.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable

import xxhash

from raymerge.cluster.run_folder import check_own
from raymerge.cluster.store_claim import read_claim, withdraw_claim, write_claim
from raymerge.cluster.store_lock import StoreLock
from raymerge.merge_actors.checkpoint.pickles import cache_folder
from raymerge.merge_actors.errors import OutputError
from raymerge.merge_actors.storage.folders import entries, exists
from raymerge.merge_actors.storage.objects import delete_folder, delete_objects, upload_file
from raymerge.merge_actors.storage.uris import checked
from raymerge.stats.statistics_file import MANIFEST, open_statistics


def collect_into_store(out: str, collect: Callable[[str], object], *, resume: bool, overwrite: bool) -> str:
    """Measure into a local folder and upload that; returns the URI.

    Args:
        out: URI of the statistics folder.
        collect: measures into a local folder; takes up what is unfinished there.
        resume: go on with a run that was stopped, be it while uploading.
        overwrite: replace what is there.

    Raises:
        RaymergeError: OUT exists, another run writes it, or the store fails.
    """
    uri = checked(out)
    parent, name = os.path.split(uri)
    local = os.path.join(cache_folder(), "statistics-runs", xxhash.xxh3_64_hexdigest(uri.encode()), name)
    run_folder = f"{parent}/.{name}.raymerge"
    lock = StoreLock(run_folder, uri)
    with lock.held():
        if exists(f"{uri}/{MANIFEST}") and not overwrite:
            raise OutputError(f"{uri} exists; choose another folder or replace it with --overwrite.")
        if uri not in read_claim(run_folder):
            check_own(uri, [entry.name for entry in entries(uri)])
        os.makedirs(os.path.dirname(local), exist_ok=True)
        if overwrite:
            shutil.rmtree(local, ignore_errors=True)
        if not (resume and os.path.exists(os.path.join(local, MANIFEST))):
            collect(local)
        lock.check_held()  # measuring may have taken hours, with the store out of reach
        write_claim(run_folder, {uri})
        delete_objects([f"{uri}/{MANIFEST}"])
        delete_folder(uri)
        files = open_statistics(local).manifest["files"]
        for each in (*files, MANIFEST):
            upload_file(os.path.join(local, each), f"{uri}/{each}")
        withdraw_claim(run_folder)
        shutil.rmtree(os.path.dirname(local), ignore_errors=True)
    return uri
