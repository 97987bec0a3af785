"""`pliant encode`: images of any size to a cache of latents, nothing cropped."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pliant.cli import options as opt
from pliant.cli.console import emit_json, progress, table, warnings
from pliant.errors import ConfigError, PliantError, suggest

if TYPE_CHECKING:
    from torch import Tensor

    from pliant.training.data import AnySizeImages, LatentSet

EXAMPLES = """\b
Examples:
  pliant encode photos/ latents --autoencoder stabilityai/sd-vae-ft-ema --side 256 --patch 2
  pliant encode clothing-192px.parquet latents --autoencoder weights/taef2_encoder.pth --side 192 --flip
  pliant encode photos/ latents --autoencoder taef2/ --limit 64 --preview roundtrip.png
Train on the result with data.source=latents.
"""

PREVIEWED = 8


def register(app: typer.Typer) -> None:
    app.command("encode", epilog=EXAMPLES)(encode)


def encode(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Folder, Parquet file or glob, or Hub data set.", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of latents to write.", show_default=False)],
    autoencoder: Annotated[
        str, typer.Option("--autoencoder", help="Folder or Hub id; TAESD-like: folder or *_encoder.pth.")
    ],
    side: Annotated[
        int, typer.Option("--side", min=1, help="Images of more than SIDE*SIDE pixels are shrunk to that area.")
    ] = 256,
    crop: Annotated[
        float,
        typer.Option("--crop", min=0, max=1, help="Share of larger images cropped to SIDE x SIDE (FiTv2: 0.5)."),
    ] = 0.0,
    patch: Annotated[
        int, typer.Option("--patch", min=1, help="Latent sides become multiples of this patch size.")
    ] = 2,
    flip: Annotated[bool, typer.Option("--flip", help="Store mirrored images too.")] = False,
    dtype: Annotated[str, typer.Option("--dtype", help="Of the stored latents: fp32, bf16 or fp16.")] = "fp32",
    precision: Annotated[
        str, typer.Option("--precision", help="The autoencoder computes in fp32, bf16 or fp16.")
    ] = "fp32",
    split: Annotated[str, typer.Option("--split", help="Of a Hub data set.")] = "train",
    image_column: Annotated[str, typer.Option("--image-column")] = "image",
    label_column: Annotated[str, typer.Option("--label-column", help="Empty: no labels.")] = "label",
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Only the first so many images.", show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images of one size encoded at once.")] = 16,
    preview: Annotated[
        Path | None, typer.Option("--preview", help="PNG of images above what decoding gives back.", show_default=False)
    ] = None,
    device: opt.Device = None,
    json: opt.JSON = False,
) -> None:
    """Run images of any size and shape through an autoencoder once and keep the latents.

    Images keep their shape: larger ones shrink to SIDE*SIDE pixels, smaller ones stay, sides are rounded down to
    multiples of the autoencoder's factor times the patch. Channels are standardised when the latents are read.
    """
    import torch

    from pliant.cli.models import pick_device
    from pliant.models.autoencoders import downscale_factor, load_autoencoder
    from pliant.training.data import autoencoder_encode, cached_latents, open_any_size
    from pliant.training.setup_data import cropped

    types = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    for name in (dtype, precision):
        if name not in types:
            raise ConfigError(f"unknown number format {name!r}: {suggest(name, types)}")
    model = load_autoencoder(autoencoder).to(pick_device(device), types[precision])
    model = model.to(memory_format=torch.channels_last)  # a third faster on CPUs
    unit = downscale_factor(model) * patch
    channels = int(getattr(model.config, "in_channels", 3))
    images = open_any_size(source, channels, side, unit, split, image_column, label_column or None, limit, crop)
    key = f"{source} ({split}) within {side}x{side} by {unit}{cropped(crop)}, {autoencoder} in {precision}"
    try:
        with progress("encoding") as advance:
            latents = cached_latents(
                out,
                images,
                autoencoder_encode(model),
                key,
                flip=flip,
                batch_size=batch_size,
                dtype=types[dtype],
                advance=advance,
            )
        if preview is not None:
            _write_preview(preview, model, images)
    except OSError as error:
        raise PliantError(f"could not write {out}: {error.strerror or error}") from None
    _report(latents, images, out, preview, json)


def _write_preview(file: Path, autoencoder: Any, images: AnySizeImages) -> None:
    """Images spread over the set, each above its round trip."""
    import torch

    from pliant import imaging
    from pliant.files import replaced_file
    from pliant.models.autoencoders import decoded, encoded

    chosen = torch.linspace(0, len(images) - 1, min(PREVIEWED, len(images))).long().tolist()
    pairs = []
    for index in chosen:
        image = images.image(index)[None]
        pairs.append((image[0], decoded(autoencoder, encoded(autoencoder, image, None), None)[0].cpu()))
    tiles = [imaging.to_pixels(image) for row in zip(*pairs, strict=True) for image in row]
    with replaced_file(file) as temporary:
        temporary.write_bytes(imaging.encode_png(imaging.grid(_padded(tiles), len(pairs))))


def _padded(tiles: list[Tensor]) -> Tensor:
    """(N, C, H, W) uint8: tiles of any size in the middle of white ones of the largest."""
    height, width = (max(tile.shape[axis] for tile in tiles) for axis in (1, 2))
    sheet = tiles[0].new_full((len(tiles), tiles[0].shape[0], height, width), 255)
    for place, tile in zip(sheet, tiles, strict=True):
        top, left = (height - tile.shape[1]) // 2, (width - tile.shape[2]) // 2
        place[:, top : top + tile.shape[1], left : left + tile.shape[2]] = tile
    return sheet


def _report(latents: LatentSet, images: AnySizeImages, out: Path, preview: Path | None, json: bool) -> None:
    from pliant.training.data.sizes import size_groups

    counts = {size: len(members) for size, members in size_groups(latents.sizes)}
    written = sum(file.stat().st_size for file in out.iterdir())
    facts = {
        "out": str(out),
        "count": len(latents),
        "channels": latents.channels,
        "bytes": written,
        "sizes": [{"size": list(size), "count": count} for size, count in counts.items()],
        "classes": list(latents.class_names),
        "statistics": latents.statistics,
        "skipped": list(images.skipped),
        "preview": None if preview is None else str(preview),
    }
    if json:
        emit_json({**facts, "warnings": warnings()})
        return
    print(f"{out}: {len(latents)} latents of {latents.channels} channels, {written:,} bytes")
    rows = sorted(counts.items(), key=lambda item: -item[1])
    table(("latent size", "images"), [(f"{h}x{w}", str(n)) for (h, w), n in rows[:12]])
    if len(rows) > 12:
        print(f"and {len(rows) - 12} more sizes")
    if preview is not None:
        print(f"{preview}: images above what the autoencoder gives back")
