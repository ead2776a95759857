"""Components from other packages: installed, listed, checked and used like built-in ones."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from click.testing import CliRunner
from spdfq_cli.main import main
from support.docs import ROOT
from support.recipes import NO_IMAGES

from spdfq import registry

RECIPE = f"""
{NO_IMAGES}
[synthesis]
type = "optimize"
images = 2
iterations = 2
[synthesis.losses.brightness]
level = 0.5
"""
# importing torch takes seconds, so one process makes all outputs and then runs the tests of the example
SEEN = """
import json, sys
import pytest
from pathlib import Path
from click.testing import CliRunner
from spdfq_cli.main import main
from spdfq.teacher import load_teacher
from spdfq.recipe import load_recipe
from spdfq.runtime import Runtime

path = sys.argv[1]

def call(*arguments):
    result = CliRunner().invoke(main, arguments)
    return result.exit_code, result.stdout, result.stderr

recipe = load_recipe(path)
made = recipe.synthesis.synthesize(load_teacher(recipe.model), Runtime())
Path("seen.json").write_text(json.dumps({
    "list": call("list", "loss"),
    "show": call("show", "loss", "brightness"),
    "check": call("check", path),
    "wrong": call("check", path, "--set", "synthesis.losses.brightness.levle=1.0"),
    "columns": made.columns,
    "shape": made.images.shape,
    "losses": made.curves[0, :, 0].tolist(),
}))
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "--rootdir=example", "example"]))
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "brightness.toml"
    path.write_text(RECIPE)
    return str(path)


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    """A process, and its folder, in which a plugin package and the one under examples are installed."""
    folder = tmp_path_factory.mktemp("plugin")
    built = shutil.ignore_patterns("build", "*.egg-info")
    for name, source in (("plugin", Path(__file__).parent / "plugin_package"), ("example", ROOT / "examples/d4c")):
        shutil.copytree(source, folder / name, ignore=built)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--target", folder / "site"]
    subprocess.run([*pip, *options, folder / "plugin", folder / "example"], check=True, timeout=120)
    (folder / "brightness.toml").write_text(RECIPE)
    done = subprocess.run(
        [sys.executable, "-c", SEEN, folder / "brightness.toml"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env={
            **os.environ,
            "PYTHONPATH": str(folder / "site"),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "COLUMNS": "120",
        },
    )
    return done, folder


@pytest.fixture(scope="module")
def seen(process):
    """What that process has seen."""
    done, folder = process
    assert (folder / "seen.json").exists(), done.stderr
    return json.loads((folder / "seen.json").read_text())


@pytest.mark.skipif(bool(find_spec("spdfq_brightness")), reason="the example plugin is installed")
def test_without_the_package_its_name_is_unknown(recipe):
    result = CliRunner().invoke(main, ["check", recipe])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: synthesis.losses.brightness: unknown loss 'brightness'")


def test_list_and_show_know_the_installed_loss(seen):
    assert re.search(
        r"^  brightness +Mean squared distance of the images to one brightness\.$", seen["list"][1], re.MULTILINE
    )
    assert "  level = 0.0    number\n      brightness aimed at" in seen["show"][1]
    assert "source  spdfq_brightness:" in seen["show"][1]


def test_a_recipe_with_the_installed_loss_is_checked_like_any_other(seen):
    assert seen["check"] == [0, "0.00 % of the multiplications have an operand in float\nok\n", ""]
    assert seen["wrong"][0] == 2
    assert "error: synthesis.losses.brightness.levle: unknown key; did you mean 'level'?" in seen["wrong"][2]


def test_images_are_optimised_with_the_installed_loss(seen):
    assert seen["columns"] == ["brightness", "total", "gradient"]
    assert seen["shape"] == [2, 1, 28, 28]
    first, second = seen["losses"]
    assert second < first


def test_the_example_plugin_installs_and_passes_its_own_tests(process):
    done, _ = process
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+ passed", done.stdout)


def test_a_plugin_that_fails_to_import_is_named_and_harms_nothing(tmp_path, monkeypatch):
    (tmp_path / "broken_plugin.py").write_text("raise RuntimeError('no such thing')\n")
    package = tmp_path / "broken_plugin-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: broken_plugin\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[spdfq.components]\nbroken = broken_plugin\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "plugin_failures", {})
    monkeypatch.setattr(registry, "_plugins_loaded", False)
    result = CliRunner().invoke(main, ["list", "loss"])
    assert result.exit_code == 0
    assert "attention_prior" in result.stdout
    assert "warning: plugin 'broken' failed to import: RuntimeError: no such thing\n" in result.stderr
    unknown = CliRunner().invoke(main, ["show", "loss", "no_such_loss"])
    assert "; plugin 'broken' failed to import: RuntimeError: no such thing" in unknown.stderr
