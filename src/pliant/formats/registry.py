"""All formats, and the two verbs that tell them apart: `load` and `save`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pliant.denoiser import Denoiser
from pliant.errors import ConfigError, FormatError, suggest
from pliant.formats import diffusers, fit, native, official_dit, sit
from pliant.formats.locate import WEIGHT_ENDINGS, locate
from pliant.formats.source import Source, check_options
from pliant.formats.state_files import StateFile, other_architecture, read_state


@dataclass(frozen=True)
class Format:
    """One kind of model file. `reads` takes a folder or an opened file of tensors, and options."""

    description: str
    folder: bool
    reads: Callable[[Any, dict[str, Any]], Source]
    saves: Callable[..., None]


def _find_native(folder: Path, options: dict[str, Any]) -> Source:
    check_options(options, (), native.FORMAT)
    config = native.read_config(folder)
    native.parse(config, folder / native.CONFIG_FILE)
    file, adapter = folder / native.MODEL_FILE, folder / native.ADAPTER_FILE
    only_adapter = adapter.exists() and not file.exists()
    notes = ("only an adapter: load its base model, then pliant.load_adapter",) if only_adapter else ()
    identity = {key: config[key] for key in ("network", "path", "prediction", "network_time")}
    count = native.count_parameters(adapter if only_adapter else file)
    return Source(native.FORMAT, folder, identity, count, notes, lambda: native.load(folder))


FORMATS: dict[str, Format] = {
    "pliant": Format("Pliant's folder: config.json and safetensors", True, _find_native, native.save),
    "diffusers": Format("folder of DiTTransformer2DModel or DiTPipeline", True, diffusers.find, diffusers.save),
    "official-dit": Format("facebookresearch/DiT's .pt, or .safetensors", False, official_dit.find, official_dit.save),
    "sit": Format("willisma/SiT's .pt, or .safetensors", False, sit.find, sit.save),
    "fit": Format("whlzy/FiT's .pt, .bin or .safetensors", False, fit.find, fit.save),
}


def get_format(name: str) -> Format:
    """A format by name. Raises ConfigError with the nearest name."""
    if name not in FORMATS:
        raise ConfigError(f"unknown format {name!r}: {suggest(name, FORMATS)}")
    return FORMATS[name]


def describe_source(
    source: str | Path, format: str | None = None, *, revision: str | None = None, **options: Any
) -> Source:
    """What a source is: format, architecture, parameters, path, assumptions. Reads no weights.

    Arguments as `load`. Raises FormatError for anything that is no model, saying what was found.
    """
    if format is not None:
        get_format(format)
    place = locate(source, revision)
    if place.is_dir():
        place = _single_file(place) or place
    if place.is_dir():
        name = format or _folder_format(place)
        if not FORMATS[name].folder:
            raise FormatError(f"format {name!r} is a file, {place} is a folder")
        return FORMATS[name].reads(place, options)
    if place.name == native.CONFIG_FILE:
        return describe_source(place.parent, format, **options)
    if format is not None and FORMATS[format].folder:
        raise FormatError(f"format {format!r} is a folder, {place} is a file")
    state = read_state(place)
    name, notes = (format, ()) if format else _file_format(state)
    found = FORMATS[name].reads(state, options)
    return replace(found, notes=(*notes, *found.notes))


def load(source: str | Path, format: str | None = None, *, revision: str | None = None, **options: Any) -> Denoiser:
    """Read a model of any known format, told apart by its content.

    source: a folder, a file, the name of a bundled model ("digits"), or a Hub id ("owner/name", with `revision`).
    format: one of `FORMATS`, where the content does not say it (SiT's files look like DiT's).
    options: for official files `heads`, `input_size`, `num_classes`; for these and diffusers `path`, `prediction`; for
    FiT also `patch_size`, `qk_norm`, `extrapolation`, `train_length`, `train_tokens`.

    Weights come back in fp32, the network in eval mode; `metadata` says where it came from and what was assumed.
    Raises FormatError, in one line, for missing, damaged, unsafe or foreign files.
    """
    found = describe_source(source, format, revision=revision, **options)
    denoiser = found.load()
    if found.format == native.FORMAT:
        return denoiser
    return replace(denoiser, metadata={**denoiser.metadata, "source": str(source), "notes": list(found.notes)})


def _folder_format(folder: Path) -> str:
    if diffusers.recognises(folder):
        return "diffusers"
    if (folder / native.CONFIG_FILE).is_file():
        config = native.read_config(folder)
        if config.get("format") == native.FORMAT:
            return native.FORMAT
        what = config.get("_class_name") or config.get("model_type") or ", ".join(list(config)[:3]) or "nothing"
        raise FormatError(f"{folder / native.CONFIG_FILE} is not of a format that Pliant reads (it describes: {what})")
    found = ", ".join(sorted(f.name for f in folder.iterdir())[:5])
    if not found:
        raise FormatError(f"{folder} is an empty folder; a model folder holds {native.CONFIG_FILE} and weights")
    raise FormatError(f"{folder} holds no {native.CONFIG_FILE}, so it is not a model folder (found: {found})")


def _single_file(folder: Path) -> Path | None:
    """The one file of weights in a folder without configs, as some repositories on the Hub are."""
    if any((folder / name).exists() for name in (native.CONFIG_FILE, diffusers.PIPELINE_FILE)):
        return None
    files = [f for f in folder.iterdir() if f.suffix in WEIGHT_ENDINGS and not f.name.startswith(native.ADAPTER_FILE)]
    return files[0] if len(files) == 1 and files[0].name != native.MODEL_FILE else None


def _file_format(state: StateFile) -> tuple[str, tuple[str, ...]]:
    """DiT, SiT or FiT, and what had to be assumed. Raises FormatError for another architecture."""
    if fit.is_fit(state):
        return "fit", ()
    if not official_dit.is_official(state):
        raise FormatError(f"{state.file} is no DiT, SiT or FiT: {other_architecture(state.tensors)}")
    said = sit.says_sit(state)
    if said is not None:
        return ("sit" if said else "official-dit"), ()
    if sit.named_sit(state.file):
        return "sit", ("taken for SiT because of the file's name",)
    if "dit" in state.file.name.lower():
        return "official-dit", ("taken for DiT because of the file's name",)
    note = "taken for DiT: SiT's files look the same, so pass format='sit' if it is one"
    warnings.warn(f"{state.file} {note}", stacklevel=4)
    return "official-dit", (note,)


def save(
    denoiser: Denoiser,
    target: str | Path,
    format: str = "pliant",
    *,
    dtype: torch.dtype | None = None,
    allow_inexact: bool = False,
) -> None:
    """Write a model atomically, replacing a model that is there.

    dtype: of the tensors in the file (None: as they are). Foreign formats cannot say everything: FormatError lists
    what they would misrepresent, `allow_inexact=True` writes all the same. Raises FormatError rather than replace
    anything that is not a model.
    """
    kind = get_format(format)
    place = Path(os.path.abspath(Path(target).expanduser()))
    if kind.folder:
        _check_folder(place, format)
    elif place.is_dir():
        raise FormatError(f"format {format!r} is a file, {target} is a folder; write e.g. {place / 'model.pt'}")
    inexact = {"allow_inexact": allow_inexact} if format != native.FORMAT else {}
    kind.saves(denoiser, place, dtype=dtype, **inexact)


def save_adapter(denoiser: Denoiser, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write only what flexification added (recipe "lora"), as a folder that `load_adapter` reads."""
    place = Path(os.path.abspath(Path(folder).expanduser()))
    _check_folder(place, native.FORMAT)
    native.save_adapter(denoiser, place, dtype)


def load_adapter(denoiser: Denoiser, source: str | Path, *, revision: str | None = None) -> Denoiser:
    """A base denoiser plus an adapter (folder, bundled name or Hub id) -> the flexible denoiser. The base is shared."""
    return native.load_adapter(denoiser, locate(source, revision))


_OURS = (native.CONFIG_FILE, native.MODEL_FILE, native.ADAPTER_FILE, native.PLAN_FILE, native.REFINER, "scheduler")


def _check_folder(folder: Path, format: str) -> None:
    """A folder is replaced as a whole, so it may only hold what a model folder holds."""
    if folder.suffix in WEIGHT_ENDINGS:
        raise FormatError(
            f"format {format!r} is a folder, {folder.name!r} names a file; 'official-dit', 'sit', 'fit' are files"
        )
    if folder.exists() and not folder.is_dir():
        raise FormatError(f"{folder} is a file; name a new folder for format {format!r}")
    if folder.is_dir():
        names = sorted(file.name for file in folder.iterdir())
        others = [name for name in names if name not in _OURS and not name.startswith(diffusers.WEIGHTS)]
        if others:
            raise FormatError(f"{folder} holds {others[0]!r}, which saving there would delete; name another folder")
