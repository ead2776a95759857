"""Runs the notebooks and stores their outputs, which the documentation shows.

python docs/run_notebooks.py          # all of them, minutes
python docs/run_notebooks.py own-loss
"""

import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parent / "notebooks"


def execute(notebook: nbformat.NotebookNode) -> None:
    """Run all cells in a temporary folder, and keep their outputs.

    Raises:
        CellExecutionError: a cell failed; the message has its traceback.
    """
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # so that "!spdfq" is this installation
    warnings = "ignore:IProgress not found"  # of tqdm, which other libraries import; spdfq has bars of its own
    with tempfile.TemporaryDirectory() as folder:
        place = {"metadata": {"path": folder}}
        client = NotebookClient(notebook, record_timing=False, coalesce_streams=True, resources=place)
        client.execute(env={**os.environ, "PATH": tools, "PYTHONWARNINGS": warnings})


def main() -> None:
    """Run the notebooks that the command line names, or all."""
    for name in sys.argv[1:] or sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")):
        path, started = NOTEBOOKS / f"{name}.ipynb", time.monotonic()
        notebook = nbformat.read(path, as_version=4)
        execute(notebook)
        nbformat.write(notebook, path)
        print(f"{name}: {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
