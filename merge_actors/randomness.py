"""Counter-based random words: a pure function of (seed, model, tensor, element index).

A mask must be the same on one worker or on sixty-four, on a CPU or a GPU, for every cut of
the tensor and every order of the models. So nothing here has a state: the word of an element
is an integer hash of its index under a 64-bit key. The key is mixed with the index's high
part into two 32-bit words per run of 65,536 elements; both enter the hash, one before and one
after the first multiplication, so that streams of different keys are never shifted or
permuted copies of one another. The hash is two rounds of xor-shift and multiply (constants of
C. Wellons' "lowbias32"); only integer additions, multiplications and shifts are used, which
wrap alike on every device.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np
import xxhash

if TYPE_CHECKING:
    import torch

#: Elements that share one pair of key words.
RUN = 1 << 16
_GOLDEN = 0x9E3779B97F4A7C15
_MASK_64 = (1 << 64) - 1


def stream_key(seed: int, model: str, tensor: str) -> int:
    """Return the 64-bit key of one model's tensor under a seed."""
    return xxhash.xxh3_64_intdigest("\0".join((str(seed), model, tensor)).encode())


def step_key(key: int, step: int) -> int:
    """Return the key of a model's sparsifying step number `step`; step 0 has the model's own key.

    The number is hashed in, not added: added to the key it would shift the stream by whole runs.
    """
    return xxhash.xxh3_64_intdigest(key.to_bytes(8, "little"), seed=step) if step else key


def keep_limit(drop_fraction: float) -> int:
    """Return the word at and above which an element is dropped, for a drop rate in [0, 1].

    Words are uniform over [-2^30, 2^30), so the rate is exact to 2^-31, and the masks of a
    growing rate are nested: the same word serves every rate.
    """
    return round((1 - drop_fraction) * (1 << 31)) - (1 << 30)


def fill_words(words_P: torch.Tensor, scratch_P: torch.Tensor, key: int, begin: int) -> torch.Tensor:
    """Fill `words_P` with the words of elements [begin, begin + P) of a stream.

    Args:
        words_P: int32, contiguous; overwritten.
        scratch_P: int32, contiguous, as long as `words_P`; overwritten.
        key: the stream's 64-bit key.
        begin: index in the tensor of the first element.

    Returns:
        `words_P`, uniform integers of [-2^30, 2^30).
    """
    import torch

    end = begin + words_P.numel()
    table = _table(str(words_P.device))
    first_run, last_run = begin // RUN, (end - 1) // RUN + 1
    pairs = [_run_words(key, run) for run in range(first_run, last_run)]
    entering: torch.Tensor | int
    for column in (0, 1):
        at = begin
        while at < end:
            run = at // RUN
            whole_runs = (end - at) // RUN if at % RUN == 0 else 0
            if whole_runs > 1:  # one launch for all whole runs: what a GPU wants
                stop = at + whole_runs * RUN
                view = words_P[at - begin : stop - begin].view(whole_runs, RUN)
                values = [pair[column] for pair in pairs[run - first_run : run - first_run + whole_runs]]
                entering = torch.tensor(values, dtype=torch.int32).to(words_P.device).unsqueeze(1)
            else:
                stop = min(end, (run + 1) * RUN)
                view = words_P[at - begin : stop - begin]
                entering = pairs[run - first_run][column]
            if column == 0:
                # The table spreads the low 16 bits of the index before the key enters.
                low = table if whole_runs > 1 else table[at % RUN : at % RUN + stop - at]
                torch.add(low, entering, out=view)
            else:
                view.add_(entering)
            at = stop
        if column == 0:
            torch.bitwise_right_shift(words_P, 16, out=scratch_P)
            words_P.bitwise_xor_(scratch_P.bitwise_and_(0xFFFF)).mul_(0x21F0AAAD)
    torch.bitwise_right_shift(words_P, 15, out=scratch_P)
    words_P.bitwise_xor_(scratch_P.bitwise_and_(0x1FFFF)).mul_(0x735A2D97)
    return words_P.bitwise_right_shift_(1)


def zero_dropped(values_P: torch.Tensor, words_P: torch.Tensor, limit: int) -> torch.Tensor:
    """Zero the elements whose word is at least `limit`, in place; `words_P` is overwritten.

    Works on the bits (an all-ones or all-zeros integer mask), several times faster than a
    boolean mask in eager mode. `limit` is a `keep_limit`.
    """
    import torch

    words_P.sub_(limit).bitwise_right_shift_(31)
    if values_P.dtype == torch.float64:
        values_P.view(torch.int64).bitwise_and_(words_P.to(torch.int64))
    else:
        values_P.view(torch.int32).bitwise_and_(words_P)
    return values_P


def _run_words(key: int, run: int) -> tuple[int, int]:
    """Mix a key and the number of a run into two signed 32-bit words (splitmix64)."""
    x = (key + run * _GOLDEN) & _MASK_64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK_64
    x ^= x >> 31
    return _signed(x & 0xFFFFFFFF), _signed(x >> 32)


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


@functools.lru_cache(maxsize=8)
def _table(device: str) -> torch.Tensor:
    """Return 65,536 well-mixed words, one for each value of an index's low 16 bits."""
    import torch

    x = np.arange(RUN, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(_GOLDEN)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    words = (x ^ (x >> np.uint64(31))).astype(np.uint32).view(np.int32)
    return torch.from_numpy(words).to(device)
