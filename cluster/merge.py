"""Run a campaign: plan it, drive it through the workers, commit what came out.

The one way from recipes to checkpoints; the command line and `raymerge.merge` call it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from raymerge.cluster.campaign import (
    PlannedWave,
    RecipeSource,
    is_sequential,
    plan_wave,
    read_recipes,
    waves,
)
from raymerge.cluster.campaign_failures import CampaignFailures
from raymerge.cluster.connect import Placement, connected
from raymerge.cluster.controller import Controller
from raymerge.cluster.inspect import quick_check
from raymerge.cluster.journal import Journal
from raymerge.cluster.manifest import make_manifest, versions, write_manifest
from raymerge.cluster.merge_result import MergeResult
from raymerge.cluster.opened import OpenedInputs
from raymerge.cluster.options import MergeOptions
from raymerge.cluster.output_files import write_metadata_files
from raymerge.cluster.own_inputs import refuse_inputs_in_output
from raymerge.cluster.progress import Progress, StatisticsLine
from raymerge.cluster.recipe import Recipe
from raymerge.cluster.recipe_statistics import ToMeasure, measure_missing
from raymerge.cluster.regmean_plus import RegMeanPlusRun
from raymerge.cluster.remarks import of_recipe
from raymerge.cluster.remote_run_folder import RemoteRunFolder, open_run_folder, refuse_sequential
from raymerge.cluster.run_folder import RunFolder, sync_folder, write_index
from raymerge.cluster.totals import Totals
from raymerge.cluster.trace import Trace
from raymerge.cluster.worker_group import InProcessGroup, WorkerGroup
from raymerge.merge_actors.errors import NotFiniteError, RaymergeError, RecipeError
from raymerge.merge_actors.files import write_error
from raymerge.merge_actors.storage.uris import is_remote
from raymerge.merge_actors.task import PieceReport, RunContext
from raymerge.merge_actors.versions import installed_versions

#: Gives a worker group, connected and perhaps used before, and takes it back.
Workers = AbstractContextManager[tuple[WorkerGroup, Placement]]


def merge(
    recipes: Sequence[RecipeSource],
    out: str | os.PathLike[str],
    options: MergeOptions | None = None,
    *,
    strict: bool = False,
    on_remark: Callable[[str], None] | None = None,
    show_progress: bool = False,
    workers: Workers | None = None,
) -> MergeResult:
    """Merge all recipes as one campaign.

    Args:
        recipes: recipe files, folders of them, YAML texts or mappings.
        out: the output folder; with several recipes each has a folder of its own name in it.
        options: where and how to run.
        strict: turn remarks about recipe keys and about heads into errors.
        on_remark: called with each remark as soon as it is known.
        show_progress: print progress on stderr.
        workers: gives the workers, which are started if it is None; a session has its own.

    Of several recipes, one that fails is left out, and the result says why; the others are merged.

    Raises:
        RaymergeError: with one sentence for the user; OUT is then as it was before. Of several recipes,
            all have failed, or what failed is not the fault of one.
    """
    started = time.monotonic()
    options = options or MergeOptions()
    remarks: list[str] = []

    def remark(line: str) -> None:
        remarks.append(line)
        if on_remark is not None:
            on_remark(line)

    read, said = read_recipes(recipes, options, strict=strict)
    for line in said:
        remark(line)
    folder = open_run_folder(os.fspath(out), is_campaign=len(read) > 1)
    if isinstance(folder, RemoteRunFolder):
        refuse_sequential([recipe.name for recipe in read if is_sequential(recipe)])
    workers = workers or connected(
        address=options.address,
        in_process=options.in_process,
        workers=options.workers,
        device=options.device,
        on_remark=remark,
    )
    run = _Run(folder, options, workers, remark, show_progress, strict)
    outputs = _run_to_commit(run, read)
    assert run.placement is not None
    return MergeResult(
        outputs=tuple(outputs),
        totals=run.totals,
        num_tasks=run.num_tasks,
        num_resumed=run.num_resumed,
        seconds=time.monotonic() - started,
        device=run.placement.device,
        num_workers=run.placement.num_workers,
        remarks=tuple(remarks),
        failed={name: str(error) for name, error in run.failures.errors.items()},
    )


def _run_to_commit(run: _Run, recipes: Sequence[Recipe]) -> list[str]:
    """Carry a run out while its folder is locked; returns the folders of the outputs."""
    folder, options = run.folder, run.options
    names, is_campaign = [recipe.name for recipe in recipes], len(recipes) > 1
    with folder.locked():
        folder.check_free(
            overwrite=options.overwrite, resume=options.resume, names=names, is_campaign=is_campaign
        )
        if not options.resume:
            folder.clear()
        try:
            run.carry_out(waves(recipes))
            if run.trace:
                run.trace.write()
        except RaymergeError as error:
            # A refused input leaves nothing behind; what else failed can be resumed if it got anywhere.
            if isinstance(error, NotFiniteError) or not (options.resume or run.num_finished):
                folder.abandon()
            raise
        for name in run.failures.errors:
            folder.discard(name)
        merged = [recipe.name for recipe in run.failures.left(recipes)]
        outputs = folder.commit(merged, is_campaign=is_campaign)
        folder.remove()
    return outputs


class _Run:
    """One run over all waves of a campaign, up to the commit."""

    def __init__(
        self,
        folder: RunFolder | RemoteRunFolder,
        options: MergeOptions,
        workers: Workers,
        remark: Callable[[str], None],
        show_progress: bool,
        strict: bool,
    ) -> None:
        self.strict = strict
        self.folder, self.options, self.workers = folder, options, workers
        self.remark, self.show_progress = remark, show_progress
        self.opened = OpenedInputs()
        self.trace = Trace(options.trace) if options.trace else None
        self.totals = Totals()
        self.num_tasks = self.num_resumed = self.num_finished = 0
        self.placement: Placement | None = None
        self.failures = CampaignFailures(1)

    def carry_out(self, ordered: Sequence[Sequence[Recipe]]) -> None:
        """Plan and run wave after wave on one worker group."""
        recipes = [recipe for wave in ordered for recipe in wave]
        folders = {recipe.name: self.folder.output(recipe.name) for recipe in recipes}
        self.failures = CampaignFailures(len(recipes))

        def plan(wave: Sequence[Recipe]) -> PlannedWave | None:
            return self.failures.plan(
                wave, lambda some: self._plan(some, folders), lambda one: self._probe(one, folders)
            )

        first = plan(ordered[0])
        with self.workers as (group, placement):
            self.placement = placement
            for number, wave in enumerate(ordered):
                planned = first if number == 0 else plan(wave)
                while planned is not None:
                    try:
                        if planned.missing:
                            self._measure(planned.missing, group, placement)
                            planned = self._plan(self.failures.left(wave), folders)
                        self._run_wave(number, planned, group, placement)
                        break
                    except RaymergeError as error:
                        self.failures.blame(planned, error)
                        planned = plan(wave)

    def _probe(self, recipes: Sequence[Recipe], folders: dict[str, str]) -> PlannedWave:
        """Plan recipes and say nothing about it."""
        results = {name: folder for name, folder in folders.items() if self.folder.has_output(name)}
        planned = plan_wave(recipes, folders, self.options, results, self.opened, strict=self.strict)
        quick_check(recipes, planned.models)
        return planned

    def _plan(self, recipes: Sequence[Recipe], folders: dict[str, str]) -> PlannedWave:
        results = {name: folder for name, folder in folders.items() if self.folder.has_output(name)}
        planned = plan_wave(recipes, folders, self.options, results, self.opened, strict=self.strict)
        refuse_inputs_in_output(
            self.folder.out,
            [
                *({model.checkpoint.path for model in planned.models.values()} - set(results.values())),
                *(each.path for each in planned.statistics.values()),
            ],
        )
        if planned.missing:  # planned again when that is measured
            return planned
        for line in planned.remarks:
            self.remark(line)
        for line in quick_check(recipes, planned.models):
            self.remark(line)
        return planned

    def _measure(self, missing: Sequence[ToMeasure], group: WorkerGroup, placement: Placement) -> None:
        """Measure what recipes name data for, on the cluster that the merge runs on."""
        group.close()  # its workers hold the GPUs; they start again for the merge
        progress = StatisticsLine()
        measure_missing(
            missing,
            where={
                "workers": placement.num_workers,
                "device": placement.device,
                "in_process": isinstance(group, InProcessGroup),
            },
            on_remark=self.remark,
            on_progress=progress.show if self.show_progress else _silent,
        )
        progress.clear()

    def _run_wave(self, number: int, wave: PlannedWave, group: WorkerGroup, placement: Placement) -> None:
        plan = wave.plan
        journal = self._open_journal(number, wave, placement)
        if is_sequential(plan.recipes[0].recipe):
            self._run_layer_by_layer(number, wave, journal, group, placement)
            return
        self.num_tasks += len(plan.tasks)
        self.num_resumed += len(journal.done)
        progress = Progress(
            len(plan.tasks),
            plan.read_bytes + plan.write_bytes,
            num_done=len(journal.done),
            done_bytes=sum(r.read_bytes + r.write_bytes for r in journal.done.values()),
        )
        started = time.monotonic()
        try:
            self._write_metadata(wave)
            group.start(self._context(wave, placement))
            show = self.folder.watched(progress.show if self.show_progress else _silent)
            on_done = self.trace.add if self.trace else _silent
            controller = Controller(
                plan, group, journal, show, on_done=on_done, may_drop=self.failures.may_drop
            )
            totals = controller.run()
        except BaseException:
            group.close()  # a worker may still be writing into a folder that is about to go
            raise
        finally:
            progress.clear()
            journal.close()
            self.num_finished += len(journal.done)
        self.totals = self.totals.plus_totals(totals)
        for dropped, error in controller.dropped.items():
            name = plan.recipes[dropped].recipe.name
            self.failures.errors[name] = error or RecipeError(
                "it failed in the run that this one resumes; mend what was wrong and merge it by itself"
            )
        for line in dict.fromkeys(line for report in journal.done.values() for line in report.warnings):
            self.remark(line)
        figures = {
            "device": placement.device,
            "num_workers": placement.num_workers,
            "read_bytes": plan.read_bytes,
            "write_bytes": plan.write_bytes,
            "seconds": round(time.monotonic() - started, 3),
        }
        self._finish_outputs(wave, journal, figures)

    def _run_layer_by_layer(
        self, number: int, wave: PlannedWave, journal: Journal, group: WorkerGroup, placement: Placement
    ) -> None:
        """Merge a recipe whose statistics are measured while it is merged."""
        started = time.monotonic()
        run = RegMeanPlusRun(
            wave=wave,
            work_folder=os.path.join(self.folder.path, f"layers-{number}"),
            journal=journal,
            group=group,
            placement=placement,
            options=self.options,
            context_of=lambda planned: self._context(planned, placement),
            on_remark=self.remark,
            on_stage=self.remark if self.show_progress else _silent,
        )
        try:
            self._write_metadata(wave)
            merged = run.run()
        except BaseException as error:
            if isinstance(error, RecipeError):  # mended, it is another recipe: nothing here can be resumed
                journal.done.clear()
            group.close()
            raise
        finally:
            journal.close()
            self.num_finished += len(journal.done)
        self.num_tasks += len(journal.done)
        self.num_resumed += run.num_resumed
        self.totals = self.totals.plus_totals(run.totals)
        for line in dict.fromkeys(line for report in journal.done.values() for line in report.warnings):
            self.remark(line)
        figures = {
            "device": placement.device,
            "num_workers": placement.num_workers,
            "seconds": round(time.monotonic() - started, 3),
            **run.figures(),
        }
        self._finish_outputs(merged, journal, figures)

    def _open_journal(self, number: int, wave: PlannedWave, placement: Placement) -> Journal:
        """Go on with the journal of an unfinished run, or make room and begin a new one."""
        path = self.folder.journal_path + (f".{number}" if number else "")
        made_by = {"device": placement.device, **versions("raymerge", "torch")}
        has_files = is_remote(path) or all(os.path.isdir(recipe.folder) for recipe in wave.plan.recipes)
        if self.options.resume and self.folder.has_journal(path) and has_files:
            return Journal.resume(path, wave.fingerprint, made_by)
        self.folder.check_space(wave.plan.write_bytes)
        for recipe in wave.plan.recipes:
            self.folder.preallocate(recipe.folder, recipe.layout)
        header = {
            "num_tasks": len(wave.plan.tasks),
            "overwrite": self.options.overwrite,
            "made_by": made_by,
            "outputs": [recipe.recipe.name for recipe in wave.plan.recipes],
        }
        return Journal.create(path, wave.fingerprint, header)

    def _write_metadata(self, wave: PlannedWave) -> None:
        """Write config, tokenizer and card: what cannot be built fails before a weight is read."""
        given = zip(wave.plan.recipes, wave.vocabularies, wave.heads, strict=True)
        for number, (plan, vocabulary, heads) in enumerate(given):
            try:
                said = write_metadata_files(
                    self.folder.small_files(plan.recipe.name),
                    plan.recipe,
                    wave.models,
                    plan.tensors,
                    plan.layout,
                    vocabulary,
                    heads,
                )
            except RaymergeError as error:
                error.recipe = number
                raise
            for line in said:
                self.remark(of_recipe(plan.recipe.name, line))

    def _context(self, wave: PlannedWave, placement: Placement) -> RunContext:
        folders = wave.plan.input_folders() - {model.folder for model in wave.hub_models}
        return RunContext(
            run_id=wave.fingerprint,
            versions=installed_versions(),
            settings=wave.plan.settings,
            device=placement.device,
            num_threads=placement.threads_per_worker,
            allow_nan=self.options.allow_nan,
            visible_paths=(*sorted(folders), self.folder.journal_path),
            hub_models=wave.hub_models,
            writable_folders=self.folder.writable_folders,
            stage=self.options.stage,
        )

    def _finish_outputs(self, wave: PlannedWave, journal: Journal, figures: dict[str, Any]) -> None:
        """Write the manifest, and last the index."""
        reports: dict[int, list[PieceReport]] = {}
        for report in journal.done.values():
            for piece in report.pieces:
                reports.setdefault(piece.recipe, []).append(piece)
        for number, plan in enumerate(wave.plan.recipes):
            if plan.recipe.name in self.failures.errors:
                continue
            run = {"id": wave.fingerprint[:12], **figures}  # the name of its metrics and logs
            manifest = make_manifest(plan, wave.models, wave.statistics, reports.get(number, []), run)
            try:
                small_files = self.folder.small_files(plan.recipe.name)
                write_manifest(small_files, manifest)
                write_index(small_files, plan.layout)
                if self.options.fsync:
                    sync_folder(small_files)
            except OSError as error:
                raise write_error(plan.folder, error) from error
            self.folder.finish(plan.recipe.name, plan.layout)


def _silent(told: object) -> None:
    del told
