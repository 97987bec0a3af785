"""Train the small classifiers whose features Pliant measures with, and write them as package assets.

    OMP_NUM_THREADS=1 python scripts/train_extractor.py digits
    OMP_NUM_THREADS=1 python scripts/train_extractor.py cifar10 --data ../shared/data

Writes config.json, model.safetensors (float16) and README.md (the card: command, seed, time, hardware,
measured accuracy) to src/pliant/assets/extractors/<name>/. One seed fixes initialisation, order and
augmentation; with the same torch build, thread count and processor the weights repeat bit for bit. One
configuration was trained once per data set: the test split chose nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from pliant.evaluation.images import digits, images_from_parquet
from pliant.evaluation.networks import ConvClassifier, ConvClassifierConfig

ASSETS = Path(__file__).resolve().parents[1] / "src" / "pliant" / "assets" / "extractors"


@dataclass(frozen=True)
class Recipe:
    name: str
    config: ConvClassifierConfig
    epochs: int
    batch: int
    rate: float  # peak learning rate of Nesterov SGD, linear warm-up then linear decay to zero
    pad: int  # random crops after this much reflected border, in pixels
    flip: bool  # mirrored digits are not digits
    autocast: bool  # bfloat16 convolutions: faster where the processor multiplies bf16 natively
    data: str


DIGITS = Recipe(
    "digits-classifier", ConvClassifierConfig((8, 8), 1, 16, (32, 32), 10), 40, 64, 0.1, 1, False, False,
    "scikit-learn's bundled 8x8 digits (UCI optical recognition of handwritten digits, CC BY 4.0); "
    "index % 5 == 0 is held out",
)  # fmt: skip
CIFAR10 = Recipe(
    "cifar10-classifier", ConvClassifierConfig((32, 32), 3, 32, (64, 96, 128), 10),
    11, 256, 0.3, 4, True, True,
    "CIFAR-10 (Krizhevsky 2009), 50k train images, test accuracy on the 10k test images",
)  # fmt: skip


def augmented(x: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Random crop out of a reflected border, random flip; each image draws its own.  (B, C, H, W) -> same."""
    b, c, h, w = x.shape
    p = recipe.pad
    wide = F.pad(x, (p, p, p, p), mode="reflect")
    rows = torch.randint(0, 2 * p + 1, (b, 1), generator=generator) + torch.arange(h)  # (B, H)
    cols = torch.randint(0, 2 * p + 1, (b, 1), generator=generator) + torch.arange(w)  # (B, W)
    if recipe.flip:
        mirrored = torch.rand(b, 1, generator=generator) < 0.5
        cols = torch.where(mirrored, cols.flip(1), cols)
    n, ch = torch.arange(b)[:, None, None, None], torch.arange(c)[None, :, None, None]
    return wide[n, ch, rows[:, None, :, None], cols[:, None, None, :]]


@torch.no_grad()
def accuracy(model: ConvClassifier, x: Tensor, y: Tensor) -> float:
    model.eval()
    hits = sum(int((model(a).argmax(1) == b).sum()) for a, b in zip(x.split(500), y.split(500), strict=True))
    return hits / len(y)


def train(recipe: Recipe, x: Tensor, y: Tensor, seed: int) -> ConvClassifier:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = ConvClassifier(recipe.config)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=recipe.rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    per_epoch = len(x) // recipe.batch
    total = per_epoch * recipe.epochs
    warm = total // 5
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: (i + 1) / warm if i < warm else max(0.0, (total - i) / (total - warm))
    )
    start = time.perf_counter()
    for epoch in range(recipe.epochs):
        model.train()
        order = torch.randperm(len(x), generator=generator)[: per_epoch * recipe.batch]
        loss_sum = 0.0
        for index in order.split(recipe.batch):
            batch = augmented(x[index], recipe, generator).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe.autocast):
                loss = F.cross_entropy(model(batch), y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            loss_sum += loss.item()
        seconds = time.perf_counter() - start
        print(
            f"epoch {epoch + 1}/{recipe.epochs}  train loss {loss_sum / per_epoch:.4f}  {seconds:.0f} s",
            flush=True,
        )
    return model


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), platform.machine())


def card(recipe: Recipe, command: str, seed: int, seconds: float, train_acc: float, test_acc: float, n: int) -> str:
    c = recipe.config
    precision = "bfloat16 autocast" if recipe.autocast else "float32"
    flips = ", flips" if recipe.flip else ""
    threads = torch.get_num_threads()
    return f"""# {recipe.name}

A small residual convolutional classifier. Its {c.widths[-1]} globally averaged features are the space in
which Pliant measures "Fréchet distance ({recipe.name})" offline. The number orders models of this data
set; it is **not** an FID and is not comparable with one.

- Input: ({c.in_channels}, {c.input_size[0]}, {c.input_size[1]}) in [-1, 1]; weights stored in float16,
  computed in float32.
- Data: {recipe.data}.
- Command: `{command}`
- Seed {seed}, {recipe.epochs} epochs, batch {recipe.batch}, Nesterov SGD to {recipe.rate} (warm-up, linear
  decay), weight decay 5e-4, crops from a {recipe.pad}-pixel reflected border{flips}, {precision}.
- Time: {seconds:.0f} s of training on {threads} thread(s) of {processor()} (shared machine),
  torch {torch.__version__}.
- Measured with the stored weights: **test accuracy {100 * test_acc:.2f} %** on {n} held-out images
  (train {100 * train_acc:.2f} % on the images as they are).
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=["digits", "cifar10"])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with cifar10-*.parquet")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ASSETS, help="assets folder to write into")
    args = parser.parse_args()
    torch.use_deterministic_algorithms(True)

    recipe = DIGITS if args.which == "digits" else CIFAR10
    if args.which == "digits":
        train_set, test_set = digits("train"), digits("test")
        data_argument = ""
    else:
        train_set = images_from_parquet(args.data / "cifar10-train.parquet")
        test_set = images_from_parquet(args.data / "cifar10-test.parquet")
        data_argument = " --data ../shared/data"
    x, y = train_set.tensors()
    start = time.perf_counter()
    model = train(recipe, x, y, args.seed)
    seconds = time.perf_counter() - start

    # Measure what is shipped: the float16 weights, read back into float32.
    state = {k: v.half().contiguous() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    test_x, test_y = test_set.tensors()
    test_acc, train_acc = accuracy(model, test_x, test_y), accuracy(model, x, y)

    folder = args.out / recipe.name
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors")
    config = {
        "name": recipe.name,
        "network": recipe.config.to_dict(),
        "seed": args.seed,
        "test_accuracy": round(test_acc, 4),
        "test_images": len(test_y),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    threads = os.environ.get("OMP_NUM_THREADS")
    prefix = f"OMP_NUM_THREADS={threads} " if threads else ""
    command = f"{prefix}python scripts/train_extractor.py {args.which}{data_argument} --seed {args.seed}"
    (folder / "README.md").write_text(card(recipe, command, args.seed, seconds, train_acc, test_acc, len(test_y)))
    print(f"{folder}: test accuracy {test_acc:.4f}, train accuracy {train_acc:.4f}, {seconds:.0f} s")


if __name__ == "__main__":
    main()
