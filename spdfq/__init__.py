"""Data-free quantization of vision transformers: synthetic images, priors, quantizers and baselines as components."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spdfq.api import diagnose, evaluate, export, quantize, synthesize
    from spdfq.errors import SpdfqError
    from spdfq.quantized.checkpoint import load_quantized
    from spdfq.recipe import Recipe, load_recipe
    from spdfq.runs.pipeline import RunResult, run
    from spdfq.teacher import Teacher, load_teacher

# imported on first use: torch and timm take seconds
_HOMES = {
    "Recipe": "spdfq.recipe",
    "RunResult": "spdfq.runs.pipeline",
    "SpdfqError": "spdfq.errors",
    "Teacher": "spdfq.teacher",
    "diagnose": "spdfq.api",
    "evaluate": "spdfq.api",
    "export": "spdfq.api",
    "load_quantized": "spdfq.quantized.checkpoint",
    "load_recipe": "spdfq.recipe",
    "load_teacher": "spdfq.teacher",
    "quantize": "spdfq.api",
    "run": "spdfq.runs.pipeline",
    "synthesize": "spdfq.api",
}
__all__ = [
    "Recipe",
    "RunResult",
    "SpdfqError",
    "Teacher",
    "diagnose",
    "evaluate",
    "export",
    "load_quantized",
    "load_recipe",
    "load_teacher",
    "quantize",
    "run",
    "synthesize",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'spdfq' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
