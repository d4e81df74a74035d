"""Checksums of tensors that add up over pieces, whatever the pieces are.

A tensor's bytes are cut into chunks of a fixed length; a chunk's checksum is XXH3 with the
chunk's number as seed, and the tensor's is their sum modulo 2^64. So pieces can be summed in
any order, and a reader with another buffer size gets the same number. It finds accidents
(truncation, swapped or stale blocks), not an adversary.
"""

from __future__ import annotations

import xxhash

from raymerge.merge_actors.dtypes import element_bytes
from raymerge.merge_actors.methods.block import unit_elements

_MODULUS = 1 << 64


def checksum_chunk_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """Return the chunk length of a tensor's checksum: one unit, which every piece is made of."""
    return unit_elements(shape, "elementwise") * element_bytes(dtype)


def piece_checksum(data: memoryview, first_byte: int, chunk_bytes: int) -> int:
    """Sum the checksums of the chunks of `data`, which begins at byte `first_byte` of its tensor.

    Args:
        data: whole chunks, but for the tensor's last.
        first_byte: a multiple of `chunk_bytes`.
        chunk_bytes: length of a chunk.
    """
    first_chunk = first_byte // chunk_bytes
    return (
        sum(
            xxhash.xxh3_64_intdigest(data[at : at + chunk_bytes], seed=first_chunk + i)
            for i, at in enumerate(range(0, len(data), chunk_bytes))
        )
        % _MODULUS
    )


def add_checksums(*checksums: int) -> int:
    """Add checksums of pieces of one tensor."""
    return sum(checksums) % _MODULUS
