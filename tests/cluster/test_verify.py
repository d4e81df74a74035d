"""Verifying outputs: a good one passes, and each way of damaging it is named."""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from raymerge.cli.main import main
from raymerge.cluster.load_check import check_load
from raymerge.cluster.verify import verify
from raymerge.merge_actors.checkpoint.folder import open_checkpoint
from raymerge.merge_actors.checksum import checksum_chunk_bytes
from raymerge.merge_actors.errors import VerifyError

MANIFEST = "raymerge_manifest.json"


def _checksum(data: bytes, chunk_bytes: int) -> str:
    """Sum chunk checksums as the format says, apart from the code that is tested."""
    starts = range(0, len(data), chunk_bytes)
    sums = [
        xxhash.xxh3_64_intdigest(data[at : at + chunk_bytes], seed=number) for number, at in enumerate(starts)
    ]
    return f"{sum(sums) % 2**64:016x}"


def _write_manifest(folder: Path, *, chunk_bytes: int | None = None) -> None:
    """Describe a folder as a merge would have."""
    checkpoint = open_checkpoint(folder)
    rows = {}
    for info in checkpoint.tensors.values():
        data = Path(info.file).read_bytes()[info.begin : info.end]
        length = chunk_bytes or checksum_chunk_bytes(info.shape, info.dtype)
        rows[info.name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "file": os.path.basename(info.file),
            "checksum": _checksum(data, length),
            "checksum_chunk_bytes": length,
        }
    files = {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}
    manifest = {"format_version": 1, "files": files, "tensors": rows}
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.fixture
def output(tiny_checkpoints: Callable[..., Any], tmp_path: Path) -> Path:
    """Return a sharded output in float32 that nothing is wrong with."""
    folder = tmp_path / "out"
    shutil.copytree(tiny_checkpoints("llama", sharded=True).models[0], folder)
    _write_manifest(folder)
    return folder


def _manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    return found


def _edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def _refused(folder: Path, pattern: str, *, load: bool = False) -> None:
    with pytest.raises(VerifyError, match=pattern):
        verify(folder, load=load)


@pytest.mark.parametrize("architecture", ["llama", "bert", "gpt2", "t5"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_good_output_passes_and_loads(
    tiny_checkpoints: Callable[..., Any], tmp_path: Path, architecture: str, dtype: str
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(tiny_checkpoints(architecture, dtype=dtype).models[0], folder)
    _write_manifest(folder)
    (found,) = verify(folder).outputs
    assert found.remarks == ()
    assert found.num_bytes == open_checkpoint(folder).num_bytes
    assert found.load is not None
    assert (found.load.how, found.load.missing_keys, found.load.unexpected_keys) == ("loaded", (), ())
    assert found.load.num_tokens == 96


@pytest.mark.parametrize("architecture", ["llama", "bert", "gpt2", "t5"])
def test_an_output_larger_than_memory_is_compared_with_its_class(
    tiny_checkpoints: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    monkeypatch.setattr("raymerge.cluster.load_check.available_bytes", lambda: 0)
    checkpoint = open_checkpoint(tiny_checkpoints(architecture).base)
    found = check_load(checkpoint.folder, checkpoint.tensors, checkpoint.config)
    assert (found.how, found.missing_keys, found.unexpected_keys) == ("compared", (), ())
    tensors = dict(checkpoint.tensors)
    name = next(
        name for name in tensors if name.endswith("norm.weight") or "ln_1" in name or "LayerNorm" in name
    )
    tensors["surplus"] = tensors.pop(name)
    found = check_load(checkpoint.folder, tensors, checkpoint.config)
    assert found.missing_keys == (name,)
    assert len(found.unexpected_keys) == 1


def test_a_wrong_shape_is_found_without_loading(
    tiny_checkpoints: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("raymerge.cluster.load_check.available_bytes", lambda: 0)
    folder = tmp_path / "out"
    shutil.copytree(tiny_checkpoints("llama").base, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    checkpoint = open_checkpoint(folder)
    with pytest.raises(
        VerifyError, match=r"has the shape \[.*80.*\], but LlamaForCausalLM .* wants \[.*48.*\]"
    ):
        check_load(checkpoint.folder, checkpoint.tensors, checkpoint.config)


def test_a_merge_passes(tiny_checkpoints: Callable[..., Any], tmp_path: Path) -> None:
    import raymerge

    family = tiny_checkpoints("llama", dtype="bfloat16", sharded=True)
    models = [{"model": str(folder), "parameters": {"weight": 0.5}} for folder in family.models]
    recipes: list[Any] = [
        {"name": method, "merge_method": method, "base_model": str(family.base), "models": models}
        for method in ("task_arithmetic", "dare_linear")
    ]
    for recipe in recipes[1:]:
        recipe["parameters"] = {"density": 0.5}
    out = tmp_path / "campaign"
    raymerge.merge(recipes, out, in_process=True, out_shard_size="30KB")
    found = raymerge.verify(out)
    assert [os.path.basename(each.folder) for each in found.outputs] == ["dare_linear", "task_arithmetic"]
    assert all(each.num_files > 1 and each.load and each.load.how == "loaded" for each in found.outputs)
    shard = sorted((out / "dare_linear").glob("*.safetensors"))[-1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    _refused(out, f"checksum of tensor .* in {shard} is [0-9a-f]{{16}}; the manifest says [0-9a-f]{{16}}")


def test_checksums_do_not_depend_on_how_the_reader_cuts(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write_manifest(output, chunk_bytes=96)
    verify(output, load=False)
    monkeypatch.setattr("raymerge.cluster.verify._PIECE_BYTES", 1000)
    verify(output, load=False)


@pytest.mark.parametrize("position", [0, 0.5, 1])
def test_one_flipped_bit_is_found(output: Path, position: float) -> None:
    shard = sorted(output.glob("*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little")
    data[begin + math.floor(position * (len(data) - 1 - begin))] ^= 1
    shard.write_bytes(data)
    _refused(output, f"checksum of tensor .* in {shard} is .*: the file has changed since it was written")


def test_swapped_chunks_are_found(tmp_path: Path) -> None:
    save_file({"weight": torch.arange(64.0)}, tmp_path / "model.safetensors")
    _write_manifest(tmp_path, chunk_bytes=128)
    save_file({"weight": torch.arange(64.0).view(2, 32).flip(0).reshape(-1)}, tmp_path / "model.safetensors")
    _refused(tmp_path, "checksum of tensor weight")


def test_files_are_checked(output: Path) -> None:
    shard = sorted(output.glob("*.safetensors"))[0]
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    _refused(output, f"{shard} has {len(data) - 1:,} bytes; the manifest says {len(data):,}")
    shard.unlink()
    _refused(output, f"{shard} is missing; the manifest has it with {len(data):,} bytes")
    shard.write_bytes(data)
    shutil.copy(shard, output / "stray.safetensors")
    _refused(output, r"stray\.safetensors does not belong to the output")


def test_a_corrupt_header_is_found(output: Path) -> None:
    shard = sorted(output.glob("*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[:8] = (1 << 40).to_bytes(8, "little")
    shard.write_bytes(data)
    _refused(output, "claims a header of")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("dtype", "F16", "is F32; the manifest says F16"),
        ("shape", [1], r"is \[32\]; the manifest says \[1\]"),
    ],
)
def test_tensors_are_held_against_the_manifest(output: Path, key: str, value: Any, words: str) -> None:
    _edit_manifest(output, lambda manifest: manifest["tensors"]["model.norm.weight"].update({key: value}))
    _refused(output, f"{key} of tensor model.norm.weight in .*safetensors {words}")


def test_missing_and_extra_tensors_are_named(output: Path) -> None:
    def rename(manifest: dict[str, Any]) -> None:
        manifest["tensors"]["gone"] = manifest["tensors"]["model.norm.weight"]

    _edit_manifest(output, rename)
    _refused(output, f"tensor gone is in no file of {output}; the manifest has it in model-")
    _write_manifest(output)
    _edit_manifest(output, lambda manifest: manifest["tensors"].pop("model.norm.weight"))
    _refused(output, "tensor model.norm.weight in .* is not in the manifest")


def test_the_index_is_checked(output: Path) -> None:
    path = output / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = "model-00009-of-00009.safetensors"
    path.write_text(json.dumps(index))
    _refused(output, "puts tensor model.norm.weight into model-00009-of-00009.safetensors; the manifest says")
    index["weight_map"] = {name: row["file"] for name, row in _manifest(output)["tensors"].items()}
    path.write_text(json.dumps(index))
    verify(output, load=False)
    index["weight_map"]["surplus"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))
    _refused(output, "puts tensor surplus into model-00001-of-.*; the manifest says there is no such tensor")
    path.unlink()
    _refused(output, "cannot read .*index.json")


def test_a_tensor_belongs_to_one_file_and_to_the_one_of_the_manifest(tmp_path: Path) -> None:
    one, two = tmp_path / "model-00001-of-00002.safetensors", tmp_path / "model-00002-of-00002.safetensors"
    save_file({"a": torch.ones(8)}, one)
    save_file({"b": torch.ones(8)}, two)
    _write_manifest(tmp_path)
    _edit_manifest(tmp_path, lambda manifest: manifest["tensors"]["b"].update(file=one.name))
    _refused(tmp_path, f"file of tensor b in {two} is {two.name}; the manifest says {one.name}")
    _write_manifest(tmp_path)
    save_file({"a": torch.ones(8)}, two)
    _refused(tmp_path, f"tensor a stands in both {one} and {two}")


def test_a_damaged_or_newer_manifest_is_named(output: Path) -> None:
    _edit_manifest(output, lambda manifest: manifest.update(format_version=9))
    _refused(output, "has the format_version 9, this raymerge reads 1")
    _write_manifest(output)
    _edit_manifest(output, lambda manifest: manifest["tensors"]["model.norm.weight"].pop("checksum"))
    _refused(output, f"{MANIFEST} is damaged")
    for damage in ({"checksum": "0123"}, {"file": "elsewhere.safetensors"}, {"checksum_chunk_bytes": 0}):
        _write_manifest(output)
        _edit_manifest(
            output, lambda manifest, row=damage: manifest["tensors"]["model.norm.weight"].update(row)
        )
        _refused(output, f"{MANIFEST} is damaged")
    (output / MANIFEST).write_text("{")
    _refused(output, "is not valid JSON")
    (output / MANIFEST).unlink()
    _refused(output, f"neither {output} nor a folder in it holds {MANIFEST}")
    _refused(output / "absent", "is not a folder")


def test_small_files_have_to_be_readable(output: Path) -> None:
    (output / "tokenizer.json").write_text("{")
    _refused(output, r"tokenizer\.json cannot be read as JSON")


def test_what_transformers_refuses_is_an_error(output: Path) -> None:
    config = json.loads((output / "config.json").read_text())
    (output / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    _refused(output, f"transformers cannot load the weights of {output}: RuntimeError", load=True)
    (output / "config.json").write_text(json.dumps(config | {"model_type": "unheard_of"}))
    _refused(output, f"transformers cannot load the config.json of {output}: ", load=True)
    (output / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((output / "tokenizer.json").read_text())
    (output / "tokenizer.json").write_text(json.dumps(tokenizer | {"model": {"type": "unheard_of"}}))
    _refused(output, f"transformers cannot load the tokenizer of {output}: ", load=True)


def test_weights_of_another_architecture_are_an_error(
    tiny_checkpoints: Callable[..., Any], tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(tiny_checkpoints("gpt2").base, folder)
    shutil.copy(tiny_checkpoints("llama").base / "config.json", folder / "config.json")
    _write_manifest(folder)
    _refused(folder, "no tensor of .* is a parameter of LlamaForCausalLM", load=True)


def test_missing_and_unexpected_keys_are_remarks(
    tiny_checkpoints: Callable[..., Any], tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(tiny_checkpoints("llama").base, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["surplus"] = tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    _write_manifest(folder)
    (found,) = verify(folder).outputs
    assert found.load is not None
    assert found.load.missing_keys == ("model.norm.weight",)
    assert found.load.unexpected_keys == ("surplus",)
    assert found.remarks == (
        f"{folder}: 1 tensor (model.norm.weight) of LlamaForCausalLM not in the output: random when it is loaded",
        f"{folder}: 1 tensor (surplus) of the output unknown to LlamaForCausalLM",
    )


def test_code_of_a_checkpoint_is_not_run_unasked(output: Path) -> None:
    config = json.loads((output / "config.json").read_text())
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (output / "evil.py").write_text("raise SystemExit('ran')")
    (output / "config.json").write_text(json.dumps(config | {"auto_map": auto_map}))
    (found,) = verify(output).outputs  # a Llama is what transformers takes for one
    assert found.load is not None and found.load.how == "loaded"
    (output / "config.json").write_text(json.dumps(config | {"auto_map": auto_map, "model_type": "evil"}))
    (found,) = verify(output).outputs
    assert found.load is not None and found.load.how == "skipped"
    assert "evil.py), which is not run unasked" in found.remarks[0]


def test_a_tokenizer_longer_than_the_embeddings_is_a_remark(output: Path) -> None:
    path = output / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["beyond"] = 96
    path.write_text(json.dumps(content))
    (found,) = verify(output).outputs
    assert found.remarks == (f"{output}: its tokenizer has 97 tokens, but its embeddings only 96 rows",)


def test_the_command(output: Path) -> None:
    result = CliRunner().invoke(main, ["verify", str(output), "--no-load"])
    assert result.exit_code == 0 and "tensors in" in result.stdout and "as written" in result.stdout
    result = CliRunner().invoke(main, ["verify", str(output), "--json"])
    (found,) = json.loads(result.stdout)["outputs"]
    assert found["folder"] == str(output) and found["load"]["architecture"] == "LlamaForCausalLM"
    (output / "config.json").write_text("{")
    result = CliRunner().invoke(main, ["verify", str(output)])
    assert result.exit_code == 1 and "config.json cannot be read as JSON" in result.stderr
