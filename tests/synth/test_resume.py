"""Resuming an interrupted synthesis bit for bit; independence of the groups."""

import math
import random
import signal
import subprocess
import sys
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from attrs import evolve
from safetensors import safe_open
from support.teachers import ITERATIONS, RUNTIME, SIDE, acting, idle, recipe, same, tiny_teacher

from spdfq.errors import DataError, NonFiniteError
from spdfq.losses import TotalVariationLoss
from spdfq.runtime import Runtime
from spdfq.runtime.files import read_tensors, write_tensors
from spdfq.synth import Adam, SyntheticImages
from spdfq.synth.group import Group
from spdfq.synth.loop import run
from spdfq.synth.pruning import TokenPruning

INTERRUPTED_AT = sorted(random.Random(0).sample(range(1, ITERATIONS), 3))
KILLED_AT = 13
KILLED = f"""
import os, signal, sys, torch
from pathlib import Path
from spdfq.synth import loop
from support.teachers import RUNTIME, acting, tiny_teacher
torch.set_num_threads(1)
loop.SAVE_SECONDS = 0.0
dying = acting(lambda _: os.kill(os.getpid(), signal.SIGKILL), {KILLED_AT})
dying.synthesize(tiny_teacher(), RUNTIME, Path(sys.argv[1]))
"""


class Interrupted(Exception):
    pass


def interrupt(inputs=None):
    raise Interrupted


@pytest.fixture
def save_always(monkeypatch):
    monkeypatch.setattr("spdfq.synth.loop.SAVE_SECONDS", 0.0)


@pytest.fixture
def a_second_per_iteration(monkeypatch):
    """A clock that advances by one second each time it is read."""
    ticks = count()
    monkeypatch.setattr("spdfq.synth.loop.time", SimpleNamespace(monotonic=lambda: next(ticks)))


# resuming


@pytest.mark.parametrize("iteration", INTERRUPTED_AT)
def test_a_run_resumed_after_any_iteration_equals_the_uninterrupted_one_bit_for_bit(tmp_path, save_always, iteration):
    teacher = tiny_teacher()
    with pytest.raises(Interrupted):
        acting(interrupt, iteration).synthesize(teacher, RUNTIME, tmp_path)
    assert state_of(tmp_path / "group-00000.safetensors") == iteration
    resumed = idle().synthesize(teacher, RUNTIME, tmp_path)
    assert same(resumed, idle().synthesize(teacher, RUNTIME))


@pytest.mark.parametrize("iteration", INTERRUPTED_AT)
def test_a_second_group_resumes_and_the_first_is_not_repeated(tmp_path, save_always, iteration):
    teacher = tiny_teacher()
    with pytest.raises(Interrupted):
        acting(interrupt, ITERATIONS + iteration).synthesize(teacher, RUNTIME, tmp_path)
    rest = idle()
    resumed = rest.synthesize(teacher, RUNTIME, tmp_path)
    assert rest.losses["acting"].calls == ITERATIONS - iteration
    assert same(resumed, idle().synthesize(teacher, RUNTIME))


def test_a_run_interrupted_from_outside_continues_from_the_last_saved_state(tmp_path, a_second_per_iteration):
    teacher = tiny_teacher()
    steps = []

    @contextmanager
    def progress(_, total):
        def advance(done=1, **values):
            steps.append(done)
            if sum(steps) >= 8:
                raise KeyboardInterrupt

        yield advance

    with pytest.raises(KeyboardInterrupt):
        recipe().synthesize(teacher, evolve(RUNTIME, progress=progress), tmp_path)
    assert steps == [5, 5]
    assert state_of(tmp_path / "group-00000.safetensors") == 10
    assert same(recipe().synthesize(teacher, RUNTIME, tmp_path), recipe().synthesize(teacher, RUNTIME))


def test_a_killed_process_is_resumed_from_the_last_saved_state(tmp_path):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=Path(__file__).parents[1])
    assert killed.returncode == -signal.SIGKILL
    assert state_of(tmp_path / "group-00000.safetensors") == KILLED_AT
    resumed = idle().synthesize(tiny_teacher(), RUNTIME, tmp_path)
    assert same(resumed, idle().synthesize(tiny_teacher(), RUNTIME))


def state_of(path):
    with safe_open(path, "pt") as stored:
        return int(stored.metadata()["iteration"])


def test_the_state_before_a_nonfinite_loss_is_kept(tmp_path, save_always):
    broken = acting(lambda inputs: inputs.images.sum() * math.nan, ITERATIONS + 7)
    with pytest.raises(NonFiniteError, match="acting is not finite in iteration 7 of group 1"):
        broken.synthesize(tiny_teacher(), RUNTIME, tmp_path)
    assert state_of(tmp_path / "group-00001.safetensors") == 7
    with safe_open(tmp_path / "group-00001.safetensors", "pt") as stored:
        assert all(stored.get_tensor(name).isfinite().all() for name in stored.keys())  # noqa: SIM118


def test_a_finished_run_is_read_back_without_an_iteration(tmp_path):
    first = idle().synthesize(tiny_teacher(), RUNTIME, tmp_path)
    again = idle()
    assert same(again.synthesize(tiny_teacher(), RUNTIME, tmp_path), first)
    assert again.losses["acting"].calls == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["group-00000.safetensors", "group-00001.safetensors"]


def test_progress_counts_every_iteration_and_shows_every_loss(tmp_path):
    def watch():
        seen = []

        @contextmanager
        def progress(_, total):
            yield lambda steps=1, **values: seen.append((total, steps, set(values)))

        return seen, evolve(RUNTIME, progress=progress)

    seen, runtime = watch()
    recipe().synthesize(tiny_teacher(), runtime, tmp_path)
    assert sum(steps for _, steps, _ in seen) == 2 * ITERATIONS
    assert {total for total, _, _ in seen} == {2 * ITERATIONS}
    assert all(shown == {*recipe().losses, "total", "gradient"} for _, _, shown in seen)
    again, runtime = watch()
    recipe().synthesize(tiny_teacher(), runtime, tmp_path)
    assert sum(steps for _, steps, _ in again) == 2 * ITERATIONS


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("not safetensors at all"),
        lambda path: SyntheticImages(images=torch.zeros(2, 3, SIDE, SIDE)).save(path),
    ],
    ids=["truncated", "empty", "text", "other contents"],
)
def test_a_damaged_state_is_one_clear_error(tmp_path, damage):
    recipe().synthesize(tiny_teacher(), RUNTIME, tmp_path)
    damage(tmp_path / "group-00001.safetensors")
    with pytest.raises(DataError, match=r"group-00001.safetensors: .*delete it or use --fresh"):
        recipe().synthesize(tiny_teacher(), RUNTIME, tmp_path)


@pytest.mark.parametrize("change", [{"iterations": 30}, {"group": 1}, {"iterations": 5}], ids=str)
def test_a_state_of_another_recipe_is_refused(tmp_path, change):
    recipe().synthesize(tiny_teacher(), RUNTIME, tmp_path)
    with pytest.raises(DataError, match="delete it or use --fresh"):
        recipe(**change).synthesize(tiny_teacher(), RUNTIME, tmp_path)


@pytest.mark.parametrize(
    ("change", "runtime", "std"),
    [
        ({"losses": {"total_variation": TotalVariationLoss(weight=0.06)}}, RUNTIME, 0.2),
        ({"optimizer": Adam(lr=0.9)}, RUNTIME, 0.2),
        ({"pruning": TokenPruning(at=(2,))}, RUNTIME, 0.2),
        ({}, evolve(RUNTIME, seed=8), 0.2),
        ({}, RUNTIME, 0.21),
    ],
    ids=["losses", "optimizer", "pruning", "seed", "teacher"],
)
def test_a_state_of_other_work_is_refused(tmp_path, change, runtime, std):
    made = recipe(losses={"total_variation": TotalVariationLoss(weight=0.05)})
    made.synthesize(tiny_teacher(std=(0.2,) * 3), RUNTIME, tmp_path)
    with pytest.raises(DataError, match=r"group-00000.*: is the state of another model, .*; give another folder, or"):
        evolve(made, **change).synthesize(tiny_teacher(std=(std,) * 3), runtime, tmp_path)


def test_a_state_of_an_older_version_is_refused(tmp_path):
    first = recipe().synthesize(tiny_teacher(), RUNTIME, tmp_path)
    for path in tmp_path.iterdir():
        tensors, metadata = read_tensors(path, "")
        del metadata["key"]
        write_tensors(path, tensors, metadata)
    with pytest.raises(DataError, match=r"or of an older version; give another folder, or delete it$"):
        recipe().synthesize(tiny_teacher(), RUNTIME, tmp_path)
    assert same(recipe().synthesize(tiny_teacher(), RUNTIME, tmp_path / "another"), first)


def test_more_images_go_on_with_the_groups_that_are_there(tmp_path):
    idle(images=2).synthesize(tiny_teacher(), RUNTIME, tmp_path)
    more = idle(images=4)
    more.synthesize(tiny_teacher(), RUNTIME, tmp_path)
    assert more.losses["acting"].calls == ITERATIONS


# groups and seeds


def test_groups_do_not_depend_on_each_other_and_the_last_one_takes_the_rest():
    teacher, spec = tiny_teacher(), recipe(images=5)
    together = spec.synthesize(teacher, RUNTIME)
    with teacher.frozen():
        alone = [
            run([Group(spec, teacher, RUNTIME, index, size)], lambda *_, **__: None)[0]
            for index, size in enumerate((2, 2, 1))
        ]
    assert torch.equal(together.images, torch.cat([part.images for part in alone]))
    assert torch.equal(together.curves, torch.cat([part.curves for part in alone]))
    assert together.images.shape == (5, 3, SIDE, SIDE)
    assert together.curves.shape == (3, ITERATIONS, 5)
    assert together.owners.tolist() == sorted(together.owners.tolist())
    assert set(together.owners.tolist()) == {0, 1, 2, 3, 4}


def test_more_images_are_more_groups():
    few, many = (recipe(images=images).synthesize(tiny_teacher(), RUNTIME) for images in (2, 4))
    assert torch.equal(few.images, many.images[:2])
    assert not torch.equal(many.images[:2], many.images[2:])


def test_the_seed_decides_and_the_global_generator_does_not():
    torch.manual_seed(1)
    first = recipe().synthesize(tiny_teacher(), RUNTIME)
    torch.manual_seed(2)
    assert same(first, recipe().synthesize(tiny_teacher(), RUNTIME))
    assert not same(first, recipe().synthesize(tiny_teacher(), Runtime(seed=8)))


def test_the_teacher_is_not_changed():
    teacher = tiny_teacher()
    teacher.module.train()
    before = {name: value.clone() for name, value in teacher.module.state_dict().items()}
    recipe().synthesize(teacher, RUNTIME)
    assert teacher.module.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in teacher.module.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.module.state_dict().items())
