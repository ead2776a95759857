"""Who imports whom (downwards only, no circles, read from the source), and lean imports."""

import ast
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import spdfq_cli

import spdfq

ROOT = Path(spdfq.__file__).parent
CLI = Path(spdfq_cli.__file__).parent

# bottom first, as in docs/architecture.md; a package may import from its own layer and from those below
LAYERS = {
    "names and errors": {"errors", "extras", "registry", "recipes"},
    "foundation": {"runtime", "recipe", "attention", "inference", "calibration_data"},
    "parts": {"teacher", "losses", "quantizers", "trackers"},
    "stages": {"data", "synth", "quantized"},
    "back-ends and evaluation": {"backends", "evaluation", "exporters", "report"},
    "diagnosis": {"doctor"},
    "functions": {"api"},
    "runs": {"runs"},
    "benches": {"bench"},
    "library": {"__init__"},
    "command line": {"spdfq_cli"},
    "start": {"__main__"},
}
# the stages of a run: what makes images, what quantizes and what measures do not know each other
STAGES = {"synth", "backends", "evaluation"}


def modules():
    """Module name -> file, of the library and the command line."""
    found = {".".join(("spdfq", *path.relative_to(ROOT).with_suffix("").parts)): path for path in ROOT.rglob("*.py")}
    found |= {".".join(("spdfq_cli", *path.relative_to(CLI).with_suffix("").parts)): path for path in CLI.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in found.items()}


MODULES = modules()


def imports(name):
    """Modules of ours that a module imports, also inside functions and under TYPE_CHECKING."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            named = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {module if module in MODULES else node.module for module in named}
    return {module for module in found if module.partition(".")[0] in ("spdfq", "spdfq_cli")} - {name}


def package(module):
    top, _, rest = module.partition(".")
    return top if top == "spdfq_cli" else rest.partition(".")[0] or "__init__"


def circle(graph):
    """One circle of a graph, or ``None``."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return " -> ".join(error.args[1])
    return None


@cache
def all_imports():
    return {name: imports(name) for name in MODULES}


def test_the_map_below_is_read_from_real_files():
    assert len(MODULES) > 50
    assert "spdfq.registry" in all_imports()["spdfq.losses.priors"]
    assert sum(map(len, all_imports().values())) > 150


def test_every_package_has_a_layer():
    placed = [name for layer in LAYERS.values() for name in layer]
    assert sorted(placed) == sorted({package(name) for name in MODULES}), "edit LAYERS and docs/architecture.md"


def test_imports_go_downwards_only():
    height = {name: index for index, layer in enumerate(LAYERS.values()) for name in layer}
    upward = [
        f"{name} imports {other}"
        for name, others in all_imports().items()
        for other in others
        if height[package(other)] > height[package(name)]
    ]
    assert upward == []


def test_packages_do_not_import_each_other_in_a_circle():
    graph = {package(name): set() for name in MODULES}
    for name, others in all_imports().items():
        graph[package(name)] |= {package(other) for other in others} - {package(name)}
    assert circle(graph) is None


def test_a_stage_knows_nothing_of_the_other_stages():
    across = [
        f"{name} imports {other}"
        for name, others in all_imports().items()
        for other in others
        if package(name) in STAGES and package(other) in STAGES - {package(name)}
    ]
    assert across == []


def test_no_module_imports_itself_by_way_of_others():
    # a package's modules may import their siblings past its __init__, which imports them all
    graph = {
        name: {other for other in others if not name.startswith(f"{other}.")} for name, others in all_imports().items()
    }
    assert circle(graph) is None


@pytest.mark.parametrize(
    "statement", ["spdfq.Recipe, spdfq.load_recipe", "import spdfq.recipe", "import spdfq_cli.main", "dir(spdfq)"]
)
def test_lean_imports_bring_neither_torch_nor_timm(statement):
    heavy = "{'torch', 'timm', 'numpy', 'PIL', 'rich', 'onnx', 'onnxruntime'}"
    code = f"import sys, spdfq; {statement}; print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_importing_the_library_parts_leaves_timm_for_later():
    code = "import sys, spdfq.runs.pipeline, spdfq.data, spdfq.synth, spdfq.backends; print('timm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "False"


def test_no_file_is_longer_than_400_lines():
    assert [str(path) for path in MODULES.values() if len(path.read_text(encoding="utf-8").splitlines()) > 400] == []
