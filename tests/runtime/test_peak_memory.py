"""The peak of memory since the last restart, free memory, and the memory of tensors."""

from pathlib import Path

import pytest
import torch

from spdfq.runtime import peak_memory as module
from spdfq.runtime.peak_memory import TensorMemory, free_memory, peak_memory, restart_peak

CPU = torch.device("cpu")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_the_peak_is_that_since_the_restart():
    assert restart_peak(CPU)
    before = peak_memory(CPU)
    held = torch.ones(30_000_000, dtype=torch.float32, device="cpu")
    assert peak_memory(CPU) - before > 1e8
    del held
    assert restart_peak(CPU)
    assert peak_memory(CPU) - before < 5e7


def test_where_the_system_does_not_say_nothing_is_claimed(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_STATUS", tmp_path / "status")
    monkeypatch.setattr(module, "_RESET", tmp_path / "gone" / "clear_refs")
    assert not restart_peak(CPU)
    assert peak_memory(CPU) is None


# free memory


@pytest.fixture
def system(monkeypatch, tmp_path):
    """A system with 8 KiB available; writes further files of the container."""
    monkeypatch.setattr(module, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(module, "_CONTAINER", tmp_path)
    (tmp_path / "meminfo").write_text("MemTotal: 16 kB\nMemAvailable: 8 kB\nHugePages_Total: 0\n")

    def write(limit):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text("5000\n")
        (tmp_path / "memory.stat").write_text("anon 3000\ninactive_file 1000\n")

    return write


def test_what_is_available_is_free(system):
    assert free_memory(CPU) == 8192


@pytest.mark.parametrize(("limit", "free"), [(6000, 6000 - 5000 + 1000), ("max", 8192), (10**9, 8192), (3000, 0)])
def test_a_container_may_leave_less(system, limit, free):
    """Cached files, which the kernel drops when it needs the memory, count as free."""
    system(limit)
    assert free_memory(CPU) == free


def test_free_memory_is_unknown_where_the_system_does_not_say(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_MEMINFO", tmp_path / "gone")
    assert free_memory(CPU) is None
    assert free_memory(torch.device("meta")) is None


# tensors


def test_tensors_count_once_until_they_are_freed():
    before = torch.zeros(1000, dtype=torch.float32, device="cpu")
    with TensorMemory(CPU, [before]) as memory:
        before.view(10, 100)
        one = torch.zeros(100, dtype=torch.float32, device="cpu")
        view = one[:50].view(5, 10)
        assert memory.live == 400
        del one
        assert memory.live == 400  # the view keeps it
        del view
        assert memory.live == 0
        torch.zeros(10, device="meta")
        both = torch.zeros(50, dtype=torch.float64, device="cpu"), torch.zeros(25, dtype=torch.float32, device="cpu")
        del both
    assert memory.peak == 500
    assert memory.live == 0


def test_what_autograd_keeps_for_the_backward_pass_counts():
    x = torch.ones(100, requires_grad=True, dtype=torch.float32, device="cpu")
    with TensorMemory(CPU, [x]) as memory:
        y = (x.exp() * 2).sum()  # keeps the exponential
        assert memory.live == 400 + 4
        y.backward()
        del y
        x.grad = None
    assert memory.live == 0
