"""A model and its calibration data on one worker: opened once, loaded when first needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from raymerge.merge_actors.checkpoint.adapted import open_model
from raymerge.merge_actors.errors import MismatchError
from raymerge.stats.batches import Batch, batch_tensors, pixel_batch
from raymerge.stats.block_passes import StopHere
from raymerge.stats.calibration_data import Example
from raymerge.stats.image_data import ImageData, open_data
from raymerge.stats.linear_maps import ModelMaps, find_linear_maps
from raymerge.stats.measure_job import MeasureJob
from raymerge.stats.model_loading import BlockLoader, compute_dtype, load_whole, skeleton


class MeasuredModel:
    """What the passes over the data work on."""

    way_out = "give a --memory-gib that holds the whole model"
    """For a user whose model cannot be loaded layer by layer."""

    def __init__(self, job: MeasureJob, count_tokens: Callable[[int], None]) -> None:
        """Read headers, tokenizer and rows.

        Raises:
            RaymergeError: the model or the data cannot be measured.
        """
        import torch

        if job.device == "cpu":
            torch.set_num_threads(job.threads)
        else:
            torch.backends.cuda.matmul.allow_tf32 = False
        self.job = job
        self.count_tokens = count_tokens
        """Told of the tokens of each batch that has passed."""
        self.checkpoint = open_model(
            job.model,
            job.revision,
            adapter=job.adapter,
            adapter_revision=job.adapter_revision,
            allow_pickle=job.allow_pickle,
        )
        self.data = open_data(
            job.data,
            self.checkpoint.inputs_folder,
            self.checkpoint.config,
            trust_code=job.trust_remote_code,
        )
        self.model: Any = None
        self.maps = ModelMaps(maps=(), blocks=(), tied=(), not_in_checkpoint=())
        self.loader: BlockLoader | None = None
        """Of a model that is loaded block by block."""
        self._examples: dict[int, list[Example]] = {}

    def load(self, *, is_streamed: bool) -> None:
        """Bring the model to the device, whole or only what stands outside its blocks."""
        if self.model is not None:
            return
        if is_streamed:
            self.model = skeleton(self.checkpoint, trust_code=self.job.trust_remote_code)
        else:
            self.model = load_whole(self.checkpoint, self.job.device, trust_code=self.job.trust_remote_code)
        self.maps = find_linear_maps(self.model, {**self.checkpoint.tensors, **self.checkpoint.tied})
        if is_streamed:
            self.loader = BlockLoader(
                self.model, self.checkpoint, self.maps.blocks, self.job.device, way_out=self.way_out
            )

    def shard(self, number: int) -> list[Example]:
        """Return a shard's examples; each is tokenised once."""
        if number not in self._examples:
            examples = self.data.shard(number)
            self._check_ids(examples)
            self._examples[number] = examples
        return self._examples[number]

    def _check_ids(self, examples: Sequence[Example]) -> None:
        """Refuse tokens without an embedding before the model does: on a GPU that would end the process's use of it."""
        embedding = self.model.get_input_embeddings() if self.model is not None else None
        num_rows = getattr(embedding, "num_embeddings", None)
        if num_rows is None:
            return
        for each in examples:
            largest = max((*each.input_ids, *(each.target_ids or ())), default=0)
            if largest >= num_rows:
                raise MismatchError(
                    f"sample {each.number} has the token {largest}, but "
                    f"{self.checkpoint.path} has {num_rows:,} embeddings; its tokenizer may not be its own."
                )

    def batch(self, examples: Sequence[Example]) -> Batch:
        """Make the tensors of a batch."""
        if isinstance(self.data, ImageData):
            return pixel_batch(examples, self._cast(self.data.pixels(examples)), self.job.device)
        start_id = None
        if self.data.is_encoder_decoder and not type(self.model).__name__.endswith("Classification"):
            start_id = getattr(self.model.config, "decoder_start_token_id", None)
            start_id = self.data.pad_id if start_id is None else start_id
        return batch_tensors(
            examples,
            pad_id=self.data.pad_id,
            start_id=start_id,
            device=self.job.device,
            side=self.job.padding_side,
        )

    def _cast(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Give pixels the type of the forward pass."""
        dtype = compute_dtype(self.checkpoint, self.job.device)
        return {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for name, tensor in inputs.items()
        }

    def forward(self, batch: Batch) -> None:
        """Run a batch as far as the pass wants it.

        Raises:
            MismatchError: the model has no embedding for a token.
        """
        try:
            self.model(**batch.inputs)
        except StopHere:
            pass
        except IndexError as error:
            numbers = ", ".join(str(each.number) for each in batch.examples[:5])
            raise MismatchError(
                f"the model cannot take samples {numbers}: {error}; its tokenizer may not be its own."
            ) from error
