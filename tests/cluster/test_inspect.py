"""Inspecting checkpoints: what they hold, where they differ, verdicts on real-shaped tiny models."""

import dataclasses
import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from raymerge.cli.main import main
from raymerge.cluster.compare import read_vocabulary
from raymerge.cluster.inspect import Inspection, inspect, quick_check, sampled_remarks
from raymerge.cluster.inspect_text import inspection_text
from raymerge.cluster.matched import LoadedModel
from raymerge.cluster.measure import measure, select_tensors, spread_strips
from raymerge.cluster.recipe import load_recipes
from raymerge.merge_actors.checkpoint.folder import open_checkpoint
from raymerge.merge_actors.errors import CheckpointError, RecipeError

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def base(tiny_checkpoints: Callable[..., Any]) -> Path:
    folder: Path = tiny_checkpoints("llama").base
    return folder


@pytest.fixture
def variant(base: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return a maker of copies of the base with changed tensors."""

    def make(name: str, change: Callable[[Tensors], Tensors], **config: Any) -> Path:
        folder = tmp_path / name
        shutil.copytree(base, folder)
        save_file(
            change(load_file(base / "model.safetensors")), folder / "model.safetensors", {"format": "pt"}
        )
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(settings | config))
        return folder

    return make


def _noise(scale: float, seed: int = 0) -> Callable[[Tensors], Tensors]:
    generator = torch.Generator().manual_seed(seed)

    def change(tensors: Tensors) -> Tensors:
        return {
            name: tensor + torch.randn(tensor.shape, generator=generator) * scale
            for name, tensor in tensors.items()
        }

    return change


def _random_backbone(tensors: Tensors) -> Tensors:
    """Return the same architecture started at random: matrices new, norms at 1 as everywhere."""
    generator = torch.Generator().manual_seed(99)
    return {
        name: torch.randn(tensor.shape, generator=generator) * 0.02 if tensor.dim() > 1 else tensor.clone()
        for name, tensor in tensors.items()
    }


def _unchanged(tensors: Tensors) -> Tensors:
    return tensors


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        (_unchanged, "identical"),
        (_noise(5e-4), "SFT-sized deltas"),
        (_noise(0.03), "continued pretraining"),
        (_random_backbone, "different backbone"),
    ],
    ids=["copy", "fine-tuned", "pretrained on", "random backbone"],
)
@pytest.mark.parametrize("sample", [None, 0.3])
def test_verdicts(
    base: Path, variant: Callable[..., Path], change: Any, verdict: str, sample: float | None
) -> None:
    found = inspect([str(variant("model", change))], str(base), sample=sample)
    (comparison,) = found.comparisons
    assert (comparison.verdict, comparison.differences) == (verdict, ())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fine_tune_is_one_in_every_dtype_and_sharding(
    tiny_checkpoints: Callable[..., Any], dtype: str
) -> None:
    base = tiny_checkpoints("llama", dtype=dtype).base
    model = tiny_checkpoints("llama", dtype=dtype, sharded=True).models[0]
    (comparison,) = inspect([str(model)], str(base)).comparisons
    assert (comparison.verdict, comparison.differences) == ("SFT-sized deltas", ())


def test_figures_equal_those_over_whole_tensors(tiny_checkpoints: Callable[..., Any]) -> None:
    family = tiny_checkpoints("llama")
    found = inspect([str(model) for model in family.models[:2]], str(family.base))
    base, first, second = (
        torch.cat([tensor.double().flatten() for tensor in load_file(folder / "model.safetensors").values()])
        for folder in (family.base, *family.models[:2])
    )
    # Deltas are formed in float32.
    deltas = [(first.float() - base.float()).double(), (second.float() - base.float()).double()]
    comparison = found.comparisons[0]
    assert comparison.norm == pytest.approx(float(deltas[0].norm()), rel=1e-9)
    assert comparison.relative_norm == pytest.approx(float(deltas[0].norm() / base.norm()), rel=1e-9)
    assert comparison.max_magnitude == float(deltas[0].abs().max())
    assert comparison.equal_fraction == float((deltas[0] == 0).double().mean())
    median = float(deltas[0].abs().median())
    assert comparison.quantiles[0] == pytest.approx(median, rel=0.01)
    (pair,) = found.pairs
    assert pair.cosine == pytest.approx(
        float(torch.nn.functional.cosine_similarity(*deltas, dim=0)), abs=1e-9
    )
    both = (deltas[0] != 0) & (deltas[1] != 0)
    conflicts = both & (deltas[0].sign() != deltas[1].sign())
    assert pair.conflict_fraction == int(conflicts.sum()) / int(both.sum())
    assert found.read_bytes == 3 * 4 * comparison.num_elements


def test_figures_do_not_depend_on_threads_or_blocks(
    tiny_checkpoints: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    family = tiny_checkpoints("gpt2")
    checkpoints = [open_checkpoint(folder) for folder in (family.base, *family.models)]
    comparisons, pairs = [(0, 1), (0, 2), (0, 3)], [(0, 1), (1, 2)]
    monkeypatch.setattr("raymerge.cluster.measure._BLOCK_ELEMENTS", 700)
    monkeypatch.setattr("raymerge.cluster.measure._PIECE_ELEMENTS", 1500)
    runs = [measure(select_tensors(checkpoints, None), comparisons, pairs, threads) for threads in (1, 3)]
    monkeypatch.undo()
    large = measure(select_tensors(checkpoints, None), comparisons, pairs, 2)
    # Compared as texts, which are exact: a cosine with a tensor of zeros is NaN, and so unequal to itself.
    first, second = ([repr(figures.tensors) for figures in run.deltas] for run in runs)
    assert first == second
    assert runs[0].agreements == runs[1].agreements
    for small, whole in zip(runs[0].deltas, large.deltas, strict=True):
        for one, other in zip(small.tensors, whole.tensors, strict=True):
            assert (one.name, one.quantiles, one.equal_fraction) == (
                other.name,
                other.quantiles,
                other.equal_fraction,
            )
            assert one.norm == pytest.approx(other.norm, rel=1e-12)


def test_float64_differences_below_float32_are_seen(base: Path, variant: Callable[..., Path]) -> None:
    one = variant("one", lambda tensors: {name: tensor.double() for name, tensor in tensors.items()})
    two = variant("two", lambda tensors: {name: tensor.double() + 1e-13 for name, tensor in tensors.items()})
    (comparison,) = inspect([str(two)], str(one)).comparisons
    assert comparison.equal_fraction == 0 and comparison.verdict == "SFT-sized deltas"
    # Against the float32 original, the same values are equal whatever the dtype.
    (comparison,) = inspect([str(one)], str(base)).comparisons
    assert comparison.verdict == "identical"
    count = len(load_file(base / "model.safetensors"))
    assert [each.text for each in comparison.differences] == [
        f"{count} tensors of another dtype: F32 in {base}, F64 in {one}"
    ]


def test_what_a_checkpoint_holds(tiny_checkpoints: Callable[..., Any]) -> None:
    family = tiny_checkpoints("llama", dtype="bfloat16", sharded=True)
    found = inspect([str(family.models[0])])
    (model,) = found.models
    assert (model.architecture, model.num_layers, model.vocabulary_rows) == ("LlamaForCausalLM", 2, 96)
    assert model.dtypes == {"BF16": model.num_parameters}
    assert (model.num_bytes, found.comparisons, found.remarks) == (2 * model.num_parameters, (), ())


def test_without_a_base_models_are_compared_with_each_other(tiny_checkpoints: Callable[..., Any]) -> None:
    names = [str(folder) for folder in tiny_checkpoints("llama").models]
    found = inspect(names)
    assert [(each.base, each.model) for each in found.comparisons] == [
        (names[0], names[1]),
        (names[0], names[2]),
        (names[1], names[2]),
    ]
    assert found.pairs == () and "no base is given" in found.remarks[0]


def _texts(found: Inspection) -> list[str]:
    return [difference.text for difference in found.comparisons[0].differences]


def test_differences_of_headers_and_config_are_named(base: Path, variant: Callable[..., Path]) -> None:
    def change(tensors: Tensors) -> Tensors:
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["extra.weight"] = torch.ones(3)
        tensors["lm_head.weight"] = torch.ones(97, 32)
        tensors["model.embed_tokens.weight"] = torch.ones(97, 32)
        tensors["model.norm.weight"] = tensors["model.norm.weight"].half()
        return tensors

    model = variant(
        "model", change, vocab_size=97, rope_parameters={"rope_theta": 5e5, "rope_type": "default"}
    )
    assert _texts(inspect([str(model)], str(base))) == [
        f"1 tensor only in {base}, not in {model}: model.layers.1.mlp.up_proj.weight",
        f"1 tensor only in {model}, not in {base}: extra.weight",
        f"2 tensors of another shape, such as lm_head.weight: [96, 32] in {base}, [97, 32] in {model}",
        f"1 tensor of another dtype: F32 in {base}, F16 in {model}",
        f"embeddings have 96 rows in {base}, 97 in {model}",
        f"rope_theta is 10000.0 in {base}, 500000.0 in {model}",
        f"vocab_size is 96 in {base}, 97 in {model}",
    ]


def test_rope_theta_is_found_where_older_configs_have_it(base: Path, variant: Callable[..., Path]) -> None:
    model = variant("model", _unchanged)
    config = json.loads((model / "config.json").read_text())
    del config["rope_parameters"]
    (model / "config.json").write_text(json.dumps(config | {"rope_theta": 10000.0, "rope_scaling": None}))
    assert _texts(inspect([str(model)], str(base))) == []
    (model / "config.json").write_text(json.dumps(config | {"rope_theta": 20000.0}))
    assert _texts(inspect([str(model)], str(base))) == [
        f"rope_theta is 10000.0 in {base}, 20000.0 in {model}"
    ]


def test_a_tied_head_that_only_one_model_stores_is_no_difference(
    tiny_checkpoints: Callable[..., Any],
) -> None:
    family = tiny_checkpoints("llama", tied=True)
    assert _texts(inspect([str(family.models[0])], str(family.base))) == []


def test_other_tokens_and_other_ids_are_named(base: Path, variant: Callable[..., Path]) -> None:
    model = variant("model", _unchanged)
    path = model / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["new"] = vocabulary.pop("word7")
    vocabulary["word8"], vocabulary["word9"] = vocabulary["word9"], vocabulary["word8"]
    path.write_text(json.dumps(content))
    assert _texts(inspect([str(model)], str(base))) == [
        f"1 token only in {base} ('word7'); 1 token only in {model} ('new'); "
        "2 tokens with another id ('word8' is 12 and 13)"
    ]


def test_unigram_tokenizers_list_their_tokens(tmp_path: Path) -> None:
    content = {"model": {"vocab": [["a", -1.0], ["b", -2.0]]}, "added_tokens": [{"content": "<x>", "id": 2}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert read_vocabulary(str(tmp_path)) == {"a": 0, "b": 1, "<x>": 2}
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a readable tokenizer"):
        read_vocabulary(str(tmp_path))


def test_another_architecture_is_named_and_has_no_figures(tiny_checkpoints: Callable[..., Any]) -> None:
    base, other = tiny_checkpoints("llama").base, tiny_checkpoints("gpt2").base
    (comparison,) = inspect([str(other)], str(base)).comparisons
    assert comparison.verdict == "different architecture"
    assert (
        comparison.reason
        == f"only 0% of the parameters of {base} have a counterpart of the same name and shape"
    )
    assert math.isnan(comparison.matrix_cosine)
    models = [str(other), str(tiny_checkpoints("llama").models[0])]
    lines = inspection_text(inspect(models, str(base))).splitlines()
    assert f"{other} - {base}" in "".join(lines) and not any(" nan" in line for line in lines)
    assert any(line.split() == [str(other), "-", str(base), "different", "architecture"] for line in lines)
    assert lines[-1].endswith("  nothing in common")


def test_a_model_that_did_not_move_has_no_cosine(base: Path, tiny_checkpoints: Callable[..., Any]) -> None:
    llama = tiny_checkpoints("llama")
    lines = inspection_text(inspect([str(llama.models[0]), str(llama.base)], str(llama.base))).splitlines()
    assert lines[-1].split()[-3:] == ["-", "0.0%", "-"]


def test_non_finite_and_integer_tensors_are_reported(base: Path, variant: Callable[..., Path]) -> None:
    def change(tensors: Tensors) -> Tensors:
        tensors["model.norm.weight"][3] = math.nan
        return tensors | {"position_ids": torch.arange(4)}

    found = inspect([str(variant("model", change))], str(base))
    assert found.comparisons[0].num_nonfinite == 1
    assert found.comparisons[0].norm == 0
    assert found.remarks == (f"note: 1 tensor of {found.models[1].model} without floats (I64) not compared",)


def test_arguments_are_checked(base: Path) -> None:
    for sample in (0.0, 1.5, math.nan):
        with pytest.raises(RecipeError, match=r"sample is .*; it must be in \(0, 1\]"):
            inspect([str(base)], sample=sample)
    with pytest.raises(RecipeError, match="no model to inspect"):
        inspect([])
    with pytest.raises(RecipeError, match="names an adapter, which inspect does not read"):
        inspect([f"{base}+adapter"])


@pytest.mark.parametrize("num_elements", [1, 99, 100, 101, 1000, 12_345])
@pytest.mark.parametrize("wanted", [1, 250, 900, 20_000])
def test_strips_are_spread_without_overlap(num_elements: int, wanted: int) -> None:
    strips = spread_strips(num_elements, wanted, strip=100)
    ends = [0, *(end for _, end in strips)]
    assert all(before <= begin < end for before, (begin, end) in zip(ends, strips, strict=False))
    taken = sum(end - begin for begin, end in strips)
    assert taken == num_elements if wanted >= num_elements or num_elements <= 100 else taken >= wanted - 50
    if len(strips) > 1:
        assert (strips[0][0], strips[-1][1]) == (0, num_elements)


def test_sampling_reads_its_share(tmp_path: Path) -> None:
    folders = []
    for seed, name in enumerate(("base", "model")):
        folders.append(tmp_path / name)
        folders[-1].mkdir()
        generator = torch.Generator().manual_seed(seed)
        save_file({"weight": torch.randn(1000, 1000, generator=generator)}, folders[-1] / "model.safetensors")
    found = inspect([str(folders[1])], str(folders[0]), sample=0.1)
    assert found.read_bytes == pytest.approx(2 * 4 * 100_000, rel=0.1)
    whole = inspect([str(folders[1])], str(folders[0]))
    assert found.comparisons[0].quantiles[1] == pytest.approx(whole.comparisons[0].quantiles[1], rel=0.02)


def _recipe(base: Path | None, *models: Path, method: str = "task_arithmetic") -> Any:
    document: dict[str, Any] = {
        "name": "one",
        "merge_method": method,
        "models": [{"model": str(model), "parameters": {"weight": 0.5}} for model in models],
    }
    if base is not None:
        document["base_model"] = str(base)
    (recipe,), _ = load_recipes(document)
    return recipe


def _check(*recipes: Any) -> list[str]:
    keys = [key for each in recipes for key in (each.donor.key, *(ref.key for ref in each.all_models()))]
    return quick_check(recipes, {key: LoadedModel(key, open_checkpoint(key)) for key in keys})


def test_the_quick_check_is_silent_for_fine_tunes(tiny_checkpoints: Callable[..., Any]) -> None:
    family = tiny_checkpoints("llama")
    assert _check(_recipe(family.base, *family.models)) == []
    assert _check(_recipe(None, *family.models, method="linear")) == []


def test_the_quick_check_warns(base: Path, variant: Callable[..., Path]) -> None:
    far, other, same = (
        variant("far", _noise(0.03)),
        variant("other", _random_backbone),
        variant("same", _unchanged),
    )
    remarks = _check(_recipe(base, far, other, same))
    assert [remark.split(" from base ")[0].split(" on sampled")[0] for remark in remarks[:1]] == [
        f"model {far}: median |delta| 0.02"
    ]
    assert "DARE does is known to fail there (arXiv:2311.03099)" in remarks[0]
    assert remarks[1].startswith(
        f"model {other}: sampled weights are unrelated to those of base {base} (cosine"
    )
    assert remarks[2:] == [
        f"note: model {same} equals base {base} in all sampled weights: it adds nothing to the merge"
    ]
    # Without a base nothing can be said about the size of deltas, but models should be related.
    remarks = _check(_recipe(None, base, far, other, method="linear"))
    assert len(remarks) == 1 and f"those of model {base}" in remarks[0]


def test_the_quick_check_skips_the_base_listed_as_a_model(base: Path, variant: Callable[..., Path]) -> None:
    tuned = variant("tuned", _noise(5e-4))
    assert _check(_recipe(base, base, tuned, method="linear")) == []
    assert _check(_recipe(base, base, base, method="linear")) == []


def test_the_quick_check_reads_a_model_once_for_many_recipes(
    base: Path, variant: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [variant(f"model{i}", _noise(0.03)) for i in range(3)]
    pairs = [_recipe(base, *pair) for pair in itertools.permutations(models, 2)]
    calls = []

    def spy(*arguments: Any) -> Any:
        calls.append(arguments)
        return measure(*arguments)

    monkeypatch.setattr("raymerge.cluster.inspect.measure", spy)
    remarks = _check(*pairs)
    assert len(calls) == 1 and len(remarks) == 3
    assert sorted(remarks) == sorted(_check(_recipe(base, *models)))


def test_the_quick_check_reads_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = {}
    for name in ("base", "model"):
        (tmp_path / name).mkdir()
        tensors = {f"layers.{i}.weight": torch.randn(400, 400) for i in range(60)}
        save_file(tensors, tmp_path / name / "model.safetensors")
        checkpoints[name] = open_checkpoint(tmp_path / name)
    seen = []

    def spy(*arguments: Any) -> Any:
        seen.append(measure(*arguments))
        return seen[-1]

    monkeypatch.setattr("raymerge.cluster.inspect.measure", spy)
    sampled_remarks(checkpoints, has_base=True)
    assert 0 < seen[0].read_bytes <= 2 * 48 * 4 * 8192 * 4


def test_the_command_prints_text_and_json(tiny_checkpoints: Callable[..., Any]) -> None:
    family = tiny_checkpoints("llama")
    names = [str(folder) for folder in family.models[:2]]
    arguments = ["inspect", *names, "--base", str(family.base)]
    result = CliRunner().invoke(main, [*arguments, "--tensors", "1"])
    assert result.exit_code == 0, result.output
    assert f"{names[0]} against {family.base}: SFT-sized deltas" in result.stdout
    assert "sign conflicts" in result.stdout and "LlamaForCausalLM" in result.stdout
    result = CliRunner().invoke(main, [*arguments, "--json"])
    document = json.loads(result.stdout)
    assert [each["verdict"] for each in document["comparisons"]] == ["SFT-sized deltas"] * 2
    assert document == inspect(names, str(family.base)).to_mapping()


def test_json_has_no_nan(tiny_checkpoints: Callable[..., Any]) -> None:
    found = inspect([str(tiny_checkpoints("gpt2").base)], str(tiny_checkpoints("llama").base))
    assert found.to_mapping()["comparisons"][0]["matrix_cosine"] is None
    json.dumps(found.to_mapping(), allow_nan=False)
    assert dataclasses.is_dataclass(found)


def test_the_command_exits_with_1_on_a_bad_model(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["inspect", str(tmp_path / "absent")])
    assert result.exit_code == 1
    assert "absent" in result.stderr and result.stdout == ""
