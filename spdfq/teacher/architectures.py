"""Building a teacher's network: a bundled or timm architecture, with weights from the hub or from a local file."""

import difflib
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from spdfq.errors import DataError, ModelError, first_line
from spdfq.recipe import ModelSpec
from spdfq.teacher.zoo import BUNDLED, data_file

_building = threading.Lock()

_HUB, _FOLDER = ("hf-hub", "hf_hub"), "local-dir"  # as timm writes them, before a colon


def build(spec: ModelSpec, weights: bool = True) -> Any:
    """The network of a recipe's ``[model]`` section in float32. The global random state does not change.

    Without a source of trained weights, or with ``weights=False``, the weights are random, but always the same.

    Raises:
        ModelError: unknown name, unreachable hub, or weights that do not fit.
        DataError: damaged weights.
    """
    with _new_weights():
        module = _bundled(spec, weights) if spec.bundled else _from_timm(spec, weights)
    if weights and (path := local_weights(spec)):
        _load_weights(module, path, "model.checkpoint" if spec.checkpoint else "model.name")
    return module


def notes(spec: ModelSpec, module: nn.Module) -> list[str]:
    """What was changed to load the weights of a network that `build` made: one line if their names have a prefix."""
    if not (path := local_weights(spec)):
        return []
    with safe_open(path, "pt") as stored:
        prefix = _prefix(module, stored.keys(), str(path))
    return [f"model: {path}: names begin with {prefix!r}, which is left out"] if prefix else []


def local_weights(spec: ModelSpec) -> Path | None:
    """The local file that the weights are read from; ``None`` for bundled ones and those of the hub."""
    if spec.checkpoint:
        return Path(spec.checkpoint)
    source, _, folder = spec.name.partition(":")
    return Path(folder, "model.safetensors") if source == _FOLDER and spec.pretrained else None


@contextmanager
def _new_weights() -> Iterator[None]:
    """Inside the ``with`` block, new weights are the same always, float32 and on the CPU.

    Random state and default dtype are those of all threads, so one thread builds at a time.
    """
    with _building, torch.inference_mode(False), torch.device("cpu"), torch.random.fork_rng(devices=[]):
        dtype = torch.get_default_dtype()
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


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

    options = {"num_classes": spec.num_classes, "img_size": spec.img_size}
    given: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    download = weights and spec.pretrained and not spec.checkpoint
    source, colon, place = spec.name.partition(":")
    if colon and source == _FOLDER:
        _check_folder(spec, Path(place))
        return _built(spec.name, given)
    if colon and source in _HUB and place:
        module = _from_hub(spec.name, given, download)
        _check_classes(spec, module.pretrained_cfg["num_classes"])
        return module
    architecture, _, tag = spec.name.partition(".")
    if not timm.is_model(architecture):
        raise ModelError(f"model.name: timm {timm.__version__} has no model {architecture!r}{_near(spec.name)}")
    known = [name for name in timm.list_pretrained(f"{architecture}*") if name.startswith(f"{architecture}.")]
    if tag and spec.name not in known:
        near = _hint(spec.name, known)
        raise ModelError(f"model.name: {architecture} has no weights {tag!r}{near} (timm knows: {_listed(known)})")
    configured = timm.models.get_pretrained_cfg(spec.name)
    if configured is not None and configured.has_weights:
        _check_classes(spec, configured.num_classes)
        return _from_hub(spec.name, given) if download else _built(spec.name, given)
    if download:
        raise ModelError(
            f"model.name: timm has no weights for {architecture}; give model.checkpoint = 'file.safetensors'"
        )
    return _built(spec.name, given)


def _check_folder(spec: ModelSpec, folder: Path) -> None:
    """Raise if a folder does not hold what timm's ``save_for_hf`` writes."""
    wanted = f"write it with timm's save_for_hf, and give model.name = '{_FOLDER}:path/to/folder'"
    if not (folder / "config.json").is_file():
        raise ModelError(f"model.name: {spec.name}: no such folder, or it has no config.json; {wanted}")
    if local_weights(spec) and not spec.checkpoint and not (folder / "model.safetensors").is_file():
        raise ModelError(
            f"model.name: {spec.name}: has no model.safetensors, the only file of weights that is read here; {wanted}"
        )


def _check_classes(spec: ModelSpec, known: int) -> None:
    """Raise if a head is asked for that trained weights do not have; timm would leave it random."""
    if spec.pretrained and not spec.checkpoint and spec.num_classes not in (None, 0, known):
        have = f"have {known} classes" if known else "have no head"
        raise ModelError(
            f"model.num_classes: the weights of {spec.name} {have}, not {spec.num_classes}; leave it out, or give your "
            "own weights: model.checkpoint = 'weights.safetensors'"
        )


def _near(name: str) -> str:
    """What a user may have meant who gave a name that timm does not know."""
    import timm

    architecture = name.partition(".")[0]
    if architecture in BUNDLED:
        return f"; the bundled one is 'bundled:{architecture}'"
    if "/" in name or ":" in name:
        return f"; a model of the Hugging Face hub is 'hf-hub:owner/name', one in a folder '{_FOLDER}:path/to/folder'"
    return _hint(architecture, timm.list_models())


def _from_hub(name: str, options: dict[str, Any], pretrained: bool = True) -> Any:
    import timm
    from huggingface_hub import constants

    offline, own = constants.HF_HUB_OFFLINE, name.startswith(_HUB)
    try:
        constants.HF_HUB_OFFLINE = offline or not _hub_answers()
        return timm.create_model(name, pretrained=pretrained, **options)
    except Exception as error:  # timm, huggingface_hub, its HTTP client and safetensors each raise their own
        if not own:
            _built(name, options)  # raises if the options are wrong
        reason = "it cannot be reached" if constants.HF_HUB_OFFLINE else _config_reason(error)
        what = name if own else f"the weights of {name}"
        local = (
            f"a local copy: model.name = '{_FOLDER}:path'"
            if own
            else "local weights: model.checkpoint = 'weights.safetensors'"
        )
        raise ModelError(
            f"model.name: {what} could not be downloaded from the hub ({reason}); check the network, or give {local}"
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
        raise ModelError(f"model: timm cannot build {name} with {given} ({_config_reason(error)})") from error


def _hint(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none"


def _config_reason(error: Exception) -> str:
    """Why timm could not make a model. The ``config.json`` of other libraries has no ``architecture``."""
    known = isinstance(error, KeyError) and error.args == ("architecture",)
    return "its config.json is not timm's: no 'architecture'" if known else first_line(error)


def _heads(module: nn.Module) -> list[str]:
    """The names of timm's classifiers."""
    named = (getattr(module, "pretrained_cfg", None) or {}).get("classifier") or ()
    return [named] if isinstance(named, str) else list(named)


def _headless(module: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights without those of timm's classifier, and without other layers of the head that the module lacks."""
    of_head = tuple(f"{name}." for name in _heads(module))
    beside_head = tuple(f"{name.partition('.')[0]}." for name in _heads(module))
    lacks = state.keys() - module.state_dict().keys()
    gone = {name for name in state if name.startswith(of_head)}
    gone |= {name for name in lacks if name.startswith(beside_head)}
    return {name: tensor for name, tensor in state.items() if name not in gone}


def _prefix(module: nn.Module, stored: Iterable[str], where: str) -> str:
    """What stands before the network's own names in stored weights, such as ``module.`` or ``model._orig_mod.``.

    Raises:
        ModelError: there are several sets of weights.
    """
    longest = max(module.state_dict(), key=len, default="")
    found = sorted(name.removesuffix(longest) for name in stored if f".{name}".endswith(f".{longest}"))
    if len(found) > 1:
        places = " and ".join(repr(prefix) if prefix else "without a prefix" for prefix in found)
        raise ModelError(f"{where}: holds {len(found)} sets of weights, {places}; keep the one you want")
    return found[0] if found else ""


def _misfit(module: nn.Module, state: dict[str, Tensor]) -> str:
    """How weights differ from those of a network, in one line."""
    own = module.state_dict()
    lacks, strange = [name for name in own if name not in state], [name for name in state if name not in own]
    sizes = {
        name: (list(state[name].shape), list(tensor.shape))
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    }
    head = [name for name in own if name.startswith(tuple(f"{name}." for name in _heads(module)))]
    if head and not strange and not sizes and lacks == head:
        return "has no head; set model.num_classes = 0, or give weights with a head"
    if head and not strange and not lacks and list(sizes) == head:
        has, wants = (shape[0] for shape in sizes[head[0]])
        return f"has {has} classes, the model {wants}; set model.num_classes = {has}, or give other weights"
    lines = [f"lacks {_some(lacks)}"] if lacks else []
    lines += [f"holds {_some(strange)}, which the model lacks"] if strange else []
    lines += [f"{name} is {has} instead of {wants}" for name, (has, wants) in list(sizes.items())[:2]]
    return "; ".join(lines)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


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
    from safetensors.torch import load_file

    where = f"{where}: {path}"
    if path.suffix != ".safetensors":
        raise ModelError(f"{where}: only .safetensors files are read (pickled weights can run code)")
    if not path.is_file():
        raise ModelError(f"{where}: no such file")
    with path.open("rb"):
        pass  # raises PermissionError, which names the file
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{where}: damaged, or not a safetensors file ({error})") from None
    if prefix := _prefix(module, state, where):
        if other := [name for name in state if not name.startswith(prefix)]:
            raise ModelError(f"{where}: also holds {_some(other)}, without the prefix {prefix!r}; leave them out")
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    if getattr(module, "num_classes", None) == 0:
        state = _headless(module, state)
    _check_tensors(module.state_dict(), state, where)
    try:
        module.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = _misfit(module, state) or first_line(error)
        raise ModelError(f"{where}: does not fit {type(module).__name__}: {reason}") from None
