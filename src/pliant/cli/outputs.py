"""Sample files: one sheet, a folder of pictures, ADM's .npz, or latents. Recipes go with all of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pliant import imaging
from pliant.cli.labels import class_name
from pliant.cli.recipe import Recipe
from pliant.cli.sampling import png
from pliant.files import replaced_file, write_json

if TYPE_CHECKING:
    from torch import Tensor

    from pliant.denoiser import Denoiser


def write_sheet(file: Path, batches: Iterable[Tensor], recipe: Recipe, zoom: int | None, visible: int) -> list[str]:
    """All images in one PNG, row by row."""
    import torch

    pixels = torch.cat([imaging.to_pixels(b) for b in batches])
    height, width = pixels.shape[-2:]
    recipe = replace(recipe, zoom=zoom or imaging.zoom_for(height, width, visible))
    with replaced_file(file) as temporary:
        temporary.write_bytes(png(recipe, pixels))
    return [str(file)]


def write_folder(folder: Path, batches: Iterable[Tensor], recipe: Recipe, model: Denoiser, zoom: int) -> list[str]:
    """One PNG per image, written as soon as its batch is done; the name says place, class and seed."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = replace(recipe, columns=1, zoom=zoom)
    files = []
    for number, batch in enumerate(batches):
        first = number * recipe.batch_size
        for k, pixels in enumerate(imaging.to_pixels(batch), start=first):
            part = recipe.part(first, len(batch), (k,), model)
            name = "".join(c if c.isalnum() else "-" for c in class_name(recipe.classes[k], model))[:40]
            file = folder / f"{k:05d}-{name}-seed{recipe.seeds[k]}.png"
            with replaced_file(file) as temporary:
                temporary.write_bytes(png(part, pixels[None]))
            files.append(str(file))
    return files


def write_arrays(file: Path, batches: Iterable[Tensor], recipe: Recipe) -> list[str]:
    """ADM's .npz (`arr_0` uint8 NHWC, `arr_1` labels); latents as `arr_0` float32 NCHW. Recipe beside it as .json."""
    import numpy as np
    import torch

    from pliant.evaluation.npz import write_npz

    labels = torch.tensor(recipe.classes, dtype=torch.int64)
    everything = list(batches)
    with replaced_file(file) as temporary:
        if everything[0].shape[1] in (1, 3):
            write_npz(temporary, torch.cat([imaging.to_pixels(b) for b in everything]), labels)
        else:
            with open(temporary, "wb") as handle:  # an open file keeps numpy from appending ".npz"
                np.savez(handle, arr_0=torch.cat(everything).float().numpy(), arr_1=labels.numpy())
    beside = file.with_suffix(".json")
    write_json(beside, recipe.to_dict())
    return [str(file), str(beside)]


def write_latents(file: Path, batches: Iterable[Tensor], recipe: Recipe) -> list[str]:
    """safetensors: samples float32 (N, C, H, W), classes and seeds int64 (N,); the recipe in the file's metadata."""
    import torch
    from safetensors.torch import save_file

    tensors = {
        "samples": torch.cat(list(batches)).float().contiguous(),
        "classes": torch.tensor(recipe.classes, dtype=torch.int64),
        "seeds": torch.tensor(recipe.seeds, dtype=torch.int64),
    }
    with replaced_file(file) as temporary:
        save_file(tensors, temporary, metadata={imaging.RECIPE_KEY: json.dumps(recipe.to_dict())})
    return [str(file)]
