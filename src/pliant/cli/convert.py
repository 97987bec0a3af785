"""`pliant convert`: a model file in another format."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pliant.cli import options as opt
from pliant.cli.console import emit_json
from pliant.errors import ConfigError, PliantError, suggest

if TYPE_CHECKING:
    import torch

EXAMPLES = """\b
Examples:
  pliant convert DiT-XL-2-256x256.pt dit-xl --to pliant --dtype bf16
  pliant convert SiT-XL-2-256.pt sit-xl --format sit
  pliant convert facebook/DiT-XL-2-256 dit-xl.pt --to official-dit
  pliant convert runs/mine/model mine-diffusers --to diffusers
  pliant convert odd.pt odd --option heads=6 --option num_classes=10
"""


def register(app: typer.Typer) -> None:
    app.command("convert", epilog=EXAMPLES)(convert)


def convert(
    source: opt.Model,
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="Folder or file to write.", show_default=False)],
    to: Annotated[str, typer.Option("--to", help="pliant, diffusers, official-dit, sit or fit.")] = "pliant",
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Of the written weights: fp32, bf16, fp16. Default: as they are.")
    ] = None,
    allow_inexact: Annotated[
        bool, typer.Option("--allow-inexact", help="Write even if the format misrepresents the model.")
    ] = False,
    format: opt.Format = None,
    option: opt.LoadOptions = None,
    json: opt.JSON = False,
) -> None:
    """Convert a model between Pliant's, diffusers', DiT's, SiT's and FiT's formats."""
    from pliant.cli.models import load_options
    from pliant.formats import describe_source, save

    found = describe_source(source, format, **load_options(option))
    written = _dtype(dtype)
    denoiser = found.load()
    try:
        save(denoiser, target, to, dtype=written, allow_inexact=allow_inexact)
    except OSError as error:
        raise PliantError(f"could not write {target}: {error.strerror or error}") from None
    files = sorted(f for f in target.rglob("*") if f.is_file()) if target.is_dir() else [target]
    written_bytes = sum(f.stat().st_size for f in files)
    if json:
        facts = {"format": to, "location": str(target), "dtype": dtype, "bytes": written_bytes}
        emit_json({"source": found.to_dict(), "target": {**facts, "files": [str(f) for f in files]}})
    else:
        print(f"{found.architecture}, {found.parameters:,} parameters: {found.format} -> {to}")
        print(f"{target}: {written_bytes:,} bytes")
        for line in found.notes:
            print(line)


def _dtype(name: str | None) -> torch.dtype | None:
    import torch

    known = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if name is not None and name not in known:
        raise ConfigError(f"unknown dtype {name!r}: {suggest(name, known)}")
    return None if name is None else known[name]
