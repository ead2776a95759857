"""Exported files where torch, timm and onnx are not installed."""

import runpy
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from support.data import RED, encoded
from support.docs import DOCS, blocks
from support.onnx_files import write_file

from spdfq.inference import load

BLOCKED = ["torch", "timm", "onnx", "einops", "safetensors", "tomlkit", "filelock", "rich"]


@pytest.fixture
def folder(tmp_path):
    write_file(tmp_path / "model.onnx")
    (tmp_path / "photo.jpg").write_bytes(encoded(RED, "JPEG"))
    return tmp_path


def run(folder, code, *blocked):
    """Run code in a new process in a folder; importing what is blocked fails as if it were not installed."""
    start = f"import sys; sys.modules.update(dict.fromkeys({blocked!r}))\n"
    return subprocess.run([sys.executable, "-c", start + code], cwd=folder, capture_output=True, text=True, timeout=60)


def page_lines():
    (code,) = (found for found in blocks(DOCS / "predict.md", "python") if "import onnxruntime" in found)
    return code


def command(*arguments):
    return f"from spdfq_cli.main import main; main({list(arguments)!r})"


def test_a_file_is_loaded_and_gives_a_label(folder):
    code = "import spdfq.inference; print(spdfq.inference.load('model.onnx')('photo.jpg')[0].label)"
    done = run(folder, code, *BLOCKED)
    assert (done.stdout, done.returncode) == ("red\n", 0), done.stderr


def test_importing_needs_neither_torch_nor_timm_nor_onnxruntime():
    code = "import sys, spdfq, spdfq.inference; print({'torch', 'timm', 'onnx', 'onnxruntime'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "set()\n"


def test_predict_works_and_commands_that_need_torch_say_so(folder):
    done = run(folder, command("predict", "model.onnx", "photo.jpg", "--top", "1"), *BLOCKED)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1:] == ["photo.jpg", " 98.15 %  red"]
    for arguments in (["evaluate", "model.onnx", "--on", "."], ["predict", ".", "photo.jpg"]):
        done = run(folder, command(*arguments), "torch", "timm")
        assert done.returncode == 2
        assert done.stderr == "error: needs torch, which is not installed: pip install spdfq\n"


def test_without_onnxruntime_there_is_one_line_with_the_remedy(folder):
    done = run(folder, command("predict", "model.onnx", "photo.jpg"), "onnxruntime")
    assert done.returncode == 2
    assert done.stderr == "error: model.onnx: needs onnxruntime, which is not installed: pip install onnxruntime\n"


def test_the_pages_lines_without_spdfq_give_the_same_label(folder):
    done = run(folder, page_lines(), *BLOCKED, "spdfq")
    assert (done.stdout, done.returncode) == ("red\n", 0), done.stderr


@pytest.mark.parametrize("size", [(31, 47), (50, 20), (8, 8)])
@pytest.mark.parametrize("crop_pct", [0.8, 1.0])
def test_the_pages_lines_prepare_an_image_as_the_library_does(folder, size, crop_pct, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "photo.jpg")
    write_file(folder / "model.onnx", crop_pct=crop_pct, interpolation="bicubic")
    (folder / "script.py").write_text(page_lines())
    monkeypatch.chdir(folder)
    found = runpy.run_path("script.py")["images"]
    with Image.open("photo.jpg") as photo:
        expected = load("model.onnx").preprocessing(photo)[None]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
