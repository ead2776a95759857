"""The notebooks of the documentation: they run at small sizes, in one kernel, and show what they promise."""

import sys

import nbformat
import pytest
from support.docs import DOCS

sys.path.insert(0, str(DOCS))

import run_notebooks

SIZES = {
    "first-vit": "iterations, images, tested = 2, 4, 50",
    "own-loss": "iterations, images, tested = 2, 4, 50\nseeds, backends = [0], ['repq']",
    "integer-file": "iterations, images, tested = 2, 4, 50",
}
NAMES = sorted(path.stem for path in run_notebooks.NOTEBOOKS.glob("*.ipynb"))


def read(name):
    return nbformat.read(run_notebooks.NOTEBOOKS / f"{name}.ipynb", as_version=4)


def outputs(cells):
    return [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]


def said(cells):
    """What the cells printed."""
    return "".join(output.text for output in outputs(cells) if output.output_type == "stream")


def kinds(cells):
    """The kinds of what the cells display."""
    return [kind for output in outputs(cells) for kind in output.get("data", {})]


def executed():
    """The cells of each notebook, run one notebook after the other; a kernel of its own for each would take seconds."""
    cells = {}
    for name, sizes in SIZES.items():
        cells[name] = read(name).cells
        (cell,) = (cell for cell in cells[name] if "sizes" in cell.metadata.get("tags", []))
        cell.source = sizes
    forget = nbformat.v4.new_code_cell("%reset -f")
    joined = [cell for each in cells.values() for cell in (*each, forget.copy())]
    for number, cell in enumerate(joined):
        cell["id"] = str(number)
    run_notebooks.execute(nbformat.v4.new_notebook(cells=joined))
    return cells


def test_every_notebook_is_run():
    assert sorted(SIZES) == NAMES


def test_the_notebooks_show_what_they_promise():
    """One test, because each process that runs a part of them would run them all."""
    cells = executed()
    shows_bars_pictures_and_the_report(cells["first-vit"])
    compares_a_loss_with_intervals(cells["own-loss"])
    ends_with_labels_of_onnxruntime(cells["integer-file"])


def shows_bars_pictures_and_the_report(cells):
    assert "full precision" in said(cells)
    bars = [output.data["text/plain"] for output in outputs(cells) if output.output_type == "display_data"]
    assert any("stage 2 of 7, images: synthesising" in bar for bar in bars)
    assert kinds(cells).count("image/png") == 2
    (report,) = (output.data["text/html"] for output in outputs(cells) if "text/html" in output.get("data", {}))
    assert report.startswith('<iframe srcdoc="&lt;!doctype html&gt;')


def compares_a_loss_with_intervals(cells):
    assert said(cells).count("runs/matrix/repq/") == 2
    assert "over plain" in said(cells)
    assert kinds(cells).count("image/png") == 1


def ends_with_labels_of_onnxruntime(cells):
    assert "(simulated)" in said(cells)
    assert "get the same class, computed by onnxruntime" in said(cells)


@pytest.mark.parametrize("name", NAMES)
def test_the_stored_outputs_are_whole_and_name_no_folder_of_a_machine(name):
    cells = read(name).cells
    counts = [cell.execution_count for cell in cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1)), "run: python docs/run_notebooks.py"
    assert [
        output for output in outputs(cells) if output.output_type == "error" or output.get("name") == "stderr"
    ] == []
    written = (run_notebooks.NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8")
    assert "/tmp/" not in written
    assert "/home/" not in written
