"""Read labelled text from the documentation of the installed libraries.

Docstrings are written and structured by people: which library one belongs to, which section a passage stands in and
which type a parameter is documented with are labels that come for free. Source files are parsed, never imported, so
the result depends on the installed versions only.
"""

import ast
import hashlib
import importlib.util
import re
import textwrap
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LIBRARIES = ("matplotlib", "networkx", "numpy", "pandas", "ray", "sympy", "torch", "transformers")
#: What a skill's label says about a text: which library, which section of the docstring, which type of parameter.
SKILLS = {
    "library": LIBRARIES,
    "section": ("summary", "parameter", "returns", "raises", "notes"),
    "type": ("array", "bool", "callable", "float", "int", "str"),
}
#: At most, of each skill; shared equally among its labels, so that accuracy means what it says.
NUM_EXAMPLES = {"train": 1200, "validation": 200, "test": 500}
FILES_PER_LIBRARY = 450
MAX_CHARACTERS = 180

_SECTION_OF_HEADER = {
    "args": "parameter",
    "parameters": "parameter",
    "other parameters": "parameter",
    "returns": "returns",
    "raises": "raises",
    "notes": "notes",
    "note": "notes",
}
_TYPE_PATTERNS = {
    "array": r"(np\.|numpy\.)?ndarray|array[-_]like|(torch\.)?(\w*tensor)",
    "bool": r"bool|boolean",
    "callable": r"callable|function",
    "float": r"float",
    "int": r"int|integer",
    "str": r"str|string",
}
#: "Header" underlined (NumPy style) or "Header:" with an indented body (Google style).
_HEADER = re.compile(r"^([A-Z][A-Za-z ]+)(?:\n-{3,}|:)\n", re.MULTILINE)
#: A line at the margin and the indented lines below it.
_ENTRY = re.compile(r"^(\S.*)\n((?:[ \t]+.*\n|\n)*)", re.MULTILINE)
#: "name : type", "name (type): text" and "name: text", where a name may be an exception's.
_ENTRY_HEAD = re.compile(
    r"\*{0,2}`?[\w.]+(?:, \*{0,2}\w+)*`?"
    r"(?: : (?P<numpy>.+)| ?\((?P<google>.*)\):(?P<typed>.*)|:(?P<text>.*))$"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """A text and the index of its label."""

    text: str
    label: int


Splits = dict[str, list[Example]]


def read_skills() -> dict[str, Splits]:
    """Return the train, validation and test examples of every skill, in a fixed order.

    A source file is in the same split for every skill; a text counts once, and not at all where it has two labels.
    """
    labels: dict[str, dict[str, set[str]]] = {skill: defaultdict(set) for skill in SKILLS}
    split_of: dict[str, str] = {}
    for library in LIBRARIES:
        for path, docstring in _docstrings(library):
            for skill, label, passage in _passages(docstring, library):
                text = _plain(passage)
                if len(text) >= 25:
                    labels[skill][text].add(label)
                    split_of.setdefault(text, _split(path))
    return {skill: _balance(SKILLS[skill], labels[skill], split_of) for skill in SKILLS}


def _docstrings(library: str) -> Iterator[tuple[str, str]]:
    """Yield (file, docstring) of the functions and classes of an installed library, tests left out."""
    spec = importlib.util.find_spec(library)
    assert spec and spec.submodule_search_locations, f"{library} is not installed"
    root = Path(spec.submodule_search_locations[0])
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    names = [
        name
        for name in names
        if not re.search(r"(^|/)(tests?|testing|_vendor|thirdparty_files)/|test_", name)
    ]
    for name in sorted(names, key=_fraction)[:FILES_PER_LIBRARY]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse((root / name).read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = ast.get_docstring(node)
                if docstring:
                    yield f"{library}/{name}", docstring


def _passages(docstring: str, library: str) -> Iterator[tuple[str, str, str]]:
    """Yield (skill, label, passage) for what a docstring holds."""
    summary, *sections = _HEADER.split(docstring + "\n")
    summary = summary.split("\n\n")[0]
    if summary:
        yield "library", library, re.sub(rf"(?i){library}|\b(py)?({'|'.join(LIBRARIES)})\b", "it", summary)
        yield "section", "summary", summary
    for header, body in zip(sections[::2], sections[1::2], strict=True):
        section = _SECTION_OF_HEADER.get(header.lower())
        body = textwrap.dedent(body)
        if section == "notes":
            yield "section", "notes", body.strip().split("\n\n")[0]
        elif section:
            for documented_type, text in _entries(body):
                yield "section", section, text
                if section == "parameter":
                    for label, pattern in _TYPE_PATTERNS.items():
                        if re.match(rf"({pattern})\b(?! or)", documented_type.lower()):
                            yield "type", label, text


def _entries(body: str) -> Iterator[tuple[str, str]]:
    """Yield (documented type or "", description) of the entries of a section."""
    for line, below in _ENTRY.findall(body):
        head = _ENTRY_HEAD.match(line)
        if head is None:
            yield "", below or line
        else:
            documented_type = head["numpy"] or head["google"] or ""
            yield (
                documented_type.strip("`: "),
                f"{head['typed'] or head['text'] or ''} {below}".split("\n\n")[0],
            )


def _plain(text: str) -> str:
    """Return one line without markup, cut at a word."""
    text = re.sub(r":\w+:`|[`*]|\s+", " ", text)
    text = re.sub(r" +", " ", text).strip()
    return text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS].rsplit(" ", 1)[0]


def _fraction(name: str) -> float:
    """Return a number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def _split(path: str) -> str:
    fraction = _fraction("split of " + path)
    return "train" if fraction < 0.65 else "validation" if fraction < 0.75 else "test"


def _balance(names: tuple[str, ...], labels: dict[str, set[str]], split_of: dict[str, str]) -> Splits:
    """Take the same number of every label, the texts in the order of their hashes."""
    splits: Splits = {split: [] for split in NUM_EXAMPLES}
    taken: dict[tuple[str, str], int] = defaultdict(int)
    for text in sorted(labels, key=_fraction):
        if len(labels[text]) == 1:
            [label] = labels[text]
            split = split_of[text]
            if taken[split, label] < NUM_EXAMPLES[split] // len(names):
                taken[split, label] += 1
                splits[split].append(Example(text=text, label=names.index(label)))
    return splits
