"""Blocks are cut into runs whose fullest part is as empty as can be; how many parts a model takes follows."""

from __future__ import annotations

import itertools
import random

import pytest

from raymerge.stats.evaluation.parts import RUNTIME_BYTES, ModelNeeds, cut_blocks, loads_of

GIB = 1 << 30


@pytest.mark.parametrize(
    ("home", "blocks", "num_parts", "expected"),
    [
        (0, [1, 1, 1, 1], 2, (0, 0, 1, 1)),
        (2, [1, 1, 1, 1], 2, (0, 1, 1, 1)),
        (2, [1, 1, 1, 1], 1, (0, 0, 0, 0)),
        (9, [1, 1, 1, 1], 2, (1, 1, 1, 1)),
        (0, [1, 5, 1, 1], 3, (0, 1, 2, 2)),
        (1, [3], 4, (1,)),
        (1, [], 2, ()),
    ],
)
def test_cuts(home: int, blocks: list[int], num_parts: int, expected: tuple[int, ...]) -> None:
    assert cut_blocks(home, blocks, num_parts) == expected


def test_no_other_cut_has_an_emptier_fullest_part() -> None:
    rng = random.Random(0)
    for _ in range(200):
        blocks = [rng.randrange(1, 20) for _ in range(rng.randrange(1, 8))]
        home, num_parts = rng.randrange(30), rng.randrange(1, 5)
        parts = cut_blocks(home, blocks, num_parts)
        assert list(parts) == sorted(parts) and max(parts) < num_parts
        assert max(loads_of(home, blocks, num_parts)) == _least(home, blocks, num_parts)


def _least(home: int, blocks: list[int], num_parts: int) -> int:
    """Try every cut."""
    fullest = []
    for cuts in itertools.combinations_with_replacement(range(len(blocks) + 1), num_parts - 1):
        bounds = [0, *cuts, len(blocks)]
        loads = [sum(blocks[begin:end]) for begin, end in itertools.pairwise(bounds)]
        fullest.append(max(loads[0] + home, *loads))
    return min(fullest)


def test_a_model_fits_with_its_activations_and_well_with_room_to_spare() -> None:
    needs = ModelNeeds(
        home_weights=4 * GIB,
        block_weights=(GIB,) * 16,
        idle_weights=2 * GIB,
        home_activations=GIB,
        block_activations=GIB // 2,
        cache_of_block=GIB // 8,
    )
    assert needs.weights == 22 * GIB
    # One device: 22 of weights, 1 of logits, 2 of caches, half a one of activations.
    assert needs.fullest(1) == 25.5 * GIB
    assert needs.fits(1, 25.5 * GIB + RUNTIME_BYTES) and not needs.fits(1, 25.5 * GIB + RUNTIME_BYTES - 1)
    # Two: 5 + 6 x 1.125 = 11.75 and 10 x 1.125 = 11.25, the idle 2 fill both up to 12.5.
    assert needs.fullest(2) == 13 * GIB
    assert needs.fits_well(1, 29 * GIB) and not needs.fits_well(1, 28 * GIB)
    assert needs.fits(1, 28 * GIB)
