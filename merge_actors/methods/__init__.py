"""Merge methods: one file per family, formula beside parameters. The two dicts are the registry."""

from raymerge.merge_actors.methods.arcee_fusion import ARCEE_FUSION
from raymerge.merge_actors.methods.averages import LINEAR, PASSTHROUGH
from raymerge.merge_actors.methods.dare import RANDOM
from raymerge.merge_actors.methods.della import DELLA
from raymerge.merge_actors.methods.fisher import FISHER
from raymerge.merge_actors.methods.interface import Method, Sparsifier
from raymerge.merge_actors.methods.karcher import KARCHER
from raymerge.merge_actors.methods.magnitude import BREADCRUMBS, MAGNITUDE
from raymerge.merge_actors.methods.model_stock import MODEL_STOCK
from raymerge.merge_actors.methods.multislerp import MULTISLERP
from raymerge.merge_actors.methods.nearswap import NEARSWAP
from raymerge.merge_actors.methods.nuslerp import NUSLERP
from raymerge.merge_actors.methods.ram import RAM, RAMPLUS_TL
from raymerge.merge_actors.methods.regmean import REGMEAN
from raymerge.merge_actors.methods.regmean_plus import REGMEAN_PLUS
from raymerge.merge_actors.methods.sce import SCE
from raymerge.merge_actors.methods.slerp import SLERP
from raymerge.merge_actors.methods.task_vectors import (
    BREADCRUMBS_LINEAR,
    BREADCRUMBS_TIES,
    DARE_LINEAR,
    DARE_TIES,
    DELLA_LINEAR,
    DELLA_TIES,
    TASK_ARITHMETIC,
    TIES,
)

METHODS: dict[str, Method] = {
    "linear": LINEAR,
    "passthrough": PASSTHROUGH,
    "slerp": SLERP,
    "nuslerp": NUSLERP,
    "multislerp": MULTISLERP,
    "karcher": KARCHER,
    "nearswap": NEARSWAP,
    "model_stock": MODEL_STOCK,
    "task_arithmetic": TASK_ARITHMETIC,
    "ties": TIES,
    "dare_linear": DARE_LINEAR,
    "dare_ties": DARE_TIES,
    "della_linear": DELLA_LINEAR,
    "della": DELLA_TIES,
    "breadcrumbs": BREADCRUMBS_LINEAR,
    "breadcrumbs_ties": BREADCRUMBS_TIES,
    "sce": SCE,
    "ram": RAM,
    "ramplus_tl": RAMPLUS_TL,
    "arcee_fusion": ARCEE_FUSION,
    "regmean": REGMEAN,
    "regmean_plus": REGMEAN_PLUS,
    "fisher": FISHER,
}
SPARSIFIERS: dict[str, Sparsifier] = {
    "random": RANDOM,
    "magnitude": MAGNITUDE,
    "della": DELLA,
    "breadcrumbs": BREADCRUMBS,
}
