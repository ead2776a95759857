"""Saves a quantized model as a safetensors file of packed integers and a config.json that says how to rebuild it."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from attrs import astuple
from torch import Tensor, nn

from spdfq.attention import watchable
from spdfq.errors import DataError, ModelError, SpdfqError, shown, writing
from spdfq.quantized.model import QuantizedModel
from spdfq.quantized.multiplications import Multiplications
from spdfq.quantized.sites import WEIGHT, Site
from spdfq.quantized.visiting import find_sites
from spdfq.quantizers import Quantizer
from spdfq.quantizers.option_checks import BYTE
from spdfq.quantizers.packing import pack, unpack
from spdfq.recipe import ModelSpec, digest
from spdfq.recipe.structure import structure, unstructure
from spdfq.registry import quantizers
from spdfq.runtime.files import read_tensors, write_tensors, write_text
from spdfq.teacher import Teacher, load_teacher
from spdfq.teacher.description import check_module
from spdfq.teacher.state import extra_states, persistent_tensors

FORMAT = 1
TENSORS, CONFIG = "model.safetensors", "config.json"


def save_quantized(
    model: QuantizedModel, folder: str | Path, teacher: Teacher, recipe: dict[str, Any] | None = None
) -> None:
    """Writes a calibrated model into a folder.

    Quantized weights are stored as integers packed at their bit-width, everything else in float32.

    Args:
        model: in float32, with every quantizer frozen.
        folder: created if it does not exist.
        teacher: its name and input description are stored.
        recipe: the resolved recipe, stored as information; its ``model`` section says how to build the network.

    Raises:
        DataError: the model is in another precision, has a weight that is NaN, or a tensor of a type that safetensors
            does not store.
        ModelError: a tensor is sparse, quantized or without a shape, or extra state is not plain data.
        SpdfqError: a quantizer was not calibrated.
    """
    folder = Path(folder)
    packed, extra = _packed(model), extra_states(model.network)
    plain = {name: value for name, value in extra.items() if not isinstance(value, Tensor)}
    packed |= {_extra(name): value.clone() for name, value in extra.items() if name not in plain}
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / TENSORS, packed)
    config = {
        "format": FORMAT,
        "teacher": {field: value for field in _TEACHER_FIELDS if (value := getattr(teacher, field)) is not None},
        "sites": {name: [site.kind, list(site.shape), site.maker] for name, site in model.sites.items()},
        "quantizers": {name: unstructure(quantizer, "quantizer") for name, quantizer in model.quantizers.items()},
        "leftovers": model.leftovers,
        "biases": model.biases,
        "shifted": model.shifted,
        "norms": {name: list(norm) for name, norm in model.norms.items()},
        "multiplications": [astuple(product) for product in model.multiplications],
        "extra_states": plain,
        "recipe": recipe or {},
        "tensors_sha256": _file_digest(folder / TENSORS),
    }
    config = json.loads(json.dumps(config))
    write_text(folder / CONFIG, json.dumps({**config, "config_digest": digest(config)}, indent=1) + "\n")


_TEACHER_FIELDS = (
    "name",
    "mean",
    "std",
    "num_classes",
    "input_size",
    "crop_pct",
    "interpolation",
    "crop_mode",
    "output",  # left out for a module that returns a tensor
)


def load_quantized(folder: str | Path, module: nn.Module | None = None) -> QuantizedModel:
    """Rebuilds what `save_quantized` wrote. Its logits are bit for bit those of the saved model.

    Args:
        folder: holds ``model.safetensors`` and ``config.json``.
        module: the float architecture, needed if the teacher was your own module.

    Raises:
        DataError: a file is missing, truncated, edited or of another format version.
        ModelError: the architecture cannot be built, or does not fit.
    """
    return load_checkpoint(folder, module)[0]


def load_checkpoint(folder: str | Path, module: nn.Module | None = None) -> tuple[QuantizedModel, Teacher, dict]:
    """The quantized model, its teacher (without the trained weights) and the recipe."""
    config = verified(folder)
    tensors = read_tensors(Path(folder) / TENSORS, "copy it again")[0]
    network = _architecture(config, module)
    sites = {name: Site(name, kind, tuple(shape), *maker) for name, (kind, shape, *maker) in config["sites"].items()}
    restored = {name: _built_quantizer(name, table, folder) for name, table in config["quantizers"].items()}
    biases = config.get("biases", [])  # missing in files that are older than the first step that adds biases
    norms = _norms(config.get("norms", {}), network, folder)  # missing in files that are older than the step 'rotate'
    shifted = _shifted(config.get("shifted", []), network, folder)  # missing in files older than the step 'smooth'
    _check_fit(network, [sites[name] for name in restored], biases, folder)
    teacher = Teacher(network, **config["teacher"])
    counted = [
        Multiplications(name, operator, tuple(operands), *counts)  # older files have no number of calls
        for name, operator, operands, *counts in config.get("multiplications", [])  # missing in still older ones
    ]
    model = QuantizedModel(teacher.module, sites, restored, config["leftovers"], biases, counted, norms, shifted)
    _fill(model, tensors, config.get("extra_states", {}), folder)
    _check_shapes(model, teacher, folder)
    return model, teacher, config["recipe"]


def _check_shapes(model: QuantizedModel, teacher: Teacher, folder: str | Path) -> None:
    """Raise ModelError if tensors have other shapes at the sites, as with another number of heads."""
    example = torch.zeros(1, *teacher.input_size, dtype=torch.float32, device=teacher.device)
    found, _ = find_sites(model.network, example, model.points)
    for name, site in model.sites.items():
        if name not in found or found[name].shape != site.shape:
            raise ModelError(_NO_FIT.format(folder, name))


def _norms(stored: Any, network: nn.Module, folder: str | Path) -> dict[str, tuple[int, float | None]]:
    """The replaced norms of a config: features and eps by module."""
    modules = dict(network.named_modules())
    found: dict[str, tuple[int, float | None]] = {}
    for name, entry in stored.items() if isinstance(stored, dict) else [("norms", stored)]:
        features, eps = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
        if type(features) is not int or features < 1 or not (eps is None or (type(eps) is float and eps >= 0)):
            raise DataError(f"{Path(folder) / CONFIG}: norms: {name}: not [features, eps]; save the model again")
        if not name or name not in modules:
            raise ModelError(_NO_FIT.format(folder, name))
        found[name] = (features, eps)
    return found


def _shifted(stored: Any, network: nn.Module, folder: str | Path) -> list[str]:
    """The weights of a config whose layers shift their inputs."""
    names = stored if isinstance(stored, list) and all(isinstance(name, str) for name in stored) else None
    if names is None or len(set(names)) < len(names):
        raise DataError(f"{Path(folder) / CONFIG}: shifted: not a list of different names; save the model again")
    modules = {f"{name}.weight": module for name, module in network.named_modules()}
    if wrong := [name for name in names if type(modules.get(name)) is not nn.Linear]:
        raise ModelError(_NO_FIT.format(folder, wrong[0]))
    return names


_NO_FIT = "{}: {} does not fit this architecture; the file was saved from another one"


def _check_fit(module: nn.Module, quantized: list[Site], biases: list[str], folder: str | Path) -> None:
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    modules = {name for name, _ in module.named_modules()}
    for site in quantized:
        owner = site.name.rpartition(".")[0]
        if owner not in modules or (site.kind == WEIGHT and shapes.get(site.name) != site.shape):
            raise ModelError(_NO_FIT.format(folder, site.name))
    for bias in biases:
        if not isinstance(dict(module.named_modules()).get(bias.rpartition(".")[0]), nn.Linear):
            raise ModelError(_NO_FIT.format(folder, bias))


def _packed(model: QuantizedModel) -> dict[str, Tensor]:
    if other := [p.dtype for p in model.network.parameters() if p.is_floating_point() and p.dtype != torch.float32]:
        raise DataError(f"a quantized model is stored in float32, this one is {other[0]}; save model.float()")
    tensors: dict[str, Tensor] = {}
    weights = set(model.weight_names())
    for name, quantizer in model.quantizers.items():
        tensors |= {f"{name}.{key}": value for key, value in quantizer.tensors().items()}
    for name in weights:
        quantizer = model.quantizers[name]
        if quantizer.bits > BYTE:
            raise DataError(f"{name}: a weight of {quantizer.bits} bits is not stored; give it a quantizer of 2 to 8")
        tensors[f"{name}.codes"] = pack(quantizer.codes(model.weight(name)), quantizer.bits)
    own = persistent_tensors(model.network)
    for name, tensor in own.items():
        if tensor.is_complex() and tensor.dtype != torch.complex64:
            raise DataError(f"{name}: is {tensor.dtype}, which safetensors does not store; convert it to complex64")
    if twice := sorted(tensors.keys() & own.keys()):
        raise DataError(
            f"{twice[0]}: is the name of a parameter or buffer and of a quantizer's tensor; rename the former"
        )
    return tensors | {name: tensor.clone() for name, tensor in own.items() if name not in weights}


def _extra(module: str) -> str:
    """The name of a module's extra state in its network's state dict."""
    return f"{module}._extra_state" if module else "_extra_state"


def verified(folder: str | Path) -> dict[str, Any]:
    """The content of ``config.json``, after a check that both files are complete and belong together.

    Raises:
        DataError: a file is missing, truncated, edited or of another format version.
    """
    if not isinstance(folder, (str, Path)):
        raise DataError(f"load_quantized: expected the folder of a quantized model, got {shown(folder)}")
    folder = Path(folder)
    for name in (CONFIG, TENSORS):
        if not (folder / name).is_file():
            raise DataError(f"{folder / name}: no such file; a quantized model is a folder with {CONFIG} and {TENSORS}")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        stored = config.pop("config_digest", None) if isinstance(config, dict) else None
    except ValueError as error:
        raise DataError(f"{folder / CONFIG}: not valid JSON ({error}); save the model again") from None
    if not isinstance(config, dict) or "format" not in config:
        raise DataError(f"{folder / CONFIG}: not the config of a quantized model; save the model again")
    if config["format"] != FORMAT:
        raise DataError(
            f"{folder / CONFIG}: format {config['format']!r}, but this version of spdfq reads format {FORMAT}; "
            "load it with the version that wrote it"
        )
    if stored != digest(config):
        raise DataError(f"{folder / CONFIG}: was edited after it was written; save the model again")
    if config["tensors_sha256"] != _file_digest(folder / TENSORS):
        raise DataError(
            f"{folder / TENSORS}: truncated, edited or of another model than its {CONFIG}; copy both again, or save "
            "the model again"
        )
    return config


def _file_digest(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _architecture(config: dict[str, Any], module: nn.Module | None) -> nn.Module:
    if module is not None:
        check_module(module)
        return watchable(module)
    name, table = config["teacher"]["name"], config["recipe"].get("model", {})
    if not table and name.startswith("bundled:"):
        table = {"name": name}
    if table.get("name") != name:
        raise ModelError(
            f"{name}: was saved without the model section of a recipe; give its module: load_quantized(folder, module)"
        )
    problems: list[str] = []
    spec: ModelSpec = structure(ModelSpec, table, "model", problems)
    if problems:
        raise ModelError("; ".join(problems))
    return load_teacher(spec, weights=False).module


def _built_quantizer(name: str, table: dict[str, Any], folder: str | Path) -> Quantizer:
    options = {key: value for key, value in table.items() if key != "type"}
    try:
        cls = quantizers.get(table["type"])
    except SpdfqError as error:
        raise DataError(f"{folder}: {name}: {error}") from None
    problems: list[str] = []
    built: Quantizer = structure(cls, options, name, problems)
    if problems:
        raise DataError(f"{folder}: {problems[0]}; it was written by another version of {table['type']!r}")
    return built


@torch.no_grad()
def _fill(model: QuantizedModel, tensors: dict[str, Tensor], plain: dict[str, Any], folder: str | Path) -> None:
    """Puts the stored tensors and extra states into a newly built model; all of them must be used."""
    left: dict[str, Any] = dict(tensors)
    try:
        for name, quantizer in model.quantizers.items():
            quantizer.restore({key: left.pop(f"{name}.{key}") for key in quantizer.stores})
        weights = {}
        for name in model.weight_names():
            quantizer, shape = model.quantizers[name], model.weight(name).shape
            weights[name] = quantizer.decode(unpack(left.pop(f"{name}.codes"), quantizer.bits, shape))
    except KeyError as error:
        raise DataError(f"{folder}: {error.args[0]} is missing; save the model again") from None
    left |= {_extra(name): value for name, value in plain.items()}
    own = persistent_tensors(model.network)
    extra = {_extra(name): name for name in extra_states(model.network)}
    wanted = own.keys() | extra.keys()
    stray = (wanted - left.keys() - weights.keys()) | (left.keys() - wanted)
    stray |= {name for name in left.keys() & own.keys() if left[name].shape != own[name].shape}
    if stray:
        raise ModelError(_NO_FIT.format(folder, min(stray)))
    for name, module in extra.items():
        model.network.get_submodule(module).set_extra_state(left.pop(name))
    for name, tensor in left.items():
        own[name].copy_(tensor)
    for name, tensor in weights.items():
        model.weight(name).copy_(tensor)
