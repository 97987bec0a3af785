"""Running recipes: pixels or latents, batch by batch, and the pictures made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from pliant import imaging
from pliant.cli.console import Advance
from pliant.cli.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor

    from pliant.denoiser import Denoiser
    from pliant.plans import AnyPlan

Decode = Callable[["Tensor"], "Tensor"]


def run_batches(
    model: Denoiser,
    plan: AnyPlan,
    classes: tuple[int, ...],
    seeds: tuple[int, ...],
    batch_size: int,
    advance: Advance,
    decode: Decode | None = None,
) -> Iterator[Tensor]:
    """Samples in order, `batch_size` at a time: (B, C, H, W) on the CPU, decoded if there is a decoder."""
    from pliant.plans import Plan, RoutedSampler, Sampler
    from pliant.plans.sampling import check_labels

    check_labels(list(classes), model)
    batches = range(0, len(classes), batch_size)
    if not isinstance(plan, Plan):
        routed = RoutedSampler(model, plan)
        for number, start in enumerate(batches):
            part = slice(start, start + batch_size)
            found = routed(list(classes[part]), list(seeds[part]))
            advance(number + 1, len(batches))
            yield (found if decode is None else decode(found)).cpu()
        return
    sampler = Sampler(model, plan)
    total = len(batches) * len(plan.steps)
    for number, start in enumerate(batches):
        x = None
        part = slice(start, start + batch_size)
        for result in sampler.steps(list(classes[part]), list(seeds[part])):
            x = result.x
            advance(number * len(plan.steps) + result.index + 1, total)
        if x is not None:  # a plan has at least one step
            yield (x if decode is None else decode(x)).cpu()


def picture(recipe: Recipe, pixels: Tensor) -> Tensor:
    """(N, C, H, W) uint8, what the recipe shows in order -> the one picture (C, H', W')."""
    return imaging.grid(imaging.enlarged(pixels, recipe.zoom), recipe.columns)


def png(recipe: Recipe, pixels: Tensor) -> bytes:
    """The file: the picture with its recipe inside."""
    return imaging.encode_png(picture(recipe, pixels), recipe.to_dict())


def run_pixels(recipe: Recipe, model: Denoiser, decode: Decode | None, advance: Advance) -> Tensor:
    """(N, C, H, W) uint8 of what the recipe shows."""
    import torch

    from pliant.plans import read_plan

    plan = read_plan(recipe.plan)
    batches = run_batches(model, plan, recipe.classes, recipe.seeds, recipe.batch_size, advance, decode)
    return imaging.to_pixels(torch.cat(list(batches)))[list(recipe.shows)]
