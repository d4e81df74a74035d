"""What can be said of a command before it is sent to a cluster, of those that have no dry run."""

from __future__ import annotations

import os

from raymerge.cluster.model_ref import parse_model, place_of
from raymerge.merge_actors.checkpoint.adapted import open_model
from raymerge.merge_actors.errors import RecipeError
from raymerge.merge_actors.storage.uris import is_remote
from raymerge.stats.data_files import FORMATS


def check_measurement(model: str, data: str, *, allow_pickle: bool) -> None:
    """Check that a model and its data are there.

    Raises:
        RaymergeError: the model cannot be opened, or the data are a file or a folder that does not exist.
    """
    try:
        ref = parse_model(model)
    except ValueError as error:
        raise RecipeError(f"{model!r} {error}.") from error
    open_model(**place_of(ref), allow_pickle=allow_pickle)
    path = os.path.expanduser(data)
    is_path = os.path.isabs(path) or path.startswith(".") or os.path.splitext(path)[1] in FORMATS
    if is_path and not is_remote(data) and not os.path.exists(path):
        raise RecipeError(f"the data {data!r} do not exist here; give a file, a folder or a data set's name.")
