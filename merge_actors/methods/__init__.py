"""Merge methods: one file per family, formula beside parameters. The two dicts are the registry."""

from raymerge.merge_actors.methods.averages import LINEAR, PASSTHROUGH
from raymerge.merge_actors.methods.interface import Method, Sparsifier

METHODS: dict[str, Method] = {
    "linear": LINEAR,
    "passthrough": PASSTHROUGH,
}
SPARSIFIERS: dict[str, Sparsifier] = {}
