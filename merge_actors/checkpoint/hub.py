"""Turn a model's path into a folder: as it stands, a URI, or downloaded from the Hugging Face Hub.

Called once per node. A lock per model and revision keeps the processes of a node from
downloading the same files at the same time; the Hub's own cache makes the second call cheap.
"""

from __future__ import annotations

import difflib
import glob
import os
import re

import filelock
import xxhash

from raymerge.merge_actors.checkpoint.pickles import cache_folder
from raymerge.merge_actors.errors import CheckpointError
from raymerge.merge_actors.storage.folders import entries
from raymerge.merge_actors.storage.mirror import SMALL_FILES, mirrored
from raymerge.merge_actors.storage.uris import absolute, is_remote
from raymerge.merge_actors.wording import some_of

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")
_WEIGHTS = ["*.safetensors"]
_PICKLES = ["pytorch_model*.bin", "adapter_model.bin"]
#: Weights in sub-folders and `consolidated` files are second copies in other layouts.
_SECOND_COPIES = ["*/*.safetensors", "*/*.bin", "consolidated*.safetensors"]


def locate(
    path: str, revision: str | None = None, *, weights: bool = True, allow_pickle: bool = False
) -> str:
    """Return the folder of a model.

    Args:
        path: a local folder, which wins, a URI, or a Hub id like `org/name`.
        revision: branch, tag or commit on the Hub; None for its default branch.
        weights: download the weights too; without them config and tokenizer are.
        allow_pickle: download PyTorch `.bin` files where there are no safetensors.

    Returns:
        An absolute path, or a URI in its normal form.

    Raises:
        CheckpointError: there is no such folder, or the Hub does not give it.
    """
    if is_remote(path):
        uri = _remote(path, revision)
        return uri if weights else mirrored(uri, entries(uri))
    local = absolute(path)
    if os.path.exists(local):
        if revision is not None:
            raise CheckpointError(
                f"model {path!r} is the local path {local}, which has no revision {revision!r}; "
                "remove the revision, or rename the local folder to mean the Hub's model."
            )
        return local
    if not _HUB_ID.fullmatch(path):
        raise CheckpointError(f"model {path!r} does not exist{_near_by(local)}.")
    key = xxhash.xxh3_64_hexdigest(f"{path}@{revision}".encode())
    lock = os.path.join(cache_folder(), "hub", key + ".lock")
    os.makedirs(os.path.dirname(lock), exist_ok=True)
    with filelock.FileLock(lock):
        if not weights:
            return _download(path, revision, [*SMALL_FILES])
        folder = _download(path, revision, [*SMALL_FILES, *_WEIGHTS])
        if glob.glob(os.path.join(glob.escape(folder), "*.safetensors")):
            return folder
        if not allow_pickle:
            raise CheckpointError(
                f"the Hub's model {_named(path, revision)} has no safetensors files in its root folder; "
                "if its PyTorch pickles are to be trusted, pass --allow-pickle to convert them."
            )
        return _download(path, revision, [*SMALL_FILES, *_PICKLES])


def _remote(uri: str, revision: str | None) -> str:
    if revision is None:
        return absolute(uri)
    if not uri.startswith("hf://"):
        raise CheckpointError(
            f"model {uri!r} has the revision {revision!r}, which only the Hub has; remove it, or name the folder of "
            "that revision"
        )
    parts = uri.removeprefix("hf://").strip("/").split("/")
    return absolute("hf://" + "/".join(["/".join(parts[:2]) + f"@{revision}", *parts[2:]]))


def _download(path: str, revision: str | None, patterns: list[str]) -> str:
    """Let huggingface_hub bring a snapshot into its cache, and explain why it could not."""
    import huggingface_hub
    from huggingface_hub import constants, errors

    named = _named(path, revision)
    near_by = _near_by(os.path.abspath(path))
    try:
        folder: str = huggingface_hub.snapshot_download(
            path, revision=revision, allow_patterns=patterns, ignore_patterns=_SECOND_COPIES
        )
        return os.path.abspath(folder)
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"the Hub's model {named} is gated; accept its terms on its page and log in with `hf auth login`."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(
            f"the Hub's model {path!r} has no revision {revision!r}; give a branch, tag or commit of it."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"model {path!r} is neither a local folder nor a model on the Hub that you may read{near_by}; "
            "if it is private, log in with `hf auth login`."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub cannot be reached"
        raise CheckpointError(
            f"model {named} is neither a local folder{near_by} nor in the Hub's cache "
            f"({constants.HF_HUB_CACHE}), and {reason}: download it on another machine or mend the path."
        ) from error
    except (errors.HTTPError, errors.HFValidationError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"cannot download model {named} from the Hub: {reason}; try again, or give a local folder."
        ) from error


def _named(path: str, revision: str | None) -> str:
    return repr(path if revision is None else f"{path}@{revision}")


def _near_by(local: str) -> str:
    """Say which folders stand where the absent one was looked for, the likely ones first."""
    parent = os.path.dirname(local)
    while not os.path.isdir(parent):
        local, parent = parent, os.path.dirname(parent)
    folders = sorted(entry.name for entry in os.scandir(parent) if entry.is_dir() and entry.name[0] != ".")
    wanted = os.path.basename(local)
    if close := difflib.get_close_matches(wanted, folders, n=1, cutoff=0.7):
        return f" (did you mean {os.path.join(parent, close[0])}?)"
    if not folders:
        return f" ({parent} has no folders)"
    return f" ({parent} has the folders {some_of(folders, 5)})"
