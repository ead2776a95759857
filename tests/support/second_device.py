"""A second device for machines that have none: it keeps its values in main memory, and refuses to mix with the CPU.

It calls itself ``lazy``, a name that torch knows and has no kernels for. What fails on a real accelerator for being on
the wrong device fails here: operands on two devices, indices elsewhere, a CPU generator for its random numbers.
"""

from collections import Counter
from contextlib import contextmanager, nullcontext
from typing import ClassVar
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

SECOND = torch.device("lazy", 0)
_MOVES = {"_to_copy", "copy_"}
_INDEXES = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
# their results, or the shapes of these, come back to the program
_READS = {
    "_local_scalar_dense",
    "_unique2",
    "argwhere",
    "bincount",
    "equal",
    "masked_select",
    "nonzero",
    "repeat_interleave",
    "unique_consecutive",
    "unique_dim",
}
_Generator, _autocast = torch.Generator, torch.autocast
_watched: list[Counter] = []


class There(torch.Tensor):
    """A tensor on the second device."""

    @staticmethod
    def __new__(cls, here):
        form = {"strides": here.stride(), "storage_offset": here.storage_offset(), "dtype": here.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, here.shape, device=SECOND, **form)
        made.here = here
        return made

    def __repr__(self):
        return f"There({self.here})"

    def tolist(self):
        _note("wait: tolist")
        return self.here.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _OfAnyDevice(type):
    def __instancecheck__(cls, instance):
        return isinstance(instance, _Generator)


class _Generators(metaclass=_OfAnyDevice):
    """Takes the place of ``torch.Generator``; what it seeds for the second device is known by the seed."""

    seeds: ClassVar[set[int]] = set()

    def __new__(cls, device="cpu"):
        return _Elsewhere() if torch.device(device).type == SECOND.type else _Generator(device)


class _Elsewhere(_Generator):
    def manual_seed(self, seed):
        _Generators.seeds.add(seed)
        return super().manual_seed(seed)


def _run(func, args, kwargs):
    name, device = func.overloadpacket.__name__, kwargs.get("device")
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, There)]
    if name == "copy_":
        result_there = isinstance(args[0], There)
    else:
        result_there = bool(there) if device is None else torch.device(device).type == SECOND.type
    _refuse(func, args, tensors, result_there and kwargs.get("generator"))
    _watch(name, args, there, result_there)
    inner = {key: torch.device("cpu") if key == "device" and device else value for key, value in kwargs.items()}
    with _disable_current_modes():
        found = func(*tree_map(_here, args), **tree_map(_here, inner))
    if not result_there:
        return found
    # an operation in place returns what it was given
    known = {id(tensor.here): tensor for tensor in there}
    return tree_map(lambda x: known.get(id(x)) if id(x) in known else _there(x), found)


def _refuse(func, args, tensors, generator):
    name = func.overloadpacket.__name__
    mixed = len({tensor.device for tensor in tensors if tensor.ndim}) > 1
    if name in _INDEXES:  # indices may stay on the CPU, but not the other way round
        mixed = not isinstance(args[0], There) and any(isinstance(index, There) for index in tree_leaves(args[1]))
    if mixed and name not in _MOVES:
        raise RuntimeError(f"{func}: all tensors must be on one device: {[tensor.device for tensor in tensors]}")
    if generator and generator.initial_seed() not in _Generators.seeds:
        raise RuntimeError(f"{func}: a generator of the CPU for random numbers of {SECOND}")


def _watch(name, args, there, result_there):
    """Note a copy from or to the second device, and what makes a program wait for it."""
    indices = [x for x in tree_leaves(args[1:2]) if isinstance(x, torch.Tensor)] if name in _INDEXES and there else []
    if name in _MOVES and result_there != isinstance(args[name == "copy_"], There):
        _note("copy to the device" if result_there else "copy from the device")
    elif there and name in _READS:
        _note(f"wait: {name}")
    elif any(index.dtype == torch.bool for index in indices):
        _note("wait: boolean index")
    elif any(not isinstance(index, There) for index in indices):
        _note("copy to the device: index")


def _note(event):
    for counter in _watched:
        counter[event] += 1


@contextmanager
def transfers():
    """Counts, inside, what copies between the devices and what waits for the second one."""
    counter = Counter()
    _watched.append(counter)
    try:
        yield counter
    finally:
        _watched.remove(counter)


def _here(x):
    return x.here if isinstance(x, There) else x


def _there(x):
    return There(x) if isinstance(x, torch.Tensor) else x


def _without_autocast(kind, *args, **kwargs):
    return nullcontext() if kind == SECOND.type else _autocast(kind, *args, **kwargs)


@contextmanager
def second_device():
    """Inside, tensors can be moved to the device it gives, and made there."""
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) asks the mode too
    try:
        with patch("torch.Generator", _Generators), patch("torch.autocast", _without_autocast), _Mode():
            yield SECOND
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
        torch.__future__.set_swap_module_params_on_conversion(swaps)
