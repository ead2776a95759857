"""Helpers for tests of saved models."""

import json

from spdfq.recipe import digest


def edited(folder, change):
    """The folder, with its config changed and a digest that fits."""
    config = json.loads((folder / "config.json").read_text())
    config.pop("config_digest")
    change(config)
    (folder / "config.json").write_text(json.dumps({**config, "config_digest": digest(config)}))
    return folder
