"""The peak of memory since the last restart."""

from pathlib import Path

import pytest
import torch

from spdfq.runtime import peak_memory as module
from spdfq.runtime.peak_memory import peak_memory, restart_peak

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
