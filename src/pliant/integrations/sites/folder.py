"""What a diffusers folder's transformer is, from its configuration alone: no weights are read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pliant.errors import FormatError
from pliant.integrations.sites import SITES, sites_of


@dataclass(frozen=True)
class DiffusersTransformer:
    """A transformer of a class that has an adapter."""

    folder: Path
    name: str
    """Of its class."""
    parameters: int
    sites: tuple[tuple[str, int], ...]
    """Kind and block of every site, in order."""

    @property
    def blocks(self) -> int:
        return 1 + max(block for _, block in self.sites)

    def to_dict(self) -> dict[str, Any]:
        listed = [{"site": s, "block": block, "kind": kind} for s, (kind, block) in enumerate(self.sites)]
        return {
            "folder": str(self.folder), "class": self.name, "parameters": self.parameters, "blocks": self.blocks,
            "sites": listed,
        }  # fmt: skip


def read_transformer(source: str | Path) -> DiffusersTransformer | None:
    """The transformer in a folder, or in a pipeline's folder; None where there is none of a class with an adapter.

    DiT's is left to `pliant.load`, which makes it Pliant's own network. Raises FormatError for a damaged configuration.
    """
    folder = Path(source).expanduser()
    for where in (folder, folder / "transformer"):
        try:
            config = json.loads((where / "config.json").read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError):
            continue
        name = config.get("_class_name") if isinstance(config, dict) else None
        if name in SITES and name != "DiTTransformer2DModel":
            return _made(where, name, config)
    return None


def _made(folder: Path, name: str, config: dict[str, Any]) -> DiffusersTransformer:
    import diffusers
    from accelerate import init_empty_weights

    try:
        with init_empty_weights():
            transformer = getattr(diffusers, name).from_config(config)
    except Exception as error:  # whatever its constructor raises for values it cannot use
        raise FormatError(f"{folder / 'config.json'} does not describe a {name} that can be made: {error}") from None
    parameters = sum(p.numel() for p in transformer.parameters())
    sites = tuple((site.kind, site.block) for site in sites_of(transformer).sites)
    return DiffusersTransformer(folder, name, parameters, sites)
