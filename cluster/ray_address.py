"""Look whether anything listens at a cluster's address: Ray itself tries for more than ten minutes and says little."""

from __future__ import annotations

import re
import socket
import time

from raymerge.merge_actors.errors import ClusterError

#: For so long an address is tried: a head that has just been started may not listen yet.
ANSWER_SECONDS = 15.0
_PAUSE_SECONDS = 0.5


def check_listens(address: str) -> None:
    """Refuse HOST:PORT where nothing listens, and a job server; other forms of address are left to Ray.

    Raises:
        ClusterError: nothing listens there, or it is no address to attach to.
    """
    if address.startswith(("http://", "https://")):
        raise ClusterError(
            f"{address} is a job server's address: send the command there with raymerge submit --address {address} "
            "-- ...; to attach to a cluster give HOST:PORT of its head, or on one of its machines auto"
        )
    found = re.fullmatch(r"\[?([^/\[\]]+)\]?:(\d{1,5})", address)
    if found is None:
        return
    host, port = found[1], int(found[2])
    deadline = time.monotonic() + ANSWER_SECONDS
    while True:
        try:
            socket.create_connection((host, port), timeout=max(1.0, deadline - time.monotonic())).close()
            return
        except (OSError, OverflowError, UnicodeError) as error:  # a port, or a name, that there cannot be
            if time.monotonic() > deadline or not isinstance(error, OSError):
                raise ClusterError(
                    f"no Ray cluster answers at {address}: {error}; give HOST:PORT of its head, as `ray start --head` "
                    "printed it, or on a machine of the cluster auto"
                ) from error
        time.sleep(_PAUSE_SECONDS)
