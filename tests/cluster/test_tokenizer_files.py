"""Extended tokenizers: written, opened again with transformers, and used."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from raymerge.cluster.matched import LoadedModel
from raymerge.cluster.tokenizer_files import write_tokenizer
from raymerge.cluster.tokenizer_tokens import read_token_ids
from raymerge.cluster.vocabulary import Vocabulary
from raymerge.merge_actors.checkpoint.folder import Checkpoint
from raymerge.merge_actors.errors import CheckpointError, OutputError


def _loaded(folder: Path) -> LoadedModel:
    path = str(folder)
    checkpoint = Checkpoint(path=path, folder=path, tensors={}, config={}, tied={}, fingerprint="")
    return LoadedModel(folder.name, checkpoint)


def _save(folder: Path, tokenizer: Any, **special: str) -> LoadedModel:
    from transformers import PreTrainedTokenizerFast

    folder.mkdir()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return _loaded(folder)


def _with_added(tokenizer: Any, added: Sequence[str]) -> Any:
    from tokenizers import AddedToken

    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in added])
    return tokenizer


def _words(tokens: Sequence[str], added: Sequence[str] = ()) -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    tokenizer = Tokenizer(WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return _with_added(tokenizer, added)


def _bpe(merges: Sequence[tuple[str, str]], added: Sequence[str] = ()) -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import Whitespace

    tokens = ["<unk>", *"abcdefgh", *(left + right for left, right in merges)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocabulary, list(merges), unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return _with_added(tokenizer, added)


def _unigram(scores: Mapping[str, float], added: Sequence[str] = ()) -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import Unigram
    from tokenizers.pre_tokenizers import Whitespace

    vocabulary = [("<unk>", 0.0), *((letter, -5.0) for letter in "abcd"), *scores.items()]
    tokenizer = Tokenizer(Unigram(vocabulary, 0, False))
    tokenizer.pre_tokenizer = Whitespace()
    return _with_added(tokenizer, added)


def _wordpiece(tokens: Sequence[str], added: Sequence[str] = ()) -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordPiece
    from tokenizers.pre_tokenizers import Whitespace

    vocabulary = {token: i for i, token in enumerate(["<unk>", *tokens])}
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return _with_added(tokenizer, added)


def _union(source: LoadedModel, *others: LoadedModel, more: Sequence[str] = ()) -> Vocabulary:
    """Plan all tokens of all models, with the ids that the plan would give."""
    ids = dict(read_token_ids(source) or {})
    first = max(ids.values()) + 1
    added: dict[str, str | None] = {}
    for other in others:
        theirs = read_token_ids(other) or {}
        for token in sorted(theirs, key=theirs.__getitem__):
            if token not in ids and token not in added:
                added[token] = other.key
    added |= dict.fromkeys(more)
    ids |= {token: first + i for i, token in enumerate(added)}
    return Vocabulary(
        num_rows=len(ids), rows={}, models={}, tokenizer_model=source.key, token_ids=ids, added=added
    )


def _write(folder: Path, source: LoadedModel, *others: LoadedModel, more: Sequence[str] = ()) -> Any:
    """Write the union and open it; `write_tokenizer` itself compares all ids with the plan."""
    from transformers import AutoTokenizer

    folder.mkdir()
    vocabulary = _union(source, *others, more=more)
    assert write_tokenizer(folder, source, vocabulary, {each.key: each for each in (source, *others)}) == []
    return AutoTokenizer.from_pretrained(folder)


class TestUnion:
    def test_added_tokens_keep_their_properties(self, tmp_path: Path) -> None:
        from tokenizers import AddedToken

        one = _save(tmp_path / "one", _words(["<unk>", "a"], ["<pad>"]), unk_token="<unk>")
        other = _words(["<unk>", "a"])
        other.add_tokens([AddedToken("<x>", lstrip=True, normalized=False)])
        tokenizer = _write(tmp_path / "out", one, _save(tmp_path / "two", other))
        assert tokenizer("a <pad> <x>").input_ids == [1, 2, 3]
        assert tokenizer.added_tokens_decoder[3].lstrip
        assert not tokenizer.added_tokens_decoder[3].special
        assert tokenizer.added_tokens_decoder[2].special

    def test_words(self, tmp_path: Path) -> None:
        one = _save(tmp_path / "one", _words(["<unk>", "a", "b"], ["<pad>"]), unk_token="<unk>")
        two = _save(tmp_path / "two", _words(["<unk>", "b", "new"], ["<x>"]), unk_token="<unk>")
        tokenizer = _write(tmp_path / "out", one, two)
        assert tokenizer("a b new <x> <pad> nothing").input_ids == [1, 2, 4, 5, 3, 0]
        assert tokenizer.unk_token == "<unk>"

    def test_bpe_learns_the_merges_of_new_tokens(self, tmp_path: Path) -> None:
        one = _save(tmp_path / "one", _bpe([("a", "b"), ("c", "d")], ["<pad>"]), unk_token="<unk>")
        two = _save(tmp_path / "two", _bpe([("b", "c"), ("a", "b"), ("ab", "c")]), unk_token="<unk>")
        tokenizer = _write(tmp_path / "out", one, two)
        assert tokenizer.tokenize("abc") == ["abc"]
        assert tokenizer.tokenize("bc") == ["bc"]
        assert tokenizer.tokenize("abcd") == ["ab", "cd"]  # as before: the donor's merges come first
        assert tokenizer.tokenize("ab<pad>cd") == ["ab", "<pad>", "cd"]

    def test_unigram_takes_the_scores_of_new_tokens(self, tmp_path: Path) -> None:
        one = _save(tmp_path / "one", _unigram({"ab": -3.0}, ["<pad>"]), unk_token="<unk>")
        two = _save(tmp_path / "two", _unigram({"cd": -2.0}, ["<x>"]), unk_token="<unk>")
        tokenizer = _write(tmp_path / "out", one, two)
        assert tokenizer.tokenize("abcd") == ["ab", "cd"]
        assert tokenizer.tokenize("cd <x> <pad>") == ["cd", "<x>", "<pad>"]

    def test_wordpiece(self, tmp_path: Path) -> None:
        one = _save(tmp_path / "one", _wordpiece(["a", "##b"], ["<pad>"]), unk_token="<unk>")
        two = _save(tmp_path / "two", _wordpiece(["a", "##bc"]), unk_token="<unk>")
        assert _write(tmp_path / "out", one, two).tokenize("abc <pad>") == ["a", "##bc", "<pad>"]

    def test_tokens_of_another_kind_of_tokenizer_are_kept(self, tmp_path: Path) -> None:
        one = _save(tmp_path / "one", _bpe([("a", "b")]), unk_token="<unk>")
        two = _save(tmp_path / "two", _unigram({"cd": -2.0}), unk_token="<unk>")
        assert _write(tmp_path / "out", one, two).convert_tokens_to_ids("cd") == 10
        assert _write(tmp_path / "back", two, one).convert_tokens_to_ids("h") == 9

    def test_made_up_tokens_are_special(self, tmp_path: Path) -> None:
        one = _save(tmp_path / "one", _words(["<unk>", "a"]), unk_token="<unk>")
        tokenizer = _write(tmp_path / "out", one, more=["<|im_start|>"])
        assert tokenizer("a<|im_start|>a").input_ids == [1, 2, 1]
        assert tokenizer.decode([1, 2], skip_special_tokens=True) == "a"

    @pytest.mark.parametrize("architecture", ["LlamaTokenizer", "BertTokenizer", "GPT2Tokenizer"])
    def test_classes_that_build_themselves_anew(self, tmp_path: Path, architecture: str) -> None:
        """Transformers rebuilds these from the vocabulary and the merges in tokenizer.json."""
        import transformers

        special = ["<unk>", "<s>", "</s>", "\u2581"]
        if architecture == "BertTokenizer":
            special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        if architecture == "GPT2Tokenizer":
            special = ["<|endoftext|>"]
        models = []
        for name, word in (("one", "ab"), ("two", "bc")):
            tokens = [*special, *"abc", word]
            keys: dict[str, Any] = {"vocab": {token: i for i, token in enumerate(tokens)}}
            if architecture != "BertTokenizer":
                keys["merges"] = [tuple(word)]
            getattr(transformers, architecture)(**keys).save_pretrained(tmp_path / name)
            models.append(_loaded(tmp_path / name))
        tokenizer = _write(tmp_path / "out", *models, more=["<new>"])
        assert type(tokenizer).__name__ == architecture
        assert "bc" in tokenizer.tokenize("bc")


def test_without_additions_files_are_copied_but_for_paths(tmp_path: Path) -> None:
    model = _save(tmp_path / "one", _words(["<unk>", "a"]), unk_token="<unk>")
    config_path = tmp_path / "one" / "tokenizer_config.json"
    config = json.loads(config_path.read_text())
    config_path.write_text(json.dumps(config | {"name_or_path": "/home/somebody/model"}))
    (tmp_path / "one" / "additional_chat_templates").mkdir()
    (tmp_path / "one" / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
    (tmp_path / "one" / "merges.txt").write_text("a b")
    out = tmp_path / "out"
    out.mkdir()
    assert write_tokenizer(out, model, None, {}) == []
    assert (out / "tokenizer.json").read_bytes() == (tmp_path / "one" / "tokenizer.json").read_bytes()
    assert "name_or_path" not in json.loads((out / "tokenizer_config.json").read_text())
    assert (out / "additional_chat_templates" / "tool.jinja").exists()
    assert (out / "merges.txt").exists()


def test_stale_token_files_are_left_out(tmp_path: Path) -> None:
    one = _save(tmp_path / "one", _words(["<unk>", "a"]), unk_token="<unk>")
    (tmp_path / "one" / "added_tokens.json").write_text("{}")
    _write(tmp_path / "out", one, more=["<x>"])
    assert not (tmp_path / "out" / "added_tokens.json").exists()


def test_ids_that_cannot_be_had_are_refused(tmp_path: Path) -> None:
    model = _save(tmp_path / "one", _words(["<unk>", "a"]), unk_token="<unk>")
    vocabulary = Vocabulary(
        num_rows=9,
        rows={},
        models={},
        tokenizer_model="one",
        token_ids={"<unk>": 0, "a": 1, "<x>": 7},
        added={"<x>": None},
    )
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(OutputError, match=r"gives '<x>' the id 2 and not 7 \(1 of 3 tokens differ\)"):
        write_tokenizer(out, model, vocabulary, {})


class TestReading:
    def test_a_model_with_old_files_only(self, tmp_path: Path) -> None:
        tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "##b"]
        (tmp_path / "vocab.txt").write_text("\n".join(tokens))
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
        assert read_token_ids(_loaded(tmp_path)) == {token: i for i, token in enumerate(tokens)}

    def test_old_files_can_be_extended(self, tmp_path: Path) -> None:
        one = tmp_path / "one"
        one.mkdir()
        (one / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]))
        (one / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
        tokenizer = _write(tmp_path / "out", _loaded(one), more=["<x>"])
        assert tokenizer("a <x>", add_special_tokens=False).input_ids == [5, 6]

    def test_no_tokenizer(self, tmp_path: Path) -> None:
        assert read_token_ids(_loaded(tmp_path)) is None
        assert write_tokenizer(tmp_path, _loaded(tmp_path), None, {}) == [
            f"no tokenizer written: {tmp_path.name} has none"
        ]

    def test_a_tokenizer_that_nobody_can_open(self, tmp_path: Path) -> None:
        (tmp_path / "tokenizer.model").write_text("nonsense")
        with pytest.raises(CheckpointError, match="transformers cannot open the tokenizer in"):
            read_token_ids(_loaded(tmp_path))
