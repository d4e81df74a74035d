"""Every error that raymerge raises for something the user can mend.

    RaymergeError(ValueError)
    +-- RecipeError        a recipe or an option: file, line, key, value, rule
    +-- CheckpointError    an input: missing, truncated, corrupt, refused
    |   +-- MismatchError  inputs that do not belong together: shapes, dtypes, vocabularies
    |   +-- NotFiniteError NaN or infinity in an input
    +-- OutputError        OUT: exists, locked, not writable, disk full
    +-- VerifyError        an output that differs from its manifest
    +-- ClusterError       Ray: no resources, workers lost, a path a node cannot see

The command line turns each into one sentence and exit code 1. A bug of ours is an
`AssertionError` or whatever Python raises, with its traceback.
"""


class RaymergeError(ValueError):
    """Base of every error that names something the user can change."""

    recipe: int | None = None
    """Number of the recipe of a campaign that it is about, where a task works for several."""
    path: str | None = None
    """The input file that it is about."""


class RecipeError(RaymergeError):
    """A recipe, a grid file or an option breaks a rule."""


class CheckpointError(RaymergeError):
    """An input checkpoint cannot be read as it stands."""


class MismatchError(CheckpointError):
    """Inputs that do not belong together."""


class NotFiniteError(CheckpointError):
    """An input tensor holds NaN or infinity."""


class OutputError(RaymergeError):
    """The output folder cannot be written, or is not ours to write."""


class VerifyError(RaymergeError):
    """An output differs from its manifest."""


class ClusterError(RaymergeError):
    """Ray cannot give what the run needs, or lost too much of it."""
