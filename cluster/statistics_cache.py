"""Statistics that a recipe asks for by naming data: measured once, then found again.

The name of an entry is a hash of what determines its values: the model's files, its tokenizer, the rows,
and the settings. How many workers there were, or where the data lie, does not matter.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import xxhash

from raymerge.cluster.model_ref import ModelRef, parse_model, place_of
from raymerge.cluster.statistics import collect_statistics
from raymerge.cluster.statistics_options import StatisticsOptions, StatisticsProgress
from raymerge.merge_actors.checkpoint.adapted import open_model
from raymerge.merge_actors.checkpoint.folder import Checkpoint
from raymerge.merge_actors.checkpoint.pickles import cache_folder
from raymerge.stats.data_rows import DataSpec
from raymerge.stats.image_data import inputs_fingerprint, open_data
from raymerge.stats.own_code import code_digest, may_run
from raymerge.stats.statistics_file import FORMAT_VERSION, MANIFEST

#: A plan tokenises about so many rows.
_ROWS_COUNTED = 2000


def find_cached(checkpoint: Checkpoint, options: StatisticsOptions) -> str | None:
    """Return the folder of a model's statistics if the cache has them.

    Args:
        checkpoint: the model.
        options: what is wanted; where it would be measured does not matter.

    Raises:
        RaymergeError: the data cannot be read, or the model has no tokenizer.
    """
    folder = _entry(checkpoint, options)
    return folder if os.path.exists(os.path.join(folder, MANIFEST)) else None


def cached_statistics(
    model: str | ModelRef,
    options: StatisticsOptions,
    *,
    on_remark: Callable[[str], None] = lambda line: None,
    on_progress: Callable[[StatisticsProgress], None] = lambda progress: None,
) -> str:
    """Return the folder of a model's statistics, measured now unless they are in the cache.

    A run that was stopped is taken up where it was; one that another process is making is waited for.

    Args:
        model: folder or Hub id, path[@revision][+adapter[@revision]].
        options: as for `collect_statistics`; `resume` and `overwrite` mean nothing here.
        on_remark: as for `collect_statistics`.
        on_progress: as for `collect_statistics`.

    Raises:
        RaymergeError: the model cannot be measured.
    """
    ref = parse_model(model) if isinstance(model, str) else model
    checkpoint = open_model(**place_of(ref), allow_pickle=options.allow_pickle)
    folder = _entry(checkpoint, options)
    os.makedirs(os.path.dirname(folder), exist_ok=True)
    with _one_at_a_time(folder + ".lock"):
        if not os.path.exists(os.path.join(folder, MANIFEST)):
            options = dataclasses.replace(options, resume=True, overwrite=False)
            collect_statistics(ref, folder, options, on_remark=on_remark, on_progress=on_progress)
    return folder


def count_tokens(
    checkpoint: Checkpoint, spec: DataSpec, *, trust_code: bool = False
) -> tuple[int, int, bool]:
    """Return rows and tokens of the data of a model, and whether the tokens are all counted.

    Of many rows a few shards are tokenised and the rest estimated.

    Args:
        checkpoint: of the model.
        spec: the data.
        trust_code: run code of the tokenizer where transformers has no class of its own.
    """
    data = open_data(spec, checkpoint.inputs_folder, checkpoint.config, trust_code=trust_code)
    num_rows = len(data.rows.texts)
    step = max(1, num_rows // _ROWS_COUNTED)
    shards = range(0, data.num_shards, step)
    examples = [example for number in shards for example in data.shard(number)]
    counted = sum(each.num_tokens for each in examples)
    return num_rows, round(counted * data.num_shards / max(1, len(shards))), step == 1


def _entry(checkpoint: Checkpoint, options: StatisticsOptions) -> str:
    return os.path.join(cache_folder(), "statistics", _key(checkpoint, options))


@contextlib.contextmanager
def _one_at_a_time(path: str) -> Iterator[None]:
    """Hold a lock file; wait for another process that makes the same entry."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _key(checkpoint: Checkpoint, options: StatisticsOptions) -> str:
    trust_code = options.trust_remote_code
    may_run(checkpoint.folder, checkpoint.config, trust_code=trust_code)
    data = open_data(options.data, checkpoint.inputs_folder, checkpoint.config, trust_code=trust_code)
    parts: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "model": checkpoint.fingerprint,
        "tokenizer": inputs_fingerprint(data, checkpoint.inputs_folder),
        "data": data.data_fingerprint(),
        "kind": options.kind,
        "estimator": options.estimator if options.kind == "fisher" else None,
    }
    if code := code_digest(checkpoint.folder, checkpoint.config):
        parts["code"] = code
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True).encode())
