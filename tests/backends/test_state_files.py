"""The state of an interrupted call goes on with the same work only."""

from contextlib import contextmanager

import pytest
import torch
from attrs import evolve
from support.backends import RUNTIME, back_end, images, state_of, teacher

from spdfq.backends import Calibration, quantize
from spdfq.backends.learning import reconstruction
from spdfq.errors import DataError
from spdfq.runtime.files import read_tensors, write_tensors

LONG = {
    "ridge": "{type='ridge', penalty=10.0}",
    "blockwise": "{type='blockwise', iterations=2}",
    "distill": "{type='distill', iterations=2}",
}
OTHER = r"step-1-\w+.safetensors: is the state of another model, of other .*; give another folder, or delete it$"


def done(folder, *steps, chosen=None, given=None, runtime=RUNTIME, overrides=()):
    spec = back_end(f"quantization.steps=[{{type='calibrate'}}, {', '.join(steps)}]", *overrides)
    return quantize(chosen or teacher("vit"), images(4) if given is None else given, spec, runtime, folder)


def other_teacher():
    chosen = teacher("vit")
    with torch.no_grad():
        chosen.module.norm.bias[0] += 1
    return chosen


@pytest.mark.parametrize("name", ["blockwise", "distill"])
@pytest.mark.parametrize(
    "other",
    [
        {"given": images(4, seed=9)},
        {"given": images(3)},
        {"chosen": other_teacher()},
        {"runtime": evolve(RUNTIME, seed=9)},
        {"runtime": evolve(RUNTIME, precision="bfloat16")},
        {"overrides": ["quantization.weights.bits=3"]},
        {"overrides": ["quantization.steps.0.observer='minmax'"]},
    ],
    ids=["images", "fewer images", "teacher", "seed", "precision", "bits", "earlier step"],
)
def test_the_state_of_other_work_is_refused(tmp_path, name, other):
    done(tmp_path, LONG[name])
    with pytest.raises(DataError, match=OTHER):
        done(tmp_path, LONG[name], **other)


@pytest.mark.parametrize(
    ("name", "other"), [("ridge", "penalty=9.0"), ("blockwise", "iterations=3"), ("distill", "iterations=2, lr=1.0")]
)
def test_the_state_of_a_step_with_other_settings_is_refused(tmp_path, name, other):
    done(tmp_path, LONG[name])
    with pytest.raises(DataError, match=OTHER):
        done(tmp_path, f"{{type='{name}', {other}}}")


@pytest.mark.parametrize("name", LONG)
def test_what_changes_no_result_does_not_matter(tmp_path, monkeypatch, name):
    """Progress, a teacher loaded anew, images in another layout of memory, and the steps that follow."""
    model = done(tmp_path, LONG[name])

    @contextmanager
    def progress(_, __):
        yield lambda *_, **__: None

    strided = images(4).to(memory_format=torch.channels_last)
    monkeypatch.setattr(torch.optim.Adam, "step", None)  # nothing is learned again
    again = done(tmp_path, LONG[name], "{type='adalog'}", given=strided, runtime=evolve(RUNTIME, progress=progress))
    found = state_of(again)
    assert all(torch.equal(found[key], value) for key, value in state_of(model).items())


@pytest.mark.parametrize("name", LONG)
def test_a_file_of_an_older_version_is_refused(tmp_path, name):
    done(tmp_path, LONG[name])
    (path,) = tmp_path.iterdir()
    tensors, metadata = read_tensors(path, "")
    metadata.pop("key")
    write_tensors(path, tensors, metadata or None)
    with pytest.raises(DataError, match=r"or of an older version; give another folder, or delete it$"):
        done(tmp_path, LONG[name])
    path.unlink()
    done(tmp_path, LONG[name])


def test_an_unfinished_block_goes_on_with_the_same_settings_only(tmp_path, monkeypatch):
    monkeypatch.setattr(reconstruction, "SAVE_SECONDS", 0.0)
    step = "{type='blockwise', iterations=25}"

    @contextmanager
    def interrupted(name, _):
        calls = []

        def advance(*_, **__):
            calls.append(1)
            if name == "reconstructing" and len(calls) == 2:
                raise KeyboardInterrupt

        yield advance

    with pytest.raises(KeyboardInterrupt):
        done(tmp_path, step, runtime=evolve(RUNTIME, progress=interrupted))
    assert [path.name for path in tmp_path.iterdir()] == ["step-1-blockwise-blocks.0.safetensors"]
    with pytest.raises(DataError, match=r"step-1-blockwise-blocks.0.safetensors: is the state of another model"):
        done(tmp_path, "{type='blockwise', iterations=24}")
    found, expected = state_of(done(tmp_path, step)), state_of(done(None, step))
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_nothing_is_hashed_without_a_folder(monkeypatch):
    monkeypatch.setattr("spdfq.teacher.Teacher.fingerprint", None)
    done(None, LONG["blockwise"])


def test_a_step_called_alone_has_a_key_too(tmp_path):
    (step,) = back_end(f"quantization.steps=[{LONG['ridge']}]").steps

    def key(**changes):
        given = {"teacher": teacher("vit"), "images": images(4), "runtime": RUNTIME, "folder": tmp_path}
        return Calibration(**{**given, **changes}).state_key(step)

    assert key() == key()
    others = [{"images": images(4, seed=9)}, {"teacher": other_teacher()}, {"runtime": evolve(RUNTIME, seed=9)}]
    assert len({key(), *(key(**changes) for changes in [*others, {"index": 1}])}) == 5
    assert key(folder=None) == ""
