"""Files of tensors: PyTorch's (`.pt`, `.pth`, `.ckpt`, `.bin`) and safetensors, told apart by their content.

Pickled files are only read with `weights_only=True`: a file that would run code is refused, never run.
"""

from __future__ import annotations

import argparse
import pickle
import re
import string
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pliant.errors import FormatError

# Where training scripts put the weights inside their checkpoints, the best first.
ENTRIES = ("ema", "model", "state_dict")

# A tensor name's start -> what has such tensors. First match wins.
OTHERS = (
    ("patch_embed.weight", "weights of Pliant itself; pass their folder, which holds config.json"),
    ("modes.", "weights of Pliant itself; pass their folder, which holds config.json"),
    ("transformer_blocks.", "a diffusers transformer; pass its folder, which holds config.json"),
    ("down_blocks.", "a diffusers UNet"),
    ("input_blocks.", "a UNet"),
    ("model.diffusion_model.", "a Stable Diffusion checkpoint"),
    ("joint_blocks.", "an MMDiT (Stable Diffusion 3)"),
    ("double_blocks.", "a FLUX transformer"),
    ("encoder.down", "an autoencoder"),
    ("decoder.up", "an autoencoder"),
    ("layer1.0.conv1", "a ResNet"),
    ("cls_token", "a vision transformer"),
)


@dataclass(frozen=True)
class StateFile:
    """The tensors of one file."""

    file: Path
    tensors: dict[str, Tensor]
    """On the CPU, usually mapped from the file rather than read."""
    facts: dict[str, Any]
    """What the file says about itself: a training script's arguments, or safetensors' metadata."""
    entry: str = ""
    """The entry of a training checkpoint that was taken, e.g. "ema"."""

    @property
    def notes(self) -> tuple[str, ...]:
        return (f"read the entry {self.entry!r} of a training checkpoint",) if self.entry else ()


def read_state(file: Path) -> StateFile:
    """Read a file of tensors. Raises FormatError, in one line, for anything else."""
    try:
        with file.open("rb") as handle:
            head = handle.read(512)
    except OSError as error:
        raise FormatError(f"{file} cannot be read ({error.strerror})") from None
    if head[:4] == b"PK\x03\x04":
        _check_archive(file)
        return _from_pickle(file, mmap=True)
    if head[8:9] == b"{":
        return _from_safetensors(file)
    if head[:1] == b"\x80":
        return _from_pickle(file, mmap=False)
    raise FormatError(f"{file} is {_other_content(head)}, not a file of tensors")


def _other_content(head: bytes) -> str:
    if not head:
        return "empty"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer (run 'git lfs pull' to get the file it stands for)"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "a web page (the download failed or needs a login)"
    if all(byte in string.printable.encode() for byte in head):
        return "a text file"
    return f"of unknown content (it begins with {head[:4].hex(' ')})"


def _check_archive(file: Path) -> None:
    """PyTorch's files are zip archives that hold a data.pkl."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except Exception:  # zipfile raises half a dozen kinds for damaged archives
        raise FormatError(f"{file} is truncated or damaged; copy or download it again") from None
    if any(name.endswith("constants.pkl") for name in names):
        raise FormatError(f"{file} is a TorchScript program, not a state dict; save model.state_dict() instead")
    if not any(name.split("/")[1:] == ["data.pkl"] for name in names):
        shown = ", ".join(names[:3]) or "nothing"
        raise FormatError(f"{file} is a zip archive of something else ({shown}), not a PyTorch file")


def _from_pickle(file: Path, mmap: bool) -> StateFile:
    try:
        # train.py of DiT and SiT stores its arguments: a Namespace is a plain record and runs nothing.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a damaged pickle can fail in any way at all
        unsafe = re.search(r"(?:GLOBAL|class) ([\w.]+)", str(error))
        if unsafe and isinstance(error, pickle.UnpicklingError):
            raise FormatError(
                f"{file} holds Python objects ({unsafe[1]}) and opening it could run code, so it was not opened; "
                f"ask for a safetensors file or a plain state dict"
            ) from None
        raise FormatError(f"{file} is truncated, damaged or not written by torch.save") from None
    return _state_of(file, content)


def _state_of(file: Path, content: Any) -> StateFile:
    if not isinstance(content, dict):
        raise FormatError(f"{file} holds a {type(content).__name__}, expected a state dict (tensors by name)")
    entry = next((name for name in ENTRIES if isinstance(content.get(name), dict)), "")
    state = content[entry] if entry else content
    tensors = {name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        shown = ", ".join(map(str, list(state)[:5])) or "nothing"
        raise FormatError(f"{file} holds no tensors by name (found: {shown})")
    arguments = content.get("args", {})
    facts = vars(arguments) if isinstance(arguments, argparse.Namespace) else arguments
    return StateFile(file, _unwrapped(tensors), dict(facts) if isinstance(facts, dict) else {}, entry)


def _from_safetensors(file: Path) -> StateFile:
    try:
        with safe_open(file, framework="pt") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - not a dict
            facts = handle.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{file} is truncated or damaged ({error}); copy or download it again") from None
    if not tensors:
        raise FormatError(f"{file} holds no tensors")
    return StateFile(file, _unwrapped(tensors), facts)


def _unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without the prefixes of DistributedDataParallel and torch.compile."""
    for prefix in ("_orig_mod.", "module."):
        if all(name.startswith(prefix) for name in tensors):
            return _unwrapped({name.removeprefix(prefix): value for name, value in tensors.items()})
    return tensors


def other_architecture(tensors: dict[str, Tensor]) -> str:
    """In words, what a state dict that is not a DiT might be."""
    for start, what in OTHERS:
        if any(name.startswith(start) for name in tensors):
            return f"it looks like {what}"
    shown = ", ".join(list(tensors)[:3])
    return f"its {len(tensors)} tensors ({shown}, ...) are of no architecture that Pliant reads"
