"""Compile the kernels on the node that runs them, once, and load them.

The source is a few hundred lines of C without dependencies; any C compiler builds it in about a
second, for exactly this processor. The library lies in a cache folder of the user's own under a
name that tells source, flags, compiler, C library and processor apart, and ends in a checksum: one that is torn or
does not load is compiled anew. Where there is no compiler the eager formulas do the same work, more slowly.
`RAYMERGE_KERNELS=off` asks for that.
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
    reasons = []
    for folder in _cache_folders():
        try:
            _make_private(folder)
            return Kernels(_library(folder, source, compiler))
        except subprocess.SubprocessError as error:
            reasons.append(f"{compiler} did not compile the kernels ({_first_line(error)})")
        except (OSError, AttributeError) as error:
            reasons.append(f"compiled kernels cannot be kept in {folder} ({_first_line(error)})")
    return Kernels(None, _remark(reasons[0]))


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


def _library(folder: str, source: bytes, compiler: str) -> ctypes.CDLL:
    """Return the library that a folder keeps, compiled if there is none, or none that can be used."""
    name = f"kernels-{_key(source, compiler)}-"
    for kept in sorted(each for each in os.listdir(folder) if each.startswith(name)):
        path = os.path.join(folder, kept)
        with contextlib.suppress(OSError, AttributeError):
            if _is_whole(path):
                return _opened(path)
    return _opened(_compile(folder, name, source, compiler))


def _opened(path: str) -> ctypes.CDLL:
    library = ctypes.CDLL(path)
    library.raymerge_prepare()
    library.raymerge_sample.restype = ctypes.c_int64
    return library


def _is_whole(path: str) -> bool:
    """Return whether a library is the user's own and as it was written: a torn one could end the process by SIGBUS."""
    _require_own(path)
    with open(path, "rb") as stream:
        return path.endswith(_ending(stream.read()))


def _ending(library: bytes) -> str:
    return f"-{xxhash.xxh3_64_hexdigest(library)}.so"


def _compile(folder: str, name: str, source: bytes, compiler: str) -> str:
    """Compile the library into a folder under a name that its checksum completes; return its path."""
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
        os.chmod(made, 0o700)  # the linker made it as writable as the umask lets it
        with open(made, "rb") as library:
            target = os.path.join(folder, name[:-1] + _ending(library.read()))
            os.fsync(library.fileno())
        # Whoever renames last wins; all of them made the same library.
        os.rename(made, target)
    return target


def _key(source: bytes, compiler: str) -> str:
    """Tell apart what must not share a library: a home folder may serve unlike nodes."""
    here = os.path.realpath(compiler)
    status = os.stat(here)
    c_library = platform.libc_ver()
    parts = (source, _FLAGS, here, status.st_size, status.st_mtime_ns, c_library, _processor())
    return xxhash.xxh3_128_hexdigest(repr(parts).encode())


def _processor() -> tuple[str, ...]:
    """Return what -march=native looks at: model and instructions, FMA among them."""
    lines: list[str] = [platform.machine()]
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as stream:
        for line in stream:
            if not line.strip():
                break  # the first core speaks for all
            if line.split("\t")[0].strip() in ("model name", "flags", "Features", "CPU part"):
                lines.append(line.strip())
    return tuple(lines)


def _cache_folders() -> list[str]:
    """Return where a library may be kept, the best first."""
    folders = [os.path.join(tempfile.gettempdir(), f"raymerge-kernels-{os.getuid()}")]
    if os.environ.get("RAYMERGE_CACHE") or os.environ.get("HOME"):
        folders.insert(0, os.path.join(cache_folder(), "kernels"))
    return folders


def _make_private(folder: str) -> None:
    """Make a folder that nobody else can write to: what lies in it will be run.

    Raises:
        OSError: that cannot be.
    """
    os.makedirs(folder, mode=0o700, exist_ok=True)
    _require_own(folder)


def _require_own(path: str) -> None:
    """Refuse what somebody else owns or could have changed.

    Raises:
        PermissionError: it is not this user's own.
    """
    status = os.lstat(path)
    if status.st_uid != os.getuid() or status.st_mode & 0o022 or stat.S_ISLNK(status.st_mode):
        raise PermissionError(f"{path} is not this user's alone")
