"""Building a teacher's network: a bundled or timm architecture, with weights from the hub or from a local file."""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spdfq.errors import DataError, ModelError
from spdfq.recipe import ModelSpec
from spdfq.teacher.zoo import BUNDLED, data_file


def build(spec: ModelSpec, weights: bool = True) -> Any:
    """The network of a recipe's ``[model]`` section in float32. The global random state does not change.

    Without a source of trained weights, or with ``weights=False``, the weights are random, but always the same.

    Raises:
        ModelError: unknown name, unreachable hub, or weights that do not fit.
        DataError: damaged weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = _bundled(spec, weights) if spec.bundled else _from_timm(spec, weights)
    if spec.checkpoint and weights:
        _load_weights(module, Path(spec.checkpoint), "model.checkpoint")
    return module


def _bundled(spec: ModelSpec, weights: bool) -> Any:
    name = spec.name.removeprefix("bundled:")
    if name not in BUNDLED:
        raise ModelError(f"model.name: no bundled model {name!r}{_hint(name, BUNDLED)} (bundled: {', '.join(BUNDLED)})")
    if spec.num_classes or spec.img_size is not None:
        raise ModelError("model: a bundled model has its own num_classes and img_size; leave them out")
    module = BUNDLED[name].create()
    if spec.num_classes == 0:
        module.reset_classifier(0)
    if weights and not spec.checkpoint:
        _load_weights(module, data_file(f"{name}.safetensors"), "model.name")
    return module


def _from_timm(spec: ModelSpec, weights: bool) -> Any:
    import timm

    architecture, _, tag = spec.name.partition(".")
    if not timm.is_model(architecture):
        bundled = architecture in BUNDLED
        near = f"; the bundled one is 'bundled:{architecture}'" if bundled else _hint(architecture, timm.list_models())
        raise ModelError(f"model.name: timm {timm.__version__} has no model {architecture!r}{near}")
    known = [name for name in timm.list_pretrained(f"{architecture}*") if name.startswith(f"{architecture}.")]
    if tag and spec.name not in known:
        near = _hint(spec.name, known)
        raise ModelError(f"model.name: {architecture} has no weights {tag!r}{near} (timm knows: {_listed(known)})")
    options = {"num_classes": spec.num_classes, "img_size": spec.img_size}
    given: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    if not (weights and spec.pretrained and not spec.checkpoint):
        return _built(spec.name, given)
    configured = timm.models.get_pretrained_cfg(spec.name)
    if configured is None or not configured.has_weights:
        raise ModelError(
            f"model.name: timm has no weights for {architecture}; give model.checkpoint = 'file.safetensors'"
        )
    return _from_hub(spec.name, given)


def _from_hub(name: str, options: dict[str, Any]) -> Any:
    import timm
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    try:
        constants.HF_HUB_OFFLINE = offline or not _hub_answers()
        return timm.create_model(name, pretrained=True, **options)
    except Exception as error:  # timm, huggingface_hub, its HTTP client and safetensors each raise their own
        _built(name, options)  # raises if the options are wrong
        reason = "it cannot be reached" if constants.HF_HUB_OFFLINE else first_line(error)
        raise ModelError(
            f"model.name: the weights of {name} could not be downloaded from the hub ({reason}); check the network, or "
            "give local weights: model.checkpoint = 'weights.safetensors'"
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = offline


def _hub_answers() -> bool:
    """Whether the hub answers a short request. A download from an unreachable hub would be retried for a minute."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception:  # the type depends on the installed HTTP client
        return False
    return True


def _built(name: str, options: dict[str, Any]) -> Any:
    """The architecture with random weights."""
    import timm

    try:
        return timm.create_model(name, pretrained=False, **options)
    except Exception as error:  # each architecture raises its own error for wrong arguments
        given = ", ".join(f"{key} = {value}" for key, value in options.items()) or "its own settings"
        raise ModelError(f"model: timm cannot build {name} with {given} ({first_line(error)})") from error


def _hint(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none"


def first_line(error: Exception) -> str:
    """An error of another library, in one line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:160]}"


def _headless(module: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights without those of timm's classifier, and without other layers of the head that the module lacks."""
    named = (getattr(module, "pretrained_cfg", None) or {}).get("classifier") or ()
    heads = [named] if isinstance(named, str) else list(named)
    of_head = tuple(f"{name}." for name in heads)
    beside_head = tuple(f"{name.partition('.')[0]}." for name in heads)
    lacks = state.keys() - module.state_dict().keys()
    gone = {name for name in state if name.startswith(of_head)}
    gone |= {name for name in lacks if name.startswith(beside_head)}
    return {name: tensor for name, tensor in state.items() if name not in gone}


def _check_tensors(own: dict[str, Tensor], state: dict[str, Tensor], where: str) -> None:
    """Raise if a weight is stored as integers or 8-bit floats, or is not finite."""
    weights = {name: tensor for name, tensor in state.items() if name in own and own[name].is_floating_point()}
    for name, tensor in weights.items():
        if not tensor.is_floating_point() or tensor.dtype.itemsize == 1:
            raise ModelError(
                f"{where}: {name} is {str(tensor.dtype).removeprefix('torch.')}, not float32, float16 or bfloat16; "
                "convert the weights first, with the scales they were stored with"
            )
    if broken := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
        raise DataError(f"{where}: holds NaN or infinite weights, the first of them in {broken[0]}")


def _load_weights(module: nn.Module, path: Path, where: str) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if path.suffix != ".safetensors":
        raise ModelError(f"{where}: {path}: only .safetensors files are read (pickled weights can run code)")
    if not path.is_file():
        raise ModelError(f"{where}: {path}: no such file")
    with path.open("rb"):
        pass  # raises PermissionError, which names the file
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{where}: {path}: damaged, or not a safetensors file ({error})") from None
    if getattr(module, "num_classes", None) == 0:
        state = _headless(module, state)
    _check_tensors(module.state_dict(), state, f"{where}: {path}")
    try:
        module.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = "; ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise ModelError(f"{where}: {path}: does not fit {type(module).__name__}: {reason[:300]}") from None
