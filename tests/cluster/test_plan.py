"""The plan: which tasks come out of which headers. No file is opened but in the test of scale."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymerge.cluster.match import match
from raymerge.cluster.matched import LoadedModel
from raymerge.cluster.plan import Plan, RecipePlan, make_plan
from raymerge.cluster.plan_files import tasks_by_file
from raymerge.cluster.recipe import load_recipes
from raymerge.merge_actors.checkpoint.folder import Checkpoint
from raymerge.merge_actors.checkpoint.header import TensorInfo
from raymerge.merge_actors.checkpoint.layout import OutputTensor, lay_out
from raymerge.merge_actors.dtypes import element_bytes
from raymerge.merge_actors.errors import MismatchError, RecipeError
from raymerge.merge_actors.methods import METHODS, SPARSIFIERS
from raymerge.merge_actors.methods.block import UNIT, unit_elements
from raymerge.merge_actors.methods.interface import Settings
from raymerge.merge_actors.methods.slices import split_of
from raymerge.merge_actors.randomness import stream_key
from raymerge.merge_actors.task import Job, MergeTask, OutputObject, Piece, Read

KIB = 1 << 10
#: Shape of a float32 tensor of two units.
CUT = (2 * UNIT // 1024, 1024)
#: A shape of two units.
CUT = (2 * UNIT // 1024, 1024)
#: name -> (dtype, shape)
Header = Mapping[str, tuple[str, tuple[int, ...]]]


def checkpoint(name: str, header: Header, config: dict[str, Any] | None = None) -> LoadedModel:
    """Return a model whose tensors lie one after the other in a file that does not exist."""
    tensors, at = {}, 100
    for tensor, (dtype, shape) in header.items():
        end = at + math.prod(shape) * element_bytes(dtype)
        tensors[tensor] = TensorInfo(tensor, dtype, shape, f"/{name}/model.safetensors", at, end)
        at = end
    opened = Checkpoint(
        path=name, folder=f"/{name}", tensors=tensors, config=config or {}, tied={}, fingerprint=name
    )
    return LoadedModel(name, opened)


def plan_of(
    recipes: Sequence[Mapping[str, Any]], models: Mapping[str, LoadedModel], slice_bytes: int
) -> Plan:
    plans = []
    for mapping in recipes:
        (recipe,), _ = load_recipes(mapping)
        tensors, _ = match(recipe, models, None)
        layout = lay_out([OutputTensor(t.name, t.dtype, t.shape) for t in tensors], 10**12)
        folder = f"/out/{recipe.name}"
        plans.append(RecipePlan(recipe=recipe, tensors=tuple(tensors), layout=layout, folder=folder))
    return make_plan(plans, slice_bytes=slice_bytes)


def linear(name: str, models: Sequence[str]) -> dict[str, Any]:
    entries = [{"model": model, "parameters": {"weight": 1.0}} for model in models]
    return {"name": name, "merge_method": "linear", "models": entries}


def ties(name: str, models: Sequence[str], **parameters: Any) -> dict[str, Any]:
    entries = [{"model": model, "parameters": {"weight": 1.0, "density": 0.5}} for model in models]
    return {
        "name": name,
        "merge_method": "ties",
        "base_model": "base",
        "models": entries,
        "parameters": parameters,
    }


def units_of(plan: Plan, piece: Piece) -> list[int]:
    found = [unit_elements(piece.shape, "elementwise")]
    for job in piece.jobs:
        name, of_job = plan.settings[job.settings]
        if name != "copy":
            found.append(unit_elements(piece.shape, split_of(METHODS[name], of_job, SPARSIFIERS)))
    return found


def assert_sound(plan: Plan) -> None:
    """Check what holds for every plan: the invariants of the policy."""
    pieces = [piece for task in plan.tasks for piece in task.pieces]
    assert [task.number for task in plan.tasks] == list(range(len(plan.tasks)))
    _assert_written_once(plan, pieces)
    _assert_disjoint([span for piece in pieces for span in _read_spans(piece)])
    for piece in [*pieces, *(piece for state in plan.states for piece in state.pieces)]:
        total = math.prod(piece.shape)
        units = units_of(plan, piece)
        for unit in units:
            assert piece.begin % unit == 0
            assert piece.end % unit == 0 or piece.end == total
        widest = max(element_bytes(read.dtype) for read in piece.reads)
        assert piece.num_elements * widest <= plan.slice_bytes or piece.num_elements <= math.lcm(*units)
        for job in piece.jobs:
            assert all(index in range(len(piece.reads)) for index in job.models)
            assert len(job.keys) == len(job.models)
    for task in plan.tasks:
        amounts = [p.num_elements * max(element_bytes(r.dtype) for r in p.reads) for p in task.pieces]
        assert sum(amounts) <= plan.slice_bytes or len(task.pieces) == 1
        asked = {job.state for piece in task.pieces for job in piece.jobs if job.state is not None}
        assert asked == set(task.states)
        assert asked <= {state.number for state in plan.states}
    for number, state in enumerate(plan.states):
        assert state.number == number
        assert state.num_elements == sum(piece.num_elements for piece in state.pieces)
        assert state.known is None or plan.states[state.known].is_model_wide


def _assert_written_once(plan: Plan, pieces: Sequence[Piece]) -> None:
    spans = [
        (job.file, job.offset + piece.begin * width, job.offset + piece.end * width)
        for piece in pieces
        for job in piece.jobs
        for width in [element_bytes(job.dtype)]
    ]
    _assert_disjoint(spans)
    written: dict[str, int] = defaultdict(int)
    for file, begin, end in spans:
        written[file] += end - begin
    for recipe in plan.recipes:
        for file in recipe.layout.files:
            path = f"{recipe.folder}/{file.name}"
            first = min((begin for begin, _ in file.tensors.values()), default=file.num_bytes)
            assert written[path] == file.num_bytes - first
            assert all(begin >= first and end <= file.num_bytes for of, begin, end in spans if of == path)


def _read_spans(piece: Piece) -> list[tuple[str, int, int]]:
    return [
        (read.file, read.offset + piece.begin * width, read.offset + piece.end * width)
        for read in piece.reads
        for width in [element_bytes(read.dtype)]
    ]


def _assert_disjoint(spans: Sequence[tuple[str, int, int]]) -> None:
    ordered = sorted(span for span in spans if span[1] < span[2])
    for (file, _, end), (next_file, begin, _) in itertools.pairwise(ordered):
        assert file != next_file or end <= begin


def test_small_tensors_share_a_task() -> None:
    """Neighbours on disk go into one task; a weight, its type and its place are all a job needs."""
    header = {"a.weight": ("F32", (2, 3)), "b.bias": ("BF16", (4,))}
    models = {name: checkpoint(name, header) for name in ("one", "two")}
    plan = plan_of([linear("mean", ["one", "two"])], models, KIB)
    assert_sound(plan)
    layout = plan.recipes[0].layout.files[0]
    file = "/out/mean/model.safetensors"
    reads = [
        tuple(
            Read(model=m, tensor=name, file=f"/{m}/model.safetensors", offset=offset, dtype=dtype)
            for m in ("one", "two")
        )
        for name, offset, dtype in (("a.weight", 100, "F32"), ("b.bias", 124, "BF16"))
    ]
    jobs = [
        Job(
            recipe=0,
            tensor=name,
            settings=0,
            base=None,
            models=(0, 1),
            keys=(stream_key(0, "one", name), stream_key(0, "two", name)),
            file=file,
            offset=layout.tensors[name][0],
            dtype=dtype,
        )
        for name, dtype in (("a.weight", "F32"), ("b.bias", "BF16"))
    ]
    weights = Settings(shared={"normalize": True}, models=({"weight": 1.0}, {"weight": 1.0}))
    assert plan.settings == (("linear", weights),)
    assert plan.states == ()
    assert plan.tasks == (
        MergeTask(
            number=0,
            pieces=(
                Piece(shape=(2, 3), begin=0, end=6, reads=reads[0], jobs=(jobs[0],)),
                Piece(shape=(4,), begin=0, end=4, reads=reads[1], jobs=(jobs[1],)),
            ),
        ),
    )
    assert (plan.read_bytes, plan.write_bytes) == (2 * (24 + 8), 24 + 8)


@pytest.mark.parametrize("dtypes", [("BF16", "F64"), ("F64", "BF16")])
def test_the_widest_input_decides_the_length_of_a_piece(dtypes: tuple[str, str]) -> None:
    shape = (16, UNIT)
    models = {
        name: checkpoint(name, {"w": (dtype, shape)})
        for name, dtype in zip(("one", "two"), dtypes, strict=True)
    }
    plan = plan_of([linear("r", ["one", "two"])], models, slice_bytes=16 * UNIT)
    assert_sound(plan)
    assert [piece.num_elements for task in plan.tasks for piece in task.pieces] == [2 * UNIT] * 8


@pytest.mark.parametrize(("tail", "value"), [("first", 1), ("last", 9)])
def test_what_a_gradient_is_beside_the_layers(tail: str, value: float) -> None:
    """Embeddings have its first value, the last norm and the head the one that `gradient_tail` names."""
    names = ["model.embed_tokens.weight", *(f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(3))]
    names += ["model.norm.weight", "lm_head.weight"]
    models = {
        name: checkpoint(name, {tensor: ("F32", (4, 4)) for tensor in names}) for name in ("one", "two")
    }
    recipe = {**linear("r", ["one", "two"]), "gradient_tail": tail}
    recipe["models"][0]["parameters"] = {"weight": [1, 5, 9]}
    plan = plan_of([recipe], models, KIB)
    weights = {
        job.tensor: plan.settings[job.settings][1].models[0]["weight"]
        for task in plan.tasks
        for piece in task.pieces
        for job in piece.jobs
    }
    assert weights == dict(zip(names, [1, 1, 5, 9, value, value], strict=True))


def test_files_that_share_inputs_by_way_of_others_are_made_together() -> None:
    """One piece goes to a and b, another to b and c: one worker makes all three, and another one d."""
    read = Read(model="m", tensor="w", file="i", offset=0, dtype="F32")

    def task(number: int, *files: str, state: int | None = None) -> MergeTask:
        jobs = tuple(
            Job(
                recipe=0,
                tensor="w",
                settings=0,
                base=None,
                models=(0,),
                keys=(1,),
                file=file,
                offset=0,
                dtype="F32",
                state=state,
            )
            for file in files
        )
        piece = Piece(shape=(4,), begin=0, end=4, reads=(read,), jobs=jobs)
        return MergeTask(number=number, pieces=(piece,), states=() if state is None else (state,))

    objects = {name: OutputObject(name, b"", 16) for name in "abcd"}
    found = tasks_by_file([task(0, "a", "b"), task(1, "d", state=7), task(2, "c", "b", state=3)], objects)
    assert [[file.uri for file in each.files] for each in found] == [["a", "b", "c"], ["d"]]
    assert [[part.number for part in each.parts] for each in found] == [[0, 2], [1]]
    assert [each.states for each in found] == [(3,), (7,)]
    pieces = [task(0, "a", state=state).pieces[0] for state in (2, 9)]
    (one,) = tasks_by_file([MergeTask(number=0, pieces=tuple(pieces), states=(2, 9))], {"a": objects["a"]})
    assert one.states == one.parts[0].states == (2, 9)


def test_large_tensor_is_cut_at_units() -> None:
    """A tensor over the slice is cut into runs of whole units; its method needs no state."""
    rows = UNIT // 1000  # of a unit
    total = (3 * rows + 5) * 1000
    header = {"w": ("F32", (3 * rows + 5, 1000))}
    models = {name: checkpoint(name, header) for name in ("one", "two")}
    plan = plan_of([linear("mean", ["one", "two"])], models, 2 * rows * 1000 * 4 + 100)
    assert_sound(plan)
    assert [[(p.begin, p.end) for p in task.pieces] for task in plan.tasks] == [
        [(0, 2 * rows * 1000)],
        [(2 * rows * 1000, total)],
    ]
    assert plan.states == ()


def test_one_unit_is_never_cut() -> None:
    columns = UNIT + 5  # a row is a unit, and more than the slice
    models = {name: checkpoint(name, {"w": ("F32", (4, columns))}) for name in ("one", "two")}
    plan = plan_of([linear("mean", ["one", "two"])], models, KIB)
    assert_sound(plan)
    assert [task.pieces[0].begin for task in plan.tasks] == [0, columns, 2 * columns, 3 * columns]


def test_cut_tensor_is_measured_first() -> None:
    """TIES needs a threshold over the tensor: the cut tensor has a state, the whole one has none."""
    header = {"cut": ("F32", CUT), "whole": ("F32", (8, 8))}
    models = {name: checkpoint(name, header) for name in ("base", "one", "two")}
    plan = plan_of([ties("ties", ["one", "two"])], models, 4 * UNIT)
    assert_sound(plan)
    (state,) = plan.states
    assert (state.number, state.num_elements, state.is_model_wide, state.known) == (0, 2 * UNIT, False, None)
    assert [(p.begin, p.end, len(p.reads), len(p.jobs)) for p in state.pieces] == [
        (0, UNIT, 3, 1),
        (UNIT, 2 * UNIT, 3, 1),
    ]
    assert [task.states for task in plan.tasks] == [(0,), (0,), ()]
    assert [[job.state for p in task.pieces for job in p.jobs] for task in plan.tasks] == [[0], [0], [None]]


def test_model_wide_trim_is_one_state_that_comes_first() -> None:
    header = {"cut": ("F32", CUT), "whole": ("F32", (8, 8)), "steps": ("I64", (3,))}
    models = {name: checkpoint(name, header) for name in ("base", "one", "two")}
    plan = plan_of([ties("ties", ["one", "two"], trim="model")], models, 4 * UNIT)
    assert_sound(plan)
    wide = plan.states[0]
    assert wide.is_model_wide
    assert wide.num_elements == 2 * UNIT + 64  # the integers are copied, not trimmed
    assert [state.known for state in plan.states[1:]] == [0] * (len(plan.states) - 1)
    waits = [{piece.shape: task.states for piece in task.pieces} for task in plan.tasks]
    assert waits == [{CUT: (1,)}, {CUT: (1,)}, {(8, 8): (0,), (3,): (0,)}]


def test_campaign_reads_shared_inputs_once() -> None:
    """Two recipes over overlapping models: one group, one read per input, one job per recipe."""
    header = {"w": ("BF16", (64, 64)), "b": ("BF16", (64,))}
    models = {name: checkpoint(name, header) for name in ("base", "one", "two", "three")}
    recipes = [linear("mean", ["one", "two"]), ties("ties", ["two", "three"]), linear("solo", ["one"])]
    plan = plan_of(recipes, models, 1 << 20)
    assert_sound(plan)
    assert plan.read_bytes == 4 * (64 * 64 + 64) * 2
    assert plan.write_bytes == 3 * (64 * 64 + 64) * 2
    assert [len(piece.jobs) for task in plan.tasks for piece in task.pieces] == [3, 3]


def test_layer_used_twice_is_read_once() -> None:
    """A frankenmerge that repeats layers reads each source layer once and writes it twice."""
    header = {
        "model.embed_tokens.weight": ("BF16", (32, 8)),
        **{f"model.layers.{i}.mlp.weight": ("BF16", (8, 8)) for i in range(4)},
        "model.norm.weight": ("BF16", (8,)),
    }
    models = {"one": checkpoint("one", header, {"num_hidden_layers": 4})}
    slices = [{"sources": [{"model": "one", "layer_range": r}]} for r in ([0, 3], [1, 4])]
    recipe = {"name": "stack", "merge_method": "passthrough", "slices": slices}
    plan = plan_of([recipe], models, 1 << 20)
    assert_sound(plan)
    names = [job.tensor for task in plan.tasks for piece in task.pieces for job in piece.jobs]
    assert sorted(names) == sorted(
        [
            "model.embed_tokens.weight",
            *(f"model.layers.{i}.mlp.weight" for i in range(6)),
            "model.norm.weight",
        ]
    )
    assert plan.read_bytes == sum(math.prod(shape) * 2 for _, shape in header.values())
    twice = [
        p for task in plan.tasks for p in task.pieces if p.reads[0].tensor == "model.layers.2.mlp.weight"
    ]
    assert [[job.tensor for job in piece.jobs] for piece in twice] == [
        ["model.layers.2.mlp.weight", "model.layers.4.mlp.weight"]
    ]


def test_tasks_follow_the_disk() -> None:
    """Whatever the names, tasks read the first model's file from its beginning to its end."""
    header = {name: ("F32", (16, 16)) for name in ("z", "m", "a", "q")}
    models = {name: checkpoint(name, header) for name in ("one", "two")}
    plan = plan_of([linear("mean", ["one", "two"])], models, KIB)
    assert [task.pieces[0].reads[0].tensor for task in plan.tasks] == ["z", "m", "a", "q"]


def test_plan_depends_on_nothing_but_its_input() -> None:
    header = {f"t{i}": ("F32", (i + 1, 64)) for i in range(20)}
    models = {name: checkpoint(name, header) for name in ("base", "one", "two")}
    recipes = [ties("ties", ["one", "two"]), linear("mean", ["two", "one"])]
    assert plan_of(recipes, models, KIB).tasks == plan_of(recipes, models, KIB).tasks


_SHAPES = st.lists(st.integers(0, 900), max_size=3).map(tuple)
_DTYPES = st.sampled_from(["F32", "BF16", "F16", "F8_E4M3", "F64", "I64", "BOOL"])
_METHODS = st.sampled_from(["linear", "ties", "ties over the model", "nuslerp", "sce"])


@settings(deadline=None, max_examples=60)
@given(
    tensors=st.lists(st.tuples(_DTYPES, _SHAPES), min_size=1, max_size=6),
    kinds=st.lists(_METHODS, min_size=1, max_size=3),
    slice_kib=st.sampled_from([1, 64, 300, 5_000, 1 << 20]),
)
def test_every_plan_is_sound(
    tensors: list[tuple[str, tuple[int, ...]]], kinds: list[str], slice_kib: int
) -> None:
    header = {f"t{i}": each for i, each in enumerate(tensors)}
    models = {name: checkpoint(name, header) for name in ("base", "one", "two")}
    recipes = []
    for number, kind in enumerate(kinds):
        name = f"r{number}"
        if kind == "linear":
            recipes.append(linear(name, ["one", "two"]))
        elif kind.startswith("ties"):
            recipes.append(ties(name, ["one", "two"], trim="model" if "model" in kind else "tensor"))
        else:
            recipes.append({**linear(name, ["one", "two"]), "merge_method": kind, "base_model": "base"})
    assert_sound(plan_of(recipes, models, slice_kib * KIB))


def test_shapes_that_differ_are_refused_with_both() -> None:
    models = {
        "one": checkpoint("one", {"w": ("F32", (4, 8))}),
        "two": checkpoint("two", {"w": ("F32", (4, 9))}),
    }
    with pytest.raises(MismatchError, match=r"tensor w has shape \[4, 8\] in model one but \[4, 9\] in two"):
        plan_of([linear("mean", ["one", "two"])], models, KIB)


def test_range_beyond_the_last_layer_is_refused() -> None:
    header = {f"model.layers.{i}.w": ("F32", (4, 4)) for i in range(3)}
    models = {"one": checkpoint("one", header, {"num_hidden_layers": 3})}
    recipe = {
        "name": "stack",
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": "one", "layer_range": [1, 4]}]}],
    }
    with pytest.raises(RecipeError, match=r"layer_range is \[1, 4\], but one has 3 layers"):
        plan_of([recipe], models, KIB)


def test_threshold_over_the_model_needs_one_density() -> None:
    header = {f"model.layers.{i}.w": ("F32", (4, 4)) for i in range(4)}
    models = {name: checkpoint(name, header) for name in ("base", "one", "two")}
    recipe = ties("ties", ["one", "two"], trim="model")
    recipe["models"][1]["parameters"]["density"] = [0.1, 0.9]
    with pytest.raises(RecipeError, match=r"one threshold per model.*model\.layers\.1\.w"):
        plan_of([recipe], models, KIB)
    recipe["models"][1]["parameters"]["density"] = 0.1
    recipe["parameters"]["trim"] = [{"filter": "layers.0.", "value": "tensor"}, {"value": "model"}]
    with pytest.raises(RecipeError, match=r"one threshold per model.*model\.layers\.0\.w"):
        plan_of([recipe], models, KIB)


def test_threshold_over_the_model_needs_the_same_models_in_every_slice() -> None:
    header = {f"model.layers.{i}.w": ("F32", (4, 4)) for i in range(4)}
    models = {name: checkpoint(name, header) for name in ("base", "one", "two", "three")}
    slices = [
        {"sources": [{"model": name, "layer_range": layers} for name in (*names, "base")]}
        for names, layers in ((("one", "two"), [0, 2]), (("one", "three"), [2, 4]))
    ]
    recipe = {
        "name": "ties",
        "merge_method": "ties",
        "base_model": "base",
        "slices": slices,
        "parameters": {"weight": 1.0, "density": 0.5, "trim": "model"},
    }
    with pytest.raises(RecipeError, match=r"one threshold per model.*model\.layers\.2\.w"):
        plan_of([recipe], models, KIB)
    plan_of([{**recipe, "slices": slices[:1]}], models, KIB)


def test_tensor_that_only_a_later_source_of_a_slice_has_is_not_forgotten() -> None:
    header = {
        "model.embed_tokens.weight": ("F32", (32, 8)),
        **{f"model.layers.{i}.w": ("F32", (8, 8)) for i in range(3)},
    }
    more = {**header, "model.layers.1.bias": ("F32", (8,)), "lm_head.weight": ("F32", (32, 8))}
    config = {"num_hidden_layers": 3}
    models = {"one": checkpoint("one", header, config), "two": checkpoint("two", more, config)}
    sources = [{"model": "one", "layer_range": [1, 3]}, {"model": "two", "layer_range": [0, 2]}]
    recipe = {
        "name": "mean",
        "merge_method": "linear",
        "slices": [{"sources": sources}],
        "parameters": {"weight": 1},
    }
    with pytest.raises(
        MismatchError, match=r"tensor model\.layers\.1\.bias stands in model two but not in one"
    ):
        plan_of([recipe], models, KIB)
    plan = plan_of([{**recipe, "missing": "present"}], models, KIB)
    assert [tensor.name for tensor in plan.recipes[0].tensors] == [
        "model.embed_tokens.weight",
        "model.layers.0.w",
        "model.layers.1.w",
        "model.layers.1.bias",
        "lm_head.weight",
    ]


_SCALE_SCRIPT = """
import json, resource, sys, time
from raymerge.cluster.options import MergeOptions
from raymerge.cluster.plan_report import plan_report
started = time.process_time()
report = plan_report([sys.argv[1]], MergeOptions())
json.dump({
    "seconds": time.process_time() - started,
    "modules": [name for name in ("torch", "ray", "transformers") if name in sys.modules],
    "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
    "num_tensors": len(report["recipes"][0]["tensors"]),
    "read_bytes": report["read_bytes"],
}, sys.stdout)
"""


def _write_sparse(folder: Path, num_tensors: int) -> int:
    """Write a checkpoint that is all header: the data are a hole in the file."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    entries, at = {}, 0
    per_layer = 700
    for i in range(num_tensors):
        name = f"model.layers.{i // per_layer}.mlp.experts.{i % per_layer}.up_proj.weight"
        entries[name] = {"dtype": "BF16", "shape": [2048, 7168], "data_offsets": [at, at + 2048 * 7168 * 2]}
        at += 2048 * 7168 * 2
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    return at


def _plan_in_a_new_process(tmp_path: Path, num_tensors: int) -> dict[str, Any]:
    names = ["base", "one", "two", "three"]
    num_bytes = [_write_sparse(tmp_path / name, num_tensors) for name in names]
    models = [
        {"model": str(tmp_path / name), "parameters": {"weight": 1.0, "density": 0.5}} for name in names[1:]
    ]
    recipe = {"merge_method": "ties", "base_model": str(tmp_path / "base"), "models": models}
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    command = [sys.executable, "-c", _SCALE_SCRIPT, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"HOME": "/"})
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["read_bytes"] == sum(num_bytes)
    assert report["num_tensors"] == num_tensors
    return report


def test_planning_loads_no_torch(tmp_path: Path) -> None:
    assert _plan_in_a_new_process(tmp_path, 500)["modules"] == []


@pytest.mark.slow
def test_plan_of_45_000_tensors_takes_seconds(tmp_path: Path) -> None:
    report = _plan_in_a_new_process(tmp_path, 45_000)
    assert report["modules"] == []
    assert report["seconds"] < 10
    assert report["peak_mib"] < 1024
