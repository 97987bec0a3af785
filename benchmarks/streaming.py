"""Streams on the bundled digits model: what the stream batch, virtual negatives and the filter save, and what they do.

    python benchmarks/streaming.py [--model digits] [--frames 120] [--rounds 7] [--picture out.png] [--json out.json]

One thread. Input: every class's digits, each kept for `HOLD` frames (a still camera), rough: noise of 0.5 on pixels in
[-1, 1]. Frames per second of processor time are of `Stream` alone, without files, medians over rounds; every round runs all
variants in turn, so that a slow moment of the machine hits all of them, and ratios are taken within a round. "sequential" runs the
same levels one call after the other. Quality: 50 frames per class, mean square distance to the clean digit and how often the bundled
classifier sees the digit that was asked for, on frames that are all different. The digits are the model's training data.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import pliant
from pliant import imaging
from pliant.evaluation.features import get_extractor
from pliant.tasks.streaming import (
    RENOISE,
    SimilarityFilter,
    Stream,
    StreamGuidance,
    even_levels,
    levels_plan,
    process,
)
from pliant.training.data.images import digits

HOLD, NOISE, STRENGTH = 4, 0.5, 0.6


def clip(label: int, count: int, hold: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(clean, rough) frames (count, 1, 8, 8) of one digit; a frame's noise stays while it is held."""
    data = digits(1, (8, 8), "all")
    pixels = data.pixels[data.labels == label]
    pixels = pixels if pixels.is_floating_point() else pixels.float() / 127.5 - 1.0
    clean = pixels[torch.arange(-(-count // hold)) % len(pixels)]
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
    rough = (clean + NOISE * noise).clamp(-1, 1)
    return clean.repeat_interleave(hold, 0)[:count], rough.repeat_interleave(hold, 0)[:count]


def push_all(stream: Stream, frames: Tensor) -> Callable[[], float]:
    """Processor seconds for all frames, from a full pipeline."""

    def run() -> float:
        stream.reset()
        for frame in frames[: len(stream.batch.levels)]:
            stream.push(frame)
        begun = time.process_time()
        for frame in frames:
            stream.push(frame)
        return time.process_time() - begun

    return run


def one_by_one(stream: Stream, frames: Tensor) -> Callable[[], float]:
    def run() -> float:
        begun = time.process_time()
        for frame in frames:
            stream.batch.one_by_one(frame[None])
        return time.process_time() - begun

    return run


def speed(model: pliant.Denoiser, count: int, rounds: int) -> list[dict[str, object]]:
    """Frames per second of every variant."""
    _, held = clip(3, count, HOLD)
    _, moving = clip(3, count, 1)
    variants: dict[str, Callable[[], float]] = {}
    for n in (1, 2, 4, 8):
        made = Stream(model, even_levels(STRENGTH, n), 3)
        variants[f"{n} levels, sequential"] = one_by_one(made, moving)
        variants[f"{n} levels, stream batch"] = push_all(made, moving)
    for negative in ("self", "onetime", "full"):
        made = Stream(model, even_levels(STRENGTH, 4), 3, StreamGuidance(negative))  # type: ignore[arg-type]
        variants[f"4 levels, stream batch, guidance {negative}"] = push_all(made, moving)
        variants[f"4 levels, sequential, guidance {negative}"] = one_by_one(made, moving)
    for frames, name in ((held, "still for 4 frames"), (moving, "moving")):
        made = Stream(model, even_levels(STRENGTH, 4), 3, filter=SimilarityFilter(0.98))
        variants[f"4 levels, stream batch, filter 0.98, {name}"] = push_all(made, frames)
    for run in variants.values():
        run()
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            taken[name].append(run())
    base = taken["4 levels, sequential"]
    rows = []
    for name, seconds in taken.items():
        ratios = [b / s for b, s in zip(base, seconds, strict=True)]
        own = taken.get(name.replace("stream batch", "sequential"))
        pairs = [a / b for a, b in zip(own, seconds, strict=True)] if own and own is not seconds else None
        rows.append(
            {
                "variant": name,
                "fps": count / statistics.median(seconds),
                "of_4_sequential": statistics.median(ratios),
                "of_own_sequential": statistics.median(pairs) if pairs else None,
            }
        )
    return rows


def quality(model: pliant.Denoiser, per_class: int) -> list[dict[str, object]]:
    """What the settings do to rough frames."""
    classifier = get_extractor("digits-classifier")
    rows = []
    settings = [("input", 0.0, "ddim", StreamGuidance())]
    for strength in (0.4, 0.6, 0.8):
        for solver in ("ddim", RENOISE):
            settings.append((f"strength {strength:g}", strength, solver, StreamGuidance()))
    for guidance in (
        StreamGuidance("self", 1.2),
        StreamGuidance("self", 1.2, 0.5),
        StreamGuidance("self", 0.8),
        StreamGuidance("onetime", 1.2),
        StreamGuidance("full", 1.2),
        StreamGuidance("full", 2.0),
    ):
        settings.append(("strength 0.6", 0.6, "ddim", guidance))
    for name, strength, solver, guidance in settings:
        distances, right = [], 0
        for label in range(10):
            clean, rough = clip(label, per_class, 1, seed=label)
            out = rough
            if strength:
                plan = levels_plan(model, even_levels(strength, 4), solver)
                stream = Stream(model, plan, label, guidance, frames=per_class)  # a block: the same outputs, faster
                (out,) = process(stream, [rough])
            distances.append(float((out.clamp(-1, 1) - clean).square().mean()))
            right += int((classifier.classify(classifier(out.clamp(-1, 1))) == label).sum())  # type: ignore[attr-defined]
        rows.append(
            {
                "setting": name,
                "solver": solver if strength else "",
                "guidance": guidance.negative,
                "scale": None if guidance.negative == "none" else guidance.scale,
                "delta": None if guidance.negative in ("none", "full") else guidance.delta,
                "mean_square": statistics.mean(distances),
                "class_accuracy": right / (10 * per_class),
            }
        )
    return rows


def picture(model: pliant.Denoiser, file: Path) -> None:
    """Rows: clean, rough input, output (4 levels from 0.6), and output by re-noising; columns: frames of a clip."""
    parts = []
    for label in (3, 8):
        clean, rough = clip(label, 10, 1, seed=label)
        rows = [clean, rough]
        for solver in ("ddim", RENOISE):
            plan = levels_plan(model, even_levels(STRENGTH, 4), solver)
            rows.append(torch.stack(list(process(Stream(model, plan, label), rough))))
        parts += rows
    pixels = imaging.enlarged(imaging.to_pixels(torch.cat(parts)), 6)
    file.write_bytes(imaging.encode_png(imaging.grid(pixels, 10)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits")
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = pliant.load(options.model)
    fast, good = speed(model, options.frames, options.rounds), quality(model, 50)
    print("| variant | frames per second | against 4 levels sequential | against itself sequential |\n|---|---|---|---|")
    for row in fast:
        own = "" if row["of_own_sequential"] is None else f"{row['of_own_sequential']:.2f}x"
        print(f"| {row['variant']} | {row['fps']:.0f} | {row['of_4_sequential']:.2f}x | {own} |")
    print("\n| setting | solver | guidance | mean square to clean | class accuracy |\n|---|---|---|---|---|")
    for row in good:
        guidance = "" if row["scale"] is None else f"{row['guidance']} {row['scale']:g}"
        guidance += "" if row["delta"] in (None, 1.0) else f", delta {row['delta']:g}"
        accuracy = f"{row['class_accuracy']:.1%}"
        print(f"| {row['setting']} | {row['solver']} | {guidance} | {row['mean_square']:.3f} | {accuracy} |")
    if options.picture:
        picture(model, options.picture)
    if options.json:
        options.json.write_text(json.dumps({"speed": fast, "quality": good}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
