"""Tiny models of timm's own classes: 32x32 colour images, a 4x4 token grid, dimension 32, two blocks of two heads."""

import timm
import torch

_COMMON = {"img_size": 32, "num_classes": 10}
_PLAIN = {**_COMMON, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
_BUILDERS = {
    "vit": ("vit_tiny_patch16_224", _PLAIN),
    "deit_distilled": ("deit_tiny_distilled_patch16_224", _PLAIN),
    "dinov2_registers": ("vit_small_patch14_reg4_dinov2", _PLAIN),
    "beit": ("beit_base_patch16_224", _PLAIN),
    "eva02": ("eva02_tiny_patch14_224", _PLAIN),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {**_COMMON, "patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2)},
    ),
}
ARCHITECTURES = list(_BUILDERS)


def build(name, **changes):
    """The same weights each time, larger than at initialisation so that attention is far from uniform."""
    entrypoint, arguments = _BUILDERS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(entrypoint, **{**arguments, **changes})
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()
