"""From what a user types to a file or folder: a path, the name of a bundled model, or an id on the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path

from pliant.errors import FormatError, suggest

ASSETS = Path(__file__).resolve().parents[1] / "assets"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

# First what is usual and safe; older repositories only have pickled weights. Never the autoencoder or text encoders.
HUB_FILES = (["*.json", "*.safetensors"], ["*.json", "*.bin", "*.pt", "*.pth"])
HUB_IGNORED = ["vae/*", "text_encoder*/*", "tokenizer*/*", "safety_checker/*", "*.msgpack", "*.onnx", "optimizer*"]
WEIGHT_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


def bundled_models() -> tuple[str, ...]:
    """Names of the models inside the package, sorted."""
    return tuple(sorted(file.parent.name for file in ASSETS.glob("*/config.json")))


def locate(source: str | Path, revision: str | None = None) -> Path:
    """The file or folder that a source means. A bundled name wins over a local folder; write "./digits" for that one.

    Raises FormatError, in one line, if nothing is there.
    """
    text = str(source)
    if isinstance(source, str) and source in bundled_models():
        return ASSETS / source
    path = Path(source).expanduser()
    if text and path.exists():
        return path
    if isinstance(source, str) and HUB_ID.fullmatch(text) and path.suffix not in WEIGHT_ENDINGS:
        return download(text, revision)
    names = bundled_models()
    bundled = "" if "/" in text or not names else f", and no bundled model has that name; {suggest(text, names)}"
    raise FormatError(f"there is no file or folder {text!r}{bundled or '.'}")


def download(hub_id: str, revision: str | None = None) -> Path:
    """A Hub repository's config and weights, from the cache or the network. Raises FormatError if neither has it."""
    from huggingface_hub import snapshot_download

    folder = None
    for patterns in HUB_FILES:
        try:
            found = snapshot_download(hub_id, revision=revision, allow_patterns=patterns, ignore_patterns=HUB_IGNORED)
        except Exception as error:  # offline, no such id, no access, disk full: the Hub's errors share no useful base
            reason = re.sub(r"\s+", " ", str(error)).strip()
            raise FormatError(
                f"there is no file or folder {hub_id!r} here, and the Hugging Face Hub did not give a model of that id "
                f"({type(error).__name__}: {reason[:160]})"
            ) from None
        folder = Path(found)
        if any(file.suffix in WEIGHT_ENDINGS for file in folder.rglob("*")):
            return folder
    raise FormatError(f"the Hub repository {hub_id!r} holds no model weights")
