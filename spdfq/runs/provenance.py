"""What a result depends on besides its recipe: the source of the code that made it, the data, the versions."""

import ast
import hashlib
import importlib.util
import os
import platform
import subprocess
import sys
import uuid
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import attrs
import torch

# they name things, read recipes and write files; no number depends on them
_RECIPE = ("recipe", *(f"recipe.{name}" for name in ("files", "schema", "structure", "toml")))
_INFRASTRUCTURE = frozenset({"spdfq"} | {f"spdfq.{name}" for name in ("errors", "registry", "runtime.files", *_RECIPE)})


def versions() -> dict[str, str]:
    """Versions of what numbers may depend on."""
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
    """What the device calls itself."""
    if device.type != "cpu":
        named = getattr(torch.get_device_module(device), "get_device_name", None)
        return str(named(device)) if named else device.type
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def git_commit() -> str | None:
    """The commit of the checkout this library runs from; ``None`` where it is installed elsewhere."""
    checkout = Path(__file__).resolve().parents[2]
    try:
        asked = subprocess.run(
            ["git", "rev-parse", "--show-toplevel", "HEAD"], cwd=checkout, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    top, _, commit = asked.stdout.strip().partition("\n")
    # an installed package may lie inside a checkout of something else
    return commit if asked.returncode == 0 and Path(top).resolve() == checkout else None


def components_in(spec: Any) -> list[Any]:
    """Every attrs object inside a spec, itself included."""
    if isinstance(spec, dict):
        return [found for item in spec.values() for found in components_in(item)]
    if isinstance(spec, (tuple, list)):
        return [found for item in spec for found in components_in(item)]
    if not attrs.has(type(spec)):
        return []
    inner = [getattr(spec, field.name) for field in attrs.fields(type(spec)) if field.init]
    return [spec, *components_in(inner)]


def data_fingerprints(spec: Any) -> list[str]:
    """Fingerprints of the data a spec reads."""
    return [component.fingerprint() for component in components_in(spec) if hasattr(component, "fingerprint")]


def source_digest(spec: Any, *modules: str) -> str:
    """A hash of the source of a spec's components, of further modules, and of what those import.

    Imports are followed inside this library, and inside the top-level package of each component from elsewhere.
    """
    todo = {*modules, *(type(component).__module__ for component in components_in(spec))}
    packages = {"spdfq", *(module.partition(".")[0] for module in todo)}
    done: set[str] = set()
    while todo - done:
        module = (todo - done).pop()
        done.add(module)
        todo |= {name for name in _imported(module) if name.partition(".")[0] in packages and _is_module(name)}
    state = hashlib.sha256()
    for module in sorted(done - _INFRASTRUCTURE):
        state.update(f"{module}\n{_parsed(module)}\n".encode())
    return state.hexdigest()[:20]


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


@cache
def _parsed(module: str) -> str:
    """The module without comments and layout; compiled code as it is; something new where no source can be found."""
    tree, path = _tree(module), _source_file(module)
    if tree is not None:
        return ast.dump(tree)
    if path:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return "" if hasattr(sys.modules.get(module), "__path__") else uuid.uuid4().hex  # a folder of modules has none


@cache
def _imported(module: str) -> tuple[str, ...]:
    """Full names of what a module imports anywhere in its source, modules and what is in them."""
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
    if name in sys.modules:
        return True
    parent = sys.modules.get(name.rpartition(".")[0])
    if name.count(".") and not hasattr(parent, "__path__"):
        return False
    return importlib.util.find_spec(name) is not None
