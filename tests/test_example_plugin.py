"""The plugin package under examples: installed into a folder of its own, where its tests pass."""

import os
import shutil
import subprocess
import sys

from support.docs import ROOT


def test_the_example_plugin_installs_and_passes_its_own_tests(tmp_path):
    shutil.copytree(ROOT / "examples/d4c", tmp_path / "source", ignore=shutil.ignore_patterns("build", "*.egg-info"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--target", tmp_path / "site", tmp_path / "source"]
    subprocess.run([*pip, *options], check=True, timeout=120)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "."],
        cwd=tmp_path / "source",
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
