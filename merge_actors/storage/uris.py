"""Tell URIs of object stores from local paths, and keep secrets out of both.

A URI is `scheme://place/path`: s3, gs, abfs, hf and whatever fsspec knows. `os.path.join`, `dirname` and
`basename` work on it as on a path. It names a place and nothing else: credentials come from the
environment of the node or from its instance, never from the URI.
"""

from __future__ import annotations

import os
import re
from urllib.parse import urlsplit

from raymerge.merge_actors.errors import RaymergeError

#: Schemes whose "user" part is an address: a container, a revision.
_ADDRESSES_WITH_AT = frozenset({"abfs", "abfss", "az", "hf"})
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://")
#: Environment variables whose values never appear in a message.
_SECRET_NAME = re.compile(r"(?i)(secret|token|password|passwd|credential|account_key|access_key|sas|api_key)")
_LEAST_SECRET = 8
_QUERY = re.compile(r"(?i)([?&;][\w.\-]*(?:sig|token|credential|key|secret|password)[\w.\-]*=)[^\s&;'\"]+")
_USER_PART = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*://)[^\s/@'\"]*:[^\s/@'\"]*@")


def is_remote(path: str) -> bool:
    """Return whether a path is a URI of something that is no local file system."""
    return _SCHEME.match(path) is not None and not path.startswith("file://")


def without_file_scheme(path: str) -> str:
    """Return a local path that was written as file:///PATH as a path, anything else as it is."""
    return path.removeprefix("file://")


def absolute(path: str) -> str:
    """Return a URI without a slash at its end, or an absolute local path with `~` resolved.

    Raises:
        RaymergeError: a URI carries credentials or a query, or names no place.
    """
    path = without_file_scheme(path)
    if not is_remote(path):
        return os.path.abspath(os.path.expanduser(path))
    return checked(path)


def checked(uri: str) -> str:
    """Return a URI in its normal form.

    Raises:
        RaymergeError: it carries credentials or a query, or names no place.
    """
    parts = urlsplit(uri)
    user, at, _ = parts.netloc.rpartition("@")
    if at and (
        ":" in user or (parts.scheme not in _ADDRESSES_WITH_AT and parts.scheme in ("s3", "gs", "gcs"))
    ):
        raise RaymergeError(
            f"{redacted_uri(uri)} carries credentials; leave them out of the URI: they are taken from the environment "
            "or the instance (docs/storage.md)"
        )
    if parts.query or parts.fragment or "?" in uri:
        raise RaymergeError(
            f"{redacted_uri(uri)} has a query, which may hold a token; a URI names a place only: leave it out and set "
            "what it says in the environment (docs/storage.md)"
        )
    path = parts.path.strip("/")
    if not parts.netloc and not path:
        raise RaymergeError(f"{uri!r} names no bucket; write {parts.scheme}://BUCKET/PATH")
    if any(part in (".", "..") for part in path.split("/")):
        raise RaymergeError(
            f"{uri!r} has '.' or '..' in its path, which object stores do not resolve; write it out"
        )
    return f"{parts.scheme}://{parts.netloc}" + (f"/{path}" if path else "")


def redacted_uri(uri: str) -> str:
    """Return a URI without user, password and query."""
    scheme, _, rest = uri.partition("://")
    rest = rest.partition("?")[0].partition("#")[0]
    place, slash, path = rest.partition("/")
    return f"{scheme}://{place.rpartition('@')[2]}{slash}{path}"


def redacted(text: str) -> str:
    """Return a message of a storage library without passwords, signatures and secrets of the environment."""
    text = _USER_PART.sub(r"\1***@", text)
    text = _QUERY.sub(r"\1***", text)
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and len(value) >= _LEAST_SECRET and value in text:
            text = text.replace(value, "***")
    return text
