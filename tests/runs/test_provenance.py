"""The source code that a result depends on: components and everything they import, and nothing else."""

import shutil
import subprocess
import sys
from importlib import import_module, invalidate_caches
from pathlib import Path
from types import ModuleType

import pytest
import torch
from attrs import define

from spdfq.recipe import load_recipe
from spdfq.runs import provenance
from spdfq.runs.provenance import (
    BUILT_FROM,
    code_digests,
    components_in,
    data_fingerprints,
    device_name,
    git_commit,
    source_digest,
    versions,
)

LOSS = """
from attrs import define
from {package}.helper import level
from spdfq.losses import Loss

@define(kw_only=True)
class Bright(Loss):
    '''A loss.'''

    def __call__(self, inputs):
        from . import late
        import {package}.other as other
        return inputs.images.mean() - level()
"""


@pytest.fixture
def package(tmp_path, monkeypatch, request):
    """A new package on the path: a loss, modules that it imports in three ways, and one that it does not import."""
    name = f"own_{abs(hash(request.node.name))}"
    folder = tmp_path / name
    folder.mkdir()
    texts = {"__init__": "", "loss": LOSS.format(package=name), "helper": "def level(): return 1", "late": "x = 1"}
    for module, text in {**texts, "other": "y = 1", "unrelated": "z = 1"}.items():
        (folder / f"{module}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    invalidate_caches()
    forget()
    yield folder
    forget()
    for module in [module for module in sys.modules if module.startswith(name)]:
        del sys.modules[module]


def forget():
    """Clear the caches, as in a new process."""
    for cached in (provenance._tree, provenance._normalised, provenance._imported, provenance._is_module):
        cached.cache_clear()


def loss_of(package):
    return import_module(f"{package.name}.loss").Bright()


def after(path, old, new, spec):
    path.write_text(path.read_text().replace(old, new))
    forget()
    return source_digest(spec)


@pytest.mark.parametrize("module", ["loss", "helper", "late", "other", "__init__"])
def test_an_edited_source_changes_the_digest(package, module):
    spec = loss_of(package)
    before = source_digest(spec)
    path = package / f"{module}.py"
    path.write_text(path.read_text() + "\nADDED = 1\n")
    forget()
    assert source_digest(spec) != before


def test_docstrings_do_not_change_the_digest_but_other_strings_do(package):
    spec = loss_of(package)
    before = source_digest(spec)
    assert after(package / "loss.py", "A loss.", "Another sentence.", spec) == before
    documented = '"""A module."""\n\ndef level():\n    """A function."""\n    return 1'
    assert after(package / "helper.py", "def level(): return 1", documented, spec) == before
    assert after(package / "late.py", "x = 1", 'x = 1\n"""What it is."""', spec) == before
    assert after(package / "helper.py", "return 1", "return '1'", spec) != before


def test_comments_layout_and_modules_that_are_not_imported_do_not(package):
    spec = loss_of(package)
    before = source_digest(spec)
    assert after(package / "helper.py", "return 1", "\n    return (1)  # of pixels", spec) == before
    assert after(package / "unrelated.py", "1", "2", spec) == before
    assert after(package / "helper.py", "(1)", "(2)", spec) != before


@pytest.mark.parametrize(
    ("module", "of_images", "of_model"),
    [
        ("spdfq.attention", True, True),
        ("spdfq.losses.priors", True, False),
        ("spdfq.synth.group", True, False),
        ("spdfq.quantizers.observers", False, True),
        ("spdfq.backends.blocks", False, True),
        ("spdfq.quantized.checkpoint", False, False),
    ],
)
def test_imports_are_followed_through_this_library(module, of_images, of_model):
    recipe = load_recipe("quickstart")
    assert belongs(module, recipe.synthesis) == of_images
    assert belongs(module, recipe.quantization, "spdfq.backends.quantize") == of_model


@pytest.mark.parametrize(
    ("name", "module", "stages"),
    [
        ("quickstart", "spdfq.backends.quantized_student", set()),
        ("psaq_vit_v2", "spdfq.backends.quantized_student", {"images"}),
        ("psaq_vit_v2", "spdfq.quantizers.log2", {"images", "quantize"}),
        ("quickstart", "spdfq.losses.total_variation", {"images"}),
        ("quickstart", "spdfq.quantized.checkpoint", {"quantize"}),
        ("quickstart", "spdfq.evaluation.accuracy", {"evaluate"}),
        ("quickstart", "spdfq.evaluation.neighbours", set()),
        ("headless", "spdfq.evaluation.neighbours", {"evaluate"}),
        ("quickstart", "spdfq.report.page", set()),
    ],
)
def test_the_code_of_each_stage(name, module, stages, monkeypatch):
    recipe = load_recipe(name)
    normalised = provenance._normalised
    before = code_digests(recipe)
    monkeypatch.setattr(provenance, "_normalised", lambda name: normalised(name) + " edited" * (name == module))
    after = code_digests(recipe)
    assert {stage for stage in before if before[stage] != after[stage]} == stages


def belongs(module, spec, *modules):
    """Whether a digest changes with the source of a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(provenance, "_normalised", lambda name: "the same")
        before = source_digest(spec, *modules)
        patch.setattr(provenance, "_normalised", lambda name: "edited" if name == module else "the same")
        return source_digest(spec, *modules) != before


def test_reading_recipes_and_writing_files_is_no_part_of_a_result():
    recipe = load_recipe("quickstart")
    for module in (
        "spdfq",
        "spdfq.recipe",
        "spdfq.registry",
        "spdfq.recipe.structure",
        "spdfq.runtime.files",
        "spdfq.runs.pipeline",
    ):
        assert not belongs(module, recipe)
    assert belongs("spdfq.data.fashion_mnist", recipe)


def test_components_of_a_script_and_of_an_interpreter_have_a_digest(tmp_path, monkeypatch):
    @define
    class Mine:
        factor: float = 1.0

    Mine.__module__ = "__main__"

    def digest_in(main):
        monkeypatch.setitem(sys.modules, "__main__", main)
        forget()
        return source_digest(Mine())

    script, interpreter = ModuleType("__main__"), ModuleType("__main__")
    script.__file__ = str(tmp_path / "mine.py")
    Path(script.__file__).write_text("import spdfq.losses\nfactor = 1.0\n")
    before = digest_in(script)
    assert digest_in(script) == before
    Path(script.__file__).write_text("import spdfq.losses\nfactor = 2.0\n")
    assert digest_in(script) != before
    # no source to be read: what was kept is not believed to be of the same code, but within a process it is
    typed = digest_in(interpreter)
    assert source_digest(Mine()) == typed
    assert digest_in(interpreter) != typed


def test_a_cell_of_a_notebook_that_defines_something_else_changes_the_digest(monkeypatch):
    @define
    class Mine:
        factor: float = 1.0

    Mine.__module__ = "__main__"
    notebook = ModuleType("__main__")
    notebook.In = [""]
    monkeypatch.setitem(sys.modules, "__main__", notebook)
    forget()

    def after(cell):
        notebook.In.append(cell)
        return source_digest(Mine())

    first = after("factor = 1.0\ndef halve(x):\n    return x / 2")
    assert after("print(halve(factor))\nfor seed in range(3):\n    seed") == first
    assert after("factor = (") == first
    assert after("# again\ndef halve(x):\n    'Docstring.'\n    return x / 2") == first
    second = after("def halve(x):\n    return x / 3")
    assert second != first
    assert after("factor = 2.0") not in (first, second)
    assert after("factor = 1.0") not in (first, second)  # the order of what was defined last counts


def test_components_are_found_at_any_depth():
    recipe = load_recipe("quickstart")
    found = {type(component).__name__ for component in components_in(recipe)}
    assert {
        "OptimizedImages",
        "GaussianMixturePrior",
        "SpectralAdam",
        "UniformQuantizer",
        "PercentileMseObserver",
    } <= found
    assert {"Ridge", "FashionMnist", "Override", "ModelSpec"} <= found


def test_the_data_that_a_spec_reads_is_fingerprinted_wherever_it_is():
    @define
    class Data:
        text: str

        def fingerprint(self):
            return f"of {self.text}"

    @define
    class Spec:
        inner: object

    assert data_fingerprints(Spec([Data("a"), {"key": Spec(Data("b"))}])) == ["of a", "of b"]
    assert data_fingerprints(load_recipe("quickstart").synthesis) == []


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_the_checkouts_own(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        return subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)

    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "x")
    # the library in its checkout, and in a virtual environment inside somebody else's
    found = {}
    for parent in (".", "venv/site-packages"):
        (tmp_path / parent / "spdfq/runs").mkdir(parents=True)
        monkeypatch.setattr(provenance, "__file__", str(tmp_path / parent / "spdfq/runs/provenance.py"))
        found[parent] = git_commit()
    assert found == {".": git("rev-parse", "HEAD").stdout.strip(), "venv/site-packages": None}
    (tmp_path / "venv/site-packages/spdfq" / BUILT_FROM).write_text("abc\n")  # as setup.py writes it
    assert git_commit() == "abc"
    (tmp_path / "venv/site-packages/spdfq" / BUILT_FROM).unlink()
    monkeypatch.setenv("PATH", "")
    assert git_commit() is None


def test_versions_and_the_device_are_named():
    assert versions()["torch"] == torch.__version__
    assert set(versions()) == {"spdfq", "python", "torch", "timm"}
    assert device_name(torch.device("cpu")).endswith("cores")
