"""A lowered network as a program of torch.export, with any number of images."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from spdfq.errors import ModelError, SpdfqError, first_line, is_out_of_memory
from spdfq.exporters.lowering import Lowered
from spdfq.quantized.model import QuantizedModel
from spdfq.runtime.shared_modules import Hook, own_hooks
from spdfq.teacher import Teacher

# where a weight lies in memory can change the last bits of a product, and roundings behind it
_GAP = 0.05
_BATCH = 2  # a program traced with one image may hold for one image only


@torch.no_grad()
def exported_program(lowered: Lowered, model: QuantizedModel, teacher: Teacher) -> torch.export.ExportedProgram:
    """The program of a lowered network, after a check that both give the logits of the quantized model, all on the CPU.

    Raises:
        ModelError: the network cannot be traced, or computes something else then; the message names the module.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(_BATCH, *teacher.input_size, generator=generator, dtype=torch.float32, device="cpu")
    expected = model(images)
    with _running_module(lowered.network) as running:
        gap = float((lowered(images) - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
        if not gap <= _GAP:
            raise ModelError(
                f"{teacher.name}: its integers give other logits than the quantized model (they differ by {gap:.1%} of "
                "the largest); it uses a quantized weight in another way too"
            )
        batch = torch.export.Dim("batch", min=1)
        try:
            return torch.export.export(lowered, (images,), dynamic_shapes=({0: batch},), strict=False)
        except SpdfqError:
            raise
        except Exception as error:  # each operator fails with its own error
            if is_out_of_memory(error):
                raise
            place = running[-1] or type(lowered.network).__name__
            if "Constraints violated" in str(error):
                raise ModelError(
                    f"{teacher.name}: its code fixes the number of images; write images.shape[0] instead of "
                    "len(images), or export with format 'safetensors'"
                ) from error
            raise ModelError(
                f"{teacher.name}: torch.export cannot trace {place} ({first_line(error)}); change that module, or "
                "export with format 'safetensors'"
            ) from error


@contextmanager
def _running_module(network: nn.Module) -> Iterator[list[str]]:
    """A stack of the names of the running modules; after an exception, its last one is where that was raised."""
    running: list[str] = [""]

    def leave(*_: object) -> None:
        running.pop()

    hooks: list[Hook] = []
    for name, module in network.named_modules():
        hooks.append((module.register_forward_pre_hook, lambda *_, name=name: running.append(name)))
        hooks.append((module.register_forward_hook, leave))
    with own_hooks(hooks):
        yield running
