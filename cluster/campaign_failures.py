"""Which recipes of a campaign have failed, and what is left to merge: the bookkeeping of `merge.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from raymerge.cluster.campaign import PlannedWave
from raymerge.cluster.recipe import Recipe
from raymerge.cluster.recipe_failures import is_of_a_recipe
from raymerge.merge_actors.errors import RaymergeError, RecipeError

#: Plans some recipes of a wave together, or raises.
Planning = Callable[[Sequence[Recipe]], PlannedWave]


class CampaignFailures:
    """Recipes that are left out while the others are merged."""

    def __init__(self, num_recipes: int) -> None:
        self._num_recipes = num_recipes
        self.errors: dict[str, RaymergeError] = {}
        """Why, by the recipe's name."""

    @property
    def may_drop(self) -> bool:
        """Whether there is more than one recipe, so that one may fail alone."""
        return self._num_recipes > 1

    def left(self, recipes: Sequence[Recipe]) -> list[Recipe]:
        """Return those recipes that have not failed."""
        return [recipe for recipe in recipes if recipe.name not in self.errors]

    def add(self, errors: Mapping[str, RaymergeError]) -> None:
        """Leave recipes out.

        Raises:
            RaymergeError: the first error, if no recipe is left.
        """
        for name, error in errors.items():
            self.errors.setdefault(name, error)
        if len(self.errors) == self._num_recipes:
            raise next(iter(self.errors.values()))

    def blame(self, wave: PlannedWave, error: RaymergeError) -> None:
        """Leave out the recipe that an error is about, or all of the wave.

        Raises:
            RaymergeError: the error, if it is not about recipes, or no recipe is left.
        """
        if not is_of_a_recipe(error):
            raise error
        names = [plan.recipe.name for plan in wave.plan.recipes]
        blamed = names if error.recipe is None else [names[error.recipe]]
        self.add(dict.fromkeys(blamed, error))

    def plan(self, recipes: Sequence[Recipe], plan: Planning, probe: Planning) -> PlannedWave | None:
        """Plan those recipes of a wave that can be merged; None if none can.

        Args:
            recipes: all of the wave.
            plan: plans several, and tells the user.
            probe: plans one, and tells nobody.

        Raises:
            RaymergeError: no recipe is left, or what is wrong is not about one of them.
        """
        for recipe in self.left(recipes):
            lost = next((name for name in recipe.depends_on if name in self.errors), None)
            if lost is not None:
                self.add({recipe.name: RecipeError(f"it uses {lost}, which was not merged")})
        left = self.left(recipes)
        if not left:
            return None
        try:
            return plan(left)
        except RaymergeError as error:
            if not self.may_drop or not is_of_a_recipe(error):
                raise
            found: dict[str, RaymergeError] = {}
            for recipe in left:  # by itself each says what is wrong with it
                try:
                    probe([recipe])
                except RaymergeError as own:
                    found[recipe.name] = own
            if not found:
                raise
            self.add(found)
            return self.plan(left, plan, probe)
