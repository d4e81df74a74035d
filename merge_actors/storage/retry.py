"""Repeat what a storage failed at, with growing pauses, and say in one sentence when it keeps failing.

Pauses grow exponentially and are drawn at random from [half, whole) of their length, so that the workers of a
cluster that were throttled together do not come back together (Brooker 2015, "Exponential Backoff And Jitter").
"""

from __future__ import annotations

import errno
import random
import re
import time
from collections.abc import Callable
from typing import TypeVar

from raymerge.merge_actors.errors import RaymergeError
from raymerge.merge_actors.storage.store import NoClientError
from raymerge.merge_actors.storage.uris import redacted

T = TypeVar("T")

#: How often an operation is tried.
MOST_ATTEMPTS = 7
#: Pause after the first failure; it doubles with every further one.
FIRST_PAUSE_SECONDS = 0.4
MOST_PAUSE_SECONDS = 20.0

_REFUSED = re.compile(
    r"ACCESS_DENIED|INVALID_ACCESS_KEY|INVALID_CLIENT_TOKEN|SIGNATURE_DOES_NOT_MATCH|UNRECOGNIZED_CLIENT|"
    r"EXPIRED_TOKEN|MISSING_AUTHENTICATION|InvalidAccessKeyId|PERMISSION_DENIED|UNAUTHENTICATED|"
    r"HTTP (response code|status) ?:? ?40[13]|\b40[13]\b (Client Error|Forbidden|Unauthorized)|[Aa]ccess ?[Dd]enied"
)
_NO_BUCKET = re.compile(r"NO_SUCH_BUCKET|NoSuchBucket|bucket does not exist")
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class ShortReadError(OSError):
    """A storage gave fewer bytes than it was asked for."""


def with_retries(action: Callable[[], T], what: str, error_class: type[RaymergeError]) -> T:
    """Return what `action` returns, repeating it while the storage fails.

    Args:
        action: may be repeated; raises OSError when the storage fails.
        what: "read s3://bucket/key", for the message.
        error_class: of the error that the user gets.

    Raises:
        RaymergeError: of `error_class`: absent, refused, or failing still.
    """
    started = time.monotonic()
    for attempt in range(1, MOST_ATTEMPTS + 1):
        try:
            return action()
        except OSError as error:
            if (reason := permanent_reason(error)) is not None:
                raise error_class(f"cannot {what}: {reason}") from error
            if attempt == MOST_ATTEMPTS:
                raise error_class(
                    f"cannot {what}: {attempt} attempts in {time.monotonic() - started:.0f} s failed, the last one "
                    f"with: {one_line(error)}; see whether the storage works, then try again (a merge goes on "
                    "with --resume)"
                ) from error
        pause = min(MOST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2 ** (attempt - 1))
        time.sleep(pause * random.uniform(0.5, 1.0))
    raise AssertionError("the last attempt returns or raises")


def permanent_reason(error: OSError) -> str | None:
    """Say why repeating is of no use; None if it may help."""
    text = str(error)
    if _NO_BUCKET.search(text):
        return "its bucket does not exist; check the name, and the endpoint and region of the environment"
    if isinstance(error, PermissionError) or _REFUSED.search(text):
        return (
            f"access is refused ({one_line(error)}); check the credentials of this node's environment or instance "
            "(docs/storage.md)"
        )
    if isinstance(error, NoClientError):
        return one_line(error)
    if isinstance(error, FileNotFoundError):
        return "it does not exist; check the name"
    if isinstance(error, IsADirectoryError | NotADirectoryError):
        return one_line(error)
    if error.errno in _NO_SPACE:
        return "the disk is full"
    return None


def one_line(error: BaseException) -> str:
    """Return an error's message on one line, without secrets."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r" ?\(Request ID: [^)]*\)", "", text)
    return redacted(text if len(text) <= 400 else text[:400] + "...")
