"""The bundled models: small timm transformers trained on Fashion-MNIST, and a few of its images."""

from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from attrs import frozen

_DATA_CONFIG: dict[str, Any] = {
    "input_size": (1, 28, 28),
    "num_classes": 10,
    "mean": (0.2860,),
    "std": (0.3530,),
    "crop_pct": 1.0,
    "interpolation": "bilinear",
}


@frozen
class BundledModel:
    """A timm architecture, and the arguments that make it small."""

    entrypoint: str
    arguments: dict[str, Any]

    def create(self) -> Any:
        """Build the architecture with random weights; timm stores the input description as its ``pretrained_cfg``."""
        import timm

        return timm.create_model(
            self.entrypoint,
            pretrained=False,
            pretrained_cfg_overlay=dict(_DATA_CONFIG),
            img_size=_DATA_CONFIG["input_size"][1:],
            in_chans=_DATA_CONFIG["input_size"][0],
            num_classes=_DATA_CONFIG["num_classes"],
            **self.arguments,
        )


BUNDLED = {
    "vit_fmnist": BundledModel(
        "vit_tiny_patch16_224",
        {"patch_size": 4, "embed_dim": 96, "depth": 6, "num_heads": 3},
    ),
    "swin_fmnist": BundledModel(
        "swin_tiny_patch4_window7_224",
        {
            "patch_size": 2,
            "window_size": 7,
            "embed_dim": 48,
            "depths": (2, 4),
            "num_heads": (2, 4),
            "drop_path_rate": 0.0,
        },
    ),
}


def data_file(name: str) -> Path:
    """The path of a bundled file, for example ``vit_fmnist.safetensors``."""
    with as_file(files(__name__) / name) as path:
        return path
