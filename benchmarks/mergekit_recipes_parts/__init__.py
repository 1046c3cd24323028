"""The parts of mergekit_recipes.py."""
