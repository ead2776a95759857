"""The command line, called from within a test, and a small recipe for it."""

from click.testing import CliRunner
from spdfq_cli.main import main

from support.recipes import NO_IMAGES

SMALL = f"""
{NO_IMAGES}
[synthesis]
type = "optimize"
images = 4
iterations = 2
[synthesis.losses.attention_prior]
[synthesis.losses.soft_cross_entropy]
[synthesis.losses.total_variation]
weight = 0.05
"""


def small_recipe(folder):
    path = folder / "small.toml"
    path.write_text(SMALL)
    return str(path)


def spdfq(*arguments):
    return CliRunner().invoke(main, list(map(str, arguments)), prog_name="spdfq")
