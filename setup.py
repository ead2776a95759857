"""Writes the commit into the package that is built, so that results name it; all settings are in pyproject.toml."""

import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent


class WithCommit(build_py):
    """Builds the package, and writes ``spdfq/commit.txt`` if the source is a checkout of its own."""

    def run(self) -> None:
        """Build, then ask git."""
        super().run()
        asked = ["git", "rev-parse", "--show-toplevel", "HEAD"]
        try:
            said = subprocess.run(asked, cwd=HERE, capture_output=True, text=True, timeout=10).stdout
        except (OSError, subprocess.TimeoutExpired):
            return
        top, _, commit = said.strip().partition("\n")
        if commit and Path(top).resolve() == HERE and not self.editable_mode:
            (Path(self.build_lib) / "spdfq" / "commit.txt").write_text(f"{commit}\n", encoding="utf-8")


setup(cmdclass={"build_py": WithCommit})
