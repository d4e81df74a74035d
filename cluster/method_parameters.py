"""Which parameters a recipe may set for a method, and on which level.

The registry itself is `raymerge.merge_actors.methods`; a method's own sparsifier adds its
parameters to the method's, and `sparsify` stands before any method.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from raymerge.cluster.origin import did_you_mean
from raymerge.merge_actors.methods import METHODS, SPARSIFIERS
from raymerge.merge_actors.methods.interface import Method, Parameter, Sparsifier

#: Names that the field uses for our sparsifiers.
SPARSIFIER_ALIASES = {"dare": "random", "ties": "magnitude"}
#: `sparsify: {method: none}` under a model undoes a `sparsify` of the whole recipe.
NO_SPARSIFIER = "none"


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodParameters:
    """The parameters of one method as a recipe sees them."""

    shared: tuple[Parameter, ...]
    """Given once: under a slice, a module or the recipe."""
    per_model: tuple[Parameter, ...]
    """Given for each model, under the model itself or on any level above it."""

    def find(self, key: str) -> Parameter | None:
        """Return the parameter with this name or alias."""
        for parameter in (*self.per_model, *self.shared):
            if key == parameter.name or key in parameter.aliases:
                return parameter
        return None

    def is_per_model(self, parameter: Parameter) -> bool:
        """Return whether the parameter may stand under a single model."""
        return any(parameter.name == each.name for each in self.per_model)

    def names(self) -> list[str]:
        """Return the names, without aliases, in the order of declaration."""
        return list(dict.fromkeys(each.name for each in (*self.per_model, *self.shared)))


def find_method(name: str) -> Method:
    """Return a method of the registry.

    Raises:
        KeyError: with the rest of a sentence: "known: ... (did you mean ...?)".
    """
    if name not in METHODS:
        raise _unknown(name, METHODS)
    return METHODS[name]


def find_sparsifier(name: str) -> Sparsifier:
    """Return a sparsifier by its name or by a name that the field uses for it.

    Raises:
        KeyError: with the rest of a sentence.
    """
    canonical = SPARSIFIER_ALIASES.get(name, name)
    if canonical not in SPARSIFIERS:
        raise _unknown(name, [*SPARSIFIERS, *SPARSIFIER_ALIASES, NO_SPARSIFIER])
    return SPARSIFIERS[canonical]


def parameters_of(method: Method) -> MethodParameters:
    """Return the parameters of a method and of its sparsifier, with the method's own defaults.

    A sparsifier reads all of its parameters from its model, so each of them is per model;
    one that is declared as given once is shared as well.
    """
    own = {each.name: _with_default(method, each) for each in method.parameters}
    steps = method.sparsifier.parameters if method.sparsifier else ()
    of_step = {each.name: own.get(each.name, _with_default(method, each)) for each in steps}
    shared = [each for each in (own | of_step).values() if not each.per_model]
    per_model = {name: each for name, each in own.items() if each.per_model} | of_step
    return MethodParameters(shared=tuple(shared), per_model=tuple(per_model.values()))


def is_parameter_of_any_method(key: str) -> bool:
    """Return whether some method or sparsifier has a parameter of this name."""
    if key == "sparsify":
        return True
    tables: Iterable[tuple[Parameter, ...]] = [
        *(method.parameters for method in METHODS.values()),
        *(each.sparsifier.parameters for each in METHODS.values() if each.sparsifier),
        *(sparsifier.parameters for sparsifier in SPARSIFIERS.values()),
    ]
    return any(key == each.name or key in each.aliases for table in tables for each in table)


def _with_default(method: Method, parameter: Parameter) -> Parameter:
    if parameter.name not in method.default_mode:
        return parameter
    return replace(parameter, default=method.default_mode[parameter.name], required=False)


def _unknown(name: str, known: Iterable[str]) -> KeyError:
    names = sorted(set(known))
    return KeyError(f"known: {', '.join(names)}{did_you_mean(name, names)}")
