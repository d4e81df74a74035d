"""Measure a model: statistics of its layers over a calibration set, by a group of activation workers."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from raymerge.cluster.connect import Placement, connected_for_statistics
from raymerge.cluster.model_ref import ModelRef, parse_model, place_of
from raymerge.cluster.own_inputs import refuse_inputs_in_output
from raymerge.cluster.remote_statistics import collect_into_store
from raymerge.cluster.run_folder import RunFolder, refuse_foreign
from raymerge.cluster.statistics_options import StatisticsOptions, StatisticsProgress
from raymerge.cluster.statistics_run import OUTPUT, StatisticsRun, journal_path
from raymerge.merge_actors.checkpoint.adapted import open_model
from raymerge.merge_actors.errors import OutputError
from raymerge.merge_actors.storage.uris import is_remote, without_file_scheme
from raymerge.stats.measure_job import MeasureJob
from raymerge.stats.own_code import code_remark
from raymerge.stats.statistics_file import MANIFEST, Statistics, open_statistics, write_json


@dataclass(kw_only=True, slots=True)
class StatisticsResult:
    """What a run has made."""

    out: str
    statistics: Statistics
    seconds: float
    num_workers: int
    device: str
    num_groups: int
    num_resumed: int
    """Layer groups that an earlier run had finished."""

    def to_mapping(self) -> dict[str, Any]:
        """Return a summary as JSON values."""
        manifest, coverage = self.statistics.manifest, self.statistics.coverage
        return {
            "out": self.out,
            "kind": self.statistics.kind,
            "tokens": manifest["num_tokens"],
            "examples": manifest["num_examples"],
            "covered": len(coverage.covered),
            "expected": len(coverage.linear_maps),
            "uncovered": list(coverage.uncovered),
            "tied": list(coverage.tied),
            "seconds": round(self.seconds, 3),
            "workers": self.num_workers,
            "device": self.device,
            "groups": self.num_groups,
            "groups_resumed": self.num_resumed,
            "timing": manifest["timing"],
        }


def collect_statistics(
    model: str | ModelRef,
    out: str | os.PathLike[str],
    options: StatisticsOptions,
    *,
    on_remark: Callable[[str], None] = lambda line: None,
    on_progress: Callable[[StatisticsProgress], None] = lambda progress: None,
) -> StatisticsResult:
    """Measure a model and write its statistics to a folder.

    Args:
        model: folder or Hub id, path[@revision][+adapter[@revision]].
        out: the folder to write.
        options: what and where.
        on_remark: gets sentences for the user.
        on_progress: called about twice a second.

    Raises:
        RaymergeError: with one sentence for the user; `out` is then as it was before.
    """
    started = time.monotonic()
    place = without_file_scheme(os.fspath(out))
    if is_remote(place):
        results: list[StatisticsResult] = []

        def collect(local: str) -> None:
            results.append(
                collect_statistics(model, local, options, on_remark=on_remark, on_progress=on_progress)
            )

        uri = collect_into_store(place, collect, resume=options.resume, overwrite=options.overwrite)
        return _at(uri, results, seconds=time.monotonic() - started)
    ref = parse_model(model) if isinstance(model, str) else model
    return _collect_here(ref, RunFolder(place), options, on_remark, on_progress)


def _collect_here(
    ref: ModelRef,
    folder: RunFolder,
    options: StatisticsOptions,
    on_remark: Callable[[str], None],
    on_progress: Callable[[StatisticsProgress], None],
) -> StatisticsResult:
    """Measure a model and write its statistics to a local folder."""
    started = time.monotonic()
    checkpoint = open_model(**place_of(ref), allow_pickle=options.allow_pickle)
    refuse_inputs_in_output(folder.out, [part.path for part in (ref, ref.adapter) if part is not None])
    if options.trust_remote_code and (line := code_remark(checkpoint.folder)):
        on_remark(line)
    with folder.locked():
        _check_free(folder, options)
        with connected_for_statistics(
            address=options.address,
            in_process=options.in_process,
            workers=options.workers,
            device=options.device,
            on_remark=on_remark,
        ) as (group, placement):
            job = _job(ref, options, placement, folder.path)
            run = StatisticsRun(options, checkpoint, folder, job, group, on_remark, on_progress)
            run.prepare()
            num_resumed = len(run.journal["groups"])
            run.measure()
        _commit(run, folder)
    return StatisticsResult(
        out=folder.out,
        statistics=open_statistics(folder.out),
        seconds=time.monotonic() - started,
        num_workers=placement.num_workers,
        device=placement.device,
        num_groups=len(run.plan.groups),
        num_resumed=num_resumed,
    )


def _at(uri: str, results: list[StatisticsResult], *, seconds: float) -> StatisticsResult:
    """Return what a run has made that ended in a store; it may only have had to upload."""
    statistics = open_statistics(uri)
    if results:
        return dataclasses.replace(results[0], out=uri, statistics=statistics, seconds=seconds)
    return StatisticsResult(
        out=uri,
        statistics=statistics,
        seconds=seconds,
        num_workers=0,
        device="cpu",
        num_groups=0,
        num_resumed=0,
    )


def _job(ref: ModelRef, options: StatisticsOptions, placement: Placement, work_folder: str) -> MeasureJob:
    return MeasureJob(
        **place_of(ref),
        allow_pickle=options.allow_pickle,
        trust_remote_code=options.trust_remote_code,
        kind=options.kind,
        data=options.data,
        estimator=options.estimator,
        device=placement.device,
        threads=placement.threads_per_worker,
        work_folder=work_folder,
    )


def _commit(run: StatisticsRun, folder: RunFolder) -> None:
    """Write the manifest of a finished run, and rename its folder."""
    manifest = run.manifest()
    output = folder.output(OUTPUT)
    os.makedirs(output, exist_ok=True)
    for name in set(os.listdir(output)) - set(manifest["files"]):
        os.remove(os.path.join(output, name))  # of an attempt with more workers that was repeated
    write_json(os.path.join(output, MANIFEST), manifest)
    folder.commit([OUTPUT], is_campaign=False)
    folder.remove()


def _check_free(folder: RunFolder, options: StatisticsOptions) -> None:
    """Refuse an OUT that exists, and an unfinished run that nobody said what to do with."""
    refuse_foreign(folder.out)
    is_unfinished = os.path.exists(journal_path(folder))
    if is_unfinished and not (options.resume or options.overwrite):
        raise OutputError(
            f"an unfinished run for {folder.out} lies in {folder.path}; go on with --resume, or start anew with "
            "--overwrite."
        )
    exists = os.path.isdir(folder.out) and os.listdir(folder.out)
    if exists and not options.overwrite and not (is_unfinished and options.resume):
        raise OutputError(f"{folder.out} exists; choose another folder or replace it with --overwrite.")
