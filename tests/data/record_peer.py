"""Record what mergekit 0.1.5 makes of small tensors, for `test_peer_parity.py`.

Run in an environment that has mergekit, not raymerge: `python tests/data/record_peer.py`.
It writes, beside itself, `peer.safetensors` (inputs `inputs/FAMILY/base|0|1|2` and outputs
`outputs/CASE`) and `peer.json` (versions, the names of the peer's methods, and per case the
method, the family of inputs, the number of models, whether there is a base, and the
parameters). A case that the peer refuses has an `error` in place of an output. Only what
involves no random mask is recorded.

A family is a base and three models whose deltas share a direction, as fine-tunes of one base
do; random numbers, so no two magnitudes are equal.
"""

import importlib.metadata
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from mergekit.merge_methods import merge_tensors, registered_methods
from safetensors.torch import save_file

FOLDER = Path(__file__).parent
WEIGHTS = (0.8, 0.5, 1.1)


@dataclass(kw_only=True)
class Case:
    """One merge: parameters are the peer's, and ours wherever names agree."""

    name: str
    method: str
    family: str
    num_models: int
    has_base: bool
    shared: dict[str, Any] = field(default_factory=dict)
    per_model: dict[str, list[Any]] = field(default_factory=dict)
    error: str | None = None


def family(
    shape: tuple[int, ...],
    seed: int,
    *,
    spread: float = 0.3,
    dtype: torch.dtype = torch.float32,
    agreement: float = 1.0,
) -> list[torch.Tensor]:
    """Return a base and three models; `agreement` scales the direction that their deltas share."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    base, common = draw(), draw()
    return [
        tensor.to(dtype)
        for tensor in (base, *(base + spread * (agreement * common + draw()) for _ in range(3)))
    ]


def families() -> dict[str, list[torch.Tensor]]:
    """Return all inputs by name."""
    made = {
        "matrix": family((12, 20), 1),
        "vector": family((37,), 2),
        "cube": family((3, 5, 8), 3),
        "fine_tune": family((16, 24), 4, spread=0.02, dtype=torch.bfloat16),
        "double": family((6, 10), 5, dtype=torch.float64),
        "unrelated": family((9, 11), 6, spread=1.0, agreement=0.0),
        "tiny": family((6, 8), 7, spread=1e-5),
    }
    base, *models = family((5, 7), 8)
    made["frozen"] = [base, base.clone(), base.clone(), base.clone()]
    made["copies"] = [base, models[0], models[0].clone(), models[0].clone()]
    made["opposed"] = [base, models[0], 2 * base - models[0] + 0.05 * models[1], models[2]]
    return made


def spherical_cases() -> Iterator[Case]:
    """Yield averages and interpolations."""
    for name in ("matrix", "vector", "cube", "fine_tune", "double", "unrelated", "copies"):
        for normalize in (True, False):
            yield case(
                f"linear-{normalize}", "linear", name, 3, shared={"normalize": normalize}, weights=True
            )
        for t in (0.0, 0.3, 1.0):
            yield case(f"slerp-{t}", "slerp", name, 1, has_base=True, shared={"t": t})
        for has_base in (False, True):
            label = "deltas" if has_base else "models"
            for mode in ((True, False), (False, False), (False, True)):
                shared = {"nuslerp_flatten": mode[0], "nuslerp_row_wise": mode[1]}
                which = "flat" if mode[0] else "first-axis" if mode[1] else "last-axis"
                yield case(
                    f"nuslerp-{which}-{label}", "nuslerp", name, 2, has_base, shared=shared, weights=True
                )
            for normalize in (True, False):
                yield case(
                    f"multislerp-{normalize}-{label}",
                    "multislerp",
                    name,
                    3,
                    has_base,
                    shared={"normalize_weights": normalize},
                    weights=True,
                )
        yield case("karcher", "karcher", name, 3)
        yield case("karcher-long", "karcher", name, 3, shared={"max_iter": 100, "tol": 1e-6})
        for filter_wise in (False, True):
            yield case(
                f"model_stock-{filter_wise}",
                "model_stock",
                name,
                3,
                True,
                shared={"filter_wise": filter_wise},
            )
        for t in (0.0, 1e-7, 0.01, 0.3):
            yield case(f"nearswap-{t}", "nearswap", name, 1, has_base=True, shared={"t": t})
    for name in ("tiny", "opposed", "frozen"):
        yield case("model_stock-False", "model_stock", name, 2, True, shared={"filter_wise": False})
        yield case("multislerp-True-deltas", "multislerp", name, 3, True, weights=True)
    yield case("multislerp-pair", "multislerp", "frozen", 2, True, weights=True)
    yield case("passthrough", "passthrough", "matrix", 1)
    yield case("passthrough-scaled", "passthrough", "matrix", 1, per_model={"scale": [0.4]})


def task_vector_cases() -> Iterator[Case]:
    """Yield task vectors; densities and gammas so that no count is a rounded product."""
    for name in ("matrix", "vector", "cube", "double", "unrelated"):
        yield from _thinned(name)
        for topk in (1.0, 0.3, 0.0):
            yield case(f"sce-{topk}", "sce", name, 3, True, shared={"select_topk": topk})
        for epsilon in (1e-5, 0.2):
            yield case(f"ram-{epsilon}", "ram", name, 3, True, shared={"epsilon": epsilon})
            yield case(f"ramplus_tl-{epsilon}", "ramplus_tl", name, 3, True, shared={"epsilon": epsilon})
        shared = {"epsilon": 0.3, "r": 0.5, "alpha": 0.4}
        yield case("ramplus_tl-strong", "ramplus_tl", name, 3, True, shared=shared)
        yield case("arcee_fusion", "arcee_fusion", name, 1, has_base=True)
    for normalize in (False, True):
        yield case(
            f"task_arithmetic-{normalize}",
            "task_arithmetic",
            "fine_tune",
            3,
            True,
            shared={"normalize": normalize, "lambda": 0.7},
            weights=True,
        )
    yield case("ties-one", "ties", "matrix", 3, True, per_model={"density": [0.001] * 3}, weights=True)


def _thinned(name: str) -> Iterator[Case]:
    for method in ("task_arithmetic", "ties", "dare_linear", "dare_ties", "della", "della_linear"):
        for normalize in (False, True):
            shared = {"normalize": normalize, "lambda": 0.7}
            yield case(f"{method}-{normalize}", method, name, 3, True, shared=shared, weights=True)
    for method in ("ties", "breadcrumbs", "breadcrumbs_ties"):
        for normalize in (False, True):
            for density in (0.0, 0.43, 0.77):
                per_model: dict[str, list[Any]] = {"density": [density, density / 2, density]}
                if method != "ties":
                    per_model["gamma"] = [0.07, 0.03, 0.0]
                yield case(
                    f"{method}-{normalize}-{density}",
                    method,
                    name,
                    3,
                    True,
                    shared={"normalize": normalize, "lambda": 0.7},
                    per_model=per_model,
                    weights=True,
                )
    per_model = {"density": [0.43, 0.2, 0.8]}
    yield case("ties-rescaled", "ties", name, 3, True, {"rescale": True}, per_model, weights=True)


def case(
    label: str,
    method: str,
    name: str,
    num_models: int,
    has_base: bool = False,
    shared: dict[str, Any] | None = None,
    per_model: dict[str, list[Any]] | None = None,
    *,
    weights: bool = False,
) -> Case:
    """Return a case named after its label and family."""
    own = dict(per_model or {})
    if weights:
        own["weight"] = list(WEIGHTS[:num_models])
    return Case(
        name=f"{label}/{name}",
        method=method,
        family=name,
        num_models=num_models,
        has_base=has_base,
        shared=shared or {},
        per_model=own,
    )


def merge(case: Case, tensors: list[torch.Tensor]) -> torch.Tensor:
    """Run the peer on one case, computing in float32 (float64 for float64 inputs)."""
    models = tensors[1 : 1 + case.num_models]
    ids = [str(i) for i in range(case.num_models)]
    dtype = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    parameters = case.shared | {
        key: dict(zip(ids, values, strict=True)) for key, values in case.per_model.items()
    }
    return merge_tensors(
        [tensors[0], *models] if case.has_base else models,
        case.method,
        parameters=parameters,
        ids=["base", *ids] if case.has_base else ids,
        base_index=0 if case.has_base else None,
        dtype=dtype,
        out_dtype=dtype,
    )


def main() -> None:
    """Record every case."""
    inputs = families()
    saved = {
        f"inputs/{name}/{key}": tensor.clone()
        for name, tensors in inputs.items()
        for key, tensor in zip(("base", "0", "1", "2"), tensors, strict=True)
    }
    cases = [*spherical_cases(), *task_vector_cases()]
    assert len({each.name for each in cases}) == len(cases)
    for each in cases:
        try:
            merged = merge(each, [tensor.clone() for tensor in inputs[each.family]])
        except ValueError as error:
            each.error = str(error).split(".")[0] + "."
        else:
            saved[f"outputs/{each.name}"] = merged.clone(memory_format=torch.contiguous_format)
    versions = {name: importlib.metadata.version(name) for name in ("mergekit", "torch")}
    save_file(saved, FOLDER / "peer.safetensors")
    rows = ",\n  ".join(json.dumps(asdict(each)) for each in cases)
    methods = sorted(method.spec.name for method in registered_methods())
    head = f'{{\n "versions": {json.dumps(versions)},\n "methods": {json.dumps(methods)},\n'
    text = f'{head} "cases": [\n  {rows}\n ]\n}}\n'
    (FOLDER / "peer.json").write_text(text)
    print(f"{len(cases)} cases, {sum(each.error is not None for each in cases)} refused")


if __name__ == "__main__":
    main()
