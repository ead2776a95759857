"""The model card of a finished run, for the Hugging Face hub."""

from pathlib import Path
from typing import Any

from attrs import frozen

from spdfq.errors import DataError
from spdfq.inference.pixels import MODES
from spdfq.quantized.checkpoint import verified
from spdfq.recipe import ModelSpec, Recipe, to_toml
from spdfq.recipe.structure import unstructure
from spdfq.report.card import CardFacts, check_card, exported_files, write_card
from spdfq.report.images import REAL_FILE
from spdfq.report.page import bits_label
from spdfq.runs.finished import finished_recipe, finished_record
from spdfq.runs.provenance import components_in
from spdfq.runs.store import lock_folder

# of the hub's list, https://huggingface.co/docs/hub/repositories-licenses, those that timm's models have
_HUB_LICENSES = frozenset(
    {"apache-2.0", "apple-amlr", "apple-ascl", "bsd-3-clause", "cc-by-nc-4.0", "gemma", "mit", "other", "unknown"}
)
_BUNDLED_LICENSE = "apache-2.0"
_HUB = ("hf-hub:", "hf_hub:")


@frozen
class _Base:
    """The model that was quantized: its id on the hub and its licence, if they are known."""

    hub_id: str | None
    license: str | None


def card_run(folder: str | Path) -> dict[str, Any]:
    """Write ``README.md`` into the folder of a finished run: a model card in the format of the Hugging Face hub.

    It says what was measured where, whether real images took part, how to load the files, and the limits. A README.md
    that this function wrote is replaced, and no other.

    Args:
        folder: of the run.

    Returns:
        ``file``, ``base_model`` and ``license`` (``None`` if unknown), ``data_free``, and ``notes``: lines about what
        to look at before the folder is uploaded.

    Raises:
        SpdfqError: anything the user can fix; the message says where and how.
    """
    recipe, folder = finished_recipe(folder), Path(folder)
    run = finished_record(folder)
    check_card(folder)
    base, exports = _base(recipe.model), exported_files(folder)
    free = not any(hasattr(component, "fingerprint") for component in components_in(recipe.synthesis))
    teacher = verified(folder / "quantized")["teacher"]
    try:
        facts = _facts(recipe, run, teacher, base, exports, free)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{folder}: run.json or exports.json is damaged ({error}); run the recipe again") from None
    lock = lock_folder(folder)
    try:
        path = write_card(folder, run, facts)
    finally:
        lock.release()
    return {
        "file": str(path),
        "base_model": base.hub_id,
        "license": base.license,
        "data_free": free,
        "notes": _notes(folder, recipe, base, exports),
    }


def _base(spec: ModelSpec) -> _Base:
    """From the name of a model alone; nothing is downloaded."""
    if spec.checkpoint or spec.random:
        return _Base(None, None)
    if spec.bundled:
        return _Base(None, _BUNDLED_LICENSE)
    if spec.name.startswith(_HUB):
        return _Base(spec.name.partition(":")[2].partition("@")[0], None)
    if ":" in spec.name:
        return _Base(None, None)
    from timm.models import get_pretrained_cfg

    configured = get_pretrained_cfg(spec.name)
    if configured is None or not configured.hf_hub_id:
        return _Base(None, None)
    return _Base(configured.hf_hub_id, configured.license)


def _facts(
    recipe: Recipe,
    run: dict[str, Any],
    teacher: dict[str, Any],
    base: _Base,
    exports: dict[str, dict[str, Any]],
    data_free: bool,
) -> CardFacts:
    return CardFacts(
        front_matter=_front_matter(base, run, sorted({entry["format"] for entry in exports.values()}), data_free),
        base=f"[{base.hub_id}](https://huggingface.co/{base.hub_id})" if base.hub_id else f"`{recipe.model.name}`",
        data_free=data_free,
        dataset=f"{run['metrics']['images']:,} labelled ones of `{_type(recipe.evaluation.dataset, 'dataset')}`",
        teacher=teacher,
        mode=MODES.get(teacher["input_size"][0]),
        recipe=to_toml({key: recipe.to_dict()[key] for key in ("seed", "synthesis", "quantization")}),
        limits=tuple(_limits(run, exports, base)),
    )


def _front_matter(base: _Base, run: dict[str, Any], formats: list[str], data_free: bool) -> str:
    from huggingface_hub import ModelCardData

    known = base.license in _HUB_LICENSES
    bits = run["backend"]["label"].lower()
    tags = ["spdfq", "quantized", bits, "vision-transformer", "timm", *formats]
    data = ModelCardData(
        base_model=base.hub_id,
        base_model_relation="quantized",
        library_name="onnx" if "onnx" in formats else "spdfq",
        license=base.license if known or base.license is None else "other",
        license_name=None if known else base.license,
        metrics=["accuracy"],
        pipeline_tag="image-classification" if run["model"]["num_classes"] else "image-feature-extraction",
        tags=[*tags, "data-free-quantization"] if data_free else tags,
    )
    return str(data.to_yaml())


def _limits(run: dict[str, Any], exports: dict[str, dict[str, Any]], base: _Base) -> list[str]:
    measured = sorted({f"{row['runtime']} {row['version']}" for entry in exports.values() for row in entry["measured"]})
    lines = [
        f"The accuracy is that of one seed on {run['metrics']['images']:,} images. It was not measured on other data.",
        f"Other runtimes than {', '.join(measured)} were not tried."
        if measured
        else f"{bits_label(run['backend'])} is simulated: no file with integers was measured.",
        "Biases and errors of the full-precision model remain, and quantization may add to them for some classes.",
    ]
    if base.license is None:
        lines.append("The licence of the full-precision model is not known here; it holds for this model, too.")
    else:
        lines.append(f"The licence of the full-precision model ({base.license}) holds for this model, too.")
    return [*lines, *(f"`{name}`: {note}" for name, entry in exports.items() for note in entry["notes"])]


def _notes(folder: Path, recipe: Recipe, base: _Base, exports: dict[str, dict[str, Any]]) -> list[str]:
    notes = []
    if base.hub_id is None and not recipe.model.bundled:
        notes.append("base_model: not known; add the hub's id of the full-precision model to the card if it has one")
    if base.license is None:
        notes.append("license: not known; add that of the full-precision model to the card")
    if not any(entry["format"] == "onnx" for entry in exports.values()):
        notes.append(
            "no ONNX file in the folder; 'spdfq export RUN --check' writes and measures one, then run this again"
        )
    elif not any(entry["measured"] for entry in exports.values()):
        notes.append("the exported files were not measured; 'spdfq export RUN --check' does it, then run this again")
    local = [f"{key} = {text}" for key, text in _texts(recipe.to_dict()) if _is_local(text)]
    if local:
        notes.append(f"recipe.toml and the report name local paths, which an upload would show: {', '.join(local)}")
    if (folder / REAL_FILE).is_file():
        notes.append(
            "real.png and the report show images of the test set, which an upload would publish; to leave them out, "
            'see "Real images" in docs/report.md'
        )
    return notes


def _type(component: Any, kind: str) -> str:
    return str(unstructure(component, kind)["type"])


def _texts(value: Any, key: str = "") -> list[tuple[str, str]]:
    """Every text of a recipe with its dotted key."""
    if isinstance(value, dict):
        return [found for name, item in value.items() for found in _texts(item, f"{key}.{name}".lstrip("."))]
    if isinstance(value, (list, tuple)):
        return [found for item in value for found in _texts(item, key)]
    return [(key, value)] if isinstance(value, str) else []


def _is_local(text: str) -> bool:
    return Path(text).is_absolute() or ("/" in text and Path(text).exists())
