"""Calibration sets of images: a folder of image files, or an image column of a table, for vision towers.

An image is decoded and goes through the model's own image processor when its batch is made; only its place, or
its compressed bytes, are kept. Needs Pillow.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

import xxhash

from raymerge.merge_actors.errors import CheckpointError, RecipeError
from raymerge.stats.calibration_data import (
    CalibrationData,
    Example,
    ImageSource,
    cut_shards,
    label_numbers,
    tokenizer_fingerprint,
)
from raymerge.stats.data_rows import DataSpec, Rows, check_columns, read_table, take
from raymerge.stats.own_code import load_with_code
from raymerge.stats.remote_data import local_data

_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def are_images(spec: DataSpec) -> bool:
    """Return whether a source is a column of images, or a folder of image files."""
    folder = local_data(spec.source)
    return spec.image_column is not None or (os.path.isdir(folder) and bool(_image_files(folder)))


def open_data(
    spec: DataSpec, model_folder: str, config: Mapping[str, Any], *, trust_code: bool = False
) -> CalibrationData | ImageData:
    """Open a calibration set of texts or images.

    Args:
        spec: which data.
        model_folder: where tokenizer or image processor are.
        config: the model's config.json.
        trust_code: run code of the folder where transformers has no class of its own.

    Raises:
        RecipeError: the data do not fit the model or cannot be read.
        CheckpointError: the model has no tokenizer, or no image processor.
    """
    kind = ImageData if are_images(spec) else CalibrationData
    return kind(spec, model_folder, config, trust_code=trust_code)


def inputs_fingerprint(data: CalibrationData | ImageData, model_folder: str) -> str:
    """Return 128 bits in hex over the files of what makes a model's inputs: tokenizer or image processor."""
    if isinstance(data, CalibrationData):
        return tokenizer_fingerprint(model_folder)
    digest = xxhash.xxh3_128()
    for name in _PROCESSOR_FILES:
        path = os.path.join(model_folder, name)
        if os.path.exists(path):
            with open(path, "rb") as stream:
                digest.update(name.encode() + stream.read())
    return digest.hexdigest()


class ImageData:
    """The calibration set of one vision model; stands for `CalibrationData`."""

    is_encoder_decoder = False
    num_truncated = 0
    pad_id = 0

    def __init__(
        self, spec: DataSpec, model_folder: str, config: Mapping[str, Any], *, trust_code: bool = False
    ) -> None:
        """Read the rows and the image processor.

        Args:
            spec: which data.
            model_folder: where the image processor is.
            config: the model's config.json.
            trust_code: run code of the image processor where transformers has no class of its own.

        Raises:
            RecipeError: the data do not fit the model or cannot be read.
            CheckpointError: the model takes no images, or has no image processor.
        """
        self.spec = spec
        self._processor = _load_processor(model_folder, config, trust_code=trust_code)
        self.rows = _read_rows(spec)
        self.max_length = _num_positions(config)
        self._shards = cut_shards(self.rows.tier_ends)
        self._labels = label_numbers(spec, self.rows.labels, config)

    @property
    def num_shards(self) -> int:
        """Count the logical shards."""
        return len(self._shards)

    def tier(self, number: int) -> int:
        """Return which of the numbers of samples a shard is first part of."""
        return self._shards[number][1]

    def shard(self, number: int) -> list[Example]:
        """Return the images of a shard."""
        return [
            Example(
                number=row,
                input_ids=(),
                label=self._labels[row] if self._labels else None,
                image=self.rows.texts[row],
                num_positions=self.max_length,
            )
            for row in self._shards[number][0]
        ]

    def pixels(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Return what the model's forward takes for some images.

        Raises:
            RecipeError: a file is no image.
        """
        images = [self._decode(each) for each in examples]
        return dict(self._processor(images, return_tensors="pt"))

    def data_fingerprint(self) -> str:
        """Return 128 bits in hex over the images as they are stored, and the labels."""
        digest = xxhash.xxh3_128()
        for row, image in enumerate(self.rows.texts):
            digest.update(b"\0image" + image.read())
            if self.rows.labels is not None:
                digest.update(str(self.rows.labels[row]).encode())
        return digest.hexdigest()

    def _decode(self, example: Example) -> Any:
        from PIL import Image, UnidentifiedImageError

        assert example.image is not None
        try:
            with Image.open(io.BytesIO(example.image.read())) as image:
                return image.convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            place = example.image.path or f"row {example.number}"
            raise RecipeError(f"{place} of the data {self.spec.source!r} is no image: {error}") from error


def _load_processor(model_folder: str, config: Mapping[str, Any], *, trust_code: bool) -> Any:
    if isinstance(config.get("text_config"), Mapping) and isinstance(config.get("vision_config"), Mapping):
        raise CheckpointError(
            f"{model_folder} reads texts and images; images alone can be measured on a vision tower of its own "
            "(CLIPVisionModel, ViTModel): save that part and measure it."
        )
    if not any(os.path.exists(os.path.join(model_folder, name)) for name in _PROCESSOR_FILES):
        raise CheckpointError(
            f"the data are images, but {model_folder} has no image processor ({_PROCESSOR_FILES[0]}); copy the file "
            "of its base model into the folder, or give texts."
        )
    try:
        import PIL  # noqa: F401
    except ImportError:
        raise RecipeError(
            "images need Pillow, which is not installed: pip install 'raymerge[images]'."
        ) from None
    import transformers
    from transformers import AutoImageProcessor

    # One way of resizing on every node, whatever else is installed there.
    is_old = int(transformers.__version__.split(".")[0]) < 5
    option: dict[str, Any] = {"use_fast": False} if is_old else {"backend": "pil"}
    try:
        return load_with_code(
            lambda runs: AutoImageProcessor.from_pretrained(model_folder, trust_remote_code=runs, **option),
            model_folder,
            trust_code=trust_code,
        )
    except CheckpointError:
        raise
    except (ValueError, OSError, ImportError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"the image processor of {model_folder} cannot be loaded: {reason}") from error


def _read_rows(spec: DataSpec) -> Rows:
    if spec.packed or spec.chat_template or spec.text_pair_column:
        raise RecipeError("images have no texts: leave out packed, chat_template and text_pair_column.")
    remarks: list[str] = []
    labels: list[Any] | None = None
    if spec.image_column is None:
        folder = local_data(spec.source)
        images = [ImageSource(path=path) for path in _image_files(folder)]
        kept = [*range(len(images))]
    else:
        table = read_table(spec, remarks)
        wanted = [spec.image_column, spec.label_column]
        check_columns(spec, table, [column for column in wanted if column is not None])
        images, kept = _column(spec, table.column(spec.image_column).to_pylist())
        labels = table.column(spec.label_column).to_pylist() if spec.label_column else None
        kept = [row for row in kept if labels is None or labels[row] is not None]
        if not kept:
            raise RecipeError(f"no row of the data {spec.source!r} has an image in {spec.image_column!r}.")
        if len(kept) < len(images):
            remarks.append(f"{len(images) - len(kept):,} of {len(images):,} rows without image are left out")
    taken, tier_ends = take(spec, kept, remarks)
    return Rows(
        texts=[images[row] for row in taken],
        pairs=None,
        labels=None if labels is None else [labels[row] for row in taken],
        remarks=tuple(remarks),
        tier_ends=tier_ends,
    )


def _column(spec: DataSpec, values: Sequence[Any]) -> tuple[list[ImageSource], list[int]]:
    """Return the images of a column (`datasets` keeps {bytes, path}; else bytes or paths), and the rows with one."""
    folder = local_data(spec.source)
    folder = folder if os.path.isdir(folder) else os.path.dirname(folder)
    images, kept = [], []
    for row, value in enumerate(values):
        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, Mapping) else (value, None)
        if isinstance(data, str):
            data, path = None, data
        if path is not None and data is None:
            path = os.path.join(folder, path)
        if data is not None and not isinstance(data, bytes):
            raise RecipeError(
                f"row {row} of the data {spec.source!r} holds a {type(data).__name__} in {spec.image_column!r}; "
                "images are bytes, paths, or {bytes, path}."
            )
        images.append(ImageSource(path=path, data=data))
        if data is not None or path is not None:
            kept.append(row)
    return images, kept


def _image_files(folder: str) -> list[str]:
    return sorted(
        os.path.join(place, name)
        for place, _, names in os.walk(folder)
        for name in names
        if name.lower().endswith(_ENDINGS) and name[0] not in "._"
    )


def _num_positions(config: Mapping[str, Any]) -> int:
    """Return about how many positions an image takes in the model: patches and one more."""

    def side(value: Any, default: int) -> int:
        value = max(value) if isinstance(value, list | tuple) and value else value
        return int(value) if isinstance(value, int) and value > 0 else default

    return (side(config.get("image_size"), 224) // side(config.get("patch_size"), 16)) ** 2 + 1
