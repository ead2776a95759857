"""The command line: what it prints where, with which exit code, and that it adds nothing of its own."""

import contextlib
import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from spdfq_cli.main import main
from spdfq_cli.run import accuracy
from support.commands import SMALL, small_recipe, spdfq

from spdfq.errors import SpdfqError
from spdfq.runs import pipeline

METRICS = {
    "images": 2000,
    "fp": {"top1": 91.25, "top5": 99.8},
    "quantized": {"top1": 88.5, "top5": 99.0},
    "agreement": 94.0,
    "simulated": True,
}
RECORD = {
    "name": "small",
    "model": {"name": "bundled:vit_fmnist"},
    "backend": {"label": "W4A4", "placement": "matmul_inputs", "steps": ["calibrate"]},
    "metrics": METRICS,
    "size": {"float": 2_745_000, "quantized": 467_000},
    "controls": [{"name": "gaussian_noise", "metrics": {**METRICS, "quantized": {"top1": 9.5}, "agreement": 100.0}}],
    "stages": {
        "images": {"seconds": 2.04, "reused": False, "key": "a"},
        "quantize": {"seconds": 0.1, "reused": True, "key": "b"},
        "gaussian_noise: quantize": {"seconds": 3.0, "reused": False, "key": "c"},
        "gaussian_noise: evaluate": {"seconds": 1.5, "reused": False, "key": "d"},
    },
}


@pytest.fixture
def small(tmp_path):
    return small_recipe(tmp_path)


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """What the command line asks of the pipeline, which itself does nothing."""
    seen = []

    def fake_run(source, **options):
        seen.append((source, options))
        options["announce"]("teacher: 1.2 s")
        options["announce"]("warning: it is late")
        (tmp_path / "run.json").write_text(json.dumps(RECORD))
        return type("Result", (), {"folder": tmp_path})

    def fake_evaluate(folder, **options):
        seen.append((folder, options))
        return METRICS

    monkeypatch.setattr(pipeline, "run", fake_run)
    monkeypatch.setattr(pipeline, "evaluate_run", fake_evaluate)
    return seen


def test_help_needs_neither_torch_nor_timm():
    code = "import sys; from spdfq_cli.main import main; main(['--help'], standalone_mode=False); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    loaded = done.stdout.splitlines()[-1].split()
    assert "click" in loaded
    assert {"torch", "timm", "numpy"}.isdisjoint(loaded)


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "spdfq", "-h"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert done.stdout.startswith("Usage: spdfq ")


@pytest.mark.parametrize("command", sorted(main.commands))
def test_every_command_explains_itself_in_one_untruncated_line(command):
    listed = next(line for line in spdfq("--help").output.splitlines() if line.strip().startswith(command))
    assert not listed.endswith("...")
    assert spdfq(command, "-h").exit_code == 0


def test_the_version_is_the_distributions():
    assert spdfq("--version").output.startswith("spdfq, version ")


def test_a_mistyped_command_is_answered_with_the_nearest():
    result = spdfq("chekc")
    assert result.exit_code == 2
    assert "no such command 'chekc'; did you mean 'check'?" in result.stderr


def test_run_hands_its_options_to_the_pipeline_and_sums_up_on_standard_output(calls, tmp_path):
    result = spdfq(
        "run",
        "quickstart",
        "--set",
        "a.b=1",
        "--set",
        "c=2",
        "--seed",
        3,
        "--out",
        tmp_path,
        "--device",
        "cpu",
        "--fresh",
    )
    source, options = calls[0]
    assert source == "quickstart"
    assert options["overrides"] == ("a.b=1", "c=2")
    assert {key: options[key] for key in ("seed", "out", "device", "fresh")} == {
        "seed": 3,
        "out": tmp_path,
        "device": "cpu",
        "fresh": True,
    }
    assert result.stderr == "teacher: 1.2 s\nwarning: it is late\n"
    assert "top-1      91.25 % FP -> 88.50 % quantized (simulated), 2000 images\n" in result.stdout
    assert "seconds    images 2.0, quantize 0.1 (reused), controls 4.5\n" in result.stdout
    assert f"report     {tmp_path / 'report.html'}\n" in result.stdout
    assert "size       2.75 MB in float32 -> 0.47 MB packed\n" in result.stdout
    assert result.stdout.endswith(
        "next       spdfq init quickstart > my.toml && spdfq run my.toml   (edit my.toml in between)\n"
    )


def test_controls_are_shown_beside_the_run(calls):
    lines = spdfq("run", "quickstart").stdout.splitlines()
    first = lines.index("controls   this run         88.50 %, agreement  94.00 %")
    assert lines[first + 1] == "           gaussian_noise    9.50 %, agreement 100.00 %"


def test_after_a_recipe_of_your_own_the_next_command_measures_its_images(calls, tmp_path, small):
    assert f"next       spdfq measure {tmp_path}   (the quality of its images)" in spdfq("run", small).stdout


def test_damaged_images_are_counted_and_named_beside_the_accuracy():
    lines = accuracy({**RECORD["metrics"], "damaged": ["a.png", "b.png"]})
    assert lines[2:] == ["damaged    2 images cannot be read and are left out: a.png, b.png"]
    assert len(accuracy(RECORD["metrics"])) == 2


def test_an_empty_name_of_the_folder_is_refused(calls):
    result = spdfq("run", "quickstart", "--out", "")
    assert result.exit_code == 2
    assert result.stderr.endswith("Error: Invalid value for '--out': the folder name is empty\n")
    assert not calls


def test_run_leaves_unsaid_options_to_the_pipeline(calls):
    spdfq("run", "quickstart")
    options = calls[0][1]
    assert (options["seed"], options["out"], options["device"], options["fresh"]) == (None, None, None, False)
    assert type(options["progress"]).__name__ == "RichProgress"


def test_json_is_alone_on_standard_output(calls, tmp_path):
    result = spdfq("run", "quickstart", "--json")
    assert json.loads(result.stdout) == {**RECORD, "folder": str(tmp_path)}


def test_quiet_leaves_warnings_alone_on_standard_error(calls):
    result = spdfq("run", "quickstart", "--quiet")
    assert result.stderr == "warning: it is late\n"
    assert calls[0][1]["progress"].__name__ == "silent"


def test_evaluate_measures_the_folder_again(calls, tmp_path):
    result = spdfq("evaluate", tmp_path, "--set", "evaluation.batch=8", "--json")
    assert calls[0][0] == tmp_path
    assert calls[0][1]["overrides"] == ("evaluation.batch=8",)
    assert json.loads(result.stdout) == {"folder": str(tmp_path), "metrics": METRICS}
    assert "88.50 % quantized (simulated)" in spdfq("evaluate", tmp_path).stdout


def test_a_recipe_with_six_mistakes_gives_six_lines_and_exit_code_2(tmp_path):
    wrong = (
        SMALL.replace("images = 4", 'images = "4"')
        .replace("iterations = 2", "iteration = 2")
        .replace("[synthesis.losses.total_variation]", "[synthesis.losses.total_variatio]")
        .replace('softmax = { type = "log2", bits = 4 }', 'softmax = { type = "log2", bits = 0 }')
        .replace('dataset = "fashion_mnist"', 'dataset = "fashion_mnist"\nbatch = 0')
        .replace('name = "bundled:vit_fmnist"', 'name = "bundled:vit_fmnist"\npretrained = 1')
    )
    (tmp_path / "wrong.toml").write_text(wrong)
    for command in ("check", "run"):
        result = spdfq(command, tmp_path / "wrong.toml")
        lines = result.stderr.splitlines()
        assert result.exit_code == 2
        assert [line.split(":")[:2] for line in sorted(lines)] == [
            ["error", " evaluation.batch"],
            ["error", " model.pretrained"],
            ["error", " quantization.softmax.bits"],
            ["error", " synthesis.images"],
            ["error", " synthesis.iteration"],
            ["error", " synthesis.losses.total_variatio"],
        ]
        assert "did you mean 'iterations'?" in result.stderr
        assert "did you mean 'total_variation'?" in result.stderr


def test_check_says_ok_and_warns(small):
    assert spdfq("check", small).output == "0.00 % of the multiplications have an operand in float\nok\n"
    result = spdfq("check", small, "--set", "synthesis.sampler='multi_semantic'")
    assert result.exit_code == 0
    assert result.output.startswith("warning: synthesis: multi_semantic without soft labels")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["check", "nowhere.toml"], "nowhere.toml: no such file; to run a shipped recipe leave out '.toml'"),
        (["check", "{small}", "--set", "model.name"], "--set model.name: expected key=value, for example "),
        (["check", "{small}", "--set", "model.name=x y"], "--set model.name=x y: the value is not TOML; strings need"),
        (["check", "{small}", "--set", "model.nam='x'"], "model.nam: unknown key; did you mean 'name'?"),
        (["check", "{small}", "--set", "model.name='resnetty'"], "model.name: timm "),
        (["check", f"{'x' * 300}.toml"], "xxx"),
        (["run", "{small}", "--out", "{small}/runs"], "{small}"),
        (
            ["run", "{small}", "--out", "{small}"],
            "{small}: cannot be written (it is a file); make it writable, or choose",
        ),
        (["measure", "x", "--sheet", "{small}"], "{small}: the sheet is a .png file in a folder that exists"),
        (["show", "loss", "atention_prior"], "unknown loss 'atention_prior'; did you mean 'attention_prior'?"),
        (["list", "losses"], "unknown kind 'losses'; did you mean 'loss'? (kinds: loss, "),
        (["init", "nothing_like_it"], "nothing_like_it: no shipped recipe of that name"),
    ],
)
def test_a_mistake_is_one_line_on_standard_error_and_exit_code_2(arguments, line, small):
    result = spdfq(*(argument.format(small=small) for argument in arguments))
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"error: {line.format(small=small)}")
    assert result.stderr.count("\n") == 1


PATHS = [name for name, each in main.commands.items() if re.search(r"\b(RUN|FILE)\b", each.params[0].metavar or "")]
MORE = {"images": ["--to", "images.npz"], "predict": ["image.png"]}


@pytest.mark.parametrize("path", ["nothing", "a_file"])
@pytest.mark.parametrize("command", PATHS)
def test_a_run_or_file_that_is_none_is_one_line_on_standard_error_and_exit_code_2(command, path, tmp_path):
    (tmp_path / "a_file").write_text("no recipe")
    (tmp_path / "image.png").write_bytes(b"")
    with contextlib.chdir(tmp_path):
        result = spdfq(command, path, *MORE.get(command, []))
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {path}: ")
    assert result.stderr.count("\n") == 1


def test_an_unknown_device_is_refused(small):
    result = spdfq("run", small, "--device", "tpu")
    assert result.exit_code == 2
    assert "'tpu' is not one of 'auto', 'cpu', 'cuda'" in result.stderr


def test_a_device_that_is_not_there_is_one_line(small, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    result = spdfq("run", small, "--device", "cuda", "--out", tmp_path / "out", "--quiet")
    assert (result.exit_code, result.stderr) == (
        2,
        "error: device: this machine has no cuda device; use 'auto' or 'cpu'\n",
    )


def test_an_interrupt_says_how_to_go_on(monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run", interrupted)
    result = spdfq("run", "quickstart")
    assert (result.exit_code, result.stderr) == (130, "interrupted; run the same command again to go on\n")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
    ids=["python", "cuda", "cpu"],
)
def test_too_little_memory_is_one_line_with_what_to_lower(monkeypatch, error):
    def full(*_, **__):
        raise error

    monkeypatch.setattr(pipeline, "run", full)
    result = spdfq("run", "quickstart")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: out of memory (")
    assert "); lower synthesis.images or synthesis.group" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_full_disk_is_one_line(monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pipeline, "run", full)
    result = spdfq("run", "quickstart")
    assert (result.exit_code, result.stderr) == (2, "error: No space left on device\n")


@pytest.mark.parametrize("error", [ZeroDivisionError(), RuntimeError("out of memory layout bounds")], ids=str)
def test_a_defect_keeps_its_traceback(monkeypatch, error):
    def broken(*_, **__):
        raise error

    monkeypatch.setattr(pipeline, "run", broken)
    assert spdfq("run", "quickstart").exception is error


def test_every_line_of_an_error_is_marked(monkeypatch):
    def wrong(*_, **__):
        raise SpdfqError("one\ntwo")

    monkeypatch.setattr(pipeline, "check_and_count", wrong)
    assert spdfq("check", "x").stderr == "error: one\nerror: two\n"


def test_a_run_really_runs(small, tmp_path):
    for label in range(10):
        (tmp_path / f"val/{label}").mkdir(parents=True)
        Image.new("L", (28, 28), 20 * label).save(tmp_path / f"val/{label}/0.png")
    few = f"evaluation.dataset={{ type = 'image_folder', root = '{tmp_path / 'val'}' }}"
    out = tmp_path / "runs" / "small"
    result = spdfq("run", small, "--set", few, "--out", out, "--quiet", "--json", "--device", "cpu")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["folder"] == str(out)
    assert Path(out, "report.html").exists()
    again = spdfq("evaluate", out, "--quiet", "--json")
    assert json.loads(again.stdout)["metrics"] == record["metrics"]
