"""Statistics that a recipe asks for by naming data: measured once, then found again.

The name of an entry is a hash of what determines its values: the model's files, its tokenizer, the rows,
and the settings. How many workers there were, or where the data lie, does not matter.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable

import xxhash

from raymerge.cluster.model_ref import parse_model
from raymerge.cluster.statistics import collect_statistics
from raymerge.cluster.statistics_options import StatisticsOptions, StatisticsProgress
from raymerge.merge_actors.checkpoint.folder import open_checkpoint
from raymerge.merge_actors.checkpoint.hub import locate
from raymerge.merge_actors.checkpoint.pickles import cache_folder
from raymerge.stats.calibration_data import CalibrationData, tokenizer_fingerprint
from raymerge.stats.statistics_file import FORMAT_VERSION, MANIFEST


def cached_statistics(
    model: str,
    options: StatisticsOptions,
    *,
    on_remark: Callable[[str], None] = lambda line: None,
    on_progress: Callable[[StatisticsProgress], None] = lambda progress: None,
) -> str:
    """Return the folder of a model's statistics, measured now unless they are in the cache.

    A run that was stopped is taken up where it was.

    Args:
        model: folder or Hub id, path[@revision].
        options: as for `collect_statistics`; `resume` and `overwrite` mean nothing here.
        on_remark: as for `collect_statistics`.
        on_progress: as for `collect_statistics`.

    Raises:
        RaymergeError: the model cannot be measured.
    """
    folder = os.path.join(cache_folder(), "statistics", _key(model, options))
    if not os.path.exists(os.path.join(folder, MANIFEST)):
        os.makedirs(os.path.dirname(folder), exist_ok=True)
        options = dataclasses.replace(options, resume=True, overwrite=False)
        collect_statistics(model, folder, options, on_remark=on_remark, on_progress=on_progress)
    return folder


def _key(model: str, options: StatisticsOptions) -> str:
    ref = parse_model(model)
    checkpoint = open_checkpoint(
        locate(ref.path, ref.revision, allow_pickle=options.allow_pickle), allow_pickle=options.allow_pickle
    )
    data = CalibrationData(options.data, checkpoint.folder, checkpoint.config)
    parts = {
        "format": FORMAT_VERSION,
        "model": checkpoint.fingerprint,
        "tokenizer": tokenizer_fingerprint(checkpoint.folder),
        "data": data.data_fingerprint(),
        "kind": options.kind,
        "estimator": options.estimator if options.kind == "fisher" else None,
    }
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True).encode())
