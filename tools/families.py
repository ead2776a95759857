"""The timm families with attention, each with a small member, and three networks of other libraries.

The depth of a member is reduced where its library allows it.
"""

from typing import Any

from attrs import field, frozen
from torch import nn


@frozen
class Family:
    """A family: its name, a member, the member's input side, and the options to build it with."""

    name: str
    member: str
    side: int = 224
    options: dict[str, Any] = field(factory=dict)
    classes: int = 10

    @property
    def size(self) -> tuple[int, int]:
        return self.side, self.side

    def build(self) -> nn.Module:
        """The member with random weights; its ``library/`` is timm unless it is named."""
        library, _, member = self.member.rpartition("/")
        return _BUILDERS[library or "timm"](member, self.classes, self.options)


def _of_timm(member: str, classes: int, options: dict[str, Any]) -> nn.Module:
    import timm

    module: nn.Module = timm.create_model(member, pretrained=False, num_classes=classes, **options)
    return module


def _of_torchvision(member: str, classes: int, options: dict[str, Any]) -> nn.Module:
    import torchvision

    module: nn.Module = torchvision.models.get_model(member, weights=None, num_classes=classes, **options)
    return module


def _of_open_clip(member: str, _: int, options: dict[str, Any]) -> nn.Module:
    import open_clip

    module: nn.Module = open_clip.create_model(member, pretrained=None, **options).visual
    return module


def _of_transformers(member: str, classes: int, options: dict[str, Any]) -> nn.Module:
    import transformers

    config = transformers.ViTConfig(num_labels=classes, **options)
    module: nn.Module = getattr(transformers, member)(config)
    return module


_BUILDERS = {
    "timm": _of_timm,
    "torchvision": _of_torchvision,
    "open_clip": _of_open_clip,
    "transformers": _of_transformers,
}


def _plain(name: str, member: str, side: int = 64, **options: Any) -> Family:
    return Family(name, member, side, {"img_size": side, "depth": 2, "embed_dim": 192, "num_heads": 3, **options})


def _sized(name: str, member: str, side: int, **options: Any) -> Family:
    return Family(name, member, side, {"img_size": side, **options})


def _any(name: str, member: str, side: int = 64, **options: Any) -> Family:
    return Family(name, member, side, options)


FAMILIES = [
    _plain("ViT", "vit_tiny_patch16_224"),
    _plain("ViT, average pooling", "vit_base_patch16_siglip_gap_224"),
    _plain("ViT, parallel blocks", "vit_small_patch16_18x2_224"),
    _plain("FlexiViT", "flexivit_small"),
    _plain("ViT with relative positions", "vit_relpos_small_patch16_224"),
    _plain("ViT with RoPE", "vit_small_patch16_rope_224"),
    _sized("ViT hybrid", "vit_tiny_r_s16_p8_224", 64, depth=2),
    _plain("DeiT", "deit_tiny_patch16_224"),
    _plain("DeiT, distilled", "deit_tiny_distilled_patch16_224"),
    _plain("DeiT III", "deit3_small_patch16_224"),
    _plain("DINOv2", "vit_small_patch14_dinov2", 56),
    _plain("DINOv2, registers", "vit_small_patch14_reg4_dinov2", 56),
    _plain("DINOv3", "vit_small_patch16_dinov3"),
    _plain("CLIP", "vit_base_patch32_clip_224"),
    _plain("SigLIP", "vit_base_patch16_siglip_224"),
    _plain("AIMv2", "aimv2_large_patch14_224", 56),
    _plain("SAM", "samvit_base_patch16_224"),
    Family("NaFlexViT", "naflexvit_base_patch16_gap", 64, {"depth": 2, "embed_dim": 192, "num_heads": 3}),
    _sized("ViTamin", "vitamin_small_224", 64),
    _plain("BEiT", "beit_base_patch16_224"),
    _plain("BEiT v2", "beitv2_base_patch16_224"),
    _plain("EVA", "eva_giant_patch14_224", 56),
    _plain("EVA-02", "eva02_tiny_patch14_224", 56),
    _sized("Gemma 4", "gemma4_vit_167m", 64, depth=2),
    _sized("Qwen3", "qwen3_vit_88m", 64, depth=2),
    _sized("DeepSeek", "deepseek_vit_412m", 84, depth=2),
    _plain("Perception Encoder", "vit_pe_core_tiny_patch16_384"),
    _sized("Swin", "swin_tiny_patch4_window7_224", 64, window_size=4, depths=(2, 2)),
    _sized("Swin v2", "swinv2_tiny_window8_256", 64, window_size=4, depths=(2, 2)),
    _sized("Swin v2 (CR)", "swinv2_cr_tiny_224", 64, depths=(2, 2), window_size=4),
    _sized("CaiT", "cait_xxs24_224", 64, depth=2),
    _sized("XCiT", "xcit_nano_12_p16_224", 64, depth=2),
    _sized("MViTv2", "mvitv2_tiny", 64),
    _sized("MViTv2, class token", "mvitv2_small_cls", 64),
    _any("LeViT", "levit_128s", 224),
    _sized("VOLO", "volo_d1_224", 64),
    _sized("PiT", "pit_ti_224", 224),
    _sized("Twins PCPVT", "twins_pcpvt_small", 64, depths=(1, 1, 1, 1)),
    _sized("Twins SVT", "twins_svt_small", 224, depths=(1, 1, 2, 2)),
    _any("PVT v2", "pvt_v2_b0", 64),
    _any("PVT v2, linear", "pvt_v2_b2_li", 64),
    _sized("CrossViT", "crossvit_tiny_240", 240),
    _sized("CoaT", "coat_tiny", 64),
    _sized("CoaT-Lite", "coat_lite_tiny", 64),
    _sized("ConViT", "convit_tiny", 64, depth=12),
    _any("DaViT", "davit_tiny", 224),
    _any("GCViT", "gcvit_xxtiny", 224),
    _any("MaxViT", "maxvit_rmlp_pico_rw_256", 256),
    _any("CoAtNet", "coatnet_nano_rw_224", 224),
    _any("MaxxViT", "maxxvit_rmlp_nano_rw_256", 256),
    _sized("Hiera", "hiera_tiny_224", 224),
    _any("Hiera (SAM 2)", "sam2_hiera_tiny", 224),
    _sized("NesT", "nest_tiny_jx", 224),
    _any("TinyViT", "tiny_vit_5m_224", 224),
    _any("EfficientViT (MIT)", "efficientvit_b0", 64),
    _any("EfficientViT (MSRA)", "efficientvit_m0", 224),
    _any("EfficientFormer", "efficientformer_l1", 224),
    _any("EfficientFormer v2", "efficientformerv2_s0", 224),
    _any("FastViT", "fastvit_sa12", 64),
    _any("MobileViT", "mobilevit_xxs", 64),
    _any("MobileViT v2", "mobilevitv2_050", 64),
    _any("MobileNet v4, hybrid", "mobilenetv4_hybrid_medium", 128),
    _any("EdgeNeXt", "edgenext_xx_small", 64),
    _any("Visformer", "visformer_tiny", 224),
    _sized("TNT", "tnt_s_patch16_224", 64, depth=2),
    _any("CAFormer", "caformer_s18", 64),
    _any("Next-ViT", "nextvit_small", 64),
    _any("SHViT", "shvit_s1", 128),
    _any("SwiftFormer", "swiftformer_xs", 64),
    _any("iFormer", "iformer_t", 64),
    _any("LowFormer", "lowformer_b0", 64),
    _any("CPUBone", "cpubone_b0_bfrobust", 64),
    _any("EfficientViM", "efficientvim_m1", 224),
    _any("CSATv2", "csatv2", 512),
    _any("ResNet with attention pooling", "resnet50_clip", 224),
    _any("BoTNet", "botnet26t_256", 256),
    _any("HaloNet", "halonet26t", 256),
    _any("LambdaNet", "lambda_resnet26t", 256),
    Family("torchvision's ViT", "torchvision/vit_b_16", 64, {"image_size": 64}),
    Family("CLIP's image tower", "open_clip/ViT-B-32", 224, classes=512),
    Family(
        "Hugging Face's ViT", "transformers/ViTForImageClassification", 64, {"image_size": 64, "num_hidden_layers": 2}
    ),
]
