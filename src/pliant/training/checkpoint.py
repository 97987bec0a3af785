"""Resumable training states on disk. A checkpoint folder either is complete or does not exist under its name.

`checkpoint-000500/` holds model.safetensors (trainable parameters and persistent buffers), ema.safetensors,
optimizer.pt (tensors and numbers only) and state.json, which is written last and lists the size of every
file.
"""

from __future__ import annotations

import io
import json
import logging
import pickle
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from pliant.errors import FormatError
from pliant.files import replaced_folder

logger = logging.getLogger("pliant.training")

FORMAT = 1
# What readers of JSON, safetensors and pickle raise on damaged files.
_DAMAGE = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, EOFError),
    *(pickle.UnpicklingError, SafetensorError),
)
_NAME = re.compile(r"checkpoint-(\d{6,})")


@dataclass(frozen=True)
class TrainingState:
    """Everything that a run needs to go on exactly: tensors, and `step` finished optimizer steps."""

    step: int
    model: Mapping[str, Tensor]
    ema: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    info: Mapping[str, Any]
    """JSON-ready: the run's config and a fingerprint of what is not stored."""


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"checkpoint-{step:06d}"


def save_checkpoint(folder: Path, state: TrainingState, keep: int) -> Path:
    """Write, move into place, then delete all but the newest `keep`. Raises OSError (disk full, no
    permission) with the earlier checkpoints untouched and nothing half-written left behind."""
    final = checkpoint_path(folder, state.step)
    with replaced_folder(final) as temporary:
        files = {
            "model.safetensors": safetensors.torch.save(_contiguous(state.model)),
            "ema.safetensors": safetensors.torch.save(_contiguous(state.ema)),
            "optimizer.pt": _torch_bytes(state.optimizer),
        }
        sizes = {name: len(data) for name, data in files.items()}
        description = {"format": FORMAT, "step": state.step, "files": sizes, **state.info}
        for name, data in files.items():
            _write(temporary / name, data)
        _write(temporary / "state.json", json.dumps(description, indent=1).encode())
    for old in sorted(_numbered(folder), key=_step_of)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def load_checkpoint(path: Path) -> TrainingState:
    """Read one checkpoint. Raises FormatError if it is missing, truncated or damaged."""
    try:
        description = json.loads((path / "state.json").read_text(encoding="utf-8"))
        for name, size in description["files"].items():
            if (path / name).stat().st_size != size:
                raise FormatError(f"{path / name} should have {size} bytes, has {(path / name).stat().st_size}")
        if description["format"] != FORMAT:
            raise FormatError(f"{path} has checkpoint format {description['format']}, this version reads {FORMAT}")
        return TrainingState(
            step=int(description["step"]),
            model=safetensors.torch.load_file(path / "model.safetensors"),
            ema=safetensors.torch.load_file(path / "ema.safetensors"),
            optimizer=torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True),
            info={key: value for key, value in description.items() if key not in ("format", "step", "files")},
        )
    except FormatError:
        raise
    except _DAMAGE as error:
        raise FormatError(f"{path} is not a complete checkpoint: {(str(error).splitlines() or ['?'])[0]}") from None


def latest_checkpoint(folder: Path) -> tuple[Path, TrainingState] | None:
    """The newest checkpoint that can be read, or None. Damaged ones are skipped with a note."""
    for path in sorted(_numbered(folder), key=_step_of, reverse=True):
        try:
            return path, load_checkpoint(path)
        except FormatError as error:
            logger.warning("ignored a checkpoint: %s", error)
    return None


def has_checkpoints(folder: Path) -> bool:
    return bool(_numbered(folder))


def remove_unfinished(folder: Path) -> None:
    """Delete what an interrupted run left half-written, with a note."""
    for path in folder.glob(".checkpoint-*.tmp"):
        logger.warning("removed an unfinished checkpoint: %s", path.name)
        shutil.rmtree(path, ignore_errors=True)


def _numbered(folder: Path) -> list[Path]:
    return [path for path in folder.glob("checkpoint-*") if path.is_dir() and _NAME.fullmatch(path.name)]


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _torch_bytes(value: Mapping[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _write(path: Path, data: bytes) -> None:
    """Through Python's own files, so that a full disk is an OSError and not a library's private exception."""
    with path.open("wb") as file:
        file.write(data)
