"""Object stores through pyarrow's file systems: s3, gs, abfs, hdfs.

Reading and writing have a client each. A read is tried once by the client, so that the retries are ours and
counted; the parts of an upload are repeated by the client, since only it can repeat one part.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import urlsplit

from raymerge.merge_actors.storage.store import Entry, NoClientError

#: Seconds without a byte after which a request is given up.
_STALLED_SECONDS = 15
_CONNECT_SECONDS = 5
#: How often the objects of a folder are listed and removed.
_DELETE_ATTEMPTS = 5
#: What S3 and Azure, and GCS, call the tag of an object's content.
_TAGS = ("ETag", "etag", "generation")
#: How often the client sends one part of an upload.
_PART_ATTEMPTS = 6


class ArrowReader:
    """An object that is open through pyarrow."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.num_bytes: int = file.size()
        found = file.metadata() or {}
        self.tag: str = next((found[key].decode() for key in _TAGS if found.get(key)), "")

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fill `buffer` from `offset` by one request."""
        self._file.seek(offset)
        return int(self._file.readinto(buffer))

    def close(self) -> None:
        """Let the object go."""
        self._file.close()


class ArrowStore:
    """A pair of pyarrow file systems for the URIs of one bucket."""

    def __init__(self, reading: Any, writing: Any) -> None:
        self._reading, self._writing = reading, writing

    def entry(self, uri: str) -> Entry | None:
        """Return what there is at a URI."""
        from pyarrow.fs import FileType

        info = self._reading.get_file_info(_path(uri))
        return None if info.type == FileType.NotFound else _entry(info)

    def entries(self, uri: str) -> list[Entry]:
        """Return what is in a folder."""
        from pyarrow.fs import FileSelector

        try:  # not `allow_not_found`: that hides the absence of the bucket
            return [_entry(info) for info in self._reading.get_file_info(FileSelector(_path(uri)))]
        except OSError as error:
            # GCS's client gives its error no number.
            if isinstance(error, FileNotFoundError) or str(error).startswith("No such file or directory"):
                return []
            raise

    def open(self, uri: str) -> ArrowReader:
        """Open an object for reading."""
        return ArrowReader(self._reading.open_input_file(_path(uri)))

    def write(self, uri: str, blocks: Iterable[bytes | memoryview], *, blocks_in_flight: int) -> None:
        """Upload an object by parts; the last request makes it visible."""
        path = _path(uri)
        stream = self._writing.open_output_stream(path)
        num_bytes = 0
        try:
            for number, block in enumerate(blocks, start=1):
                stream.write(block)
                num_bytes += len(block)
                if number % blocks_in_flight == 0:
                    stream.flush()  # waits for the parts under way, each of which the client has a copy of
        except BaseException:
            # pyarrow completes an upload when its stream goes, whatever it holds by then. If a part
            # has failed it cannot, and nothing is there.
            with contextlib.suppress(Exception):
                stream.close()
                self._writing.delete_file(path)
            raise
        stream.close()
        found = self.entry(uri)
        if found is None or found.num_bytes != num_bytes:
            with contextlib.suppress(Exception):
                self._writing.delete_file(path)
            has = "nothing" if found is None else f"{found.num_bytes:,} bytes"
            raise OSError(f"{num_bytes:,} bytes were written to {uri}, but the store has {has}")

    def delete(self, uris: Sequence[str]) -> None:
        """Remove objects."""
        for uri in uris:
            with contextlib.suppress(FileNotFoundError):
                self._writing.delete_file(_path(uri))

    def delete_folder(self, uri: str) -> None:
        """Remove all objects under a URI."""
        for _ in range(_DELETE_ATTEMPTS):
            try:
                self._writing.delete_dir_contents(_path(uri), missing_dir_ok=True)
            except FileNotFoundError:
                continue  # an object that went meanwhile, perhaps by our own request: see to the others
            break
        with contextlib.suppress(OSError):  # an empty marker, where the store has such things
            self._writing.delete_dir(_path(uri))


def make_arrow_store(uri: str) -> ArrowStore:
    """Make the clients of a bucket.

    Raises:
        NoClientError: pyarrow lacks the file system, or it refuses the settings of the environment.
    """
    from pyarrow import ArrowException

    scheme = urlsplit(uri).scheme
    makers = {"s3": _s3, "gs": _gcs, "gcs": _gcs, "hdfs": _hdfs}
    try:
        return makers.get(scheme, _azure)(uri)
    except ImportError as error:
        raise NoClientError(f"this pyarrow was built without {scheme}://: {error}") from error
    except (ArrowException, ValueError) as error:
        raise NoClientError(f"no client for {scheme}:// can be made: {error}") from error


def _s3(uri: str) -> ArrowStore:
    from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem, resolve_s3_region

    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region is None and endpoint is None:
        with contextlib.suppress(OSError):
            region = resolve_s3_region(urlsplit(uri).netloc)
    options = {
        "endpoint_override": endpoint,
        "region": region or ("us-east-1" if endpoint else None),
        "request_timeout": _STALLED_SECONDS,
        "connect_timeout": _CONNECT_SECONDS,
    }
    return ArrowStore(
        S3FileSystem(retry_strategy=AwsStandardS3RetryStrategy(max_attempts=1), **options),
        S3FileSystem(
            retry_strategy=AwsStandardS3RetryStrategy(max_attempts=_PART_ATTEMPTS),
            allow_delayed_open=True,
            **options,
        ),
    )


def _gcs(uri: str) -> ArrowStore:
    from datetime import timedelta

    from pyarrow.fs import GcsFileSystem

    del uri
    options: dict[str, Any] = {}
    if endpoint := os.environ.get("STORAGE_EMULATOR_HOST"):  # Google's own name for another server
        parts = urlsplit(endpoint if "://" in endpoint else f"http://{endpoint}")
        options = {"endpoint_override": parts.netloc, "scheme": parts.scheme, "anonymous": True}
    return ArrowStore(
        GcsFileSystem(retry_time_limit=timedelta(seconds=_CONNECT_SECONDS), **options),
        GcsFileSystem(retry_time_limit=timedelta(seconds=60), **options),
    )


def _azure(uri: str) -> ArrowStore:
    from pyarrow.fs import AzureFileSystem

    place = urlsplit(uri).netloc
    _, at, host = place.rpartition("@")
    account = host.split(".")[0] if at else os.environ.get("AZURE_STORAGE_ACCOUNT_NAME")
    if not account:
        raise ValueError(
            "write abfs://CONTAINER@ACCOUNT.dfs.core.windows.net/PATH, or set AZURE_STORAGE_ACCOUNT_NAME"
        )
    options: dict[str, Any] = {}
    if endpoint := os.environ.get("AZURE_STORAGE_SERVICE_ENDPOINT"):  # as Azure's command line calls it
        parts = urlsplit(endpoint)
        for service in ("blob", "dfs"):
            options |= {
                f"{service}_storage_authority": parts.netloc,
                f"{service}_storage_scheme": parts.scheme,
            }
    client = AzureFileSystem(
        account_name=account,
        account_key=os.environ.get("AZURE_STORAGE_ACCOUNT_KEY"),
        sas_token=os.environ.get("AZURE_STORAGE_SAS_TOKEN"),
        **options,
    )
    return ArrowStore(client, client)


def _hdfs(uri: str) -> ArrowStore:
    from pyarrow.fs import FileSystem

    try:
        client, _ = FileSystem.from_uri(uri)
    except OSError as error:
        if "libhdfs" in str(error):
            raise NoClientError(
                "no client for hdfs:// can be made: it needs libhdfs and a Java on every node (HADOOP_HOME, JAVA_HOME)"
            ) from error
        raise
    return ArrowStore(client, client)


def _path(uri: str) -> str:
    """Return pyarrow's path: the bucket or container, then the key."""
    parts = urlsplit(uri)
    if parts.scheme == "hdfs":
        return parts.path or "/"
    place = parts.netloc
    if parts.scheme in ("abfs", "abfss", "az"):
        place = place.rpartition("@")[0] or place
    return f"{place}{parts.path}"


def _entry(info: Any) -> Entry:
    from pyarrow.fs import FileType

    is_folder = info.type == FileType.Directory
    modified = info.mtime_ns / 1e9 if info.mtime_ns else None
    return Entry(info.base_name, is_folder, 0 if is_folder else info.size, str(info.mtime_ns), modified)
