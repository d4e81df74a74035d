"""Merges end to end: same bytes for any cut, order and number of workers, and exactly what the formulas say."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from raymerge.cluster.merge import merge
from raymerge.cluster.merge_result import MergeResult
from raymerge.cluster.options import MergeOptions
from raymerge.cluster.recipe import load_recipes
from raymerge.cluster.settings import resolve
from raymerge.cluster.verify import verify
from raymerge.merge_actors.dtypes import torch_name
from raymerge.merge_actors.errors import MismatchError
from raymerge.merge_actors.methods import METHODS, SPARSIFIERS
from raymerge.merge_actors.methods.slices import merge_tensors

#: Parameters that a method cannot do without, or that make it do something.
PARAMETERS: dict[str, dict[str, Any]] = {
    "linear": {"weight": 0.5},
    "passthrough": {},
    "slerp": {"t": 0.3},
    "nuslerp": {"weight": 0.5},
    "multislerp": {"weight": 0.5},
    "nearswap": {"t": 0.001},
    "ties": {"weight": 0.7, "density": 0.4},
    "task_arithmetic": {"weight": 0.7},
    "dare_linear": {"weight": 0.7, "density": 0.4},
    "dare_ties": {"weight": 0.7, "density": 0.4},
    "della_linear": {"weight": 0.7, "density": 0.5, "epsilon": 0.2},
    "della": {"weight": 0.7, "density": 0.5, "epsilon": 0.2},
    "breadcrumbs": {"weight": 0.7, "density": 0.5, "gamma": 0.05},
    "breadcrumbs_ties": {"weight": 0.7, "density": 0.5, "gamma": 0.05},
    "sce": {"select_topk": 0.3},
}
#: Methods that need measured statistics have tests of their own.
NAMES = [name for name in METHODS if METHODS[name].statistic is None]


def recipe_of(method: str, base: str, models: Sequence[str], **more: Any) -> dict[str, Any]:
    """Return a recipe of a method over as many of the models as it takes."""
    declared = METHODS[method]
    models = models[: declared.num_models[1] or len(models)]
    given = PARAMETERS.get(method, {})
    recipe: dict[str, Any] = {"name": method, "merge_method": method, **more}
    if declared.base != "unused":
        recipe["base_model"] = base
    recipe["models"] = [{"model": model} for model in models]
    if given:
        recipe["parameters"] = given
    return recipe


def run(recipes: Any, out: Path, **options: Any) -> MergeResult:
    chosen = MergeOptions(**{"in_process": True, "workers": 1, "device": "cpu", **options})
    return merge(recipes if isinstance(recipes, list) else [recipes], out, chosen)


def read_tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def weights_digest(folder: str | Path) -> str:
    """Return a hash of all weight files under a folder, names included."""
    digest = hashlib.sha256()
    for file in sorted(Path(folder).rglob("*.safetensors")):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def matrices(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Write a base and three models of odd tensors; slices of 1 MiB cut the larger ones."""
    root = tmp_path_factory.mktemp("matrices")
    generator = torch.Generator().manual_seed(9)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    base = {
        "model.embed_tokens.weight": noise(700, 1024).bfloat16(),
        "model.layers.0.mlp.weight": noise(1100, 1024).bfloat16(),
        "model.layers.0.mlp.bias": noise(1537),
        "model.layers.1.mlp.weight": noise(630, 777),  # rows that no power of two divides
        "model.layers.1.scale": noise().half(),
        "model.layers.1.vector": noise(500_001),
        "model.norm.empty": torch.empty(0, 8),
    }
    folders = []
    for number, name in enumerate(("base", "first", "second", "third")):
        folder = root / name
        folder.mkdir()
        scale = 0.0 if name == "base" else 0.05
        tensors = {key: (value + scale * noise(*value.shape)).to(value.dtype) for key, value in base.items()}
        # Copied, and of a length that would leave the next tensor of a task unaligned.
        tensors["model.layers.0.mask"] = torch.arange(25).reshape(5, 5) % 2 == number % 2
        tensors["model.layers.0.steps"] = torch.tensor([number, 2**40])
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"num_hidden_layers": 2}))
        folders.append(str(folder))
    return folders


def every_recipe(matrices: Sequence[str]) -> list[dict[str, Any]]:
    base, *models = matrices
    recipes = [recipe_of(name, base, models, dtype="float32") for name in NAMES]
    wide = recipe_of("ties", base, models, dtype="float32")
    wide |= {"name": "ties_wide", "parameters": {"weight": 0.7, "density": 0.4, "trim": "model"}}
    thinned = recipe_of("linear", base, models, base_model=base, out_dtype="bfloat16")
    thinned |= {"name": "thinned", "parameters": {"weight": 0.7, "sparsify": {"method": "dare", "drop": 0.8}}}
    return [*recipes, wide, thinned]


@pytest.fixture(scope="module")
def reference(matrices: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, MergeResult]:
    """Every method in one campaign: one worker, and slices that hold the largest tensor whole."""
    out = tmp_path_factory.mktemp("reference") / "out"
    return out, run(every_recipe(matrices), out, slice_mib=1024)


def expected(recipe: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Merge whole tensors in memory as a recipe says: nothing of plan, slices and files is used."""
    (read,), _ = load_recipes(recipe)
    module, layers = read.slices()[0]
    method = METHODS[read.merge_method]
    keys = [use.model.key for use in layers.sources]
    models = [read_tensors(key) for key in keys]
    base = read_tensors(layers.base.model.key) if layers.base else None
    merged = {}
    for name, donor in (base or models[0]).items():
        if not donor.is_floating_point():
            merged[name] = donor
            continue
        settings = resolve(read, module, layers, method, name, 0.0)
        stated = read.out_dtype or read.dtype
        dtype = getattr(torch, torch_name(stated)) if stated else donor.dtype
        merged[name] = merge_tensors(
            method,
            [model[name] for model in models],
            None if base is None else base[name],
            settings,
            sparsifiers=SPARSIFIERS,
            seed=read.seed,
            tensor_name=name,
            model_names=keys,
        ).to(dtype)
    return merged


def assert_same(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def test_every_method_equals_its_formula_on_whole_tensors(
    matrices: list[str], reference: tuple[Path, MergeResult]
) -> None:
    out, result = reference
    recipes = every_recipe(matrices)
    assert result.outputs == tuple(str(out / recipe["name"]) for recipe in recipes)
    for recipe in recipes:
        if recipe["name"] != "ties_wide":  # its threshold is that of no single tensor
            assert_same(read_tensors(out / recipe["name"]), expected(recipe))


def test_trim_over_the_model_keeps_what_one_threshold_keeps(
    matrices: list[str], reference: tuple[Path, MergeResult]
) -> None:
    """One model, TIES with `trim: model`: the deltas at and above the one quantile, added to the base."""
    base, first = read_tensors(matrices[0]), read_tensors(matrices[1])
    floats = [name for name, tensor in base.items() if tensor.is_floating_point()]
    deltas = {name: first[name].float() - base[name].float() for name in floats}
    every = torch.cat([delta.abs().flatten() for delta in deltas.values()]).sort().values
    threshold = every[len(every) - 1 - int(0.4 * len(every))]
    recipe = recipe_of("ties", matrices[0], matrices[1:2], dtype="float32")
    recipe["parameters"] = {"weight": 1.0, "density": 0.4, "trim": "model"}
    out = reference[0].parent / "one_model"
    run(recipe, out, slice_mib=1)
    merged = read_tensors(out)
    for name in floats:
        kept = torch.where(deltas[name].abs() >= threshold, deltas[name], 0.0)
        assert torch.equal(merged[name], base[name].float() + kept), name


def test_campaign_reads_every_input_once(matrices: list[str], tmp_path: Path) -> None:
    """Recipes that share models in every way read each model once; what is copied, from one model."""
    base, *models = matrices
    names = ("linear", "ties", "dare_ties", "nuslerp", "slerp", "della")
    recipes = [recipe_of(name, base, models) for name in names]
    result = run(recipes, tmp_path / "out", slice_mib=64, workers=2)
    num_bytes = sum(tensor.nbytes for folder in matrices for tensor in read_tensors(folder).values())
    copied = ("model.layers.0.mask", "model.layers.0.steps")
    not_read = sum(read_tensors(folder)[name].nbytes for folder in models[1:] for name in copied)
    assert result.totals.read_bytes == num_bytes - not_read
    written = [read_tensors(out) for out in result.outputs]
    assert result.totals.write_bytes == sum(t.nbytes for tensors in written for t in tensors.values())


@pytest.mark.parametrize(
    ("slice_mib", "workers"), [(1, 4), (2, 2), pytest.param(1, 1, marks=pytest.mark.slow)]
)
def test_bytes_do_not_depend_on_slices_and_workers(
    matrices: list[str],
    reference: tuple[Path, MergeResult],
    tmp_path: Path,
    slice_mib: int,
    workers: int,
) -> None:
    result = run(every_recipe(matrices), tmp_path / "out", slice_mib=slice_mib, workers=workers)
    for recipe in every_recipe(matrices):
        name = recipe["name"]
        assert weights_digest(tmp_path / "out" / name) == weights_digest(reference[0] / name), name
    assert result.num_tasks > reference[1].num_tasks
    assert result.num_workers == workers


@pytest.mark.ray
@pytest.mark.parametrize("workers", [1, 4, pytest.param(2, marks=pytest.mark.slow)])
def test_bytes_are_the_same_through_ray(
    ray_session: None,
    matrices: list[str],
    reference: tuple[Path, MergeResult],
    tmp_path: Path,
    workers: int,
) -> None:
    kept = ("ties", "ties_wide", "dare_ties", "nuslerp", "thinned")
    recipes = [recipe for recipe in every_recipe(matrices) if recipe["name"] in kept]
    result = run(recipes, tmp_path / "out", in_process=False, workers=workers, slice_mib=1)
    for name in kept:
        assert weights_digest(tmp_path / "out" / name) == weights_digest(reference[0] / name), name
    assert result.totals.num_retries == 0
    assert not (tmp_path / ".out.raymerge").exists()


@pytest.mark.parametrize("name", ["ties", "dare_linear", "sce"])
def test_recipe_alone_equals_the_recipe_in_a_campaign(
    matrices: list[str], reference: tuple[Path, MergeResult], tmp_path: Path, name: str
) -> None:
    (recipe,) = [recipe for recipe in every_recipe(matrices) if recipe["name"] == name]
    result = run(recipe, tmp_path / "alone")
    assert weights_digest(tmp_path / "alone") == weights_digest(reference[0] / name)
    assert result.outputs == (str(tmp_path / "alone"),)


def test_order_of_models_means_nothing_where_the_maths_is_symmetric(
    tiny_checkpoints: Callable[..., Any], tmp_path: Path
) -> None:
    """Each model keeps its own weight and its own random stream wherever it stands in the list."""
    family = tiny_checkpoints("llama", dtype="bfloat16")
    base, models = str(family.base), [str(model) for model in family.models]
    names = [name for name in NAMES if METHODS[name].is_symmetric and METHODS[name].num_models[1] != 1]
    assert {"linear", "ties", "dare_linear", "dare_ties", "della", "task_arithmetic"} <= set(names)
    names = [name for name in names if "weight" in PARAMETERS.get(name, {})]
    found = []
    for number, order in enumerate([(0, 1, 2), (2, 0, 1), (2, 1, 0)]):
        recipes = []
        for name in names:
            recipe = recipe_of(name, base, models)
            entries = [
                {"model": model, "parameters": {"weight": 0.2 + 0.1 * i}} for i, model in enumerate(models)
            ]
            recipe["models"] = [entries[i] for i in order if i < len(recipe["models"])]
            recipes.append(recipe)
        run(recipes, tmp_path / str(number), workers=2)
        found.append({name: read_tensors(tmp_path / str(number) / name) for name in names})
    for name in names:
        for tensor in (key for key, value in found[0][name].items() if value.is_floating_point()):
            assert torch.equal(found[1][name][tensor], found[0][name][tensor]), (name, tensor)
            assert torch.equal(found[2][name][tensor], found[0][name][tensor]), (name, tensor)


def test_verify_accepts_every_output(reference: tuple[Path, MergeResult]) -> None:
    checked = verify(reference[0], load=False)
    assert len(checked.outputs) == len(reference[1].outputs)


_MODEL_CLASSES = {
    "llama": "LlamaForCausalLM",
    "bert": "BertForMaskedLM",
    "gpt2": "GPT2LMHeadModel",
    "t5": "T5ForConditionalGeneration",
}


def load_model(folder: str | Path, architecture: str) -> Any:
    import transformers

    model_class = getattr(transformers, _MODEL_CLASSES[architecture])
    model, info = model_class.from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model


@pytest.mark.parametrize("architecture", list(_MODEL_CLASSES))
def test_every_method_on_real_architectures(
    tiny_checkpoints: Callable[..., Any], tmp_path: Path, architecture: str
) -> None:
    """Outputs hold what the formulas say, and open in transformers with these very tensors."""
    family = tiny_checkpoints(architecture, dtype="bfloat16")
    base, models = str(family.base), [str(model) for model in family.models]
    recipes = [recipe_of(name, base, models) for name in NAMES]
    result = run(recipes, tmp_path / "out")
    assert not [line for line in result.remarks if "copied" in line]
    for recipe in recipes:
        folder = tmp_path / "out" / recipe["name"]
        merged = read_tensors(folder)
        assert_same(merged, expected(recipe))
        if recipe["name"] not in ("linear", "slerp", "ties"):
            continue  # their files differ from these in numbers alone, and loading takes its time
        state = load_model(folder, architecture).state_dict()
        for name, tensor in merged.items():
            assert torch.equal(state[name], tensor), (recipe["name"], name)


def test_tied_heads_stay_tied(tiny_checkpoints: Callable[..., Any], tmp_path: Path) -> None:
    for architecture in ("llama", "gpt2"):
        family = tiny_checkpoints(architecture, tied=True)
        recipe = recipe_of("ties", str(family.base), [str(model) for model in family.models])
        out = tmp_path / architecture
        run(recipe, out)
        assert "lm_head.weight" not in read_tensors(out)
        model = load_model(out, architecture)
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_sharded_output_loads(tiny_checkpoints: Callable[..., Any], tmp_path: Path) -> None:
    """Shards in, shards out: the cut of the files changes no tensor."""
    family = tiny_checkpoints("llama", dtype="bfloat16", sharded=True)
    recipe = recipe_of("dare_ties", str(family.base), [str(model) for model in family.models])
    run(recipe, tmp_path / "sharded", out_shard_size="20KB")
    run(recipe, tmp_path / "single")
    assert (tmp_path / "single" / "model.safetensors").exists()
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 3 and all((tmp_path / "sharded" / file).exists() for file in files)
    assert_same(read_tensors(tmp_path / "sharded"), read_tensors(tmp_path / "single"))
    load_model(tmp_path / "sharded", "llama")
    assert verify(tmp_path / "sharded").outputs[0].load is not None


def test_frankenmerge_renumbers_layers_and_mends_the_config(
    tiny_checkpoints: Callable[..., Any], tmp_path: Path
) -> None:
    family = tiny_checkpoints("llama")
    first, second = str(family.models[0]), str(family.models[1])
    recipe = {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": first, "layer_range": [0, 2]}]},
            {"sources": [{"model": second, "layer_range": [0, 1]}]},
            {"sources": [{"model": first, "layer_range": [1, 2]}]},
        ],
    }
    run(recipe, tmp_path / "out")
    merged, one, two = (read_tensors(folder) for folder in (tmp_path / "out", first, second))
    origin = {0: (one, 0), 1: (one, 1), 2: (two, 0), 3: (one, 1)}
    layers = [name for name in merged if name.startswith("model.layers.")]
    assert len(layers) == 2 * len([name for name in one if name.startswith("model.layers.")])
    for name in layers:
        _, _, number, rest = name.split(".", 3)
        tensors, layer = origin[int(number)]
        assert torch.equal(merged[name], tensors[f"model.layers.{layer}.{rest}"])
    assert torch.equal(merged["model.embed_tokens.weight"], one["model.embed_tokens.weight"])
    assert torch.equal(merged["lm_head.weight"], one["lm_head.weight"])
    model = load_model(tmp_path / "out", "llama")
    assert model.config.num_hidden_layers == 4
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


@pytest.mark.parametrize("order", [("untied", "tied"), ("tied", "untied")])
def test_a_stack_of_tied_and_untied_models_ends_in_the_last_ones_head(
    order: tuple[str, str], tiny_checkpoints: Callable[..., Any], tmp_path: Path
) -> None:
    folders = {
        "untied": tiny_checkpoints("llama").models[0],
        "tied": tiny_checkpoints("llama", tied=True).models[1],
    }
    first, last = (str(folders[each]) for each in order)
    out = tmp_path / "out"
    run(
        {
            "merge_method": "passthrough",
            "slices": [
                {"sources": [{"model": first, "layer_range": [0, 2]}]},
                {"sources": [{"model": last, "layer_range": [0, 2]}]},
            ],
        },
        out,
    )
    merged = load_file(out / "model.safetensors")
    ending = load_file(Path(last) / "model.safetensors")
    head = "model.embed_tokens.weight" if order[1] == "tied" else "lm_head.weight"
    assert torch.equal(merged["lm_head.weight"], ending[head])
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


def test_merged_layer_ranges(tiny_checkpoints: Callable[..., Any], tmp_path: Path) -> None:
    """A slice of several models merges the layers that stand at the same place in their ranges."""
    family = tiny_checkpoints("llama")
    names = [str(model) for model in family.models[:2]]
    recipe = {
        "merge_method": "linear",
        "parameters": {"weight": 0.5},
        "slices": [
            {
                "sources": [
                    {"model": names[0], "layer_range": [0, 1]},
                    {"model": names[1], "layer_range": [1, 2]},
                ]
            }
        ],
    }
    run(recipe, tmp_path / "out")
    merged, one, two = (read_tensors(folder) for folder in (tmp_path / "out", *names))
    key = "model.layers.{}.mlp.up_proj.weight"
    mean = (0.5 * one[key.format(0)] + 0.5 * two[key.format(1)]) / 1.0
    torch.testing.assert_close(merged[key.format(0)], mean, rtol=1e-6, atol=1e-8)
    assert key.format(1) not in merged


def test_later_document_uses_an_earlier_result(tiny_checkpoints: Callable[..., Any], tmp_path: Path) -> None:
    """Two waves in one run equal two runs by hand."""
    family = tiny_checkpoints("llama", dtype="bfloat16")
    base, models = str(family.base), [str(model) for model in family.models]
    first = {**recipe_of("ties", base, models[:2]), "name": "step1"}
    second = {**recipe_of("linear", base, ["step1", models[2]]), "name": "step2"}
    path = tmp_path / "chain.yaml"
    path.write_text(yaml.safe_dump_all([first, second]))
    result = run(str(path), tmp_path / "chain")
    assert result.outputs == (str(tmp_path / "chain" / "step1"), str(tmp_path / "chain" / "step2"))
    run(first, tmp_path / "alone1")
    again = {**second, "models": [{"model": str(tmp_path / "alone1")}, {"model": models[2]}]}
    run(again, tmp_path / "alone2")
    for step in ("1", "2"):
        assert weights_digest(tmp_path / "chain" / f"step{step}") == weights_digest(tmp_path / f"alone{step}")


def _write(folder: Path, tensors: Mapping[str, torch.Tensor]) -> str:
    folder.mkdir()
    save_file(dict(tensors), folder / "model.safetensors")
    return str(folder)


def test_missing_policies(tmp_path: Path) -> None:
    """A tensor that some models lack is refused, taken from the base, averaged or left out, as asked."""
    one = {"a": torch.ones(4), "only_base": torch.full((2,), 5.0), "not_in_two": torch.full((3,), 1.0)}
    two = {"a": torch.full((4,), 3.0), "only_two": torch.full((2,), 7.0)}
    three = {"a": torch.full((4,), 5.0), "not_in_two": torch.full((3,), 9.0)}
    folders = [_write(tmp_path / name, t) for name, t in (("base", one), ("two", two), ("three", three))]
    recipe = recipe_of("task_arithmetic", folders[0], folders[1:])
    with pytest.raises(
        MismatchError, match=r"tensor not_in_two stands in model \S+base but not in \S+two; say in"
    ):
        run(recipe, tmp_path / "error")
    assert not (tmp_path / "error").exists()
    found = {}
    for policy in ("base", "present", "drop"):
        result = run({**recipe, "missing": policy}, tmp_path / f"out_{policy}")
        found[policy] = read_tensors(tmp_path / f"out_{policy}")
        assert any("only_two" in line for line in result.remarks)
        torch.testing.assert_close(found[policy].pop("a"), torch.full((4,), 1 + 0.7 * 2 + 0.7 * 4))
    assert_same(found["base"], {"only_base": one["only_base"], "not_in_two": one["not_in_two"]})
    assert_same(
        found["present"],
        {"only_base": one["only_base"], "not_in_two": three["not_in_two"], "only_two": two["only_two"]},
    )
    assert found["drop"] == {}


def test_tensor_missing_in_one_model_is_averaged_over_the_others(tmp_path: Path) -> None:
    tensors = [{"a": torch.ones(4)}, {"a": torch.ones(4), "b": torch.full((2,), 1.0)}]
    tensors.append({"a": torch.ones(4), "b": torch.full((2,), 4.0)})
    folders = [_write(tmp_path / f"m{i}", each) for i, each in enumerate(tensors)]
    run({**recipe_of("linear", "", folders), "missing": "present"}, tmp_path / "out")
    assert torch.equal(read_tensors(tmp_path / "out")["b"], torch.full((2,), 2.5))


def test_mixed_dtypes_are_merged_in_float32(tmp_path: Path) -> None:
    """The same tensor in four dtypes: the output has the first model's, or the one asked for."""
    generator = torch.Generator().manual_seed(2)
    dtypes = [torch.bfloat16, torch.float32, torch.float16, torch.float8_e4m3fn]
    tensors = [torch.randn(64, 33, generator=generator).to(dtype) for dtype in dtypes]
    folders = [_write(tmp_path / f"m{i}", {"w": tensor}) for i, tensor in enumerate(tensors)]
    recipe = {
        "merge_method": "linear",
        "models": [{"model": f} for f in folders],
        "parameters": {"weight": 1.0},
    }
    mean = sum(tensor.float() for tensor in tensors) / 4
    for name, dtype in (
        (None, torch.bfloat16),
        ("float16", torch.float16),
        ("float32", torch.float32),
        ("float8_e4m3fn", torch.float8_e4m3fn),
        ("float8_e5m2", torch.float8_e5m2),
    ):
        run(recipe, tmp_path / str(name), dtype=name)
        merged = read_tensors(tmp_path / str(name))["w"]
        assert merged.dtype == dtype
        assert torch.equal(merged.float(), mean.to(dtype).float()), name


def test_values_beyond_float8_are_counted(tmp_path: Path) -> None:
    tensor = torch.tensor([[1.0, 500.0, -1000.0, 448.0]])
    folder = _write(tmp_path / "m", {"w": tensor})
    recipe = {"merge_method": "linear", "models": [{"model": folder}], "parameters": {"weight": 1.0}}
    result = run(recipe, tmp_path / "out", dtype="float8_e4m3fn")
    assert read_tensors(tmp_path / "out")["w"].float().tolist() == [[1.0, 448.0, -448.0, 448.0]]
    [line] = [line for line in result.remarks if "beyond the range" in line]
    assert line.startswith("2 values of tensor w are beyond the range of F8_E4M3 and became 448")


def test_float64_is_merged_in_float64(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(2)
    tensors = [torch.randn(64, 33, generator=generator, dtype=torch.float64) for _ in range(3)]
    folders = [_write(tmp_path / f"m{i}", {"w": tensor}) for i, tensor in enumerate(tensors)]
    recipe = recipe_of("task_arithmetic", folders[0], folders[1:])
    run(recipe, tmp_path / "out")
    wanted = tensors[0] + 0.7 * (tensors[1] - tensors[0]) + 0.7 * (tensors[2] - tensors[0])
    torch.testing.assert_close(read_tensors(tmp_path / "out")["w"], wanted, rtol=1e-14, atol=1e-14)


def _write_lora(folder: Path, pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]], **config: Any) -> str:
    folder.mkdir()
    tensors = {}
    for module, (a, b) in pairs.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    return str(folder)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_adapter_equals_the_model_merged_by_hand(
    tiny_checkpoints: Callable[..., Any], tmp_path: Path, architecture: str
) -> None:
    """W + s B A, with ranks that differ, and transposed for GPT-2's Conv1D."""
    family = tiny_checkpoints(architecture)
    base = read_tensors(family.base)
    is_conv1d = architecture == "gpt2"
    modules = (
        {"transformer.h.0.attn.c_attn": 2, "transformer.h.1.mlp.c_fc": 5}
        if is_conv1d
        else {"model.layers.0.self_attn.q_proj": 2, "model.layers.1.mlp.down_proj": 5}
    )
    generator = torch.Generator().manual_seed(4)
    pairs, by_hand = {}, dict(base)
    for module, rank in modules.items():
        weight = base[f"{module}.weight"]
        num_out, num_in = weight.T.shape if is_conv1d else weight.shape
        a = torch.randn(rank, num_in, generator=generator)
        b = torch.randn(num_out, rank, generator=generator)
        pairs[module] = (a, b)
        update = 8 / rank * (b @ a)
        by_hand[f"{module}.weight"] = weight + (update.T if is_conv1d else update)
    ranks = {module.split(".")[-1]: rank for module, rank in modules.items()}
    adapter = _write_lora(
        tmp_path / "lora", pairs, r=99, lora_alpha=8, rank_pattern=ranks, fan_in_fan_out=is_conv1d
    )
    run({"merge_method": "passthrough", "models": [{"model": f"{family.base}+{adapter}"}]}, tmp_path / "out")
    merged = read_tensors(tmp_path / "out")
    assert merged.keys() == by_hand.keys()
    for name, tensor in by_hand.items():
        # The product is summed in another order; the rest is the same float32.
        torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-5)
    other = str(family.models[0])
    dense = _write(tmp_path / "dense", {name: tensor.contiguous() for name, tensor in merged.items()})
    for name, model in (("adapted", f"{family.base}+{adapter}"), ("plain", dense)):
        run(recipe_of("task_arithmetic", str(family.base), [model, other]), tmp_path / name)
    adapted, plain = read_tensors(tmp_path / "adapted"), read_tensors(tmp_path / "plain")
    for name in plain:
        torch.testing.assert_close(adapted[name], plain[name], rtol=1e-6, atol=1e-6)


def test_adapter_is_the_same_for_any_slice(tmp_path: Path) -> None:
    """A large adapted matrix is cut; its rows get the same bytes as in one piece."""
    generator = torch.Generator().manual_seed(6)
    base = _write(tmp_path / "base", {"m.q_proj.weight": torch.randn(1111, 1000, generator=generator)})
    pair = (torch.randn(7, 1000, generator=generator), torch.randn(1111, 7, generator=generator))
    adapter = _write_lora(tmp_path / "lora", {"m.q_proj": pair}, r=7, lora_alpha=14)
    recipe = recipe_of("ties", base, [f"{base}+{adapter}"])
    for slice_mib in (1, 1024):
        run(recipe, tmp_path / f"s{slice_mib}", slice_mib=slice_mib)
    assert weights_digest(tmp_path / "s1") == weights_digest(tmp_path / "s1024")


def test_pickles_are_read_when_allowed(tiny_checkpoints: Callable[..., Any], tmp_path: Path) -> None:
    family = tiny_checkpoints("llama", dtype="bfloat16")
    folders = []
    for path in (family.base, *family.models):
        folder = tmp_path / path.name
        folder.mkdir()
        torch.save(read_tensors(path), folder / "pytorch_model.bin")
        (folder / "config.json").write_text((path / "config.json").read_text())
        folders.append(str(folder))
    run(recipe_of("ties", folders[0], folders[1:]), tmp_path / "pickles", allow_pickle=True)
    run(recipe_of("ties", str(family.base), [str(model) for model in family.models]), tmp_path / "plain")
    assert_same(read_tensors(tmp_path / "pickles"), read_tensors(tmp_path / "plain"))


def test_output_says_what_was_done(matrices: list[str], reference: tuple[Path, MergeResult]) -> None:
    """Resolved recipe, seed, versions, fingerprints, and per tensor its treatment, norm and checksum."""
    folder = reference[0] / "ties"
    manifest = json.loads((folder / "raymerge_manifest.json").read_text())
    assert manifest["inputs"].keys() == set(matrices)
    assert manifest["seed"] == 0 and "torch" in manifest["versions"]
    merged = read_tensors(folder)
    assert manifest["tensors"].keys() == merged.keys()
    row = manifest["tensors"]["model.layers.1.mlp.weight"]
    assert row["method"] == "ties" and row["base"] == matrices[0] and row["models"] == matrices[1:]
    assert row["norm"] == pytest.approx(float(merged["model.layers.1.mlp.weight"].double().norm()), rel=1e-5)
    assert row["num_nonfinite"] == 0
    assert manifest["tensors"]["model.layers.0.mask"]["method"] == "copy"
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    (read,), _ = load_recipes((folder / "raymerge_recipe.yaml").read_text())
    assert (
        read.merge_method == "ties"
        and [use.model.key for use in read.modules[0].slices[0].sources] == matrices[1:]
    )


def test_seed_decides_the_masks(
    matrices: list[str], reference: tuple[Path, MergeResult], tmp_path: Path
) -> None:
    base, *models = matrices
    recipe = recipe_of("dare_linear", base, models, dtype="float32")
    for name, seed in (("zero", 0), ("one", 1)):
        run(recipe, tmp_path / name, seed=seed)
    assert weights_digest(tmp_path / "zero") == weights_digest(reference[0] / "dare_linear")
    assert weights_digest(tmp_path / "one") != weights_digest(tmp_path / "zero")


def test_python_api_merges_and_plans(tiny_checkpoints: Callable[..., Any], tmp_path: Path) -> None:
    import raymerge

    family = tiny_checkpoints("llama")
    recipe = recipe_of("ties", str(family.base), [str(model) for model in family.models])
    planned = raymerge.plan(recipe)
    result = raymerge.merge(recipe, tmp_path / "out", in_process=True, workers=1)
    assert result.num_tasks == planned["num_tasks"]
    assert result.totals.write_bytes == planned["write_bytes"]
    raymerge.verify(tmp_path / "out", load=False)
