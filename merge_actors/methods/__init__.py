"""Merge methods: one file per family, formula beside parameters. The two dicts are the registry."""

from raymerge.merge_actors.methods.averages import LINEAR, PASSTHROUGH
from raymerge.merge_actors.methods.dare import RANDOM
from raymerge.merge_actors.methods.interface import Method, Sparsifier
from raymerge.merge_actors.methods.magnitude import BREADCRUMBS, MAGNITUDE
from raymerge.merge_actors.methods.task_vectors import (
    BREADCRUMBS_LINEAR,
    BREADCRUMBS_TIES,
    DARE_LINEAR,
    DARE_TIES,
    TASK_ARITHMETIC,
    TIES,
)

METHODS: dict[str, Method] = {
    "linear": LINEAR,
    "passthrough": PASSTHROUGH,
    "task_arithmetic": TASK_ARITHMETIC,
    "ties": TIES,
    "dare_linear": DARE_LINEAR,
    "dare_ties": DARE_TIES,
    "breadcrumbs": BREADCRUMBS_LINEAR,
    "breadcrumbs_ties": BREADCRUMBS_TIES,
}
SPARSIFIERS: dict[str, Sparsifier] = {
    "random": RANDOM,
    "magnitude": MAGNITUDE,
    "breadcrumbs": BREADCRUMBS,
}
