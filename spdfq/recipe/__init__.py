"""Recipes: TOML files, checked into classes before anything runs."""

from spdfq.recipe.files import assign_all, locate, merge, merge_parents, read, resolve, shipped
from spdfq.recipe.schema import (
    Budget,
    Evaluation,
    ModelSpec,
    Override,
    Published,
    PublishedRow,
    Quantization,
    Recipe,
    RuntimeSpec,
    digest,
    load_recipe,
)
from spdfq.recipe.toml import dumps as to_toml

__all__ = [
    "Budget",
    "Evaluation",
    "ModelSpec",
    "Override",
    "Published",
    "PublishedRow",
    "Quantization",
    "Recipe",
    "RuntimeSpec",
    "assign_all",
    "digest",
    "load_recipe",
    "locate",
    "merge",
    "merge_parents",
    "read",
    "resolve",
    "shipped",
    "to_toml",
]
