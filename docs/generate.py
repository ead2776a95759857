"""Writes the parts of the documentation that follow from the code: the marked blocks of the pages in `BLOCKS`.

python docs/generate.py           # after a change to a recipe, a component, a docstring or a command
python docs/generate.py --check   # write nothing, exit with 1 and name the pages that are out of date
"""

import json
import re
import sys
from pathlib import Path

import click
import leaderboard
import plots
from api_page import api_block
from integer_tables import integers_block, speed_sentence
from other_tools_table import other_tools_block
from readme_table import readme_block
from results_page import files_block, results_block
from schema_page import schema_block
from spdfq_cli.main import main as cli
from study_page import study_block
from time_page import time_block
from uniform_tables import uniform_block

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
    "tracker": "`tracker` of `[runtime]`: what the results of a run are sent to.",
    "exporter": "`--format` of `spdfq export`, and `format` of `spdfq.export`: a file format for other software.",
}


def components_block() -> str:
    """The built-in components of every kind; those of installed plugins are left out."""
    return "\n".join(_kind(kind) for kind in REGISTRIES).strip()


def cli_block() -> str:
    """The help text of every command."""
    top = click.Context(cli, info_name="spdfq", terminal_width=100, **cli.context_settings)
    commands = [click.Context(command, parent=top, info_name=name) for name, command in cli.commands.items()]
    return "\n\n".join(
        f"## {context.command_path}\n\n```text\n{context.get_help()}\n```" for context in (top, *commands)
    )


def recipes_block() -> str:
    """The table of shipped recipes and parts."""
    rows = [[f"`{name}`", recipe_summary(name)] for name in shipped()]
    return _table(["name", "what"], rows)


def models_block() -> str:
    """How each bundled model was trained, and its curve."""
    return "\n\n".join(_model(name) for name in BUNDLED)


# pages with the name of a block in its markers, and what writes it
BLOCKS = {
    ("recipes.md", "recipes"): recipes_block,
    ("bundled-models.md", "models"): models_block,
    ("components.md", "components"): components_block,
    ("api.md", "api"): api_block,
    ("cli.md", "cli"): cli_block,
    ("time-and-memory.md", "time"): time_block,
    ("uniform-backend.md", "uniform"): uniform_block,
    ("export.md", "integers"): integers_block,
    ("other-tools.md", "other-tools"): other_tools_block,
    ("results.md", "results"): results_block,
    ("results-schema.md", "files"): files_block,
    ("results-schema.md", "schema"): schema_block,
    ("spdfq-constants.md", "study"): study_block,
    ("../README.md", "results"): readme_block,
    ("../README.md", "integers"): speed_sentence,
}


def outdated() -> list[str]:
    """The pages whose committed block differs from what the code gives now, and plots whose rows have changed."""
    pages = {page: (DOCS / page).read_text(encoding="utf-8") for page, _ in BLOCKS}
    blocks = [page for (page, name), write in BLOCKS.items() if block(pages[page], name) != write()]
    whole = leaderboard.PAGE.exists() and leaderboard.PAGE.read_text(encoding="utf-8") == leaderboard.leaderboard_page()
    return [*blocks, *([] if whole else [leaderboard.PAGE.name]), *plots.outdated()]


def block(text: str, name: str) -> str:
    """The text between the markers of a name."""
    return _marked(text, name)[2]


def refresh(path: Path, name: str, content: str) -> None:
    """Put content between the markers of a name."""
    start, end, _ = _marked(text := path.read_text(encoding="utf-8"), name)
    path.write_text(f"{text[:start]}\n{content}\n{text[end:]}", encoding="utf-8")


def _marked(text: str, name: str) -> tuple[int, int, str]:
    """Start, end and content of the marked block."""
    found = re.findall(f"<!-- {name}:(?:start|end) -->", text)
    if [marker.partition(":")[2] for marker in found] != ["start -->", "end -->"]:
        raise ValueError(f"expected one block between <!-- {name}:start --> and <!-- {name}:end -->, found {found}")
    start, end = text.index(found[0]) + len(found[0]), text.index(found[1])
    return start, end, text[start:end].strip()


def _kind(kind: str) -> str:
    entries = [REGISTRIES[kind].entry(name) for name in REGISTRIES[kind].names()]
    built_in = [entry for entry in entries if entry.module.startswith("spdfq.")]
    return "\n".join([f"## {kind}", "", PLACES[kind], "", *(_component(entry) for entry in built_in)])


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
    if sys.argv[1:] == ["--check"]:
        old = outdated()
        sys.exit(f"out of date: {', '.join(old)}; run: python docs/generate.py" if old else 0)
    for (page, name), write in BLOCKS.items():
        refresh(DOCS / page, name, write())
    leaderboard.PAGE.write_text(leaderboard.leaderboard_page(), encoding="utf-8")
    if plots.outdated():
        plots.write()
