"""Recipes, one file each: where the input lies, how it is read, which steps it goes through."""
