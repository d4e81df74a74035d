"""Read YAML that a stranger wrote, and keep the line of every key.

Only plain values come out: mappings, lists, texts, numbers, booleans, null. Refused, each with
its line: other tags, duplicate keys, texts over `MAX_TEXT_BYTES`, and documents that unfold to
more than `MAX_NUM_NODES` values through aliases ("billion laughs") or refer to themselves.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from raymerge.cluster.origin import Origin, join
from raymerge.merge_actors.errors import RecipeError
from raymerge.merge_actors.storage.folders import reading
from raymerge.merge_actors.storage.uris import absolute, is_remote, without_file_scheme

MAX_TEXT_BYTES = 4 << 20
#: A recipe of 1000 models with 20 parameters each has about 50,000.
MAX_NUM_NODES = 500_000
_MERGE_TAG = "tag:yaml.org,2002:merge"
_TAG_PREFIX = "tag:yaml.org,2002:"


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One YAML document."""

    value: Any
    """Plain values."""
    origin: Origin
    """The file, and the line of every key path."""


def read_documents(path: str | os.PathLike[str]) -> list[Document]:
    """Read every document of a file, local or in an object store.

    Raises:
        RecipeError: if the file cannot be read, is no text, or is no YAML that is allowed.
        CheckpointError: the store has no such object, or fails.
    """
    path = without_file_scheme(os.fspath(path))
    try:
        data = _beginning(path)
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}.") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if len(data) <= MAX_TEXT_BYTES:
            raise RecipeError(f"{path} is not a text in UTF-8 (byte {error.start}).") from error
        text = data.decode("latin-1")
    return parse_documents(text, path)


def _beginning(path: str) -> bytes:
    """Return a file as far as it may be long, and a byte more."""
    if is_remote(path):
        with reading(absolute(path)) as reader:
            return reader.read(0, MAX_TEXT_BYTES + 1)
    with open(path, "rb") as file:  # which may be a pipe
        return file.read(MAX_TEXT_BYTES + 1)


def parse_documents(text: str, file: str) -> list[Document]:
    """Parse every document of a text; documents without content are left out."""
    if len(text.encode("utf-8", "surrogatepass")) > MAX_TEXT_BYTES:
        raise RecipeError(f"{file} is larger than {MAX_TEXT_BYTES >> 20} MiB; a recipe is a small text.")
    try:
        nodes = list(_compose(text))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        problem = " ".join(part for part in (error.context, error.problem) if part)
        raise RecipeError(f"{file}{line}: not valid YAML: {problem}.") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{file}: not valid YAML: {' '.join(str(error).split())}.") from error
    except RecursionError:
        raise RecipeError(f"{file}: values are nested too deeply to be a recipe.") from None
    return [_Reader(file).document(node) for node in nodes]


def _compose(text: str) -> Iterator[yaml.Node]:
    # The pure Python loader: its recursion ends in RecursionError, not in a dead process.
    for node in yaml.compose_all(text, Loader=yaml.SafeLoader):
        if not (isinstance(node, yaml.ScalarNode) and node.tag == _TAG_PREFIX + "null"):
            yield node


class _Reader:
    """Turns the nodes of one document into values; aliases are unfolded, within the limit."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.lines: dict[str, int] = {}
        self.num_nodes = 0
        #: nodes that are being read: one met again inside itself is a loop
        self.open_nodes: set[int] = set()
        self.scalars = yaml.SafeLoader("")

    def document(self, node: yaml.Node) -> Document:
        value = self.value(node, "")
        line = node.start_mark.line + 1
        return Document(value=value, origin=Origin(file=self.file, line=line, lines=self.lines))

    def value(self, node: yaml.Node, key: str) -> Any:
        """Return a node as plain values, and note the lines of its keys."""
        self.enter(node)
        value: Any
        if isinstance(node, yaml.ScalarNode):
            value = self.scalar(node)
        elif isinstance(node, yaml.SequenceNode):
            value = self.sequence(node, key)
        else:
            assert isinstance(node, yaml.MappingNode)
            value = self.mapping(node, key)
        self.open_nodes.remove(id(node))
        return value

    def enter(self, node: yaml.Node) -> None:
        """Count a node and mark it as being read."""
        self.num_nodes += 1
        if self.num_nodes > MAX_NUM_NODES:
            raise self.error(node, f"aliases unfold to more than {MAX_NUM_NODES:,} values")
        if id(node) in self.open_nodes:
            raise self.error(node, "an anchor refers to itself")
        self.open_nodes.add(id(node))

    def scalar(self, node: yaml.ScalarNode) -> Any:
        """Return a number, a switch, a text or nothing; tags that make other things are refused."""
        kind = node.tag.removeprefix(_TAG_PREFIX)
        if kind in ("str", "timestamp", "value"):
            return node.value
        if kind not in ("int", "float", "bool", "null"):
            raise self.error(node, f"the tag {node.tag!r} is not allowed in a recipe")
        try:
            return self.scalars.construct_object(node)
        except (ValueError, KeyError, IndexError):
            raise self.error(node, f"{node.value!r} is not a YAML {kind}") from None

    def sequence(self, node: yaml.SequenceNode, key: str) -> list[Any]:
        self.check_tag(node, "seq")
        items = []
        for index, item in enumerate(node.value):
            item_key = f"{key}[{index}]"
            self.lines[item_key] = item.start_mark.line + 1
            items.append(self.value(item, item_key))
        return items

    def mapping(self, node: yaml.MappingNode, key: str) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name, (value_node, line) in self.pairs(node, key).items():
            self.lines[join(key, name)] = line
            result[name] = self.value(value_node, join(key, name))
        return result

    def pairs(self, node: yaml.MappingNode, key: str) -> dict[str, tuple[yaml.Node, int]]:
        """Return name -> (value, line); a mapping's own keys win over those of "<<"."""
        self.check_tag(node, "map")
        own: dict[str, tuple[yaml.Node, int]] = {}
        merged: dict[str, tuple[yaml.Node, int]] = {}
        for name_node, value_node in node.value:
            if name_node.tag == _MERGE_TAG:
                merged |= self.merged_pairs(value_node, key)
                continue
            name, line = self.name(name_node), name_node.start_mark.line + 1
            if name in own:
                twice = f"key {join(key, name)} stands twice, first in line {own[name][1]}; keep one"
                raise self.error(name_node, twice)
            own[name] = (value_node, line)
        return merged | own

    def merged_pairs(self, node: yaml.Node, key: str) -> dict[str, tuple[yaml.Node, int]]:
        """Return the keys of "<<: *anchor"; of several anchors the first one that has a key wins."""
        merged: dict[str, tuple[yaml.Node, int]] = {}
        for source in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            if not isinstance(source, yaml.MappingNode):
                raise self.error(node, "'<<' takes a mapping or a list of mappings")
            self.enter(source)
            merged = self.pairs(source, key) | merged
            self.open_nodes.remove(id(source))
        return merged

    def name(self, node: yaml.Node) -> str:
        if not isinstance(node, yaml.ScalarNode):
            raise self.error(node, "a key must be a text")
        return str(node.value)

    def check_tag(self, node: yaml.Node, kind: str) -> None:
        if node.tag != _TAG_PREFIX + kind:
            raise self.error(node, f"the tag {node.tag!r} is not allowed in a recipe")

    def error(self, node: yaml.Node, problem: str) -> RecipeError:
        return RecipeError(f"{self.file}:{node.start_mark.line + 1}: {problem}.")
