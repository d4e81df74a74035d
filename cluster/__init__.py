"""The driver: recipes, plans, runs, and connecting to Ray."""
