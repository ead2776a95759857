"""Train the bundled models on Fashion-MNIST's training split and write ``spdfq/teacher/zoo``.

    apt-get install dataset-fashion-mnist
    python tools/train_bundled.py --model vit_fmnist
    python tools/train_bundled.py --model swin_fmnist
    python tools/train_bundled.py --splits      # the bundled test and training images

The models learn from the training split alone. The 10,000 test images are evaluated once per epoch for the printed
curve. They influence nothing: the weights of the last epoch are written.
"""

import gzip
import json
import math
import struct
import time
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from spdfq.teacher.zoo import BUNDLED

ZOO = Path(__file__).parents[1] / "spdfq" / "teacher" / "zoo"


def read_idx(path: Path) -> Tensor:
    """One gzipped IDX file of unsigned bytes as a uint8 tensor."""
    raw = gzip.decompress(path.read_bytes())
    dims = raw[3]
    shape = struct.unpack(f">{dims}I", raw[4 : 4 + 4 * dims])
    return torch.frombuffer(bytearray(raw[4 + 4 * dims :]), dtype=torch.uint8).reshape(shape)


def read_split(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images ``[n, 1, 28, 28]`` and labels ``[n]``; split is ``train`` or ``t10k``."""
    images = read_idx(folder / f"{split}-images-idx3-ubyte.gz").unsqueeze(1)
    return images, read_idx(folder / f"{split}-labels-idx1-ubyte.gz").long()


def normalised(images: Tensor, model: nn.Module) -> Tensor:
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
    return (images.float() / 255 - mean) / std


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image with probability one half and shift it by up to two pixels."""
    mirror = torch.rand(len(images), generator=generator) < 0.5
    images = torch.where(mirror.view(-1, 1, 1, 1), images.flip(-1), images)
    padded = F.pad(images, (2, 2, 2, 2), value=float(images.min()))
    offset = torch.randint(0, 5, (2, len(images), 1), generator=generator)
    rows, columns = (offset[axis] + torch.arange(images.shape[-1]) for axis in (0, 1))
    index = torch.arange(len(images)).view(-1, 1, 1)
    return padded[index, 0, rows.unsqueeze(2), columns.unsqueeze(1)].unsqueeze(1)


def optimizers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, which halves the number of epochs here, and AdamW for the rest."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and ("blocks" in n) and "table" not in n]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=lr * 10, weight_decay=0.05, momentum=0.95),
        torch.optim.AdamW(rest, lr=lr, weight_decay=0.05, betas=(0.9, 0.98)),
    ]


def one_cycle(step: int, total: int, warmup: float = 0.1) -> float:
    """Linear warm-up, then cosine to zero."""
    done = step / total
    return done / warmup if done < warmup else 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


@torch.no_grad()
def top1(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    hits = sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(500), labels.split(500), strict=True))
    model.train()
    return 100 * hits / len(labels)


def train(name: str, data: Path, epochs: int, lr: float, seed: int, batch: int) -> tuple[nn.Module, list[dict]]:
    torch.manual_seed(seed)
    model = BUNDLED[name].create()
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = name.startswith("swin")  # measured: which one trains faster on a CPU when compiled
    generator = torch.Generator().manual_seed(seed)
    images, labels = read_split(data, "train")
    images = normalised(images, model)
    test_images, test_labels = read_split(data, "t10k")
    test_images = normalised(test_images, model)
    optims = optimizers(model, lr)
    bases = [optim.param_groups[0]["lr"] for optim in optims]
    fast, steps, curve, start = torch.compile(model), len(images) // batch, [], time.time()
    for epoch in range(epochs):
        order, running = torch.randperm(len(images), generator=generator), 0.0
        for step in range(steps):
            for optim, base in zip(optims, bases, strict=True):
                optim.param_groups[0]["lr"] = base * one_cycle(epoch * steps + step, epochs * steps)
            chosen = order[step * batch : (step + 1) * batch]
            with torch.autocast("cpu", torch.bfloat16):
                logits = fast(augmented(images[chosen], generator))
            loss = F.cross_entropy(logits.float(), labels[chosen], label_smoothing=0.05)
            model.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optim in optims:
                optim.step()
            running += float(loss.detach())
        curve.append({"epoch": epoch + 1, "loss": running / steps, "test_top1": top1(model, test_images, test_labels)})
        print(json.dumps({**curve[-1], "seconds": round(time.time() - start)}), flush=True)
    return model.eval(), curve


def write_model(model: nn.Module, name: str, data: Path) -> float:
    """Save the weights as float16 and return the top-1 accuracy of the saved weights."""
    half = {key: value.detach().half().contiguous() for key, value in model.state_dict().items()}
    save_file(half, ZOO / f"{name}.safetensors")
    model.load_state_dict({key: value.float() for key, value in half.items()})
    images, labels = read_split(data, "t10k")
    return top1(model, normalised(images, model), labels)


def write_images(data: Path, split: str, per_class: list[int], seed: int, target: str) -> None:
    """The given number of images of each class, chosen by the seed, as uint8."""
    images, labels = read_split(data, split)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    chosen = torch.cat([order[labels[order] == label][:count] for label, count in enumerate(per_class)])
    chosen = chosen[torch.randperm(len(chosen), generator=generator)]
    tensors = {"images": images[chosen].contiguous(), "labels": labels[chosen].to(torch.uint8)}
    save_file(tensors, ZOO / f"{target}.safetensors", metadata={"source": "Fashion-MNIST (MIT licence), Zalando SE"})


@click.command(help=__doc__)
@click.option("--data", type=click.Path(exists=True, path_type=Path), default="/usr/share/datasets/fashion-mnist")
@click.option("--model", "name", type=click.Choice(sorted(BUNDLED)))
@click.option("--epochs", default=12, show_default=True)
@click.option("--lr", default=2e-3, show_default=True)
@click.option("--batch", default=128, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", type=int)
@click.option("--splits", is_flag=True, help="Write the bundled test (2,000) and training (256) images.")
def main(data, name, epochs, lr, batch, seed, threads, splits):
    if threads:
        torch.set_num_threads(threads)
    if splits:
        write_images(data, "t10k", [200] * 10, seed, "fmnist_test")
        write_images(data, "train", [26] * 6 + [25] * 4, seed, "fmnist_train")
    if name:
        model, curve = train(name, data, epochs, lr, seed, batch)
        settings = {"epochs": epochs, "lr": lr, "batch": batch, "seed": seed}
        result = {"model": name, **settings, "test_top1": write_model(model, name, data), "curve": curve}
        (ZOO.parents[2] / "docs").mkdir(exist_ok=True)
        (ZOO.parents[2] / "docs" / f"{name}-training.json").write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(result))


if __name__ == "__main__":
    main()
