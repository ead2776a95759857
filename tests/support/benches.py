"""A bench file and its parents."""

from support.recipes import NO_IMAGES

NOISE = '[synthesis]\ntype = "gaussian_noise"\nimages = 4\n'
OPTIMIZED = """
[synthesis]
type = "optimize"
images = 4
iterations = 2
[synthesis.losses.cross_entropy]
"""
BENCH = """
schema = 1
seeds = [0, 1, 2]
[base]
extends = ["base.toml"]
[parents]
images = ["images/noise.toml", "images/optimized.toml"]
[keys]
"quantization.weights.bits" = [3, 4]
"""


def bench_files(folder):
    """Write a bench's parents into a folder, and give what writes a bench file beside them and gives its path."""
    (folder / "images").mkdir()
    (folder / "base.toml").write_text(NO_IMAGES)
    (folder / "images/noise.toml").write_text(NOISE)
    (folder / "images/optimized.toml").write_text(OPTIMIZED)

    def write(text=BENCH, name="bits.toml"):
        (folder / name).write_text(text)
        return str(folder / name)

    return write
