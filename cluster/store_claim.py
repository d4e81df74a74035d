"""Note beside an output in a store which folders a run is about to change, before it touches them.

A store renames nothing, so a run that replaces an output first removes it, its manifest before its weights. Killed
then, it leaves weights without anything that says whose they are. The claim says it, to the next run on any machine.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from raymerge.merge_actors.storage.folders import exists, read_bytes
from raymerge.merge_actors.storage.objects import delete_objects, write_object

CLAIM_NAME = "begun.json"


def write_claim(run_folder: str, folders: Iterable[str]) -> None:
    """Note that what lies in some folders is raymerge's from here on, whole or not.

    Raises:
        OutputError: the store refuses, or keeps failing.
    """
    write_object(f"{run_folder}/{CLAIM_NAME}", json.dumps({"folders": sorted(folders)}).encode())


def read_claim(run_folder: str) -> set[str]:
    """Return the folders that an unfinished run has noted."""
    uri = f"{run_folder}/{CLAIM_NAME}"
    return set(json.loads(read_bytes(uri))["folders"]) if exists(uri) else set()


def withdraw_claim(run_folder: str) -> None:
    """Remove the note: what it names is whole.

    Raises:
        OutputError: the store refuses, or keeps failing.
    """
    delete_objects([f"{run_folder}/{CLAIM_NAME}"])
