"""Recipes: one file per experiment, each a function `config()`."""
