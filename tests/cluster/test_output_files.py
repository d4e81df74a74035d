"""Everything of an output but its weights: written, read again, and opened with transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from raymerge.cluster.campaign import plan_wave
from raymerge.cluster.chat_template import TEMPLATES
from raymerge.cluster.options import MergeOptions
from raymerge.cluster.output_files import RECIPE_NAME, write_metadata_files
from raymerge.cluster.recipe import load_recipes
from raymerge.merge_actors.errors import RecipeError


def _write(out: Path, recipe: dict[str, Any]) -> list[str]:
    """Write the files of a recipe's output; return the remarks."""
    parsed = load_recipes({"name": "merged", **recipe})[0][0]
    wave = plan_wave([parsed], {"merged": str(out)}, MergeOptions(), {})
    out.mkdir()
    plan = wave.plan.recipes[0]
    return write_metadata_files(
        str(out), parsed, wave.models, plan.tensors, plan.layout, wave.vocabularies[0]
    )


def _json(out: Path, name: str = "config.json") -> Any:
    return json.loads((out / name).read_text())


def _linear(*models: Path, **keys: Any) -> dict[str, Any]:
    listed = [{"model": str(model), "parameters": {"weight": 1.0}} for model in models]
    return {"merge_method": "linear", "models": listed, **keys}


def _copy_with(origin: Path, to: Path, name: str = "config.json", **keys: Any) -> Path:
    """Copy a model folder, some keys of a JSON file changed; None removes a key."""
    shutil.copytree(origin, to)
    changed = {**_json(to, name), **keys} if (to / name).exists() else keys
    (to / name).write_text(json.dumps({key: value for key, value in changed.items() if value is not None}))
    return to


@pytest.fixture
def llama(tiny_checkpoints: Any) -> Any:
    return tiny_checkpoints("llama")


class TestConfig:
    def test_the_dtype_is_that_of_the_output(self, llama: Any, tmp_path: Path) -> None:
        _write(tmp_path / "out", _linear(*llama.models, dtype="bfloat16"))
        assert _json(tmp_path / "out")["dtype"] == "bfloat16"
        old = _copy_with(llama.base, tmp_path / "old", torch_dtype="float32", dtype=None)
        _write(tmp_path / "out2", _linear(old, llama.models[0], out_dtype="float16"))
        assert (_json(tmp_path / "out2")["torch_dtype"], _json(tmp_path / "out2")["dtype"]) == (
            "float16",
        ) * 2

    def test_paths_and_packing_of_the_donor_are_dropped(self, llama: Any, tmp_path: Path) -> None:
        donor = _copy_with(llama.base, tmp_path / "d", _name_or_path="/home/me", compression_config={"a": 1})
        _write(tmp_path / "out", _linear(donor, llama.models[0]))
        assert not {"_name_or_path", "compression_config"} & _json(tmp_path / "out").keys()
        assert _json(tmp_path / "out")["architectures"] == ["LlamaForCausalLM"]

    def test_layers_and_lists_by_layer(self, llama: Any, tmp_path: Path) -> None:
        kinds, every = ["full_attention", "sliding_attention"], ["sliding_attention", "full_attention"]
        first = _copy_with(llama.base, tmp_path / "first", layer_types=kinds, mlp_only_layers=[1])
        second = _copy_with(llama.models[0], tmp_path / "second", layer_types=every)
        ranges = [(first, [0, 2]), (second, [0, 1]), (first, [1, 2])]
        slices = [{"sources": [{"model": str(model), "layer_range": each}]} for model, each in ranges]
        _write(tmp_path / "out", {"merge_method": "passthrough", "slices": slices})
        config = _json(tmp_path / "out")
        assert config["num_hidden_layers"] == 4
        assert config["layer_types"] == [*kinds, "sliding_attention", "sliding_attention"]
        assert config["mlp_only_layers"] == [1, 3]

    def test_an_untied_head_is_not_tied_again(self, tiny_checkpoints: Any, tmp_path: Path) -> None:
        untied = tiny_checkpoints("llama")
        wrong = _copy_with(untied.base, tmp_path / "wrong", tie_word_embeddings=True)
        remarks = _write(tmp_path / "out", _linear(wrong, untied.models[0]))
        assert _json(tmp_path / "out")["tie_word_embeddings"] is False
        assert remarks == [
            "tie_word_embeddings is false in the output, which has a lm_head.weight of its own"
        ]

    def test_a_tied_model_stays_tied(self, tiny_checkpoints: Any, tmp_path: Path) -> None:
        tied = tiny_checkpoints("llama", tied=True)
        assert _write(tmp_path / "out", _linear(tied.base, tied.models[0])) == []
        assert _json(tmp_path / "out")["tie_word_embeddings"] is True


class TestSpecialTokens:
    """The ids in config.json and generation_config.json are those of the output's tokenizer."""

    def _models(self, write: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
        ids = {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": None}
        base = write(tmp_path / "base", 1, ["<unk>", "<s>", "</s>", "<end>", "a"], config=ids)
        other = write(tmp_path / "other", 2, ["<unk>", "a", "</s>", "<s>"], config={"bos_token_id": 3})
        (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3], "top_p": 0.9}))
        return base, other

    def test_with_the_tokens_of_another_model(
        self, tmp_path: Path, write_token_model: Callable[..., Path]
    ) -> None:
        base, other = self._models(write_token_model, tmp_path)
        _write(tmp_path / "out", _linear(base, other, tokenizer_source=str(other)))
        config = _json(tmp_path / "out")
        assert (config["vocab_size"], config["bos_token_id"], config["eos_token_id"]) == (4, 3, [2])
        assert _json(tmp_path / "out", "generation_config.json") == {"eos_token_id": [2], "top_p": 0.9}

    def test_ids_beyond_a_cut_are_removed(
        self, tmp_path: Path, write_token_model: Callable[..., Path]
    ) -> None:
        base = write_token_model(tmp_path / "base", 1, list("abcde"), config={"pad_token_id": 4})
        other = write_token_model(tmp_path / "other", 2, list("abcd"))
        _write(tmp_path / "out", _linear(base, other, vocabulary="truncate"))
        config = _json(tmp_path / "out")
        assert (config["vocab_size"], config["pad_token_id"]) == (4, None)

    def test_a_union_keeps_them(self, tmp_path: Path, write_token_model: Callable[..., Path]) -> None:
        base, other = self._models(write_token_model, tmp_path)
        _write(tmp_path / "out", _linear(base, other, tokenizer_source="union"))
        config = _json(tmp_path / "out")
        assert (config["vocab_size"], config["bos_token_id"], config["eos_token_id"]) == (5, 1, [2, 3])


class TestChatTemplate:
    def _template(self, llama: Any, tmp_path: Path, wanted: str) -> str:
        _write(tmp_path / "out", _linear(*llama.models, chat_template=wanted))
        text = (tmp_path / "out" / "chat_template.jinja").read_text()
        assert _json(tmp_path / "out", "tokenizer_config.json")["chat_template"] == text
        return text

    @pytest.mark.parametrize("name", sorted(TEMPLATES))
    def test_named_templates_render(self, llama: Any, tmp_path: Path, name: str) -> None:
        from transformers import AutoTokenizer

        self._template(llama, tmp_path, name)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
        said = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "World"}]
        text = tokenizer.apply_chat_template(said, tokenize=False)
        assert text.index("Hello") < text.index("World")
        prompt = tokenizer.apply_chat_template(said[:1], tokenize=False, add_generation_prompt=True)
        assert text.startswith(prompt.rstrip())

    def test_text_and_file(self, llama: Any, tmp_path: Path) -> None:
        assert self._template(llama, tmp_path, "{{ messages }}") == "{{ messages }}"
        (tmp_path / "t.jinja").write_text("{{ messages[0] }}")
        shutil.rmtree(tmp_path / "out")
        assert self._template(llama, tmp_path, str(tmp_path / "t.jinja")) == "{{ messages[0] }}"

    def test_auto_takes_the_most_common(self, llama: Any, tmp_path: Path) -> None:
        models = []
        for number, template in enumerate(["{{ 1 }}", "{{ 2 }}", "{{ 2 }}"]):
            model = _copy_with(llama.models[number], tmp_path / f"m{number}")
            (model / "chat_template.jinja").write_text(template)
            models.append(model)
        _write(tmp_path / "out", _linear(*models, chat_template="auto"))
        assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ 2 }}"
        _write(tmp_path / "out2", _linear(*models))
        assert (tmp_path / "out2" / "chat_template.jinja").read_text() == "{{ 1 }}"

    def test_auto_without_any(self, llama: Any, tmp_path: Path) -> None:
        remarks = _write(tmp_path / "out", _linear(*llama.models, chat_template="auto"))
        assert remarks == ["chat_template: auto finds none, as no model has one"]

    def test_an_unknown_name(self, llama: Any, tmp_path: Path) -> None:
        with pytest.raises(RecipeError, match=r"is 'chatmll'; it must be auto.*did you mean 'chatml'"):
            _write(tmp_path / "out", _linear(*llama.models, chat_template="chatmll"))


class TestOtherFiles:
    def test_the_recipe_reads_back_equal(self, llama: Any, tmp_path: Path) -> None:
        policy = {"source": "union", "tokens": {"word1": {"source": str(llama.models[0]), "force": True}}}
        recipe = _linear(*llama.models, tokenizer=policy, dtype="bfloat16", chat_template="chatml")
        _write(tmp_path / "out", recipe)
        assert (
            load_recipes(tmp_path / "out" / RECIPE_NAME)[0] == load_recipes({"name": "merged", **recipe})[0]
        )

    def test_the_model_card(self, llama: Any, tmp_path: Path) -> None:
        _write(tmp_path / "out", _linear(*llama.models, dtype="bfloat16"))
        text = (tmp_path / "out" / "README.md").read_text()
        _, front, body = text.split("---\n", 2)
        assert yaml.safe_load(front) == {"library_name": "transformers", "tags": ["merge", "raymerge"]}
        assert "`linear` ([arXiv:2203.05482](https://arxiv.org/abs/2203.05482))" in body
        assert all(f"`{model}`" in body for model in llama.models)
        assert "| dtype | bfloat16 |" in body
        block = body.split("```yaml\n")[1].split("```")[0]
        assert load_recipes(block)[0][0].name == "merged"

    def test_code_is_copied_with_a_remark(self, llama: Any, tmp_path: Path) -> None:
        donor = _copy_with(llama.base, tmp_path / "d", auto_map={"AutoModel": "modeling_x.X"})
        (donor / "modeling_x.py").write_text("raise SystemExit('this was run')")
        remarks = _write(tmp_path / "out", _linear(donor, llama.models[0]))
        assert remarks == [f"code of {donor} copied, not run: modeling_x.py"]
        assert (tmp_path / "out" / "modeling_x.py").exists()

    def test_files_beside_the_model_are_copied(self, llama: Any, tmp_path: Path) -> None:
        donor = _copy_with(llama.base, tmp_path / "d")
        (donor / "preprocessor_config.json").write_text("{}")
        (donor / "modules.json").write_text("[]")
        (donor / "1_Pooling").mkdir()
        (donor / "1_Pooling" / "config.json").write_text("{}")
        (donor / "training_args.bin").write_text("secret")
        (donor / "notes.py").write_text("pass")
        _write(tmp_path / "out", _linear(donor, llama.models[0]))
        names = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*")}
        assert {"preprocessor_config.json", "modules.json", "1_Pooling/config.json"} <= names
        assert not {"training_args.bin", "notes.py"} & names


class TestLoading:
    """Whole outputs, merged in this process, opened with transformers."""

    def _merge(self, out: Path, recipe: dict[str, Any]) -> Path:
        from raymerge.cluster.merge import merge

        merge([recipe], out, MergeOptions(in_process=True))
        return out

    def _grown(self, model: Path, to: Path, tokens: list[str]) -> Path:
        """Copy a model with more tokens, the rows of each filled with its number."""
        import torch
        from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

        of_bert = _json(model)["model_type"] == "bert"
        network = (AutoModelForMaskedLM if of_bert else AutoModelForCausalLM).from_pretrained(model)
        tokenizer = AutoTokenizer.from_pretrained(model)
        old = len(tokenizer)
        tokenizer.add_tokens(tokens)
        network.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():
            for row in range(old, len(tokenizer)):
                network.get_input_embeddings().weight[row] = float(row)
        network.save_pretrained(to)
        tokenizer.save_pretrained(to)
        return to

    def test_a_union_of_llamas(self, llama: Any, tmp_path: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        one = self._grown(llama.models[0], tmp_path / "one", ["<x>"])
        two = self._grown(llama.models[1], tmp_path / "two", ["<y>", "<x>"])
        recipe = _linear(one, two, base_model=str(llama.base), tokenizer_source="union")
        out = self._merge(tmp_path / "out", recipe | {"merge_method": "task_arithmetic"})
        tokenizer, network = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
        assert tokenizer.convert_tokens_to_ids(["<x>", "<y>"]) == [96, 97]
        embedding_VD = network.get_input_embeddings().weight
        assert embedding_VD.shape[0] == network.config.vocab_size == 98
        assert network.lm_head.weight.shape[0] == 98
        # <x> is 96 in one and 97 in two, the base takes their mean: 96.5 - 0.5 + 0.5.
        torch.testing.assert_close(embedding_VD[96], torch.full((32,), 96.5))
        torch.testing.assert_close(embedding_VD[97], torch.full((32,), 96.0))
        assert network(**tokenizer("word1 <x> word2 <y>", return_tensors="pt")).logits.shape[-1] == 98

    def test_a_union_of_berts_with_a_bias_by_token(self, tiny_checkpoints: Any, tmp_path: Path) -> None:
        from transformers import AutoModelForMaskedLM, AutoTokenizer

        berts = tiny_checkpoints("bert")
        grown = self._grown(berts.models[0], tmp_path / "grown", ["<x>"])
        out = self._merge(tmp_path / "out", _linear(berts.base, grown, vocabulary="union"))
        network, info = AutoModelForMaskedLM.from_pretrained(out, output_loading_info=True)
        assert not info["missing_keys"] and not info["mismatched_keys"] and not info["unexpected_keys"]
        assert network.get_input_embeddings().weight[96, 0] == 96
        assert network.cls.predictions.bias.shape == (97,)
        assert AutoTokenizer.from_pretrained(out).convert_tokens_to_ids("<x>") == 96

    def test_stacked_layers(self, llama: Any, tmp_path: Path) -> None:
        from transformers import AutoModelForCausalLM

        slices = [
            {"sources": [{"model": str(model), "layer_range": [0, 2]}]}
            for model in (llama.base, *llama.models)
        ]
        out = self._merge(tmp_path / "out", {"merge_method": "passthrough", "slices": slices})
        network, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
        assert len(network.model.layers) == 8
        assert not info["missing_keys"] and not info["unexpected_keys"]
