"""Merges whose inputs and outputs lie in an object store: the same bytes as on a disk, each source byte once."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from object_store import BUCKET, ObjectStore
from safetensors.torch import save_file

import raymerge
from raymerge.cluster import merge as merge_module
from raymerge.cluster.merge import merge
from raymerge.cluster.merge_result import MergeResult
from raymerge.cluster.options import MergeOptions
from raymerge.cluster.statistics import collect_statistics
from raymerge.cluster.statistics_options import StatisticsOptions
from raymerge.merge_actors.errors import OutputError, VerifyError
from raymerge.stats.data_rows import DataSpec

OPTIONS = {"in_process": True, "workers": 2, "out_shard_size": "40KB"}


@pytest.fixture
def family(
    tiny_checkpoints: Callable[..., Any], object_store: ObjectStore, request: pytest.FixtureRequest
) -> tuple[Any, dict[str, str], str]:
    """Return a family on disk, the URIs of its members by name, and a prefix of this test alone."""
    found = tiny_checkpoints("llama", sharded=True)
    prefix = request.node.name.replace("[", "-").replace("]", "")
    uris = {
        path.name: object_store.put(path, f"{prefix}/{path.name}") for path in (found.base, *found.models)
    }
    return found, uris, prefix


def recipe_of(
    base: Any, models: list[Any], method: str = "task_arithmetic", **parameters: Any
) -> dict[str, Any]:
    return {
        "merge_method": method,
        "base_model": str(base),
        "models": [{"model": str(model), "parameters": {"weight": 0.5}} for model in models],
        "parameters": parameters,
        "dtype": "float32",
    }


def weights(read: Callable[[str], bytes], names: list[str]) -> dict[str, bytes]:
    return {name: read(name) for name in names if name.endswith((".safetensors", ".index.json"))}


def on_disk(folder: Path) -> dict[str, bytes]:
    return weights(lambda name: (folder / name).read_bytes(), sorted(path.name for path in folder.iterdir()))


def in_store(store: ObjectStore, prefix: str) -> dict[str, bytes]:
    names = [key.removeprefix(f"{prefix}/") for key in store.keys(f"{prefix}/")]
    return weights(lambda name: store.get(f"{prefix}/{name}"), sorted(names))


def run(recipe: dict[str, Any], out: Any, **options: Any) -> MergeResult:
    return merge([recipe], out, MergeOptions(**{**OPTIONS, **options}))


def test_same_bytes_from_and_to_a_store(family: Any, object_store: ObjectStore, tmp_path: Path) -> None:
    found, uris, prefix = family
    local = run(recipe_of(found.base, [*found.models]), tmp_path / "local")
    recipe = recipe_of(uris["base"], [uris[path.name] for path in found.models])
    result = run(recipe, f"s3://{BUCKET}/{prefix}/out")
    assert result.outputs == (f"s3://{BUCKET}/{prefix}/out",)
    expected = on_disk(Path(local.outputs[0]))
    assert len(expected) > 3
    assert in_store(object_store, f"{prefix}/out") == expected
    there = {key.rpartition("/")[2] for key in object_store.keys(f"{prefix}/out/")}
    assert there == {path.name for path in Path(local.outputs[0]).iterdir()}
    assert object_store.unfinished_uploads(f"{prefix}/") == 0
    assert not object_store.keys(f"{prefix}/.out.raymerge/")


def test_mixed_places(family: Any, object_store: ObjectStore, tmp_path: Path) -> None:
    found, uris, prefix = family
    local = run(recipe_of(found.base, [found.models[0]]), tmp_path / "local")
    run(recipe_of(found.base, [uris["first"]]), tmp_path / "to-disk")
    run(recipe_of(uris["base"], [found.models[0]]), f"s3://{BUCKET}/{prefix}/out")
    expected = on_disk(Path(local.outputs[0]))
    assert on_disk(tmp_path / "to-disk") == expected == in_store(object_store, f"{prefix}/out")


def test_each_source_byte_is_fetched_once(
    family: Any, object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two recipes over the same models, some tensors cut into slices: counted by the server and by us."""
    found, uris, prefix = family

    def count_from_here(*arguments: Any) -> list[str]:
        object_store.forget()  # headers and samples are planning's
        return []

    monkeypatch.setattr(merge_module, "quick_check", count_from_here)
    recipes = [
        {**recipe_of(uris["base"], [uris["first"], uris["second"]], method), "name": method}
        for method in ("task_arithmetic", "linear")
    ]
    result = merge(recipes, f"s3://{BUCKET}/{prefix}/out", MergeOptions(**OPTIONS))
    fetched = object_store.fetched(r"\.safetensors$")
    assert all(
        end <= begin for (key, _, end), (other, begin, _) in itertools.pairwise(fetched) if key == other
    )
    num_bytes = sum(end - begin for _, begin, end in fetched)
    checkpoints = [raymerge.inspect([str(path)]).models[0] for path in (found.base, *found.models[:2])]
    assert num_bytes == result.totals.fetched_bytes == sum(each.num_bytes for each in checkpoints)


def test_stage_fetches_once_what_is_measured_first(
    object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TIES looks at a tensor that was cut several times; the node's copy answers all but the first."""
    generator = torch.Generator().manual_seed(5)
    uris, folders = [], []
    for name in ("base", "one", "two"):
        folders.append(tmp_path / name)
        folders[-1].mkdir()
        tensors = {
            "wide": torch.randn(1024, 640, generator=generator),
            "small": torch.randn(40, generator=generator),
        }
        save_file(tensors, folders[-1] / "model.safetensors")
        uris.append(object_store.put(folders[-1], f"stage/{name}"))
    monkeypatch.setattr(merge_module, "quick_check", lambda *arguments: object_store.forget() or [])
    options = {"slice_mib": 1, "out_shard_size": "5GB"}
    local = run(recipe_of(folders[0], folders[1:], "ties", density=0.4), tmp_path / "local", **options)
    recipe = recipe_of(uris[0], uris[1:], "ties", density=0.4)
    run(recipe, tmp_path / "plain", **options)
    measured_again = object_store.fetched(r"safetensors$")
    run(recipe, tmp_path / "staged", stage=str(tmp_path / "stage"), **options)
    fetched = object_store.fetched(r"safetensors$")
    sizes = [
        (f"stage/{folder.name}/model.safetensors", 0, (folder / "model.safetensors").stat().st_size)
        for folder in folders
    ]
    assert fetched == sizes
    assert sum(end - begin for _, begin, end in measured_again) > 2 * sum(size for _, _, size in sizes)
    run(recipe, tmp_path / "again", stage=str(tmp_path / "stage"), **options)  # what is staged stays
    assert not object_store.fetched(r"safetensors$")
    expected = on_disk(Path(local.outputs[0]))
    assert all(on_disk(tmp_path / name) == expected for name in ("plain", "staged", "again"))


def test_verify_and_inspect_and_plan_take_uris(
    family: Any, object_store: ObjectStore, tmp_path: Path
) -> None:
    found, uris, prefix = family
    recipe = recipe_of(uris["base"], [uris["first"]])
    out = f"s3://{BUCKET}/{prefix}/out"
    run(recipe, out)
    verified = raymerge.verify(out).outputs[0]
    assert verified.load is not None
    assert verified.load.how == "loaded" and not verified.load.missing_keys
    assert any("without the values" in remark for remark in verified.remarks)
    assert raymerge.inspect([out], base=str(found.base)).comparisons[0].model == out
    assert raymerge.plan(recipe)["recipes"][0]["num_files"] == 1
    name = next(key for key in object_store.keys(f"{prefix}/out/") if key.endswith(".safetensors"))
    data = bytearray(object_store.get(name))
    data[-1] ^= 1
    object_store.put_bytes(name, bytes(data))
    with pytest.raises(VerifyError, match="the file has changed since it was written"):
        raymerge.verify(out)


def test_adapter_and_statistics_in_a_store(
    tiny_checkpoints: Callable[..., Any], object_store: ObjectStore, tmp_path: Path
) -> None:
    """Measure a model in a store into the store, and merge by that; add an adapter that lies there too."""
    base = tiny_checkpoints("llama").base
    model = object_store.put(base, "kinds/model")
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"word{i} word{i + 1}"}) + "\n" for i in range(20)))
    data = DataSpec(source=str(texts), batch_tokens=64)
    options = StatisticsOptions(kind="gram", in_process=True, workers=1, data=data)
    statistics = f"s3://{BUCKET}/kinds/grams"
    result = collect_statistics(model, statistics, options)
    assert result.out == statistics
    with pytest.raises(OutputError, match=r"holds config\.json, .* and no manifest of raymerge"):
        collect_statistics(str(base), model, options)
    with pytest.raises(OutputError, match="exists; choose another folder or replace it with --overwrite"):
        collect_statistics(model, statistics, options)
    collect_statistics(str(base), tmp_path / "grams", options)
    for name in result.statistics.manifest["files"]:
        assert object_store.get(f"kinds/grams/{name}") == (tmp_path / "grams" / name).read_bytes()
    recipe = {
        "merge_method": "regmean",
        "models": [{"model": model, "statistics": statistics}, {"model": model, "statistics": statistics}],
    }
    run(recipe, f"s3://{BUCKET}/kinds/regmean")
    _write_adapter(tmp_path / "adapter")
    adapter = object_store.put(tmp_path / "adapter", "kinds/adapter")
    outs = []
    for name, spelled in (("here", f"{base}+{tmp_path / 'adapter'}"), ("there", f"{model}+{adapter}")):
        run({"merge_method": "passthrough", "models": [{"model": spelled}]}, tmp_path / name)
        outs.append(on_disk(tmp_path / name))
    assert outs[0] == outs[1]


def _write_adapter(folder: Path) -> None:
    folder.mkdir()
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file(
        {f"{module}.lora_A.weight": torch.ones(2, 32), f"{module}.lora_B.weight": torch.full((32, 2), 0.5)},
        folder / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def test_any_file_system_of_fsspec(tiny_checkpoints: Callable[..., Any], tmp_path: Path) -> None:
    family = tiny_checkpoints("llama")
    memory = fsspec.filesystem("memory")
    memory.put(str(family.base), "/models/base", recursive=True)
    memory.put(str(family.models[0]), "/models/first", recursive=True)
    local = run(recipe_of(family.base, [family.models[0]]), tmp_path / "local")
    result = run(recipe_of("memory://models/base", ["memory://models/first"]), "memory://models/out")
    assert result.outputs == ("memory://models/out",)
    assert raymerge.verify("memory://models/out").outputs[0].num_files > 1
    for name, data in on_disk(Path(local.outputs[0])).items():
        assert memory.cat_file(f"/models/out/{name}") == data
    with pytest.raises(OutputError, match="exists"):
        run(recipe_of("memory://models/base", ["memory://models/first"]), "memory://models/out")
