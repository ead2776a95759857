"""Commands that show components and recipes: list, show, init."""

import difflib
import shutil
import textwrap

import click
from spdfq_cli.options import note

from spdfq.errors import SpdfqError

_WIDEST = 120
_INDENT = " " * 6


@click.command("list")
@click.argument("kind", required=False)
def list_(kind: str | None) -> None:
    """List components and recipes, or one KIND."""
    for name in [known(kind)] if kind else kinds():
        if not kind:
            click.secho(f"{name}", bold=True)
        click.echo("\n".join(rows(name, paper=bool(kind))) + ("" if kind else "\n"))
    _tell_broken_plugins()


@click.command()
@click.argument("first", metavar="[KIND]")
@click.argument("second", metavar="NAME", required=False)
def show(first: str, second: str | None) -> None:
    """Show one component or recipe in full.

    The KIND can be left out for a name that only one kind has.
    """
    kind, name = (known(first), second) if second else (kind_of(first), first)
    if kind == "recipe":
        click.echo(recipe(name), nl=False)
    else:
        click.echo("\n".join(component(kind, name)))


@click.command()
@click.argument("name")
def init(name: str) -> None:
    """Print a commented recipe to start from."""
    from spdfq.recipe import load_recipe
    from spdfq.recipe.commented import commented
    from spdfq.recipe.describe import recipe_summary

    click.echo(commented(load_recipe(name), recipe_summary(name)), nl=False)


def kinds() -> list[str]:
    """All kinds, recipes last."""
    from spdfq.registry import REGISTRIES

    return [*REGISTRIES, "recipe"]


def known(kind: str) -> str:
    """The kind itself; an unknown kind is an error that names the nearest one."""
    if kind in kinds():
        return kind
    near = difflib.get_close_matches(kind, kinds(), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise SpdfqError(f"unknown kind {kind!r}{hint} (kinds: {', '.join(kinds())})")


def kind_of(name: str) -> str:
    """The kind of a component or recipe; a name that no kind or several kinds have is an error."""
    if name.endswith(".toml"):
        return "recipe"
    if name in kinds():
        raise SpdfqError(f"{name}: is a kind; give a NAME after it ('spdfq list {name}' shows its names)")
    having = [kind for kind in kinds() if name in names(kind)]
    if len(having) > 1:
        raise SpdfqError(f"{name}: is the name of a {' and of a '.join(having)}; give the kind before the name")
    if not having:
        near = difflib.get_close_matches(name, [known for kind in kinds() for known in names(kind)], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise SpdfqError(f"{name}: no component or recipe of that name{hint} ('spdfq list' shows all)")
    return having[0]


def names(kind: str) -> list[str]:
    """The names of all components or recipes of a kind."""
    from spdfq.recipe import shipped
    from spdfq.registry import registry

    return shipped() if kind == "recipe" else registry(kind).names()


def rows(kind: str, paper: bool) -> list[str]:
    """Each name of a kind with its summary, wrapped to the terminal's width with a hanging indent."""
    from spdfq.recipe import shipped
    from spdfq.recipe.describe import plain, recipe_summary
    from spdfq.registry import registry

    found: list[tuple[str, str, str | None]]
    if kind == "recipe":
        found = [(name, recipe_summary(name), None) for name in shipped()]
    else:
        entries = [registry(kind).entry(name) for name in registry(kind).names()]
        found = [(entry.name, plain(entry.summary), entry.paper) for entry in entries]
    width = max((len(name) for name, _, _ in found), default=0)
    lines: list[str] = []
    for name, summary, cited in found:
        text = f"{summary} [{cited}]" if paper and cited else summary
        lines += _wrapped(text, f"  {name:<{width}}  ", " " * (width + 4)) or [f"  {name}"]
    return lines


def recipe(name: str) -> str:
    """A recipe with every default written out, or a part merged with what it extends."""
    from spdfq.recipe import load_recipe, resolve, toml
    from spdfq.recipe.files import is_complete

    part = not name.endswith(".toml") and not is_complete(name)
    return toml.dumps(resolve(name) if part else load_recipe(name).to_dict())


def component(kind: str, name: str) -> list[str]:
    """A component with its keys, documentation, paper and source."""
    from spdfq.recipe.describe import body, describe, plain
    from spdfq.registry import registry

    entry = registry(kind).entry(name)
    lines = [f"{kind} {name}", *_wrapped(plain(entry.summary), "  ", "  "), ""]
    for field in describe(entry.component):
        lines += [f"  {field.name} = {field.default}    {field.type}", *_wrapped(field.doc, _INDENT, _INDENT), ""]
    text = [*body(entry.component).splitlines(), ""] if body(entry.component) else []
    paper = [f"paper   {entry.paper}"] if entry.paper else []
    return [*lines, *text, *paper, f"source  {entry.module}:{entry.line}"]


def _wrapped(text: str, first: str, rest: str) -> list[str]:
    """Text wrapped to the terminal's width, at least 30 characters a line, behind two indents of equal length."""
    width = max(min(shutil.get_terminal_size().columns, _WIDEST), len(rest) + 30)
    return textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )


def _tell_broken_plugins() -> None:
    from spdfq.registry import plugin_failures

    for plugin, why in plugin_failures.items():
        note(f"warning: plugin {plugin!r} failed to import: {why}")
