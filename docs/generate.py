"""The parts of the documentation that follow from the code.

    python docs/generate.py     # after a recipe was added or a bundled model trained again

writes the marked blocks of ``recipes.md`` and ``bundled-models.md``. The components page is written by each build.
"""

import json
import re
from pathlib import Path

from spdfq.recipe import shipped
from spdfq.recipe.describe import body, describe, plain, recipe_summary
from spdfq.registry import REGISTRIES, Registration
from spdfq.teacher.zoo import BUNDLED

DOCS = Path(__file__).parent
PLACES = {
    "loss": "`[synthesis.losses.NAME]`: what the synthesis minimises.",
    "prior": "`prior` of the loss `attention_prior`: what attention maps are drawn from.",
    "source": "`[synthesis]`: where the calibration images come from.",
    "sampler": "`sampler` of the source `optimize`: which classes an image shows, and where.",
    "target": "`target` of the source `optimize`: the distribution that outputs are pulled towards.",
    "augmentation": "`augmentations` of the source `optimize`: what images go through before the teacher sees them.",
    "optimizer": "`optimizer` of the source `optimize`: of the pixels.",
    "schedule": "`schedule` of the source `optimize`: of the learning rate.",
    "quantizer": "`weights`, `activations`, `softmax` and `gelu` of `[quantization]`: how a tensor is quantized.",
    "observer": "`observer` and `weight_observer` of steps such as `calibrate`: how ranges are chosen.",
    "placement": "`placement` of `[quantization]`: which tensors are quantized.",
    "step": "`[[quantization.steps]]`: what calibrates and repairs the quantized model, in order.",
    "dataset": "`dataset` and `bank` of `[evaluation]`, `dataset` of the source `real`: labelled images.",
}


def components_page() -> str:
    """Every registered component of every kind, as Markdown."""
    return "\n".join(_kind(kind) for kind in REGISTRIES)


def recipes_block() -> str:
    """The table of shipped recipes and parts."""
    rows = [[f"`{name}`", recipe_summary(name)] for name in shipped()]
    return _table(["name", "what"], rows)


def models_block() -> str:
    """How each bundled model was trained, and its curve."""
    return "\n\n".join(_model(name) for name in BUNDLED)


def write_components(path: Path) -> None:
    """Write the components page, unless it is there already as it should be."""
    page = components_page()
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text(encoding="utf-8") != page:
        path.write_text(page, encoding="utf-8")


def block(text: str, name: str) -> str:
    """What stands between the markers of a name."""
    return _marked(text, name)[2]


def refresh(path: Path, name: str, content: str) -> None:
    """Put content between the markers of a name."""
    start, end, _ = _marked(text := path.read_text(encoding="utf-8"), name)
    path.write_text(f"{text[:start]}\n{content}\n{text[end:]}", encoding="utf-8")


def _marked(text: str, name: str) -> tuple[int, int, str]:
    """Where the marked block starts and ends, and what it holds."""
    found = re.findall(f"<!-- {name}:(?:start|end) -->", text)
    if [marker.partition(":")[2] for marker in found] != ["start -->", "end -->"]:
        raise ValueError(f"expected one block between <!-- {name}:start --> and <!-- {name}:end -->, found {found}")
    start, end = text.index(found[0]) + len(found[0]), text.index(found[1])
    return start, end, text[start:end].strip()


def _kind(kind: str) -> str:
    entries = [REGISTRIES[kind].entry(name) for name in REGISTRIES[kind].names()]
    return "\n".join([f"## {kind}", "", PLACES[kind], "", *(_component(entry) for entry in entries)])


def _component(entry: Registration) -> str:
    paper = f" ({_cited(entry.paper)})" if entry.paper else ""
    rows = [[f"`{doc.name}`", doc.type, _default(doc.default), doc.doc] for doc in describe(entry.component)]
    keys = _table(["key", "takes", "default", "meaning"], rows) if rows else "It has no keys."
    text = [body(entry.component), ""] if body(entry.component) else []
    return "\n".join([f"### {entry.name}", "", plain(entry.summary) + paper, "", *text, keys, ""])


def _default(default: str) -> str:
    return default if default in ("required", "none") else f"`{default}`"


def _cited(paper: str) -> str:
    kind, _, number = paper.partition(":")
    return f"[arXiv {number}](https://arxiv.org/abs/{number})" if kind == "arXiv" else paper


def _model(name: str) -> str:
    found = json.loads((DOCS / f"{name}-training.json").read_text(encoding="utf-8"))
    module, bundled = BUNDLED[name].create(), BUNDLED[name]
    size = " × ".join(map(str, module.pretrained_cfg["input_size"]))
    options = ", ".join(f"{key} {value}" for key, value in bundled.arguments.items())
    facts = [
        ["architecture", f"timm's `{bundled.entrypoint}` with {options}"],
        ["input", f"{size}, {module.num_classes} classes"],
        ["parameters", f"{sum(parameter.numel() for parameter in module.parameters()):,}"],
        [
            "training",
            f"{found['epochs']} epochs, batch {found['batch']}, learning rate {found['lr']}, seed {found['seed']}",
        ],
        ["**top-1**", f"**{found['test_top1']:.2f} %** on the 10,000 test images"],
    ]
    curve = [[str(row["epoch"]), f"{row['loss']:.3f}", f"{row['test_top1']:.2f}"] for row in found["curve"]]
    title = f'## {name}\n\nIn a recipe: `name = "bundled:{name}"`.'
    return "\n\n".join([title, _table(["", ""], facts), _table(["epoch", "training loss", "test top-1 (%)"], curve)])


def _table(headings: list[str], rows: list[list[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    refresh(DOCS / "recipes.md", "recipes", recipes_block())
    refresh(DOCS / "bundled-models.md", "models", models_block())
