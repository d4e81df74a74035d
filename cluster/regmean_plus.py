"""One RegMean++ merge: stage after stage, measure, solve, go on with what was merged.

Phases of a stage, all on the same devices: each worker takes candidates (or some shards of one) through the
newly merged layer and sums the Grams of the next one (`stats/regmean_plus_worker.py`); the Grams are written to
the run folder; the stage's tensors are matched and planned like those of any recipe with statistics, and the
ordinary controller has them solved for and written into the output. A finished stage is in the journal; what
goes wrong repeats only the stage under way.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import os
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raymerge.cluster.activation_group import ActivationGroup, WorkersLost
from raymerge.cluster.campaign import PlannedWave
from raymerge.cluster.connect import Placement
from raymerge.cluster.controller import Controller
from raymerge.cluster.journal import Journal
from raymerge.cluster.match import match
from raymerge.cluster.matched import MergedTensor
from raymerge.cluster.model_ref import place_of
from raymerge.cluster.options import MergeOptions
from raymerge.cluster.plan import RecipePlan, make_plan
from raymerge.cluster.regmean_plus_group import passes_group
from raymerge.cluster.regmean_plus_measure import Measured, StageMeasurer, same_layers
from raymerge.cluster.regmean_plus_plan import candidates_of, expected_statistics, partial_statistics
from raymerge.cluster.regmean_plus_state import RunState
from raymerge.cluster.remarks import of_recipe
from raymerge.cluster.totals import Totals
from raymerge.cluster.worker_group import WorkerGroup
from raymerge.merge_actors.checkpoint.header import TensorInfo
from raymerge.merge_actors.errors import ClusterError
from raymerge.merge_actors.task import RunContext
from raymerge.stats.block_passes import needed_outputs
from raymerge.stats.boundary_files import remove_boundaries
from raymerge.stats.measure_job import MeasureJob
from raymerge.stats.regmean_plus_stages import Candidate, Stage, stages_of
from raymerge.stats.regmean_plus_worker import RegMeanPlusJob
from raymerge.stats.statistics_file import Statistics

#: Losses of a worker that a run survives.
_MOST_LOSSES = 5


@dataclass(slots=True, kw_only=True)
class RegMeanPlusRun:
    """One recipe under way."""

    wave: PlannedWave
    """Of this recipe alone, planned as if all statistics were there."""
    work_folder: str
    """For hidden states, Grams and the state of the run; every worker sees it."""
    journal: Journal
    """Of the wave; the tasks of all stages are numbered through."""
    group: WorkerGroup
    placement: Placement
    options: MergeOptions
    context_of: Callable[[PlannedWave], RunContext]
    on_remark: Callable[[str], None]
    on_stage: Callable[[str], None]
    """Told what begins, for people."""
    totals: Totals = field(default_factory=Totals)
    num_resumed: int = 0
    """Tasks that an earlier run had finished."""
    _passes: ActivationGroup = field(init=False)
    _measurer: StageMeasurer = field(init=False)

    def run(self) -> PlannedWave:
        """Merge all that is not merged yet; returns the wave with its tensors as they were merged.

        Raises:
            RaymergeError: with one sentence for the user.
        """
        job = self._job()
        self._prepare(job)
        stages, state = self._measurer.stages, self._measurer.state
        self.num_resumed = state.num_tasks
        num_losses = 0
        while len(state.stages) < len(stages):
            stage = stages[len(state.stages)]
            try:
                self._run_stage(stage)
            except WorkersLost as lost:
                num_losses += 1
                if num_losses > _MOST_LOSSES:
                    raise ClusterError(
                        f"workers died too often, the last one with: {lost}; see Ray's logs, and use smaller batches "
                        "(batch_tokens of the data) if memory ran out."
                    ) from lost
                self.on_remark(f"a worker was lost ({lost}); {self._label(stage)} starts again")
                self._passes.start(job)
        self._passes.close()
        shutil.rmtree(self.work_folder, ignore_errors=True)
        return self._with_tensors(self._as_merged())

    def figures(self) -> dict[str, Any]:
        """Return what the manifest says about the data of the candidates."""
        state = self._measurer.state
        models = [use.model.key for use in candidates_of(self._plan.recipe)]
        return {
            "measured": [
                {
                    "model": model,
                    "data_fingerprint": found["data"],
                    "num_tokens": num_tokens,
                    **({"code": json.loads(found["code"])} if "code" in found else {}),
                }
                for model, found, num_tokens in zip(models, state.identity, state.num_tokens, strict=True)
            ],
            "measure_seconds": round(state.measure_seconds, 3),
        }

    @property
    def _plan(self) -> RecipePlan:
        return self.wave.plan.recipes[0]

    def _job(self) -> RegMeanPlusJob:
        jobs = []
        for number, use in enumerate(candidates_of(self._plan.recipe)):
            folder = os.path.join(self.work_folder, f"candidate-{number}")
            os.makedirs(folder, exist_ok=True)
            place = place_of(use.model)
            if use.model.path in self._plan.recipe.depends_on:
                place["model"] = self.wave.models[use.model.key].checkpoint.folder
            assert use.data is not None
            jobs.append(
                MeasureJob(
                    **place,
                    allow_pickle=self.options.allow_pickle,
                    trust_remote_code=self.options.trust_remote_code,
                    kind="gram",
                    data=use.data.spec,
                    estimator="expected",
                    device=self.placement.device,
                    threads=self.placement.threads_per_worker,
                    work_folder=folder,
                )
            )
        return RegMeanPlusJob(candidates=tuple(jobs))

    def _prepare(self, job: RegMeanPlusJob) -> None:
        """Start the workers, learn what the candidates are, take up an earlier run."""
        nothing = dataclasses.replace(self.wave.plan, tasks=(), states=())
        context = self.context_of(dataclasses.replace(self.wave, plan=nothing))
        self._passes = passes_group(self.group, self.placement.num_workers, context)
        try:
            self._passes.start(job)
            candidates = self._describe(len(job.candidates))
        except WorkersLost as lost:
            raise ClusterError(f"a worker died before it could begin: {lost}; see Ray's logs.") from lost
        names = [use.model.key for use in candidates_of(self._plan.recipe)]
        same_layers(names, candidates)
        self._measurer = StageMeasurer(
            passes=self._passes,
            candidates=candidates,
            folders=[each.work_folder for each in job.candidates],
            stages=stages_of(candidates[0].description.maps.blocks),
            state=RunState.open(self.work_folder, candidates, self.journal),
        )
        for name, candidate in zip(names, candidates, strict=True):
            for line in candidate.description.remarks:
                self.on_remark(of_recipe(name, line))

    def _describe(self, num_candidates: int) -> list[Candidate]:
        num_workers = self._passes.num_workers
        shares = [tuple(range(rank, num_candidates, num_workers)) for rank in range(num_workers)]
        found = self._passes.call("describe", [(share,) for share in shares], lambda _: None)
        numbered = {
            number: candidate
            for share, candidates in zip(shares, found, strict=True)
            for number, candidate in zip(share, candidates, strict=True)
        }
        return [numbered[number] for number in range(num_candidates)]

    def _label(self, stage: Stage) -> str:
        return stage.label(len(self._measurer.maps.blocks))

    def _run_stage(self, stage: Stage) -> None:
        """Measure and merge one stage; on success it is in the state on disk."""
        state = self._measurer.state
        self.on_stage(f"note: {self._label(stage)}: measuring")
        started = time.monotonic()
        measured = self._measurer.measure(stage, self._merged_places(state.merged))
        state.measure_seconds += time.monotonic() - started
        self.on_stage(f"note: {self._label(stage)}: merging")
        tensors = self._tensors_of(stage, measured)
        num_tasks = self._merge(tensors)
        state.finish_stage(
            [tensor.name for tensor in tensors],
            [statistics.modules for statistics in measured.statistics],
            measured.done,
            num_tasks,
        )
        self._clean(stage)

    def _tensors_of(self, stage: Stage, measured: Measured) -> list[MergedTensor]:
        """Match the tensors that belong to a stage with its statistics."""
        merged = self._measurer.state.merged
        names: Collection[str] = {tensor.name for tensor in self._plan.tensors}
        if stage.kind != "tail":
            block = () if stage.block is None else self._measurer.candidates[0].block_tensors[stage.block]
            outside = [name for statistics in measured.statistics for name in statistics.modules]
            names = {*block, *measured.used, *outside} & {*names}
        matched = self._match(measured.statistics)
        return [tensor for tensor in matched if tensor.name in names and tensor.name not in merged]

    def _as_merged(self) -> list[MergedTensor]:
        """Return all tensors as they were merged: data may not have reached all that could be solved for."""
        recipe, state = self._plan.recipe, self._measurer.state
        found = expected_statistics(recipe, self.wave.models, trust_code=self.options.trust_remote_code)
        statistics = []
        for number, use in enumerate(candidates_of(recipe)):
            assert use.measurement is not None
            every, measured = found[use.measurement].modules, state.measured(number)
            modules = {name: module for name, module in every.items() if name in measured}
            statistics.append(partial_statistics(use.model.key, modules, expected=every))
        return self._match(statistics)

    def _match(self, statistics: Sequence[Statistics]) -> list[MergedTensor]:
        """Match the recipe with statistics of its candidates."""
        recipe = self._plan.recipe
        found = {
            use.measurement: each
            for use, each in zip(candidates_of(recipe), statistics, strict=True)
            if use.measurement is not None
        }
        return match(recipe, self.wave.models, None, found, self.wave.heads[0])[0]

    def _merge(self, tensors: Sequence[MergedTensor]) -> int:
        """Have tensors merged and written; returns the number of tasks."""
        wave = self._with_tensors(tensors)
        plan = make_plan(wave.plan.recipes, slice_bytes=self.wave.plan.slice_bytes)
        first = self._measurer.state.num_tasks
        for number in [number for number in self.journal.done if number >= first]:
            del self.journal.done[number]  # of an attempt whose workers were lost
        tasks = tuple(dataclasses.replace(task, number=first + task.number) for task in plan.tasks)
        plan = dataclasses.replace(plan, tasks=tasks)
        self.group.start(self.context_of(dataclasses.replace(wave, plan=plan)))
        totals = Controller(plan, self.group, self.journal).run()
        self.totals = self.totals.plus_totals(totals)
        return len(tasks)

    def _merged_places(self, merged: Collection[str]) -> Mapping[str, TensorInfo]:
        """Return where merged tensors stand in the output's files."""
        shapes = {tensor.name: tensor for tensor in self._plan.tensors}
        places = {}
        for file in self._plan.layout.files:
            for name, (begin, end) in file.tensors.items():
                if name in merged:
                    path = os.path.join(self._plan.folder, file.name)
                    tensor = shapes[name]
                    places[name] = TensorInfo(name, tensor.dtype, tensor.shape, path, begin, end)
        return places

    def _clean(self, stage: Stage) -> None:
        """Delete the stage's Grams, and the hidden states from which no later stage begins."""
        measurer = self._measurer
        later = measurer.stages[stage.number + 1 : stage.number + 2]
        keep = needed_outputs(measurer.maps.blocks, later[0].begin) if later else ()
        for folder in measurer.folders:
            for path in glob.glob(os.path.join(glob.escape(folder), "gram-*.safetensors")):
                os.remove(path)
            remove_boundaries(folder, keep)

    def _with_tensors(self, tensors: Sequence[MergedTensor]) -> PlannedWave:
        recipe = dataclasses.replace(self._plan, tensors=tuple(tensors))
        return dataclasses.replace(self.wave, plan=dataclasses.replace(self.wave.plan, recipes=(recipe,)))
