"""Vocabularies end to end: recipe and folders in, the rows that a worker reads out."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from raymerge.cluster.campaign import PlannedWave, plan_wave
from raymerge.cluster.options import MergeOptions
from raymerge.cluster.recipe import load_recipes
from raymerge.cluster.vocabulary_rows import coalesce, find_counterpart, num_rows_of, round_up
from raymerge.merge_actors.errors import CheckpointError, MismatchError, RecipeError
from raymerge.merge_actors.task import RowRun, SolveTask

Writer = Callable[..., Path]
EMBEDDING = "model.embed_tokens.weight"
BASE_TOKENS = ["<unk>", "a", "b", "c"]


def _plan(recipe: dict[str, Any], *more: dict[str, Any]) -> PlannedWave:
    recipes = [load_recipes({"name": f"r{i}", **each})[0][0] for i, each in enumerate([recipe, *more])]
    return plan_wave(recipes, {each.name: f"/out/{each.name}" for each in recipes}, MergeOptions(), {})


def _read(wave: PlannedWave, recipe: int = 0, tensor: str = EMBEDDING) -> dict[str, list[float]]:
    """Return per model the first column of the rows that the worker would merge."""
    import torch

    from raymerge.merge_actors.files import LocalFiles
    from raymerge.merge_actors.inputs import arena_bytes, read_pieces

    for task in wave.plan.tasks:
        arena_P = torch.full(
            (arena_bytes(task.pieces),), 0x7F, dtype=torch.uint8
        )  # rows nobody fills stand out
        inputs = read_pieces(task.pieces, LocalFiles(), arena_P)
        for piece, of_piece in zip(task.pieces, inputs, strict=True):
            for job in piece.jobs:
                if (job.recipe, job.tensor) == (recipe, tensor):
                    used = [*([] if job.base is None else [job.base]), *job.models]
                    columns = piece.shape[-1] if len(piece.shape) > 1 else 1
                    return {
                        Path(piece.reads[i].model.split("+")[0]).name: of_piece[i]
                        .view(-1, columns)[:, 0]
                        .tolist()
                        for i in used
                    }
    raise AssertionError(f"{tensor} is in no task")


@pytest.fixture
def base(tmp_path: Path, write_token_model: Writer) -> Path:
    return write_token_model(tmp_path / "base", 1, BASE_TOKENS)


@pytest.fixture
def permuted(tmp_path: Path, write_token_model: Writer) -> Path:
    """Hold the tokens of the base in another order, and one more."""
    return write_token_model(tmp_path / "permuted", 2, ["<unk>", "b", "new", "a", "c"])


@pytest.fixture
def longer(tmp_path: Path, write_token_model: Writer) -> Path:
    """Hold the base's tokens and two added ones."""
    return write_token_model(tmp_path / "longer", 3, BASE_TOKENS, added=["<x>", "<y>"])


def _task_arithmetic(base: Path, *models: Path, **keys: Any) -> dict[str, Any]:
    return {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "models": [{"model": str(model), "parameters": {"weight": 1.0}} for model in models],
        **keys,
    }


def _linear(*models: Path, **keys: Any) -> dict[str, Any]:
    return {
        "merge_method": "linear",
        "models": [{"model": str(model), "parameters": {"weight": 1.0}} for model in models],
        **keys,
    }


class TestUnion:
    def test_rows_follow_their_tokens(self, base: Path, permuted: Path, longer: Path) -> None:
        wave = _plan(_task_arithmetic(base, permuted, longer, tokenizer={"source": "union"}))
        vocabulary = wave.vocabularies[0]
        assert vocabulary is not None and vocabulary.num_rows == 7
        assert vocabulary.token_ids is not None
        assert sorted(vocabulary.token_ids, key=vocabulary.token_ids.__getitem__) == [
            *BASE_TOKENS,
            "new",
            "<x>",
            "<y>",
        ]
        assert _read(wave) == {
            "base": [100, 101, 102, 103, 202, 304, 305],  # what the base lacks: the mean over those having it
            "permuted": [200, 203, 201, 204, 202, 304, 305],
            "longer": [300, 301, 302, 303, 202, 304, 305],
        }

    def test_the_bias_of_the_head_moves_with_its_rows(self, base: Path, permuted: Path) -> None:
        wave = _plan(_task_arithmetic(base, permuted, tokenizer_source="union"))
        assert _read(wave, tensor="lm_head.bias") == {
            "base": [100, 101, 102, 103, 202],
            "permuted": [200, 203, 201, 204, 202],
        }
        assert _read(wave, tensor="lm_head.weight")["permuted"] == [200.5, 203.5, 201.5, 204.5, 202.5]

    def test_without_a_base_the_mean_over_those_that_have_it(
        self, base: Path, longer: Path, tmp_path: Path, write_token_model: Writer
    ) -> None:
        other = write_token_model(tmp_path / "other", 5, BASE_TOKENS, added=["<x>"])
        wave = _plan(_linear(base, longer, other, tokenizer_source="union"))
        assert _read(wave) == {
            "base": [100, 101, 102, 103, 404, 305],
            "longer": [300, 301, 302, 303, 304, 305],
            "other": [500, 501, 502, 503, 504, 305],
        }

    def test_padding_rows_of_the_donor_are_kept_and_used(
        self, longer: Path, tmp_path: Path, write_token_model: Writer
    ) -> None:
        padded = write_token_model(tmp_path / "padded", 1, BASE_TOKENS, num_rows=8)
        wave = _plan(_task_arithmetic(padded, longer, vocabulary="union"))
        assert _read(wave) == {
            "padded": [100, 101, 102, 103, 304, 305, 106, 107],
            "longer": [300, 301, 302, 303, 304, 305, 106, 107],
        }

    def test_rows_that_nobody_has_are_zero(self, base: Path, longer: Path) -> None:
        wave = _plan(_task_arithmetic(base, longer, tokenizer={"source": "union", "pad_to_multiple_of": 4}))
        assert _read(wave)["longer"] == [300, 301, 302, 303, 304, 305, 0, 0]

    def test_equal_vocabularies_stay_in_place(
        self, base: Path, tmp_path: Path, write_token_model: Writer
    ) -> None:
        twin = write_token_model(tmp_path / "twin", 2, BASE_TOKENS)
        wave = _plan(_task_arithmetic(base, twin, tokenizer_source="union"))
        assert all(read.row_runs is None for task in wave.plan.tasks for p in task.pieces for read in p.reads)

    def test_a_model_without_tokenizer_and_other_rows_is_refused(
        self, base: Path, tmp_path: Path, write_token_model: Writer
    ) -> None:
        bare = write_token_model(tmp_path / "bare", 2, None, num_rows=5)
        with pytest.raises(CheckpointError, match=r"bare has no tokenizer files .* `vocabulary: pad`"):
            _plan(_linear(base, bare, tokenizer_source="union"))
        same = write_token_model(tmp_path / "same", 2, None, num_rows=4)
        vocabulary = _plan(_linear(base, same, tokenizer_source="union")).vocabularies[0]
        assert vocabulary is not None and "same has no tokenizer" in vocabulary.remarks[0]

    def test_a_token_beyond_the_embedding_is_not_added(
        self, base: Path, tmp_path: Path, write_token_model: Writer
    ) -> None:
        short = write_token_model(tmp_path / "short", 3, BASE_TOKENS, added=["<x>", "<y>"], num_rows=5)
        wave = _plan(_task_arithmetic(base, short, vocabulary="union"))
        assert _read(wave)["base"] == [100, 101, 102, 103, 304]
        assert wave.vocabularies[0] is not None and list(wave.vocabularies[0].added) == ["<x>"]

    def test_added_tokens_keep_the_order_of_their_ids(
        self, base: Path, tmp_path: Path, write_token_model: Writer
    ) -> None:
        other = write_token_model(tmp_path / "other", 2, [*BASE_TOKENS, "z", "k"])
        assert _read(_plan(_linear(base, other, vocabulary="union")))["base"] == [
            100,
            101,
            102,
            103,
            204,
            205,
        ]

    def test_two_wishes_have_to_agree(self, base: Path, longer: Path) -> None:
        with pytest.raises(RecipeError, match=r"vocabulary is base, but the source of 'tokenizer' is union"):
            _plan(_task_arithmetic(base, longer, vocabulary="base", tokenizer={"source": "union"}))


class TestOneModelsTokens:
    def test_base_drops_what_the_base_lacks(self, base: Path, permuted: Path) -> None:
        for keys in ({"vocabulary": "base"}, {"tokenizer_source": "base"}):
            assert _read(_plan(_task_arithmetic(base, permuted, **keys))) == {
                "base": [100, 101, 102, 103],
                "permuted": [200, 203, 201, 204],
            }

    def test_a_tokenizer_whose_tokens_stay_is_written_as_it_is(self, base: Path, permuted: Path) -> None:
        vocabulary = _plan(_task_arithmetic(base, permuted, vocabulary="base")).vocabularies[0]
        assert vocabulary is not None and vocabulary.token_ids is None

    def test_a_row_that_another_token_has_is_no_padding(
        self, tmp_path: Path, write_token_model: Writer
    ) -> None:
        """Rows 4 to 7 belong to no token of the base: where they do in a model, the base's are taken."""
        padded = write_token_model(tmp_path / "padded", 1, BASE_TOKENS, num_rows=8)
        full = write_token_model(tmp_path / "full", 2, [*BASE_TOKENS, "k", "l", "m"], num_rows=8)
        assert _read(_plan(_task_arithmetic(padded, full, vocabulary="base"))) == {
            "padded": [100, 101, 102, 103, 104, 105, 106, 107],
            "full": [200, 201, 202, 203, 104, 105, 106, 207],
        }

    def test_the_tokens_of_a_named_model(self, base: Path, permuted: Path) -> None:
        wave = _plan(_task_arithmetic(base, permuted, tokenizer_source=str(permuted)))
        assert _read(wave) == {"base": [100, 102, 202, 101, 103], "permuted": [200, 201, 202, 203, 204]}
        assert wave.vocabularies[0] is not None and wave.vocabularies[0].tokenizer_model == str(permuted)


class TestRowsByNumber:
    def test_pad_fills_with_the_mean(self, base: Path, tmp_path: Path, write_token_model: Writer) -> None:
        first = write_token_model(tmp_path / "first", 2, None, num_rows=6)
        second = write_token_model(tmp_path / "second", 4, None, num_rows=5)
        wave = _plan(_linear(base, first, second, vocabulary="pad"))
        assert _read(wave) == {
            "base": [100, 101, 102, 103, 304, 205],
            "first": [200, 201, 202, 203, 204, 205],
            "second": [400, 401, 402, 403, 404, 205],
        }

    def test_truncate_cuts_to_the_smallest(self, base: Path, longer: Path) -> None:
        wave = _plan(_task_arithmetic(base, longer, vocabulary="truncate"))
        assert _read(wave) == {"base": [100, 101, 102, 103], "longer": [300, 301, 302, 303]}
        assert wave.vocabularies[0] is not None and wave.vocabularies[0].tokenizer_model == str(base)

    def test_pad_takes_the_tokenizer_that_names_all_rows(self, base: Path, longer: Path) -> None:
        vocabulary = _plan(_task_arithmetic(base, longer, vocabulary="pad")).vocabularies[0]
        assert vocabulary is not None and vocabulary.tokenizer_model == str(longer)

    def test_rules_for_tokens_contradict_it(self, base: Path, longer: Path) -> None:
        with pytest.raises(RecipeError, match=r"vocabulary is pad, which counts rows, but 'tokenizer'"):
            _plan(_task_arithmetic(base, longer, vocabulary="pad", tokenizer={"source": "union"}))


class TestRulesForTokens:
    def _rows(
        self, base: Path, longer: Path, permuted: Path, token: str, rule: dict[str, Any]
    ) -> list[list[float]]:
        """Return [base, longer, permuted] rows of one token under a rule."""
        policy = {"source": "union", "tokens": {token: rule}}
        wave = _plan(_task_arithmetic(base, longer, permuted, tokenizer=policy))
        ids = wave.vocabularies[0].token_ids if wave.vocabularies[0] else None
        assert ids is not None
        return [[rows[ids[token]]] for rows in _read(wave).values()]

    def test_sources(self, base: Path, longer: Path, permuted: Path) -> None:
        def rows(token: str, rule: dict[str, Any]) -> list[float]:
            return [row for (row,) in self._rows(base, longer, permuted, token, rule)]

        assert rows("a", {}) == [101, 301, 203]
        assert rows("a", {"force": True}) == [101, 101, 101]
        assert rows("<x>", {"force": True}) == [304, 304, 304]
        assert rows("a", {"source": str(permuted)}) == [101, 301, 203]
        assert rows("a", {"source": str(permuted), "force": True}) == [203, 203, 203]
        assert rows("<x>", {"source": {"kind": "zero"}}) == [0, 304, 0]
        assert rows("<x>", {"source": {"kind": "zero"}, "force": True}) == [0, 0, 0]
        model_token = {"kind": "model_token", "model": str(longer), "token": "b"}
        assert rows("<z>", {"source": model_token}) == [302, 302, 302]
        assert rows("new", {"source": model_token}) == [302, 302, 202]
        by_id = {"kind": "model_token", "model": str(longer), "token_id": 5}
        assert rows("<z>", {"source": by_id}) == [305, 305, 305]

    def test_a_row_of_another_dtype_is_converted(
        self, base: Path, tmp_path: Path, write_token_model: Writer
    ) -> None:
        half = write_token_model(tmp_path / "half", 2, BASE_TOKENS, added=["<x>"], dtype="bfloat16")
        policy = {"source": "union", "tokens": {"<x>": {"source": str(half), "force": True}}}
        assert _read(_plan(_task_arithmetic(base, half, tokenizer=policy)))["base"][4] == 204

    def test_a_token_of_no_model_needs_a_source(self, base: Path, longer: Path) -> None:
        policy = {"source": "union", "tokens": {"<z>": {}}}
        with pytest.raises(
            RecipeError, match=r"tokenizer.tokens.<z> is a token that no model has; say where"
        ):
            _plan(_task_arithmetic(base, longer, tokenizer=policy))

    def test_a_token_that_the_source_lacks(self, base: Path, longer: Path) -> None:
        policy = {"source": "union", "tokens": {"<x>": {"source": str(base)}}}
        with pytest.raises(RecipeError, match=r"base, which has no token '<x>'"):
            _plan(_task_arithmetic(base, longer, tokenizer=policy))

    def test_a_row_beyond_the_source(self, base: Path, longer: Path) -> None:
        rule = {"source": {"kind": "model_token", "model": str(base), "token_id": 4}}
        with pytest.raises(RecipeError, match=r"token_id is 4; .*base has rows \[0, 4\)"):
            _plan(_task_arithmetic(base, longer, tokenizer={"source": "union", "tokens": {"<z>": rule}}))

    def test_a_row_that_is_in_the_embedding_and_not_in_the_head(self, base: Path, longer: Path) -> None:
        tensors = load_file(longer / "model.safetensors")
        save_file(tensors | {"lm_head.bias": tensors["lm_head.bias"][:5]}, longer / "model.safetensors")
        row = {"kind": "model_token", "model": str(longer), "token_id": 5}
        policy = {"source": "base", "tokens": {"a": {"source": row, "force": True}}}
        with pytest.raises(
            MismatchError, match=r"row 5 of tensor lm_head.bias .* there the tensor is of shape \[5\]"
        ):
            _plan(_linear(base, tokenizer=policy))

    def test_a_row_that_an_adapter_changes(self, base: Path, longer: Path, tmp_path: Path) -> None:
        (tmp_path / "lora").mkdir()
        shapes = {"A": (1, 2), "B": (6, 1)}
        tensors = {
            f"base_model.model.lm_head.lora_{name}.weight": np.ones(shape, np.float32)
            for name, shape in shapes.items()
        }
        save_file(tensors, tmp_path / "lora" / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["lm_head"]}
        (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config))
        source = f"{longer}+{tmp_path / 'lora'}"
        policy = {"source": "base", "tokens": {"a": {"source": source, "force": True}}}
        with pytest.raises(MismatchError, match=r"lm_head.weight of model .* is changed by its adapter"):
            _plan(_linear(base, tokenizer=policy))


def test_rows_that_move_are_not_solved_for(
    base: Path, longer: Path, tmp_path: Path, write_token_model: Writer, write_statistics: Any
) -> None:
    """The matrix of a Gram's layer is read as it stands; where its rows move it is averaged."""
    twin = write_token_model(tmp_path / "twin", 2, BASE_TOKENS)
    module = {"gram": "h", "kind": "linear", "in_features": 2, "num_rows": 20}
    for model in (base, longer, twin):
        gram = {"h": np.array([2, 1, 2], np.float32)}
        write_statistics(tmp_path / f"{model.name}-s", model, "gram", gram, {"lm_head.weight": module})

    def solved(*models: Path) -> list[str]:
        entries = [{"model": str(each), "statistics": f"{each}-s"} for each in models]
        wave = _plan({"merge_method": "regmean", "models": entries, "vocabulary": "union"})
        return [job.tensor for task in wave.plan.tasks if isinstance(task, SolveTask) for job in task.jobs]

    assert (solved(base, twin), solved(base, longer)) == (["lm_head.weight"], [])


def test_recipes_of_a_campaign_fill_rows_as_if_alone(
    base: Path, longer: Path, tmp_path: Path, write_token_model: Writer
) -> None:
    other = write_token_model(tmp_path / "other", 5, BASE_TOKENS, added=["<x>", "<y>"])
    both = _plan(_linear(base, longer, vocabulary="union"), _linear(base, other, vocabulary="union"))
    assert _read(both, 0)["base"] == [100, 101, 102, 103, 304, 305]
    assert _read(both, 1)["base"] == [100, 101, 102, 103, 504, 505]
    # The same inputs, but another of them is the base that rows are filled from.
    first = _task_arithmetic(longer, base, other, vocabulary="union")
    both = _plan(first, _task_arithmetic(other, base, longer, vocabulary="union"))
    assert _read(both, 0)["base"] == [100, 101, 102, 103, 304, 305]
    assert _read(both, 1)["base"] == [100, 101, 102, 103, 504, 505]


def test_slicing_does_not_change_rows(tmp_path: Path, write_token_model: Writer) -> None:
    from dataclasses import replace

    import torch

    from raymerge.merge_actors.files import LocalFiles
    from raymerge.merge_actors.inputs import arena_bytes, read_pieces

    one = write_token_model(tmp_path / "one", 1, [f"t{i}" for i in range(50)])
    two = write_token_model(tmp_path / "two", 2, [f"t{i}" for i in (*range(60, 19, -1), *range(5))])
    wave = _plan(_linear(one, two, vocabulary="union"))
    piece = next(p for t in wave.plan.tasks for p in t.pieces if p.jobs[0].tensor == EMBEDDING)

    def read(part: Any) -> list[torch.Tensor]:
        return read_pieces([part], LocalFiles(), torch.zeros(arena_bytes([part]), dtype=torch.uint8))[0]

    whole = [tensor.clone() for tensor in read(piece)]
    edges = [0, 2, 14, 70, piece.end]  # whole rows
    parts = [read(replace(piece, begin=a, end=b)) for a, b in itertools.pairwise(edges)]
    for number, tensor in enumerate(whole):
        assert torch.equal(torch.cat([part[number] for part in parts]), tensor)


def test_a_low_rank_update_moves_with_its_rows(base: Path, permuted: Path) -> None:
    """Row r of the update holds r + 1 everywhere: it has to be added to the row that came from r."""
    from dataclasses import replace

    import torch

    from raymerge.merge_actors.files import LocalFiles
    from raymerge.merge_actors.inputs import arena_bytes, read_pieces
    from raymerge.merge_actors.task import LowRankRead

    wave = _plan(_task_arithmetic(base, permuted, vocabulary="base"))
    piece = next(p for t in wave.plan.tasks for p in t.pieces if p.jobs[0].tensor == EMBEDDING)
    file = permuted / "update.bin"
    a_RI, b_OR = torch.ones(1, 2), torch.arange(1.0, 6.0).view(5, 1)
    file.write_bytes(a_RI.numpy().tobytes() + b_OR.numpy().tobytes())
    for is_transposed in (False, True):
        a_offset, b_offset = (8, 0) if is_transposed else (0, 8)
        low_rank = LowRankRead(
            str(file), a_offset, str(file), b_offset, "F32", 1, 1.0, is_transposed, num_rows=5
        )
        reads = tuple(replace(r, low_rank=low_rank) if "permuted" in r.model else r for r in piece.reads)
        changed = replace(piece, reads=reads)
        inputs = read_pieces([changed], LocalFiles(), torch.zeros(arena_bytes([changed]), dtype=torch.uint8))[
            0
        ]
        index = next(i for i, read in enumerate(reads) if read.low_rank)
        assert inputs[index].view(-1, 2)[:, 0].tolist() == [201, 207, 203, 209]


def test_without_a_policy_sizes_must_agree(base: Path, longer: Path) -> None:
    with pytest.raises(MismatchError, match=r"\(4 and 6 tokens\); choose a policy"):
        _plan(_task_arithmetic(base, longer))


def test_a_model_without_embedding_is_refused(base: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    save_file({"conv.weight": np.zeros((4, 2), np.float32)}, bare / "model.safetensors")
    with pytest.raises(MismatchError, match="bare has no tensor with a row per token"):
        _plan(_linear(base, bare, vocabulary="pad"))


def test_a_broken_tokenizer_is_named(base: Path, longer: Path) -> None:
    (longer / "tokenizer.json").write_text(json.dumps({"model": {}}))
    with pytest.raises(CheckpointError, match=r"longer/tokenizer.json holds no vocabulary"):
        _plan(_task_arithmetic(base, longer, vocabulary="union"))


def test_coalesce() -> None:
    assert coalesce([(0, 4), (1, 5), (3, 6), (4, 8)]) == (RowRun(0, 4, 2), RowRun(3, 6, 1), RowRun(4, 8, 1))
    assert coalesce([(0, 0), (1, 1)], frozenset({1})) == (RowRun(0, 0, 1), RowRun(1, 1, 1, is_replaced=True))
    assert coalesce([]) == ()
    assert (round_up(9, 4), round_up(8, 4), round_up(9, None)) == (12, 8, 9)


class TestAdapters:
    def _with_adapter(self, folder: Path, num_rows: int) -> Any:
        """Return a model whose adapter brings an embedding of its own, and a tokenizer for it."""
        from raymerge.cluster.matched import LoadedModel
        from raymerge.merge_actors.checkpoint.adapter import Adapter
        from raymerge.merge_actors.checkpoint.folder import open_checkpoint
        from raymerge.merge_actors.checkpoint.header import TensorInfo

        own = TensorInfo(EMBEDDING, "F32", (num_rows, 2), "/adapter", 0, 8 * num_rows)
        adapter = Adapter(
            path="ad",
            folder=str(folder.parent / "ad"),
            config={},
            pairs={},
            full={EMBEDDING: own},
            fingerprint="",
        )
        return LoadedModel("with", open_checkpoint(folder), adapter)

    def test_an_embedding_of_the_adapter_counts(
        self, base: Path, tmp_path: Path, write_token_model: Writer
    ) -> None:
        from raymerge.cluster.tokenizer_tokens import read_token_ids

        model = self._with_adapter(base, 6)
        assert num_rows_of(model) == 6  # whatever config.json says
        write_token_model(tmp_path / "ad", 3, BASE_TOKENS, added=["<x>", "<y>"])
        assert read_token_ids(model) == {**{t: i for i, t in enumerate(BASE_TOKENS)}, "<x>": 4, "<y>": 5}

    def test_a_tied_head_is_the_embedding(self, base: Path) -> None:
        model = self._with_adapter(base, 4)
        assert find_counterpart(model, EMBEDDING) == model.adapter.full[EMBEDDING]
        del model.checkpoint.tensors["lm_head.weight"]
        found = find_counterpart(model, "lm_head.weight")
        assert found is not None and found.name == EMBEDDING
