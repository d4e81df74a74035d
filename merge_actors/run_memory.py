"""What a worker remembers between runs that are alike: the points of a grid in an evaluator."""

from __future__ import annotations

from dataclasses import dataclass

from raymerge.merge_actors.directions import Directions
from raymerge.merge_actors.known_states import KnownStates
from raymerge.merge_actors.known_sums import KnownSums


@dataclass(frozen=True, slots=True)
class RunMemory:
    """Shared by the workers of one process."""

    states: KnownStates
    """Thresholds and norms: the weights and lambdas of a grid do not measure again."""
    directions: Directions
    """Merged task vectors: its lambdas do not form them again."""
    sums: KnownSums
    """Sums of Gram matrices: its alphas do not add them again."""

    def counters(self) -> dict[str, int]:
        """Count what was taken over so far."""
        return {
            "num_reused_states": self.states.num_reused,
            "num_reused_directions": self.directions.num_reused,
            "num_reused_sums": self.sums.num_reused,
        }
