"""Several processes on one recipe, started by torchrun: who does which part, and how they exchange results."""

import atexit
import os
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from attrs import frozen

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
# the other processes wait while rank 0 chooses ranges
_PATIENCE = timedelta(days=2)


@frozen
class Ranks:
    """The processes that share a run; by default this one alone. See `join`.

    Args:
        rank: number of this process, 0 to ``count - 1``. Rank 0 writes files and prints.
        count: number of processes.
    """

    rank: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """The items that this process works on: every ``count``-th one."""
        return items[self.rank :: self.count]

    def first(self, make: Callable[[], T]) -> T:
        """Call ``make`` on rank 0, and return its result on every rank."""
        if self.count == 1:
            return make()
        import torch.distributed as dist

        shared: list[Any] = [make() if self.leads else None]
        dist.broadcast_object_list(shared, src=0)
        result: T = shared[0]
        return result

    def gathered(self, value: T) -> list[T]:
        """Every rank's value, on every rank, in rank order."""
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def add_up(self, tensors: Iterable["Tensor"]) -> None:
        """Replace each tensor by its sum over the ranks, in place. Every rank gets the same bits."""
        if self.count == 1:
            return
        import torch

        every = list(tensors)
        together = torch.cat([tensor.detach().flatten().float() for tensor in every]).cpu()
        self._all_reduce(together)
        for tensor, total in zip(every, together.split([tensor.numel() for tensor in every]), strict=True):
            tensor.detach().copy_(total.view_as(tensor))

    def equalise(self, tensors: Iterable["Tensor"]) -> None:
        """Replace each tensor by that of rank 0, in place."""
        if self.count == 1:
            return
        for tensor in tensors:
            sent = tensor.detach().cpu().contiguous()
            self._broadcast(sent)
            tensor.detach().copy_(sent)

    def _all_reduce(self, tensor: "Tensor") -> None:
        """Replace a tensor on the CPU by its sum over the ranks."""
        import torch.distributed as dist

        dist.all_reduce(tensor)

    def _broadcast(self, tensor: "Tensor") -> None:
        """Replace a tensor on the CPU by that of rank 0."""
        import torch.distributed as dist

        dist.broadcast(tensor, src=0)

    def wait(self) -> None:
        """Wait until every rank has called this."""
        self.gathered(None)


def join() -> Ranks:
    """Join the processes that torchrun started into one group; without torchrun there is a single process.

    Processes exchange objects and tensors through gloo, also on machines with GPUs. Images are exchanged through files.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1 or "RANK" not in os.environ:
        return Ranks()
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=_PATIENCE)
        # otherwise gloo's threads outlive the interpreter, and sometimes abort a process that has finished its work
        atexit.register(_leave)
    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", "0")))
    return Ranks(dist.get_rank(), dist.get_world_size())


def _leave() -> None:
    """End the group unless it has ended."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
