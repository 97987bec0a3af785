"""Opening models for verbs: options as typed, warnings as lines, and a hash of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pliant.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from pliant.denoiser import Denoiser


@dataclass(frozen=True)
class Opened:
    """A loaded model and what the user called it."""

    denoiser: Denoiser
    source: str
    """Bundled name, Hub id, or absolute path: usable from any folder."""
    format: str | None
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.denoiser.metadata.get("name") or Path(self.source).name)


def open_model(
    source: str, format: str | None = None, options: Sequence[str] | None = None, device: str | None = None
) -> Opened:
    """Load a model for inference. Raises PliantError."""
    from pliant.formats import load

    place = pick_device(device)
    given = load_options(options)
    denoiser = load(source, format, **given)
    denoiser.network.requires_grad_(False)
    return Opened(denoiser.to(place), portable(source), format, given)


def pick_device(device: str | None) -> torch.device:
    """The device a user named; None: a GPU if there is one. Raises ConfigError for one that cannot be used."""
    import torch

    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(chosen)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or ["?"])[0]
        raise ConfigError(f"cannot use the device {chosen!r}: {reason}") from None
    return place


def load_options(pairs: Sequence[str] | None) -> dict[str, Any]:
    """["heads=6", "input_size=[32,64]"] -> {"heads": 6, "input_size": [32, 64]}. Raises ConfigError."""
    import yaml

    options: dict[str, Any] = {}
    for pair in pairs or ():
        key, equals, text = pair.partition("=")
        if not equals or not key.isidentifier():
            raise ConfigError(f"--option {pair!r} is not of the form key=value, e.g. heads=16")
        try:
            options[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"--option {key}: cannot read the value {text!r}") from None
    return options


def portable(source: str) -> str:
    """A name for the source that means the same from another folder."""
    from pliant.formats.locate import bundled_models

    path = Path(source).expanduser()
    return str(path.resolve()) if source not in bundled_models() and path.exists() else source


def parse_patch(text: str) -> tuple[int, int]:
    """ "4" -> (4, 4), "2x4" -> (2, 4) (height x width). Raises ConfigError."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(p.isdecimal() and int(p) > 0 for p in parts):
        raise ConfigError(f"cannot read the patch size {text!r}; write 4, or height x width as 2x4")
    return int(parts[0]), int(parts[-1])


def weights_hash(denoiser: Denoiser) -> str:
    """SHA-256 of all weights by name: the same whatever file they came from."""
    from pliant.training.fingerprint import weights_hash as of

    return of(denoiser)
