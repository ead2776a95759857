"""The command line: options in, one call into spdfq, lines out."""

import difflib
from typing import Any

import click
from spdfq_cli.bench import bench
from spdfq_cli.card import card
from spdfq_cli.catalogue import init, list_, show
from spdfq_cli.compare import compare
from spdfq_cli.doctor import doctor
from spdfq_cli.export import export
from spdfq_cli.images import images
from spdfq_cli.measure import measure
from spdfq_cli.predict import predict
from spdfq_cli.run import check, evaluate, run

from spdfq.errors import SpdfqError, is_out_of_memory

INTERRUPTED = 130
# what `predict` on a file does without
_DEPENDENCIES = {"torch", "timm", "einops", "jinja2", "safetensors", "tomlkit", "filelock"}
_LESS_MEMORY = "lower synthesis.images or synthesis.group, or the batch of a step or of the evaluation"


class Commands(click.Group):
    """Commands that print a user's mistakes as lines; other errors keep their traceback."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Find a command; for an unknown name, suggest the nearest one."""
        name = args[0]
        near = difflib.get_close_matches(name, self.commands, n=1)
        if near and name not in self.commands:
            ctx.fail(f"no such command {name!r}; did you mean {near[0]!r}?")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; errors that the user can fix are printed without a traceback."""
        try:
            return super().invoke(ctx)
        except SpdfqError as error:
            for line in str(error).splitlines():
                click.echo(f"error: {line}", err=True)
            ctx.exit(2)
        except BrokenPipeError:
            raise  # the reader of the output has closed it; click exits without a message
        except ModuleNotFoundError as error:
            if error.name not in _DEPENDENCIES:
                raise
            click.echo(f"error: needs {error.name}, which is not installed: pip install spdfq", err=True)
            ctx.exit(2)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            said = str(error).partition("\n")[0] or type(error).__name__
            click.echo(f"error: out of memory ({said}); {_LESS_MEMORY}", err=True)
            ctx.exit(2)
        except OSError as error:
            place = f"{error.filename}: " if error.filename is not None else ""
            click.echo(f"error: {place}{error.strerror or error}", err=True)
            ctx.exit(2)
        except KeyboardInterrupt:
            click.echo("interrupted; run the same command again to go on", err=True)
            ctx.exit(INTERRUPTED)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="spdfq")
def main() -> None:
    """Quantize vision transformers without real images.

    \b
    spdfq run quickstart                     a 3-bit ViT beside noise and real images
    spdfq list                               all components and recipes
    spdfq init quickstart > my.toml          a recipe to edit, with every key explained
    spdfq check my.toml && spdfq run my.toml
    """


_COMMANDS = (run, evaluate, check, list_, show, init, bench, compare, measure, doctor, export, predict, images, card)
for command in _COMMANDS:
    main.add_command(command)
