"""How much memory a computation holds at its peak, and how much is free."""

import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_MEMINFO = Path("/proc/meminfo")
_CONTAINER = Path("/sys/fs/cgroup")


def restart_peak(device: torch.device) -> bool:
    """Forget the peak so far. False where this is not possible: the peak is then that of the whole process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        _RESET.write_text("5")
    except OSError:
        return False
    return True


def peak_memory(device: torch.device) -> int | None:
    """Bytes at the peak since `restart_peak`: resident memory of this process; on CUDA, what torch has allocated.

    ``None`` where the system does not say.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if device.type != "cpu" or not _STATUS.exists():
        return None
    lines = [line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:")]
    return int(lines[0].split()[1]) * 1024 if lines else None


def free_memory(device: torch.device) -> int | None:
    """Bytes that a computation may still take on a device; on a CPU, also within the limit of a container.

    ``None`` where the system does not say.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    if device.type != "cpu" or not _MEMINFO.exists():
        return None
    available = _numbers(_MEMINFO).get("MemAvailable:")
    left = [] if available is None else [available * 1024]
    limit = _CONTAINER / "memory.max"
    if limit.exists() and (most := limit.read_text().strip()).isdecimal():  # otherwise "max"
        cached = _numbers(_CONTAINER / "memory.stat")["inactive_file"]
        left.append(int(most) - int((_CONTAINER / "memory.current").read_text()) + cached)
    return max(0, min(left)) if left else None


def _numbers(path: Path) -> dict[str, int]:
    """The numbers of a file with a name and a number in each line."""
    return {line.split()[0]: int(line.split()[1]) for line in path.read_text().splitlines()}


class TensorMemory(TorchDispatchMode):
    """Inside the ``with`` block, counts the bytes of the tensors that are made, until they are freed.

    Memory that kernels take for themselves is not seen.

    Args:
        device: only tensors there are counted.
        known: tensors that were there before, and do not count.

    Attributes:
        peak: the largest number of bytes at a time.
    """

    def __init__(self, device: torch.device, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.device, self.live, self.peak = device, 0, 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for found in tree_leaves(result):
            if isinstance(found, Tensor) and found.device.type == self.device.type:
                self._count(found.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:  # tensors that share a storage are counted once
            self._seen.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size
