"""The documentation against the code: its examples run, its lists are complete, its links lead somewhere."""

import json
import re
import runpy
import sys
import tomllib
from pathlib import Path

import attrs
import pytest
from spdfq_cli.main import main

from spdfq import registry
from spdfq.bench.plan import read_plan
from spdfq.data import FashionMnist
from spdfq.recipe import load_recipe, shipped
from spdfq.teacher.zoo import BUNDLED

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))

import generate  # noqa: E402  (it lies in the folder of the documentation)

PAGES = [*DOCS.glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]


def text(path):
    return path.read_text(encoding="utf-8")


def blocks(path, language):
    return re.findall(rf"^ *```{language}\n(.*?)^ *```$", text(path), re.DOTALL | re.MULTILINE)


@pytest.fixture
def run_as_script(tmp_path, monkeypatch):
    """Runs code as a user would run a script, in a folder of its own, with 2 iterations and 20 evaluation images."""
    load = FashionMnist._load
    monkeypatch.setattr(FashionMnist, "_load", lambda self: tuple(tensor[:20] for tensor in load(self)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SPDFQ_STORE", raising=False)
    for kind in registry.REGISTRIES.values():  # what a script registers is forgotten after the test
        kind._load()
        monkeypatch.setattr(kind, "_entries", dict(kind._entries))

    def run(code):
        code, shortened = re.subn(r"(?<=iterations=)\d+", "2", code)
        assert shortened
        (tmp_path / "script.py").write_text(code, encoding="utf-8")
        return runpy.run_path(str(tmp_path / "script.py"), run_name="__main__")

    return run


def test_the_readme_has_a_ten_line_example_and_a_fifteen_line_loss():
    example, own_loss = blocks(ROOT / "README.md", "python")
    assert sum(1 for line in example.splitlines() if line) <= 10
    assert sum(1 for line in own_loss.splitlines() if line) <= 15
    assert max(map(len, (example + own_loss).splitlines())) <= 120


def test_the_readmes_example_runs_and_leaves_a_checkpoint_of_the_same_model(run_as_script, tmp_path):
    seen = run_as_script(blocks(ROOT / "README.md", "python")[0])
    assert seen["images"].shape == (4, 1, 28, 28)
    expected = seen["quantized"](seen["images"])
    assert (seen["reloaded"](seen["images"]) == expected).all()
    assert (tmp_path / "runs" / "first-look" / "report.html").exists()


def test_the_readmes_own_loss_runs_and_has_a_column_of_its_own(run_as_script, tmp_path):
    run_as_script(blocks(ROOT / "README.md", "python")[1])
    (curve,) = tmp_path.glob("runs/quickstart-*/losses.csv")
    assert "contrast" in curve.read_text(encoding="utf-8").splitlines()[0].split(",")


def test_a_loss_that_a_script_registers_is_forgotten_after_the_test():
    assert "contrast" not in registry.losses.names()


def test_the_example_of_a_module_of_ones_own_runs_and_reloads(run_as_script):
    (code,) = (found for found in blocks(DOCS / "own-model.md", "python") if "Teacher" in found)
    seen = run_as_script(code)
    assert (seen["reloaded"](seen["images"]) == seen["quantized"](seen["images"])).all()
    bits = {row["name"]: row["bits"] for row in seen["quantized"].site_table()["quantized"]}
    assert bits["head.weight"] == 8
    assert bits["blocks.0.attn.qkv.weight"] == 4


def test_recipes_names_exactly_the_shipped_ones():
    written = generate.block(text(DOCS / "recipes.md"), "recipes")
    assert re.findall(r"^\| `([\w/]+)` \|", written, re.MULTILINE) == shipped()
    assert written == generate.recipes_block(), "run: python docs/generate.py"


def test_every_shipped_recipe_says_what_it_is():
    empty = [line for line in generate.recipes_block().splitlines() if line.endswith("|  |")]
    assert not empty


def test_the_bundled_models_page_agrees_with_the_training_records():
    written = generate.block(text(DOCS / "bundled-models.md"), "models")
    assert written == generate.models_block(), "run: python docs/generate.py"
    for name in BUNDLED:
        record = json.loads(text(DOCS / f"{name}-training.json"))
        assert f"**{record['test_top1']:.2f} %** on the 10,000 test images" in written
        assert len(record["curve"]) == record["epochs"]


def test_every_registered_component_and_each_of_its_keys_is_on_the_components_page():
    page = generate.components_page()
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE))
    assert set(sections) == set(registry.REGISTRIES) == set(generate.PLACES)
    for kind, known in registry.REGISTRIES.items():
        parts = dict(re.findall(r"^### (\S+)\n(.*?)(?=^### |\Z)", sections[kind], re.DOTALL | re.MULTILINE))
        assert sorted(parts) == known.names()
        for name in known.names():
            keys = [field.name for field in attrs.fields(known.get(name)) if field.init]
            assert re.findall(r"^\| `(\w+)` \|", parts[name], re.MULTILINE) == keys


def test_every_key_on_the_components_page_has_a_meaning():
    rows = re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \| (.*) \|$", generate.components_page(), re.MULTILINE)
    assert rows
    assert [row for row in rows if not row[3].strip()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_internal_links_lead_to_files_and_headings_that_exist(page):
    targets = re.findall(r"\]\((?!https?://)([^)\s]+)\)", re.sub(r"```.*?```", "", text(page), flags=re.DOTALL))
    targets += re.findall(r"```\{(?:include|image)\} (\S+)", text(page))
    for target in targets:
        name, _, anchor = target.partition("#")
        path = page if not name else page.parent / name
        assert path.exists() or path.parent.name == "generated", f"{page.name}: {target}"
        if anchor:
            shown = text(path) + (generate.components_page() if path.name == "components.md" else "")
            slugs = {
                re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
                for heading in re.findall(r"^#+ (.*)$", shown, re.MULTILINE)
            }
            assert anchor in slugs, f"{page.name}: {target}"


def test_every_page_is_in_the_table_of_contents():
    listed = re.findall(r"^([a-z-]+)$", "\n".join(blocks(DOCS / "index.md", r"\{toctree\}")), re.MULTILINE)
    assert sorted(listed) == sorted(page.stem for page in DOCS.glob("*.md") if page.stem != "index")


def test_the_recipes_in_the_documentation_load():
    """A part is completed by the quickstart; what extends something or states its schema is whole by itself."""
    pages = ("recipes.md", "own-model.md", "data.md")
    found = [tomllib.loads(code) for page in pages for code in blocks(DOCS / page, "toml")]
    assert len(found) == 10
    for data in found:
        load_recipe(data if {"extends", "schema"} & data.keys() else {"extends": ["quickstart"], **data})


def test_the_bench_in_the_documentation_has_the_cells_it_speaks_of(tmp_path):
    (code,) = (found for found in blocks(DOCS / "bench.md", "toml") if "seeds" in found)
    (tmp_path / "compare.toml").write_text(code)
    plan = read_plan(str(tmp_path / "compare.toml"))
    recipes = [load_recipe(combination.data) for combination in plan.combinations]
    assert len(recipes) * len(plan.seeds) == 24
    assert {recipe.quantization.weights.bits for recipe in recipes} == {3}
    assert {recipe.quantization.steps[1].iterations for recipe in recipes} == {100, 300}
    assert "24 cells" in text(DOCS / "bench.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_the_documentation_exist_with_their_options(page):
    shell = "\n".join(blocks(page, "console") + re.findall(r"`(spdfq [^`]+)`", text(page)))
    for command, rest in re.findall(r"\bspdfq ([a-z]+)([^\n&>]*)", shell):
        assert command in main.commands, f"{page.name}: spdfq {command}"
        known = {option for parameter in main.commands[command].params for option in parameter.opts}
        used = set(re.findall(r"(?<= )--[a-z]+", rest))
        assert used <= known, f"{page.name}: spdfq {command} {used - known}"


def test_troubleshooting_quotes_messages_that_exist():
    source = "\n".join(text(path) for folder in ("spdfq", "cli") for path in sorted((ROOT / folder).rglob("*.py")))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # messages that run over several lines
    rows = re.findall(r"^\| (.*?) \|", text(DOCS / "troubleshooting.md"), re.MULTILINE)
    quoted = [fragment for row in rows for fragment in re.findall(r"`([^`]+)`", row) if fragment != "import timm"]
    assert len(quoted) > 30
    assert [fragment for fragment in quoted if fragment not in source] == []


def test_results_have_one_marked_place_in_the_readme_and_in_the_documentation():
    for page in (ROOT / "README.md", DOCS / "results.md"):
        assert generate.block(text(page), "results")


def test_refreshing_a_block_changes_nothing_else(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- x:start -->\nold\nlines\n<!-- x:end -->\nafter\n")
    generate.refresh(page, "x", "new")
    generate.refresh(page, "x", "newer")
    assert page.read_text() == "before\n<!-- x:start -->\nnewer\n<!-- x:end -->\nafter\n"


@pytest.mark.parametrize("markers", ["", "<!-- x:start -->", "<!-- x:end --><!-- x:start -->"])
def test_a_page_without_its_markers_is_refused(markers):
    with pytest.raises(ValueError, match="expected one block"):
        generate.block(markers, "x")


def test_one_version_is_named_everywhere():
    version = tomllib.loads(text(ROOT / "pyproject.toml"))["project"]["version"]
    assert f"\nversion: {version}\n" in text(ROOT / "CITATION.cff")
    assert re.search(r"^## (\S+)", text(ROOT / "CHANGELOG.md"), re.MULTILINE)[1] == version


def test_every_package_and_its_data_are_listed_for_the_wheel():
    settings = tomllib.loads(text(ROOT / "pyproject.toml"))["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "spdfq").rglob("__init__.py")}
    assert {".".join(folder.parts) for folder in folders} | {"spdfq_cli"} == set(settings["packages"])
    for package, patterns in settings["package-data"].items():
        folder = ROOT / package.replace(".", "/")
        assert all(list(folder.glob(pattern)) for pattern in patterns), package
    data = [path for path in (ROOT / "spdfq").rglob("*") if path.suffix in (".toml", ".css", ".safetensors")]
    kept = {
        path
        for package, patterns in settings["package-data"].items()
        for pattern in patterns
        for path in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    assert set(data) <= kept
