"""Seed streams, devices, precision and the progress bar."""

from types import SimpleNamespace

import pytest
import torch
from attrs import evolve

from spdfq.errors import SpdfqError
from spdfq.recipe import RuntimeSpec
from spdfq.runtime import Runtime, generator, make_runtime, pick_device, pick_precision


def draw(*arguments):
    return torch.rand(4, generator=generator(*arguments)).tolist()


def test_a_stream_is_a_pure_function_of_seed_and_purpose():
    assert draw(0, "noise", 3) == draw(0, "noise", 3)
    torch.manual_seed(1)
    torch.rand(5)
    assert draw(0, "noise", 3) == draw(0, "noise", 3)


def test_a_stream_is_the_same_on_every_machine():
    # printf '0/noise/3' | sha256sum: b8fa417c2c105577..., its first eight bytes as a little-endian number
    state = int.from_bytes(bytes.fromhex("b8fa417c2c105577"), "little")
    assert draw(0, "noise", 3) == torch.rand(4, generator=torch.Generator().manual_seed(state)).tolist()


def test_streams_of_other_seeds_and_purposes_differ():
    streams = [draw(0, "a"), draw(1, "a"), draw(0, "b"), draw(0, "a", 0), draw(0, "a", 1), draw(0, 1, 2), draw(0, 12)]
    assert len({tuple(stream) for stream in streams}) == len(streams)


def test_drawing_leaves_the_global_stream_alone():
    before = torch.get_rng_state()
    draw(0, "a")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_runtime_draws_from_its_own_seed():
    assert torch.rand(3, generator=Runtime(seed=4).generator("a", 1)).tolist() == draw(4, "a", 1)[:3]


@pytest.mark.parametrize(("precision", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_autocast_gives_the_precision_and_ends(precision, dtype):
    runtime = Runtime(precision=precision)
    a = torch.ones(2, 2)
    with runtime.autocast():
        assert (a @ a).dtype == dtype
    assert (a @ a).dtype == torch.float32


@pytest.mark.parametrize(
    ("capability", "expected"), [((9, 0), "bfloat16"), ((8, 0), "bfloat16"), ((7, 5), "float32"), ((7, 0), "float32")]
)
def test_auto_precision_of_a_gpu_follows_its_generation(capability, expected, monkeypatch):
    """Hopper and Ampere compute bfloat16 fast; Turing and Volta only emulate it."""
    properties = SimpleNamespace(major=capability[0], minor=capability[1])
    monkeypatch.setattr("torch.version.hip", None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda *_: properties)
    assert pick_precision("auto", torch.device("cuda")) == expected


def test_auto_precision_is_bfloat16_only_where_the_device_is_fast_at_it(monkeypatch):
    cpu = torch.device("cpu")
    for fast, expected in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr("spdfq.runtime.runtime._fast_bfloat16", lambda device, fast=fast: fast)
        assert pick_precision("auto", cpu) == expected
        assert (pick_precision("float32", cpu), pick_precision("bfloat16", cpu)) == ("float32", "bfloat16")


def test_an_accelerator_is_taken_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    assert [pick_device(name).type for name in ("auto", "cuda", "cpu")] == ["cuda", "cuda", "cpu"]


def test_a_device_that_is_not_there_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    with pytest.raises(SpdfqError, match=r"runtime\.device: this machine has no cuda device; use 'auto' or 'cpu'"):
        pick_device("cuda")


def test_a_runtime_follows_its_section_and_the_device_given_beside_it(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    spec = RuntimeSpec(precision="bfloat16", device="cuda", threads=threads + 1)
    try:
        runtime = make_runtime(spec, seed=3, device="cpu")
        assert (runtime.device.type, runtime.precision, runtime.seed) == ("cpu", "bfloat16", 3)
        assert torch.get_num_threads() == threads + 1
        make_runtime(evolve(spec, threads=None), seed=3, device="cpu")
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)
    with pytest.raises(SpdfqError, match="no cuda device"):
        make_runtime(evolve(spec, threads=None), seed=3)
