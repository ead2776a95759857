"""What a result depends on besides its recipe: the source code, the data and the versions."""

import ast
import hashlib
import importlib.util
import os
import platform
import subprocess
import sys
import uuid
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import attrs
import torch

from spdfq.backends.quantized_student import student_section
from spdfq.recipe import Recipe

BUILT_FROM = "commit.txt"
# these modules register names, read recipes and write files; no number depends on them
_RECIPE = ("recipe", *(f"recipe.{name}" for name in ("files", "schema", "structure", "toml")))
_INFRASTRUCTURE = frozenset({"spdfq"} | {f"spdfq.{name}" for name in ("errors", "registry", "runtime.files", *_RECIPE)})


def versions() -> dict[str, str]:
    """Versions of the packages that results may depend on."""
    return {
        "spdfq": _version("spdfq"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": _version("timm"),
    }


@cache
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def device_name(device: torch.device) -> str:
    """The device's model name; for a CPU, with its number of cores."""
    if device.type != "cpu":
        named = getattr(torch.get_device_module(device), "get_device_name", None)
        return str(named(device)) if named else device.type
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def git_commit() -> str | None:
    """The commit of the checkout that this library runs from, or that it was installed from; ``None`` if unknown."""
    checkout = Path(__file__).resolve().parents[2]
    installed = checkout / "spdfq" / BUILT_FROM
    if installed.exists():  # only setup.py writes it, into a package that it builds
        return installed.read_text(encoding="utf-8").strip()
    try:
        asked = subprocess.run(
            ["git", "rev-parse", "--show-toplevel", "HEAD"], cwd=checkout, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    top, _, commit = asked.stdout.strip().partition("\n")
    # an installed package may lie inside a checkout of another project
    return commit if asked.returncode == 0 and Path(top).resolve() == checkout else None


def components_in(spec: Any) -> list[Any]:
    """Every attrs object inside a spec, including the spec itself."""
    if isinstance(spec, dict):
        return [found for item in spec.values() for found in components_in(item)]
    if isinstance(spec, (tuple, list)):
        return [found for item in spec for found in components_in(item)]
    if not attrs.has(type(spec)):
        return []
    inner = [getattr(spec, field.name) for field in attrs.fields(type(spec)) if field.init]
    return [spec, *components_in(inner)]


def data_fingerprints(spec: Any) -> list[str]:
    """Fingerprints of the data that a spec reads."""
    return [component.fingerprint() for component in components_in(spec) if hasattr(component, "fingerprint")]


def source_digest(spec: Any, *modules: str) -> str:
    """A hash of the source code of a spec's components, of further modules, and of everything they import.

    Imports are followed inside this library and, for a component of another package, inside that package. Docstrings,
    comments and layout do not change the hash.
    """
    start = {*modules, *(type(component).__module__ for component in components_in(spec))}
    packages = {"spdfq", *map(_top_level, start)}
    found, waiting = set(start), list(start)
    while waiting:
        names = {name for name in _imported(waiting.pop()) if _top_level(name) in packages and _is_module(name)}
        waiting += names - found
        found |= names
    state = hashlib.sha256()
    for module in sorted(found - _INFRASTRUCTURE):
        state.update(f"{module}\n{_normalised(module)}\n".encode())
    if "__main__" in found:
        state.update("\n".join(_cells()).encode())
    return state.hexdigest()[:20]


def code_digests(recipe: Recipe) -> dict[str, str]:
    """A `source_digest` for each stage that a recipe configures: ``images``, ``quantize`` and ``evaluate``.

    A stage's digest does not cover the stages before it. The teacher's own accuracy depends on that of ``evaluate``.
    """
    images: Any = recipe.synthesis
    if images.needs_student:
        images_code = source_digest([images, student_section(recipe.quantization)], "spdfq.backends.quantized_student")
    else:
        images_code = source_digest(images)
    # the evaluation has a bank exactly if the model has no head
    evaluator = "neighbours" if recipe.evaluation.bank else "accuracy"
    return {
        "images": images_code,
        "quantize": source_digest(recipe.quantization, "spdfq.backends.quantize", "spdfq.quantized.checkpoint"),
        "evaluate": source_digest(recipe.evaluation, f"spdfq.evaluation.{evaluator}"),
    }


def _top_level(module: str) -> str:
    return module.partition(".")[0]


def _source_file(module: str) -> Path | None:
    loaded = getattr(sys.modules.get(module), "__file__", None)
    if loaded or module == "__main__":  # a script has no import specification
        return Path(loaded) if loaded else None
    found = importlib.util.find_spec(module)
    return Path(found.origin) if found and found.has_location and found.origin else None


@cache
def _tree(module: str) -> ast.Module | None:
    path = _source_file(module)
    return ast.parse(path.read_text(encoding="utf-8")) if path and path.suffix == ".py" else None


class _WithoutDocstrings(ast.NodeTransformer):
    """Removes statements that are only a string."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        """Keep any other expression."""
        return None if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str) else node


@cache
def _normalised(module: str) -> str:
    """The module's source without docstrings, comments and layout; for compiled code, the hash of its file.

    A random string where no source can be found, so that stored results never match.
    """
    tree, path = _tree(module), _source_file(module)
    if tree is not None:
        return ast.dump(_WithoutDocstrings().visit(tree))
    if path:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    is_package = hasattr(sys.modules.get(module), "__path__")  # one without an __init__.py has no source
    return "" if is_package else uuid.uuid4().hex


def _cells() -> list[str]:
    """What the cells of a notebook have defined so far: functions, classes and constants, the latest one last.

    The module of a notebook has no file, so `_normalised` gives it a random string for the session. This tells the
    versions within a session apart.
    """
    defined: dict[str, None] = {}
    for cell in getattr(sys.modules["__main__"], "In", ()):
        with suppress(SyntaxError):  # a cell with a mistake defines nothing
            for statement in _WithoutDocstrings().visit(ast.parse(cell)).body:
                if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or _is_constant(
                    statement
                ):
                    found = ast.dump(statement)
                    defined.pop(found, None)
                    defined[found] = None
    return list(defined)


def _is_constant(statement: ast.stmt) -> bool:
    """Whether a statement gives names to values that are written out."""
    if not isinstance(statement, (ast.Assign, ast.AnnAssign)) or statement.value is None:
        return False
    try:
        ast.literal_eval(statement.value)
    except ValueError:
        return False
    return True


@cache
def _imported(module: str) -> tuple[str, ...]:
    """Full names of everything that a module's source imports: modules, and the names imported from them."""
    tree = _tree(module)
    if tree is None or module in _INFRASTRUCTURE:
        return ()
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, module)
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return tuple(names)


def _absolute(node: ast.ImportFrom, module: str) -> str:
    if not node.level:
        return node.module or ""
    package = module if hasattr(sys.modules.get(module), "__path__") else module.rpartition(".")[0]
    return importlib.util.resolve_name("." * node.level + (node.module or ""), package)


@cache
def _is_module(name: str) -> bool:
    """Whether a name is an importable module, and not a class or function of one."""
    if name in sys.modules:
        return True
    parent = sys.modules.get(name.rpartition(".")[0])
    if name.count(".") and not hasattr(parent, "__path__"):
        return False
    return importlib.util.find_spec(name) is not None
