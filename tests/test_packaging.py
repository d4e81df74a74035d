"""The package as it is built and laid out: what is in it, who may import whom, what importing it costs."""

import ast
import importlib.metadata
import re
import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PACKAGE_FOLDERS = ("raymerge", "merge_actors", "stats", "cluster", "cli")
#: Imports run from a higher floor to the same or a lower one.
FLOOR = {"merge_actors": 0, "stats": 1, "cluster": 2, "cli": 3}
#: Outside cluster/ only the actors' thin skins know ray.
RAY_SKINS = {"merge_actors/ray_worker.py", "merge_actors/ray_metrics.py", "stats/ray_activation_worker.py"}

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCES = sorted(path for folder in PACKAGE_FOLDERS for path in (ROOT / folder).rglob("*.py"))


def _module_of(folder: Path) -> str:
    parts = folder.relative_to(ROOT).parts
    return ".".join(parts if parts[0] == "raymerge" else ("raymerge", *parts))


def _tracked(*patterns: str) -> list[Path]:
    """Return the files of the repository, those not yet committed included; in an unpacked sdist, all."""
    command = [
        "git",
        "-C",
        str(ROOT),
        "ls-files",
        "--cached",
        "--others",
        "--exclude-standard",
        "--",
        *patterns,
    ]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def _imported_modules(path: Path) -> list[str]:
    """Return every module that a file imports at any depth, functions included."""
    modules = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            modules.append(node.module or "")
            modules += [f"{node.module}.{alias.name}" for alias in node.names]
    return modules


def _run_python(code: str) -> str:
    """Run code in a fresh interpreter away from the repository and return what it prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_package_list_is_the_folders() -> None:
    folders = {path.parent for path in SOURCES if path.name == "__init__.py"}
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == {_module_of(folder) for folder in folders}


def test_every_folder_with_code_is_a_typed_package() -> None:
    for folder in {path.parent for path in SOURCES}:
        assert (folder / "__init__.py").is_file(), folder
        assert (folder / "py.typed").read_bytes() == b"", folder


def test_the_links_for_mypy_spell_out_the_packages() -> None:
    links = {link.name: link.resolve() for link in (ROOT / ".typing" / "raymerge").iterdir()}
    expected = {name: (ROOT / name).resolve() for name in FLOOR}
    expected |= {
        path.name: path for path in (ROOT / "raymerge").iterdir() if path.suffix in (".py", ".typed")
    }
    assert links == expected


def test_the_version_is_that_of_pyproject() -> None:
    assert importlib.metadata.version("raymerge") == PYPROJECT["project"]["version"]


def test_every_dependency_is_pinned() -> None:
    lines = (ROOT / "requirements" / "constraints.txt").read_text().splitlines()
    pinned = {_normalised(line.split("==")[0]) for line in lines}
    project = PYPROJECT["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    assert {_normalised(re.split(r"[\[<>=~! ]", requirement)[0]) for requirement in wanted} <= pinned
    assert all(re.match(r"[a-z0-9-]+==[^+]+$", line.split(" ;")[0]) for line in lines), (
        "pins are name==public version"
    )


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downward(path: Path) -> None:
    relative = path.relative_to(ROOT)
    for module in _imported_modules(path):
        parts = module.split(".")
        assert parts[0] not in FLOOR, f"{relative} imports {module}: its name is raymerge.{module}"
        if parts[0] == "ray":
            allowed = relative.parts[0] == "cluster" or str(relative) in RAY_SKINS
            assert allowed, f"{relative} imports ray: only cluster/ and {sorted(RAY_SKINS)} may"
        if parts[0] == "raymerge" and len(parts) > 1 and relative.parts[0] in FLOOR:
            floor = FLOOR.get(parts[1], -1)
            assert floor <= FLOOR[relative.parts[0]], f"{relative} imports upward: {module}"


def test_importing_raymerge_loads_neither_torch_nor_ray() -> None:
    loaded = "import sys, raymerge; print([m for m in ('torch', 'ray', 'transformers') if m in sys.modules])"
    assert _run_python(loaded).strip() == "[]"


def test_every_module_but_the_skins_imports_without_ray() -> None:
    names = [
        _module_of(path.parent if path.name == "__init__.py" else path.with_suffix(""))
        for path in SOURCES
        if path.is_relative_to(ROOT / "merge_actors") and str(path.relative_to(ROOT)) not in RAY_SKINS
    ]
    code = f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\n"
    code += "print('ray' in sys.modules)"
    assert _run_python(code).strip() == "False"


def test_help_is_fast_and_loads_neither_torch_nor_ray() -> None:
    code = (
        "import sys\nfrom raymerge.cli.main import main\n"
        "try: main(['--help'])\nexcept SystemExit as end: assert not end.code\n"
        "print([m for m in ('torch', 'ray', 'transformers', 'numpy') if m in sys.modules])"
    )
    assert _run_python(code).rstrip().endswith("\n[]")
    script = Path(sys.executable).with_name("raymerge")
    seconds = []
    for _ in range(5):
        begin = _seconds_of_children()
        subprocess.run([script, "--help"], capture_output=True, check=True, cwd="/")
        seconds.append(_seconds_of_children() - begin)
    assert min(seconds) < 0.5, f"raymerge --help took {seconds}"


def _seconds_of_children() -> float:
    """Return the processor's time of the processes that have ended: what else runs here does not count."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_the_wheel_holds_every_module(tmp_path: Path) -> None:
    copy = tmp_path / "source"  # setuptools leaves build/ and *.egg-info beside pyproject.toml
    for path in _tracked("pyproject.toml", "README.md", "LICENSE", *PACKAGE_FOLDERS):
        target = copy / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(copy)], check=True)
    [wheel] = tmp_path.glob("raymerge-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in SOURCES:
        parts = path.relative_to(ROOT).parts
        assert "/".join(parts if parts[0] == "raymerge" else ("raymerge", *parts)) in names
    assert {f"raymerge/{name}/py.typed" for name in FLOOR} <= names
    assert not [name for name in names if name.split("/")[0] in (*FLOOR, "tests", "examples", "benchmarks")]
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_code_is_ascii() -> None:
    for path in _tracked("*.py", "*.toml", "*.yaml", "Makefile", ".ci/*"):
        text = path.read_text(encoding="utf-8")
        lines = [number for number, line in enumerate(text.splitlines(), 1) if not line.isascii()]
        assert not lines, f"{path.relative_to(ROOT)}: not ASCII in lines {lines}"


def test_nothing_names_a_path_of_one_machine() -> None:
    # Containers of Ray have a home of their own, which the cluster files name.
    home = re.compile(r"/(home|Users)/(?!ray/)\w+/|/root/|/work/\w")
    for path in _tracked(
        "*.md", "*.py", "*.yaml", "*.yml", "*.toml", "*.txt", "Makefile", ".ci/*", ":!tests"
    ):
        found = home.search(path.read_text(encoding="utf-8"))
        assert not found, f"{path.relative_to(ROOT)} names {found.group()}"
