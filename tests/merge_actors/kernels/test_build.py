"""The kernels are compiled once, into a folder of the user's own, and done without where they cannot be."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from raymerge.merge_actors.kernels import build

_LOAD = "from raymerge.merge_actors.kernels.build import load_kernels; k = load_kernels(); "


def _in_a_fresh_process(code: str, **variables: str) -> str:
    environment = {**os.environ, **variables}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd="/", check=True)
    return done.stdout.strip()


def test_a_second_process_finds_what_the_first_compiled(tmp_path: Path) -> None:
    code = _LOAD + "print(k.library is not None, k.remark)"
    assert _in_a_fresh_process(code, RAYMERGE_CACHE=str(tmp_path)) == "True"
    (made,) = (tmp_path / "kernels").iterdir()
    assert made.suffix == ".so"
    assert (tmp_path / "kernels").stat().st_mode & 0o777 == 0o700
    before = made.stat().st_mtime_ns
    assert _in_a_fresh_process(code, RAYMERGE_CACHE=str(tmp_path)) == "True"
    assert [path.stat().st_mtime_ns for path in (tmp_path / "kernels").iterdir()] == [before]


def test_a_library_that_cannot_be_used_is_compiled_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = (
        b"#include <stdint.h>\nvoid raymerge_prepare(void) {}\nint64_t raymerge_sample(void) { return 7; }\n"
    )
    compiler = shutil.which("cc") or "gcc"
    assert build._library(str(tmp_path), source, compiler).raymerge_sample() == 7
    (made,) = tmp_path.iterdir()
    whole = made.read_bytes()
    stranger = made.with_name(made.name.rpartition("-")[0] + build._ending(b"MZ"))
    damaged = ((made, b""), (made, whole[: len(whole) // 2]), (made, whole[:-1] + b"?"), (stranger, b"MZ"))
    for path, data in damaged:  # the last is whole, but no library of this machine
        made.unlink()
        path.write_bytes(data)
        path.chmod(0o700)
        assert build._library(str(tmp_path), source, compiler).raymerge_sample() == 7
        assert made.read_bytes() == whole
    monkeypatch.setattr(build, "_compile", pytest.fail)  # what is whole is taken as it is
    assert build._library(str(tmp_path), source, compiler).raymerge_sample() == 7


def test_processes_that_compile_at_once_do_not_meet(tmp_path: Path) -> None:
    """Each starts compiling before any has finished; a umask that lets the group write spoils nothing."""
    code = "import os; os.umask(0o002); " + _LOAD + "print(k.library is not None, k.remark)"
    environment = {**os.environ, "RAYMERGE_CACHE": str(tmp_path)}
    at_once = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, cwd="/")
        for _ in range(2)
    ]
    assert [process.communicate()[0].decode().strip() for process in at_once] == ["True"] * 2
    (made,) = (tmp_path / "kernels").iterdir()
    before = made.stat().st_mtime_ns
    assert _in_a_fresh_process(code, RAYMERGE_CACHE=str(tmp_path)) == "True"
    assert made.stat().st_mtime_ns == before, "compiled once more"


def test_where_the_cache_cannot_be_written_the_temporary_folder_serves(tmp_path: Path) -> None:
    code = _LOAD + "print(k.library is not None, k.remark)"
    (tmp_path / "file").touch()
    nowhere = {"RAYMERGE_CACHE": str(tmp_path / "file"), "TMPDIR": str(tmp_path)}
    assert _in_a_fresh_process(code, **nowhere) == "True"
    assert list(tmp_path.glob("raymerge-kernels-*/kernels-*.so"))


def test_processors_do_not_share_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = sys.executable  # any file
    here = build._key(b"", compiler)
    assert here == build._key(b"", compiler)
    assert any(line.startswith(("flags", "Features")) for line in build._processor())
    monkeypatch.setattr(build, "_processor", lambda: ("x86_64", "flags\t\t: fpu sse2"))
    assert build._key(b"", compiler) != here


def test_without_a_compiler_there_is_one_remark_and_off_is_silent(tmp_path: Path) -> None:
    code = _LOAD + "print(k.library, k.remark)"
    nowhere = {"PATH": str(tmp_path), "CC": "", "RAYMERGE_CACHE": str(tmp_path)}
    said = _in_a_fresh_process(code, **nowhere)
    assert said.startswith("None node ") and "there is no C compiler" in said
    assert _in_a_fresh_process(code, **nowhere, RAYMERGE_KERNELS="off") == "None"


def test_a_compiler_that_fails_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'kernels.c: error: no such thing' >&2\nexit 1\n")
    broken.chmod(0o755)
    code = _LOAD + "print(k.library, k.remark)"
    said = _in_a_fresh_process(code, CC=str(broken), RAYMERGE_CACHE=str(tmp_path))
    assert said.startswith("None") and f"{broken} did not compile" in said and "no such thing" in said
    assert not list((tmp_path / "kernels").iterdir())


def test_what_others_could_have_changed_is_not_loaded(tmp_path: Path) -> None:
    own = tmp_path / "own.so"
    own.touch(mode=0o600)
    build._require_own(str(own))
    own.chmod(0o666)
    with pytest.raises(PermissionError, match="not this user's alone"):
        build._require_own(str(own))
    link = tmp_path / "link.so"
    link.symlink_to(own)
    with pytest.raises(PermissionError, match="not this user's alone"):
        build._require_own(str(link))
