"""Compile the kernels on the node that runs them, once, and load them.

The source is a few hundred lines of C without dependencies; any C compiler builds it in about a
second, for exactly this processor. The library lies in a cache folder of the user's own under a
name that tells source, flags, compiler and processor apart. Where there is no compiler the
eager formulas do the same work, more slowly. `RAYMERGE_KERNELS=off` asks for that.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import threading
from importlib import resources
from typing import NamedTuple

import xxhash

from raymerge.merge_actors.checkpoint.pickles import cache_folder

#: Contraction and everything else that could change a bit is off; only the sums' own `fmaf` fuses.
_FLAGS = (
    *("-O3", "-march=native", "-std=c11", "-shared", "-fPIC"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
)
_COMPILERS = ("cc", "gcc", "clang")
_COMPILE_SECONDS = 120
_loading = threading.Lock()


class Kernels(NamedTuple):
    """The loaded library, or why there is none."""

    library: ctypes.CDLL | None
    remark: str = ""
    """For the user, if the kernels are missing without having been switched off."""


def load_kernels() -> Kernels:
    """Return the compiled kernels of this process, compiling them if this node never did."""
    with _loading:
        return _load()


@functools.cache
def _load() -> Kernels:
    if os.environ.get("RAYMERGE_KERNELS", "auto").lower() in ("off", "0", "false", "no"):
        return Kernels(None)
    compiler = next((path for name in _names() if (path := shutil.which(name))), None)
    if compiler is None:
        return Kernels(None, _remark("there is no C compiler"))
    source = resources.files(__package__).joinpath("kernels.c").read_bytes()
    try:
        library = ctypes.CDLL(_compiled(source, compiler))
        library.raymerge_prepare()
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        return Kernels(None, _remark(f"{compiler} did not compile the kernels ({_first_line(error)})"))
    library.raymerge_sample.restype = ctypes.c_int64
    return Kernels(library)


def _names() -> tuple[str, ...]:
    own = os.environ.get("CC", "")
    return (own, *_COMPILERS) if own else _COMPILERS


def _remark(reason: str) -> str:
    return (
        f"node {platform.node()} merges with the slower eager formulas, since {reason}; the result is the "
        "same. Install gcc or clang, or set RAYMERGE_KERNELS=off there to be silent"
    )


def _first_line(error: Exception) -> str:
    said = getattr(error, "stderr", None) or str(error)
    lines = [line for line in str(said).splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[0] if lines else type(error).__name__)


def _compiled(source: bytes, compiler: str) -> str:
    """Return the path of the library, compiled if it is not in the cache."""
    folder = _private_folder()
    target = os.path.join(folder, f"kernels-{_key(source, compiler)}.so")
    if os.path.exists(target):
        _require_own(target)
        return target
    with tempfile.TemporaryDirectory(dir=folder) as work:
        path, made = os.path.join(work, "kernels.c"), os.path.join(work, "kernels.so")
        with open(path, "wb") as stream:
            stream.write(source)
        subprocess.run(
            [compiler, *_FLAGS, path, "-o", made, "-lm"],
            check=True,
            capture_output=True,
            text=True,
            timeout=_COMPILE_SECONDS,
            stdin=subprocess.DEVNULL,
        )
        with open(made, "rb+") as library:
            os.fsync(library.fileno())  # a torn library would end every later process with SIGBUS
        # Whoever renames last wins; all of them made the same library.
        os.rename(made, target)
    return target


def _key(source: bytes, compiler: str) -> str:
    """Tell apart what must not share a library: a home folder may serve unlike nodes."""
    here = os.path.realpath(compiler)
    status = os.stat(here)
    parts = (source, _FLAGS, here, status.st_size, status.st_mtime_ns, _processor())
    return xxhash.xxh3_128_hexdigest(repr(parts).encode())


def _processor() -> tuple[str, ...]:
    lines: list[str] = [platform.machine()]
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as stream:
        for line in stream:
            if not line.strip():
                break  # the first core speaks for all
            if line.split("\t")[0].strip() in ("model name", "flags", "Features", "CPU part"):
                lines.append(line.strip())
    return tuple(lines)


def _private_folder() -> str:
    """Return a folder that nobody else can write to: what lies in it will be run."""
    folders = [os.path.join(tempfile.gettempdir(), f"raymerge-kernels-{os.getuid()}")]
    if os.environ.get("RAYMERGE_CACHE") or os.environ.get("HOME"):
        folders.insert(0, os.path.join(cache_folder(), "kernels"))
    for number, folder in enumerate(folders):
        try:
            os.makedirs(folder, mode=0o700, exist_ok=True)
            _require_own(folder)
            if os.access(folder, os.W_OK):
                return folder
        except OSError:
            if number == len(folders) - 1:
                raise
    raise PermissionError(f"{folders[-1]} cannot be written to")


def _require_own(path: str) -> None:
    """Refuse what somebody else owns or could have changed.

    Raises:
        PermissionError: it is not this user's own.
    """
    status = os.lstat(path)
    if status.st_uid != os.getuid() or status.st_mode & 0o022 or stat.S_ISLNK(status.st_mode):
        raise PermissionError(f"{path} is not this user's alone")
