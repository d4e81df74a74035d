"""Vision towers: images from folders and columns, Grams against hooks on the whole model, RegMean++ on top."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import raymerge
from raymerge.cluster.statistics import collect_statistics
from raymerge.cluster.statistics_options import StatisticsOptions
from raymerge.merge_actors.errors import CheckpointError, RecipeError
from raymerge.merge_actors.methods.gram_matrix import unpack_upper
from raymerge.stats.data_rows import DataSpec
from raymerge.stats.image_data import ImageData
from raymerge.stats.statistics_file import open_statistics

pytest.importorskip("PIL")
NUM_IMAGES = 12


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write images of several sizes and formats, in folders of two classes."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for number in range(NUM_IMAGES):
        height, width = 20 + 3 * number, 40 - 2 * number
        pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
        place = folder / f"class{number % 2}"
        place.mkdir(exist_ok=True)
        Image.fromarray(pixels.numpy()).save(place / f"{number:02d}.{('png', 'jpg')[number % 3 == 0]}")
    (folder / "notes.txt").write_text("no image\n")
    return folder


def _parquet(images: Path, path: Path) -> Path:
    import pyarrow
    import pyarrow.parquet

    files = sorted(images.glob("*/*.*"))
    rows = [
        {"image": {"bytes": file.read_bytes(), "path": None}, "label": int(file.parent.name[-1])}
        for file in files
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([*rows, {"image": None, "label": 1}]), path)
    return path


@pytest.fixture(scope="module")
def make_tower(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """Return a maker of tiny vision models of a kind and seed, with their image processors."""

    def make(kind: str, seed: int) -> Path:
        from transformers import CLIPVisionConfig, CLIPVisionModel, ViTConfig, ViTForImageClassification
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
        from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

        folder = tmp_path_factory.mktemp(f"{kind}{seed}")
        shape = {
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
        }
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            if kind == "vit":
                ViTForImageClassification(ViTConfig(**shape, num_labels=2)).save_pretrained(folder)
                ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
            else:
                CLIPVisionModel(CLIPVisionConfig(**shape)).save_pretrained(folder)
                processor = CLIPImageProcessorPil(
                    size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
                )
                processor.save_pretrained(folder)
        return folder

    return make


def _reference(folder: Path, images: Path) -> dict[str, tuple[torch.Tensor, int]]:
    """Sum Grams by hooks, an image at a time, in float64."""
    from PIL import Image
    from transformers import AutoImageProcessor, CLIPVisionModel, ViTForImageClassification

    kind = ViTForImageClassification if "vit" in folder.name else CLIPVisionModel
    model = kind.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    found: dict[str, tuple[torch.Tensor, int]] = {}

    def hook_of(name: str) -> Any:
        def hook(module: Any, arguments: Any) -> None:
            rows = arguments[0].reshape(-1, arguments[0].shape[-1]).double()
            gram, num_rows = found.get(name, (torch.zeros(rows.shape[1], rows.shape[1]).double(), 0))
            found[name] = (gram + rows.T @ rows, num_rows + rows.shape[0])

        return hook

    stored = load_file(folder / "model.safetensors")  # transformers may have renamed modules since
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            [name] = [name for name, tensor in stored.items() if torch.equal(tensor, module.weight)]
            module.register_forward_pre_hook(hook_of(name))
    for file in sorted(images.glob("*/*.*")):
        with Image.open(file) as image, torch.no_grad():
            model(**processor(image.convert("RGB"), return_tensors="pt"))
    return found


def _collect(model: Path, out: Path, source: Path, **changes: Any) -> Any:
    fields = {name: changes.pop(name) for name in list(changes) if name in DataSpec.__slots__}
    data = DataSpec(source=str(source), **{"batch_tokens": 70, **fields})
    options = {"kind": "gram", "in_process": True, "workers": 2, "data": data, **changes}
    return collect_statistics(str(model), out, StatisticsOptions(**options))


@pytest.mark.parametrize("kind", ["vit", "clip"])
def test_grams_of_a_vision_tower(
    kind: str, make_tower: Callable[[str, int], Path], images: Path, tmp_path: Path
) -> None:
    model = make_tower(kind, 1)
    result = _collect(model, tmp_path / "folder", images)
    found, expected = open_statistics(tmp_path / "folder"), _reference(model, images)
    tensors = {
        k: v for file in found.manifest["files"] for k, v in load_file(tmp_path / "folder" / file).items()
    }
    assert found.modules.keys() == expected.keys() and len(expected) == {"vit": 13, "clip": 12}[kind]
    assert result.statistics.num_tokens == NUM_IMAGES * 17
    for name, module in found.modules.items():
        gram, num_rows = expected[name]
        assert module.num_rows == (num_rows,), name
        scale = gram.diagonal().max().item()
        own = unpack_upper(tensors[module.key], module.in_features).double()
        torch.testing.assert_close(own, gram, rtol=2e-6, atol=2e-6 * scale)
    parquet = _parquet(images, tmp_path / "images.parquet")
    _collect(model, tmp_path / "column", parquet, image_column="image", workers=1)
    column = open_statistics(tmp_path / "column")
    for name, module in column.modules.items():
        file = load_file(module.tensor.file)
        assert torch.equal(file[module.key], tensors[found.modules[name].key])


def test_fisher_and_samples_of_images(
    make_tower: Callable[[str, int], Path], images: Path, tmp_path: Path
) -> None:
    model = make_tower("vit", 1)
    parquet = _parquet(images, tmp_path / "images.parquet")
    options = {"image_column": "image", "label_column": "label", "samples": 5}
    result = _collect(
        model, tmp_path / "fisher", parquet, kind="fisher", estimator="empirical", workers=1, **options
    )
    assert result.statistics.manifest["num_examples"] == 5
    assert not result.statistics.coverage.uncovered


@pytest.mark.parametrize("kind", ["vit", "clip"])
def test_regmean_plus_merges_vision_towers(
    kind: str, make_tower: Callable[[str, int], Path], images: Path, tmp_path: Path
) -> None:
    models = [make_tower(kind, seed) for seed in (1, 2)]
    data = {"path": str(images), "batch_tokens": 70}
    for method in ("regmean", "regmean_plus"):
        entries = [{"model": str(model), "data": data} for model in models]
        recipe = {"merge_method": method, "models": entries}
        raymerge.merge(recipe, tmp_path / method, in_process=True, workers=2)
    plain, plus = (load_file(tmp_path / name / "model.safetensors") for name in ("regmean", "regmean_plus"))
    assert plain.keys() == plus.keys()
    second = [name for name in plus if ".1." in name and plus[name].dim() == 2]
    assert len(second) == 6
    assert all((plain[name] - plus[name]).abs().max() > 1e-3 * plain[name].abs().max() for name in second)


def test_what_cannot_be_used_is_refused(
    make_tower: Callable[[str, int], Path],
    tiny_checkpoints: Callable[..., Any],
    images: Path,
    tmp_path: Path,
) -> None:
    import json

    model = make_tower("vit", 1)
    config = json.loads((model / "config.json").read_text())

    def refusal(kind: type[Exception], folder: Path, **fields: Any) -> str:
        with pytest.raises(kind) as caught:
            data = ImageData(DataSpec(**{"source": str(images), **fields}), str(folder), config)
            data.pixels(data.shard(0))
        return str(caught.value)

    assert "has no image processor" in refusal(CheckpointError, tiny_checkpoints("bert").base)
    assert "leave out packed" in refusal(RecipeError, model, packed=True)
    parquet = _parquet(images, tmp_path / "images.parquet")
    assert "no column 'picture'" in refusal(RecipeError, model, source=str(parquet), image_column="picture")
    assert "holds a int in 'label'" in refusal(RecipeError, model, source=str(parquet), image_column="label")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.png").write_bytes(b"no image")
    assert "a.png of the data" in refusal(RecipeError, model, source=str(broken))
    config["text_config"], config["vision_config"] = {}, {}
    assert "tower" in refusal(CheckpointError, model)
