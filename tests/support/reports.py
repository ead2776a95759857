"""A run folder with every file that a report shows, and its page."""

import json
from html.parser import HTMLParser

import torch
from torch import nn

from spdfq.report import write_pictures, write_report
from spdfq.synth.base import SyntheticImages
from spdfq.teacher import Teacher

VOID = {"meta", "img", "line", "polygon", "polyline"}


class Page(HTMLParser):
    """The tags, headings and text of a page; refuses one whose tags do not nest."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.words, self.attributes = [], [], [], []
        self.feed(html)
        assert not self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.words.append(data)


def teacher(channels=1, mean=0.5, std=0.25):
    size = (channels, 4, 4)
    module = nn.Sequential(nn.Flatten(), nn.Linear(channels * 16, 2))
    return Teacher(module, mean=[mean] * channels, std=[std] * channels, num_classes=2, input_size=size, name="tiny")


def run_json():
    return {
        "name": "trial",
        "started": "2026-01-18T09:14:03+00:00",
        "versions": {"spdfq": "0.1.0", "torch": "2.14.0"},
        "device": "cpu",
        "device_name": "a processor",
        "precision": "float32",
        "threads": 2,
        "git_commit": None,
        "seed": 0,
        "model": {"name": "tiny", "parameters": 250_000, "input_size": [1, 4, 4], "num_classes": 2},
        "images": {"type": "optimize", "count": 2},
        "backend": {"label": "W4A4", "placement": "matmul_inputs", "steps": ["calibrate", "blockwise"]},
        "metrics": {
            "images": 2000,
            "fp": {"top1": 91.14, "top5": 99.8},
            "quantized": {"top1": 89.86, "top5": 99.7},
            "agreement": 95.25,
            "simulated": True,
        },
        "stages": {
            "images": {"seconds": 46.2, "reused": False, "key": "a"},
            "quantize": {"seconds": 0.01, "reused": True, "key": "b"},
        },
        "warnings": [],
    }


def page(folder, **changes):
    (folder / "run.json").write_text(json.dumps(run_json() | changes))
    return write_report(folder).read_text(encoding="utf-8")


def whole_folder(folder):
    """A run folder with every optional piece."""
    images = SyntheticImages(
        images=torch.zeros(2, 1, 4, 4),
        curves=torch.rand(1, 30, 2, generator=torch.Generator().manual_seed(0)),
        columns=("total", "gradient"),
        prior=torch.rand(2, 1, 2, 2, generator=torch.Generator().manual_seed(1)),
        reached=torch.rand(2, 1, 2, 2, generator=torch.Generator().manual_seed(2)),
    )
    write_pictures(folder, images, teacher())
    (folder / "recipe.toml").write_text('seed = 0\n\n[model]\nname = "tiny"\n')
    sites = {
        "quantized": [
            {"name": f"blocks.{i}.fc.weight", "kind": "weight", "quantizer": "uniform", "bits": bits}
            | {"granularity": "channel", "shape": [8, 6]}
            for i, bits in enumerate((4, 8, 4))
        ],
        "float": [{"name": "norm", "what": "LayerNorm", "parameters": 1200}],
    }
    (folder / "sites.json").write_text(json.dumps(sites))
    return folder
