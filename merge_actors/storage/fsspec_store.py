"""Every other store through fsspec: hf, memory, sftp, and what the user has installed.

Ranges are read without fsspec's caches, which would fetch more than was asked for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

from raymerge.merge_actors.storage.store import Entry, NoClientError

_PERMISSION_STATUS = (401, 403)


class FsspecReader:
    """An object that is read by range."""

    tag = ""
    """An entry's version has it."""

    def __init__(self, filesystem: Any, path: str, num_bytes: int) -> None:
        self._filesystem, self._path, self.num_bytes = filesystem, path, num_bytes

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fill `buffer` from `offset` by one request."""
        with _as_os_errors():
            data = _cat(self._filesystem, self._path, offset, offset + len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        """Nothing is held open."""


class FsspecStore:
    """A file system of fsspec."""

    def __init__(self, filesystem: Any) -> None:
        self._filesystem = filesystem

    def entry(self, uri: str) -> Entry | None:
        """Return what there is at a URI."""
        with _as_os_errors():
            try:
                return _entry(self._filesystem.info(self._path(uri)))
            except FileNotFoundError:
                return None

    def entries(self, uri: str) -> list[Entry]:
        """Return what is in a folder."""
        path = self._path(uri)
        with _as_os_errors():
            try:
                found = self._filesystem.ls(path, detail=True, refresh=True)
            except FileNotFoundError:
                return []
        return [_entry(info) for info in found if info["name"].strip("/") != path.strip("/")]

    def open(self, uri: str) -> FsspecReader:
        """Open an object for reading."""
        found = self.entry(uri)
        if found is None or found.is_folder:
            raise FileNotFoundError(f"{uri} is not there")
        return FsspecReader(self._filesystem, self._path(uri), found.num_bytes)

    def write(self, uri: str, blocks: Iterable[bytes | memoryview], *, blocks_in_flight: int) -> None:
        """Write an object block by block."""
        del blocks_in_flight  # fsspec uploads a part at a time
        path = self._path(uri)
        num_bytes = 0
        with _as_os_errors():
            self._filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
            stream = self._filesystem.open(path, "wb")
            try:
                for block in blocks:
                    stream.write(block)
                    num_bytes += len(block)
                stream.close()
            except BaseException:
                with contextlib.suppress(Exception):
                    stream.discard()
                stream.closed = True  # else fsspec completes the object when the stream is collected
                raise
        found = self.entry(uri)
        if found is None or found.num_bytes != num_bytes:
            has = "nothing" if found is None else f"{found.num_bytes:,} bytes"
            raise OSError(f"{num_bytes:,} bytes were written to {uri}, but the store has {has}")

    def delete(self, uris: Sequence[str]) -> None:
        """Remove objects."""
        with _as_os_errors():
            for uri in uris:
                with contextlib.suppress(FileNotFoundError):
                    self._filesystem.rm_file(self._path(uri))

    def delete_folder(self, uri: str) -> None:
        """Remove all objects under a URI."""
        with _as_os_errors(), contextlib.suppress(FileNotFoundError):
            self._filesystem.rm(self._path(uri), recursive=True)

    def _path(self, uri: str) -> str:
        return str(self._filesystem._strip_protocol(uri))


def make_fsspec_store(uri: str) -> FsspecStore:
    """Make the client of a scheme.

    Raises:
        NoClientError: fsspec does not know the scheme, or needs a package that is not installed.
    """
    import fsspec

    scheme = urlsplit(uri).scheme
    try:
        return FsspecStore(fsspec.filesystem(scheme, **_options(scheme, uri)))
    except (ValueError, ImportError) as error:
        reason = str(error).rstrip(".")
        raise NoClientError(
            f"no client for {scheme}:// can be made ({reason}); docs/storage.md lists what is supported"
        ) from error


def _options(scheme: str, uri: str) -> dict[str, Any]:
    """Return what fsspec reads out of a URI: the host of sftp, nothing for most."""
    import fsspec

    found: dict[str, Any] = fsspec.get_filesystem_class(scheme)._get_kwargs_from_urls(uri)
    return {key: value for key, value in found.items() if key not in ("password", "url_query", "path")}


def _cat(filesystem: Any, path: str, begin: int, end: int) -> bytes:
    from fsspec.spec import AbstractFileSystem

    if type(filesystem).cat_file is AbstractFileSystem.cat_file:
        with filesystem.open(path, "rb", cache_type="none") as stream:
            stream.seek(begin)
            return bytes(stream.read(end - begin))
    return bytes(filesystem.cat_file(path, start=begin, end=end))


@contextlib.contextmanager
def _as_os_errors() -> Iterator[None]:
    """Turn the errors of HTTP libraries, which have no common base, into OSError."""
    try:
        yield
    except OSError as error:
        _raise_if_refused(error)
        raise
    except Exception as error:
        _raise_if_refused(error)
        raise OSError(f"{type(error).__name__}: {error}") from error


def _raise_if_refused(error: Exception) -> None:
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    if status in _PERMISSION_STATUS:
        raise PermissionError(str(error)) from error
    if status == 404:
        raise FileNotFoundError(str(error)) from error


def _entry(info: Any) -> Entry:
    is_folder = info["type"] == "directory"
    keys = ("etag", "ETag", "blob_id", "last_commit", "mtime", "created", "LastModified")
    times = [info.get(key) for key in ("LastModified", "mtime", "created")]
    return Entry(
        name=str(info["name"]).rstrip("/").rpartition("/")[2],
        is_folder=is_folder,
        num_bytes=0 if is_folder else int(info.get("size") or 0),
        version=repr([info[key] for key in keys if info.get(key)]),
        modified_seconds=next((each.timestamp() for each in times if hasattr(each, "timestamp")), None),
    )
