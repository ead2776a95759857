"""One module in several threads: hooks, attributes and compiled code belong to all of them.

A forward pass that watches a module changes all three for a while. Here each change acts in its own thread alone, or
lasts until the last thread that needs it is done.
"""

import copy
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from attrs import define
from torch import nn
from torch.utils.hooks import RemovableHandle

Module = TypeVar("Module", bound=nn.Module)
Hook = tuple[Callable[[Callable[..., Any]], RemovableHandle], Callable[..., Any]]
"""A method of a module that registers a hook, and the hook."""
Change = tuple[Any, str, Any]
"""An object, the name of its attribute, and the value to set."""

_CHECKPOINTING = ("grad_checkpointing", "gradient_checkpointing", "use_checkpoint", "with_cp")
_COMPILED = "_compiled_call_impl"
_MARK = "_spdfq_thread"
_lock = threading.RLock()


@contextmanager
def own_hooks(hooks: Iterable[Hook]) -> Iterator[None]:
    """Inside the ``with`` block, hooks act on the calls that this thread makes, and on no others."""
    thread = threading.get_ident()
    handles: list[RemovableHandle] = []
    try:
        with _lock:  # torch numbers hooks without one
            for register, hook in hooks:
                handles.append(register(_in_thread(thread, hook)))
        yield
    finally:
        with _lock:
            for handle in handles:
                handle.remove()


def _in_thread(thread: int, hook: Callable[..., Any]) -> Callable[..., Any]:
    def own(*args: Any) -> Any:
        return hook(*args) if threading.get_ident() == thread else None

    setattr(own, _MARK, thread)
    return own


def copied(module: Module, memo: dict[int, Any] | None = None) -> Module:
    """A deep copy without the `own_hooks` that a thread has at this moment; ``memo`` is that of `copy.deepcopy`."""
    with _lock:
        twin = copy.deepcopy(module, memo)
    for part in twin.modules():
        for hooks in (part._forward_pre_hooks, part._forward_hooks):
            for number in [number for number, hook in hooks.items() if hasattr(hook, _MARK)]:
                del hooks[number]
    return twin


@define
class _Held:
    owner: Any  # kept alive, so that no other object gets its id
    before: Any
    holders: int = 0


_held: dict[tuple[int, str], _Held] = {}


@contextmanager
def held(changes: Iterable[Change]) -> Iterator[None]:
    """Inside the ``with`` block, attributes have other values.

    Several ``with`` blocks may hold an attribute at the same value, nested or in different threads. The last one to end
    restores it.
    """
    done: list[tuple[Any, str]] = []
    try:
        with _lock:
            for owner, attribute, value in changes:
                before = getattr(owner, attribute)
                setattr(owner, attribute, value)
                _held.setdefault((id(owner), attribute), _Held(owner, before)).holders += 1
                done.append((owner, attribute))
        yield
    finally:
        with _lock:
            for owner, attribute in done:
                entry = _held[id(owner), attribute]
                entry.holders -= 1
                if not entry.holders:
                    setattr(owner, attribute, entry.before)
                    del _held[id(owner), attribute]


def as_written(parts: Iterable[nn.Module]) -> Iterator[Change]:
    """Changes for `held` after which each call of a module's parts runs their Python code, once.

    Gradient checkpointing would run it a second time, during the backward pass, without hooks and function modes.
    Compiled modules would ignore them.
    """
    for part in parts:
        own = vars(part)
        for flag in _CHECKPOINTING:
            if own.get(flag) is True:
                yield part, flag, False
        if own.get(_COMPILED) is not None:
            yield part, _COMPILED, None


class _Stance:
    """Has everything compiled run as written while there is a holder."""

    holders = 0
    outer: Any = None


@contextmanager
def uncompiled() -> Iterator[None]:
    """Inside the ``with`` block, compiled functions and modules run as written; those of other threads do too."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled
        yield
        return
    with _lock:
        if not _Stance.holders:
            _Stance.outer = torch.compiler.set_stance("force_eager")
        _Stance.holders += 1
    try:
        yield
    finally:
        with _lock:
            _Stance.holders -= 1
            if not _Stance.holders:
                _Stance.outer.__exit__(None, None, None)
