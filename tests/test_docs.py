"""The documentation against the code: generated pages are current, lists are complete, links and commands exist."""

import json
import re
import sys
import tomllib
from itertools import pairwise

import attrs
import pytest
from attrs import evolve
from spdfq_cli.main import main
from support.docs import DOCS, ROOT, blocks, built_in, text

from spdfq import registry
from spdfq.bench.plan import read_plan
from spdfq.recipe import load_recipe, shipped
from spdfq.teacher.zoo import BUNDLED

sys.path.insert(0, str(DOCS))

import api_page
import generate
import leaderboard
import plots
import results_page
from result_rows import RESULTS, rows_of

COMPONENTS = generate.block(text(DOCS / "components.md"), "components")
PAGES = [*DOCS.glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]


@pytest.mark.parametrize(("page", "name"), generate.BLOCKS)
def test_a_generated_block_is_what_the_code_gives_now(page, name):
    write = generate.BLOCKS[page, name]
    assert generate.block(text(DOCS / page), name) == write(), "run: python docs/generate.py"


def test_recipes_names_exactly_the_shipped_ones():
    written = generate.block(text(DOCS / "recipes.md"), "recipes")
    assert re.findall(r"^\| `([\w/]+)` \|", written, re.MULTILINE) == shipped()


def test_every_shipped_recipe_says_what_it_is():
    empty = [line for line in generate.recipes_block().splitlines() if line.endswith("|  |")]
    assert not empty


def test_the_bundled_models_page_agrees_with_the_training_records():
    written = generate.block(text(DOCS / "bundled-models.md"), "models")
    for name in BUNDLED:
        record = json.loads(text(DOCS / f"{name}-training.json"))
        assert f"**{record['test_top1']:.2f} %** on the 10,000 test images" in written
        assert len(record["curve"]) == record["epochs"]


def test_every_built_in_component_and_each_of_its_keys_is_on_the_components_page():
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", COMPONENTS, re.DOTALL | re.MULTILINE))
    assert set(sections) == set(registry.REGISTRIES) == set(generate.PLACES)
    for kind, known in registry.REGISTRIES.items():
        parts = dict(re.findall(r"^### (\S+)\n(.*?)(?=^### |\Z)", sections[kind], re.DOTALL | re.MULTILINE))
        assert sorted(parts) == built_in(known)
        for name in parts:
            keys = [field.name for field in attrs.fields(known.get(name)) if field.init]
            assert re.findall(r"^\| `(\w+)` \|", parts[name], re.MULTILINE) == keys


def test_every_key_on_the_components_page_has_a_meaning():
    rows = re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \| (.*) \|$", COMPONENTS, re.MULTILINE)
    assert rows
    assert [row for row in rows if not row[3].strip()] == []


def test_a_component_of_a_plugin_is_not_on_the_components_page(monkeypatch):
    monkeypatch.setattr(registry.losses, "_entries", dict(registry.losses._entries))
    plugin = type("PluginLoss", (registry.losses.get("cross_entropy"),), {"__module__": "some_plugin.losses"})
    registry.losses.register("plugin_loss")(plugin)
    assert "plugin_loss" in registry.losses.names()
    assert generate.components_block() == COMPONENTS


def test_every_public_name_of_the_packages_is_on_the_python_page():
    written = generate.block(text(DOCS / "api.md"), "api")
    for package in api_page.PACKAGES:
        missing = [name for name in api_page.public_names(package) if not re.search(rf"\b{name}\b", written)]
        assert missing == [], package


def test_checking_the_pages_writes_nothing_and_names_what_is_out_of_date(tmp_path, monkeypatch):
    kept = {block: generate.BLOCKS[block] for block in (("cli.md", "cli"), ("recipes.md", "recipes"))}
    for page, _ in kept:
        (tmp_path / page).write_text(text(DOCS / page), encoding="utf-8")
    edited = tmp_path / "cli.md"
    generate.refresh(edited, "cli", "an old help text")
    monkeypatch.setattr(generate, "DOCS", tmp_path)
    monkeypatch.setattr(generate, "BLOCKS", kept)
    assert generate.outdated() == ["cli.md"]
    assert "an old help text" in text(edited)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_internal_links_lead_to_files_and_headings_that_exist(page):
    targets = re.findall(r"\]\((?!https?://)([^)\s]+)\)", re.sub(r"```.*?```", "", text(page), flags=re.DOTALL))
    for target in targets:
        name, _, anchor = target.partition("#")
        path = page if not name else page.parent / name
        assert path.exists(), f"{page.name}: {target}"
        if anchor:
            slugs = {
                re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
                for heading in re.findall(r"^#+ (.*)$", text(path), re.MULTILINE)
            }
            assert anchor in slugs, f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_heading_skips_a_level(page):
    outside_code = re.sub(r"^```\w*\n.*?^```$", "", text(page), flags=re.DOTALL | re.MULTILINE)
    levels = [len(marks) for marks in re.findall(r"^(#+) ", outside_code, re.MULTILINE)]
    assert levels[0] == 1
    assert all(later <= earlier + 1 for earlier, later in pairwise(levels))


def test_every_page_is_on_the_index_once_with_a_line_about_it():
    listed = re.findall(r"^\* \[[^\]]+\]\(([\w-]+)\.md\): \S", text(DOCS / "index.md"), re.MULTILINE)
    assert sorted(listed) == sorted(page.stem for page in DOCS.glob("*.md") if page.stem != "index")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_page_uses_what_only_sphinx_understands(page):
    outside_code = re.sub(r"^```\w+\n.*?^```$", "", text(page), flags=re.DOTALL | re.MULTILINE)
    assert re.findall(r"^ *```\{.*|^ *:::.*|\{(?:doc|ref|py:\w+)\}`.*", outside_code, re.MULTILINE) == []


def test_the_recipes_in_the_documentation_load():
    """A part is completed by the quickstart; what extends something or states its schema is whole by itself."""
    pages = ("recipes.md", "own-model.md", "data.md")
    found = [tomllib.loads(code) for page in pages for code in blocks(DOCS / page, "toml")]
    assert len(found) == 11
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
        used = set(re.findall(r"(?<= )--[a-z-]+", rest))
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


def test_the_page_of_results_is_short_and_has_a_table_for_each_model_with_its_command():
    page = text(DOCS / "results.md")
    assert len(page.splitlines()) <= 150
    sections = re.findall(r"^## (The bundled|A real|The real).*?(?=^## )", page, re.DOTALL | re.MULTILINE)
    assert len(sections) == 5
    assert page.count("Reproduce: `spdfq bench benchmarks/") == 5
    assert len(re.findall(r"^\d+\. ", page, re.MULTILINE)) == 10


def test_a_machine_is_named_for_every_cell_of_a_table_with_several(monkeypatch):
    machines = iter(["one", "two"] * 1000)
    rows = [evolve(row, device_name=next(machines)) for row in rows_of("fmnist_swin_w3a3")]
    monkeypatch.setattr(results_page, "rows_of", lambda name: rows)
    (table,) = [table for table in results_page.TABLES if "Swin" in table.title]
    written = results_page._model(table)
    assert "| real images (reference) | 81.2 ± 1.4 (3) ab |" in written
    assert "Machines: **a** one, float32 (commit not recorded); **b** two, float32" in written


def test_the_leaderboard_has_every_row_and_loads_nothing():
    page = text(leaderboard.PAGE)
    assert page == leaderboard.leaderboard_page(), "run: python docs/generate.py"
    assert not re.search(r"(?:src|href)=.?(?:https?:)?//|@import|url\(", page)
    lines = json.loads(re.search(r'type="application/json">(.*?)</script>', page, re.DOTALL)[1])
    files = (ROOT / "benchmarks/results").glob("*.jsonl")
    assert sum(len(line["all"]) for line in lines) == sum(len(text(path).splitlines()) for path in files)


def test_the_leaderboard_compares_with_noise_of_the_same_file_back_end_machine_and_commit():
    (line,) = (line for line in leaderboard._lines(RESULTS / "fmnist_d4c.jsonl") if line["images"].startswith("D4C"))
    (noise,) = (line for line in leaderboard._lines(RESULTS / "fmnist_d4c.jsonl") if line["images"] == "Gaussian noise")
    assert line["over"] == pytest.approx(line["top1"] - noise["top1"], abs=0.01)
    assert re.fullmatch(r"\[\d+\.\d, \d+\.\d\]", line["interval"])  # with per-image results, so without a star
    assert (noise["over"], noise["interval"]) == (None, "")
    old = leaderboard._lines(RESULTS / "fmnist_swin_w3a3.jsonl")
    assert {line["interval"][-1:] for line in old} == {"", "*"}


def test_the_plots_show_the_rows_of_today():
    assert plots.outdated() == [], "run: python docs/generate.py"


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
