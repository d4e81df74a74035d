"""Classification heads of models with labels of their own: matched by label, kept, left out, refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import raymerge
from raymerge.cluster.heads import label_fault
from raymerge.cluster.verify import verify
from raymerge.merge_actors.checkpoint.header import TensorInfo
from raymerge.merge_actors.errors import MismatchError, RecipeError, VerifyError

HEAD = ("classifier.weight", "classifier.bias")


@pytest.fixture
def make_classifier(tmp_path: Path, tiny_checkpoints: Callable[..., Any]) -> Callable[..., Path]:
    """Return a writer of tiny BERT classifiers: (name, labels, seed) -> folder."""
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    base = tiny_checkpoints("bert").base

    def make(name: str, labels: list[str] | int, seed: int) -> Path:
        torch.manual_seed(seed)
        config = BertConfig.from_pretrained(base)
        if isinstance(labels, int):
            config.num_labels = labels
        else:
            config.id2label = dict(enumerate(labels))
            config.label2id = {label: i for i, label in enumerate(labels)}
        model = BertForSequenceClassification(config)
        model.save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


@pytest.fixture
def models(make_classifier: Callable[..., Path]) -> list[Path]:
    """Write two tasks that share the label `neutral`, in other places."""
    return [
        make_classifier("nli", ["yes", "neutral", "no"], 1),
        make_classifier("mood", ["neutral", "glad"], 2),
    ]


def _recipe(models: list[Path], **changes: Any) -> dict[str, Any]:
    return {
        "merge_method": "linear",
        "models": [
            {"model": str(each), "parameters": {"weight": w}}
            for each, w in zip(models, (3, 1, 2), strict=False)
        ],
        **changes,
    }


def _merge(asked: dict[str, Any], out: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    raymerge.merge(asked, out, in_process=True, workers=1)
    return load_file(out / "model.safetensors"), json.loads((out / "config.json").read_text())


def _tensors(folder: Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = load_file(folder / "model.safetensors")
    return found


def test_rows_are_matched_by_label(models: list[Path], tmp_path: Path) -> None:
    merged, config = _merge(_recipe(models, heads="label-aware"), tmp_path / "out")
    first, second = map(_tensors, models)
    assert config["id2label"] == {"0": "yes", "1": "neutral", "2": "no", "3": "glad"}
    assert config["label2id"] == {"yes": 0, "neutral": 1, "no": 2, "glad": 3}
    for name in HEAD:
        shared = (3 * first[name][1] + second[name][0]) / 4  # the weights count among those that know it
        wanted = np.stack([first[name][0], shared, first[name][2], second[name][1]])
        np.testing.assert_allclose(merged[name], wanted, rtol=1e-6, atol=1e-7)
    encoder = "bert.encoder.layer.0.attention.self.query.weight"
    np.testing.assert_allclose(
        merged[encoder], (3 * first[encoder] + second[encoder]) / 4, rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("heads", ["exclude", "keep"])
def test_what_becomes_of_heads_as_asked_is_a_note(models: list[Path], tmp_path: Path, heads: str) -> None:
    done = raymerge.merge(_recipe(models, heads=heads), tmp_path / "out", in_process=True, workers=1)
    said = [line for line in done.remarks if "merge: " in line]  # the name of the recipe
    assert said and all(line.startswith("note: ") and line.count("note:") == 1 for line in said)


def test_the_output_loads_and_knows_its_labels(models: list[Path], tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    _merge(_recipe(models[:1] * 2, heads="label-aware"), tmp_path / "same")
    out = tmp_path / "out"
    _merge(_recipe(models, heads="label-aware"), out)
    model = AutoModelForSequenceClassification.from_pretrained(out).eval()
    assert model.config.id2label[3] == "glad"
    inputs = AutoTokenizer.from_pretrained(out)("word1 word2", return_tensors="pt")
    assert model(**inputs).logits.shape == (1, 4)
    [verified] = verify(out).outputs
    assert not any("random when it is loaded" in line for line in verified.remarks)


def test_three_models_share_a_label_by_their_weights(
    models: list[Path], make_classifier: Callable[..., Path], tmp_path: Path
) -> None:
    third = make_classifier("third", ["glad", "neutral"], 3)
    merged, _ = _merge(_recipe([*models, third], heads="label-aware"), tmp_path / "out")
    first, second, last = (_tensors(folder)["classifier.weight"] for folder in (*models, third))
    found = merged["classifier.weight"]
    np.testing.assert_allclose(found[1], (3 * first[1] + second[0] + 2 * last[1]) / 6, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found[3], (second[1] + 2 * last[0]) / 3, rtol=1e-5, atol=1e-7)


def test_heads_of_task_vectors_ignore_the_base(
    models: list[Path], tiny_checkpoints: Callable[..., Any], tmp_path: Path
) -> None:
    """The base, a masked language model, has no head; the head's rows are averaged all the same."""
    asked = _recipe(
        models,
        merge_method="task_arithmetic",
        base_model=str(tiny_checkpoints("bert").base),
        heads="label-aware",
        missing="drop",
    )
    merged, config = _merge(asked, tmp_path / "out")
    first, second = map(_tensors, models)
    np.testing.assert_allclose(merged["classifier.weight"][3], second["classifier.weight"][1], rtol=1e-6)
    np.testing.assert_allclose(merged["classifier.bias"][0], first["classifier.bias"][0], rtol=1e-6)
    assert config["architectures"] == ["BertForSequenceClassification"] and len(config["id2label"]) == 4


def test_one_models_head_is_kept(models: list[Path], tmp_path: Path) -> None:
    merged, config = _merge(_recipe(models, heads={"keep": str(models[1])}), tmp_path / "out")
    for name in HEAD:
        np.testing.assert_array_equal(merged[name], _tensors(models[1])[name])
    assert config["id2label"] == {"0": "neutral", "1": "glad"}
    assert not (tmp_path / "out" / "heads").exists()


def test_every_models_head_is_kept_beside_the_output(models: list[Path], tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    out = tmp_path / "out"
    merged, config = _merge(_recipe(models, heads="keep"), out)
    np.testing.assert_array_equal(merged["classifier.weight"], _tensors(models[0])["classifier.weight"])
    assert config["id2label"]["0"] == "yes"
    for folder in models:
        head = load_file(out / "heads" / folder.name / "model.safetensors")
        assert head.keys() == set(HEAD)
        for name in HEAD:
            np.testing.assert_array_equal(head[name], _tensors(folder)[name])
    # As docs/recipes.md says: the merged encoder with the head of a task.
    place = out / "heads" / "mood"
    model = AutoModelForSequenceClassification.from_pretrained(
        out, config=AutoConfig.from_pretrained(place), ignore_mismatched_sizes=True
    )
    state = {name: torch.from_numpy(each) for name, each in load_file(place / "model.safetensors").items()}
    assert model.load_state_dict(state, strict=False).unexpected_keys == []
    assert torch.equal(model.classifier.weight, state["classifier.weight"])


def test_heads_can_be_left_out(models: list[Path], tmp_path: Path) -> None:
    merged, _ = _merge(_recipe(models, heads="exclude"), tmp_path / "out")
    assert not any(name.startswith("classifier") for name in merged)


def test_different_labels_are_refused_unless_said(
    models: list[Path], make_classifier: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(MismatchError, match=r"have different labels \(yes, neutral, no and neutral, glad\)"):
        _merge(_recipe(models), tmp_path / "out")
    turned = make_classifier("turned", ["no", "neutral", "yes"], 4)
    pair = [models[0], turned]
    with pytest.raises(MismatchError, match="set heads: label-aware"):  # the shapes agree, the rows do not
        _merge(_recipe(pair), tmp_path / "out")
    merged, _ = _merge(_recipe(pair, heads="merge"), tmp_path / "out")
    first, second = map(_tensors, pair)
    np.testing.assert_allclose(
        merged["classifier.weight"],
        (3 * first["classifier.weight"] + second["classifier.weight"]) / 4,
        rtol=1e-5,
        atol=1e-7,
    )
    matched, config = _merge(_recipe(pair, heads="label-aware"), tmp_path / "matched")
    assert list(config["id2label"].values()) == ["yes", "neutral", "no"]
    np.testing.assert_allclose(
        matched["classifier.weight"],
        (3 * first["classifier.weight"] + second["classifier.weight"][::-1]) / 4,
        rtol=1e-5,
        atol=1e-7,
    )


def test_labels_without_names_cannot_be_matched(
    models: list[Path], make_classifier: Callable[..., Path], tmp_path: Path
) -> None:
    unnamed = make_classifier("unnamed", 2, 5)
    asked = _recipe([models[1], unnamed], heads="label-aware")
    with pytest.raises(MismatchError, match=r"config\.json of .*unnamed names none .*LABEL_0, LABEL_1"):
        _merge(asked, tmp_path / "out")


def test_named_and_unnamed_labels_are_merged_by_position_with_a_warning(
    models: list[Path], make_classifier: Callable[..., Path], tmp_path: Path
) -> None:
    """As many labels, and nothing says that they differ, or that they do not."""
    pair = [models[1], make_classifier("unnamed", 2, 5)]
    done = raymerge.merge(_recipe(pair), tmp_path / "out", in_process=True, workers=1)
    [said] = [line for line in done.remarks if "labels of the head" in line]
    assert f"are named in {pair[0]} (neutral, glad) but not in {pair[1]} (LABEL_0, LABEL_1), so" in said
    for way in (raymerge.plan, lambda *a, **k: raymerge.merge(*a, tmp_path / "strict", in_process=True, **k)):
        with pytest.raises(MismatchError, match=r"labels of the head are named in \S+/mood .* but not in"):
            way(_recipe(pair), strict=True)
    assert not (tmp_path / "strict").exists()
    quiet = raymerge.plan(_recipe(pair, heads="merge"), strict=True)["remarks"]
    assert not [line for line in quiet if "labels" in line]
    both = [pair[1], make_classifier("also", 2, 6)]
    assert not [line for line in raymerge.plan(_recipe(both))["remarks"] if "labels" in line]


def test_a_head_that_is_not_as_large_as_its_config_says_is_refused(
    models: list[Path], tmp_path: Path
) -> None:
    config = json.loads((models[1] / "config.json").read_text())
    for wrong in ({"id2label": {"0": "a", "1": "b", "2": "c"}}, {"id2label": None, "num_labels": 3}):
        (models[1] / "config.json").write_text(json.dumps({**config, **wrong}))
        for heads in (None, "merge", "label-aware", "keep", {"keep": str(models[1])}):
            asked = _recipe(models[1:] if heads is None else models, **({"heads": heads} if heads else {}))
            with pytest.raises(
                MismatchError,
                match=r"mood: tensor classifier\.weight has 2 rows, but config\.json has 3 labels \(\w+, \w+, \w+\)",
            ):
                raymerge.plan(asked)
        for heads in ("exclude", {"keep": str(models[0])}):
            raymerge.plan(_recipe(models, heads=heads))
    (models[1] / "config.json").write_text(json.dumps(config))
    _merge(_recipe(models[1:]), tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text(json.dumps({**config, "id2label": {"0": "one"}}))
    with pytest.raises(
        VerifyError, match=r"classifier\.weight has 2 rows, but config\.json has 1 label \(one\)"
    ):
        verify(tmp_path / "out", load=False)


def test_heads_of_transformers_agree_with_their_configs() -> None:
    """Whatever a family calls the layers of its head, a model as transformers makes it is not refused."""
    import transformers

    tiny = {"num_labels": 5, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tiny |= {"intermediate_size": 16, "vocab_size": 32}
    families = (
        ("Bert", "SequenceClassification", {}),
        ("Roberta", "SequenceClassification", {"pad_token_id": 1}),
        ("Roberta", "TokenClassification", {"pad_token_id": 1}),
        ("Electra", "SequenceClassification", {"embedding_size": 16}),
        ("DistilBert", "SequenceClassification", {"dim": 16, "hidden_dim": 16, "n_heads": 2, "n_layers": 1}),
        ("Llama", "SequenceClassification", {}),
        ("T5", "SequenceClassification", {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1}),
        ("ViT", "ImageClassification", {"image_size": 8, "patch_size": 4}),
        ("ResNet", "ImageClassification", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}),
        (
            "Funnel",
            "SequenceClassification",
            {
                "d_model": 16,
                "n_head": 2,
                "d_head": 8,
                "d_inner": 16,
                "block_sizes": [1],
                "num_hidden_layers": None,
            },
        ),
    )
    for family, task, more in families:
        given = {key: value for key, value in {**tiny, **more}.items() if value is not None}
        config = getattr(transformers, f"{family}Config")(**given)
        model = getattr(transformers, f"{family}For{task}")(config)
        stored = {**json.loads(config.to_json_string()), "architectures": [type(model).__name__]}
        tensors = {
            name: TensorInfo(name=name, dtype="F32", shape=tuple(each.shape), file="x", begin=0, end=0)
            for name, each in model.state_dict().items()
        }
        assert label_fault(stored, tensors) is None, family
        fault = label_fault({**stored, "id2label": {"0": "a"}}, tensors)
        assert fault is not None and "has 5 rows" in fault, family


def test_a_head_can_only_be_kept_from_a_classifier(
    models: list[Path], tiny_checkpoints: Callable[..., Any], tmp_path: Path
) -> None:
    encoder = tiny_checkpoints("bert").models[0]
    asked = _recipe([models[0], encoder], heads={"keep": str(encoder)}, missing="present")
    with pytest.raises(MismatchError, match="is no classifier with labels"):
        _merge(asked, tmp_path / "out")
    with pytest.raises(RecipeError, match="none of the models"):
        _merge(_recipe(models, heads={"keep": "/elsewhere"}), tmp_path / "out")


def test_regmean_solves_the_encoder_and_matches_the_heads(models: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": f"word{i} word{i + 1}"}) + "\n" for i in range(40)))
    asked = _recipe(models, merge_method="regmean", data=str(path), heads="label-aware")
    merged, config = _merge(asked, tmp_path / "out")
    assert len(config["id2label"]) == 4
    np.testing.assert_allclose(
        merged["classifier.weight"][3], _tensors(models[1])["classifier.weight"][1], rtol=1e-6
    )
    tensors = json.loads((tmp_path / "out" / "raymerge_manifest.json").read_text())["tensors"]
    assert "rank" in tensors["bert.pooler.dense.weight"] and "rank" not in tensors["classifier.weight"]


@pytest.mark.parametrize(
    ("weights", "what"),
    [
        ((1, -1), r"tensor classifier\.bias .* \(-1, 1\) sum to 0"),
        ((0, 1), r"the row of label yes .* \(0\) sum to 0"),
    ],
)
def test_weights_that_leave_a_label_without_a_mean_are_refused(
    models: list[Path], tmp_path: Path, weights: tuple[int, ...], what: str
) -> None:
    asked = _recipe(models, heads="label-aware", parameters={"normalize": False})
    for model, weight in zip(asked["models"], weights, strict=True):
        model["parameters"]["weight"] = weight
    with pytest.raises(MismatchError, match=what):
        raymerge.merge(asked, tmp_path / "out", in_process=True, workers=1)
    _merge({**asked, "heads": {"keep": str(models[0])}}, tmp_path / "kept")


def test_a_head_that_only_the_base_has_is_left_out(
    models: list[Path], make_classifier: Callable[..., Path], tmp_path: Path
) -> None:
    base = make_classifier("base", ["yes", "no"], 3)
    tensors = {
        name.replace("classifier", "score") if name in HEAD else name: values
        for name, values in _tensors(base).items()
    }
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    asked = _recipe(models, heads="label-aware", merge_method="task_arithmetic", base_model=str(base))
    merged, _ = _merge(asked, tmp_path / "out")
    assert set(HEAD) <= merged.keys() and "score.weight" not in merged
