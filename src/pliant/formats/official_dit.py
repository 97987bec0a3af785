"""Official DiT files: `.pt` state dicts as facebookresearch/DiT releases and trains them (sheet A, section 3.5).

Also the same tensors in a safetensors file. The layout holds every shape but not the number of heads, nor what the
network predicts on which path; SiT uses the same layout with another meaning (`sit.py`).
"""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path as FilePath
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pliant.adapters import DynamicDiT, ExitDiT, FlexiDiT
from pliant.adapters.token_router import TokenRoutedDiT
from pliant.denoiser import Denoiser
from pliant.errors import ConfigError, FormatError
from pliant.files import replaced_file
from pliant.formats.source import (
    Source,
    architecture,
    check_options,
    check_tensors,
    meta_dit,
    option_path,
    owned,
    plain_source,
    square_side,
)
from pliant.formats.state_files import StateFile, other_architecture
from pliant.models.dit import SIZES, DiTConfig
from pliant.models.patches import patch_pair
from pliant.models.positions import patch_positions
from pliant.paths import NetworkTime, VPDiscrete, prediction_type

NETWORK_OPTIONS = ("heads", "input_size", "num_classes")
OPTIONS = (*NETWORK_OPTIONS, "path", "prediction")

# Pliant's name -> official name, outside the blocks and inside them. `modulation` is cut, see `to_official`.
OUTSIDE = {
    "patch_embed": "x_embedder.proj",
    "time_embed.fc1": "t_embedder.mlp.0",
    "time_embed.fc2": "t_embedder.mlp.2",
    "label_embed": "y_embedder.embedding_table",
    "head": "final_layer.linear",
}
INSIDE = {"qkv": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
KINDS = ("weight", "bias")


def to_official(state: dict[str, Tensor], positions: Tensor) -> dict[str, Tensor]:
    """A DiT's state dict and table (N, D) -> the official state dict. Views where possible."""
    width = state["time_embed.fc2.bias"].shape[0]
    depth = (state["modulation.bias"].shape[0] // width - 2) // 6
    out = {"pos_embed": positions[None]}
    for ours, theirs in OUTSIDE.items():
        out |= {f"{theirs}.{kind}": state[f"{ours}.{kind}"] for kind in KINDS if f"{ours}.{kind}" in state}
    for i in range(depth):
        for ours, theirs in INSIDE.items():
            out |= {f"blocks.{i}.{theirs}.{kind}": state[f"blocks.{i}.{ours}.{kind}"] for kind in KINDS}
    for kind in KINDS:
        rows = state[f"modulation.{kind}"].split([*[6 * width] * depth, 2 * width])
        out |= {f"blocks.{i}.adaLN_modulation.1.{kind}": rows[i] for i in range(depth)}
        out[f"final_layer.adaLN_modulation.1.{kind}"] = rows[depth]
    return out


def from_official(tensors: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Inverse of `to_official` (the table of positions is dropped). fp32 copies."""
    state: dict[str, Tensor] = {}
    for ours, theirs in OUTSIDE.items():
        state |= {f"{ours}.{k}": owned(tensors[f"{theirs}.{k}"]) for k in KINDS if f"{theirs}.{k}" in tensors}
    for i in range(depth):
        for ours, theirs in INSIDE.items():
            state |= {f"blocks.{i}.{ours}.{kind}": owned(tensors[f"blocks.{i}.{theirs}.{kind}"]) for kind in KINDS}
    places = [*(f"blocks.{i}" for i in range(depth)), "final_layer"]
    for kind in KINDS:
        state[f"modulation.{kind}"] = torch.cat(
            [tensors[f"{place}.adaLN_modulation.1.{kind}"].to(torch.float32) for place in places]
        )
    return state


def is_official(state: StateFile) -> bool:
    """Whether the tensors are of this layout (DiT's or SiT's)."""
    return {"x_embedder.proj.weight", "t_embedder.mlp.0.weight", "final_layer.linear.weight"} <= state.tensors.keys()


def read_config(state: StateFile, options: dict[str, Any]) -> DiTConfig:
    """The architecture, from tensor shapes; `heads`, `input_size` and `num_classes` may be given.

    Raises FormatError for another architecture, ConfigError for options that contradict the file.
    """
    if not is_official(state):
        raise FormatError(f"{state.file} is no DiT or SiT: {other_architecture(state.tensors)}")
    width, channels, ph, pw = stored_shape(state, "x_embedder.proj.weight", 4)
    rows = stored_shape(state, "y_embedder.embedding_table.weight", 2)[0]
    out = stored_shape(state, "final_layer.linear.weight", 2)[0] / (ph * pw * channels)
    hidden = stored_shape(state, "blocks.0.mlp.fc1.weight", 2)[0]
    if out not in (1, 2):
        raise FormatError(f"{state.file}: the final layer has {out:g} times the input's channels, expected 1 or 2")
    depth = 1 + max(int(m[1]) for m in map(re.compile(r"blocks\.(\d+)\.").match, state.tensors) if m)
    classes, dropout = stored_classes(state, rows, options.get("num_classes"))
    return DiTConfig(
        input_size=_input_size(state, (ph, pw), options.get("input_size")),
        patch_size=(ph, pw),
        in_channels=channels,
        width=width,
        depth=depth,
        heads=_heads(state, width, options.get("heads")),
        mlp_ratio=hidden / width,
        num_classes=classes,
        class_dropout=dropout,
        learn_sigma=out == 2,
    )


def stored_shape(state: StateFile, name: str, rank: int) -> tuple[int, ...]:
    tensor = state.tensors.get(name)
    if tensor is None:
        raise FormatError(f"{state.file} lacks the tensor {name!r}; the file is incomplete or of another architecture")
    if tensor.ndim != rank or 0 in tensor.shape:
        raise FormatError(f"{state.file}: tensor {name!r} has shape {tuple(tensor.shape)}, expected {rank} axes")
    return tuple(tensor.shape)


def _input_size(state: StateFile, patch: tuple[int, int], given: Any) -> tuple[int, int]:
    """The table of positions says how many tokens there are; official models are square."""
    if given is not None:
        return patch_pair(given)
    tokens = stored_shape(state, "pos_embed", 3)[1]
    side = square_side(tokens)
    if side is None:
        raise FormatError(f"{state.file} has {tokens} tokens, no square; say the latent's size with input_size=(h, w)")
    return side * patch[0], side * patch[1]


def _heads(state: StateFile, width: int, given: Any) -> int:
    """Not in the file: official widths have known heads, other widths are cut into heads of 64 channels."""
    stated = given or state.facts.get("heads")
    if stated is not None:
        return int(stated)
    name = state.facts.get("model")  # "DiT-S/2", from train.py's arguments
    known = {size["width"]: size["heads"] for size in SIZES.values()}
    if isinstance(name, str) and re.fullmatch(r"[DS]iT-(S|B|L|XL)/\d+", name):
        return DiTConfig.named(name).heads
    if width in known or width % 64 == 0:
        return known.get(width, width // 64)
    raise ConfigError(f"{state.file} does not say how many heads its attention has; say it with heads=")


def stored_classes(state: StateFile, rows: int, given: Any) -> tuple[int, float]:
    """The label table has one row more than classes unless the model was trained without label dropout."""
    if given is None or int(given) == rows - 1:
        return rows - 1, 0.1
    if int(given) == rows:
        return rows, 0.0
    raise ConfigError(f"{state.file} has {rows} labels (the null label included), so num_classes={given} cannot be")


def read_tensors(state: StateFile, config: DiTConfig) -> dict[str, Tensor]:
    """The checked weights under Pliant's names. Raises FormatError for tensors that do not belong."""
    where, meta = state.file, meta_dit(config)
    expected = to_official(meta.state_dict(), meta.positions)
    tensors = dict(state.tensors)
    tensors.setdefault("pos_embed", expected["pos_embed"])  # recomputed, so a file may leave it out
    check_tensors(tensors, expected, where)
    if "pos_embed" in state.tensors:
        _check_positions(state.tensors["pos_embed"], config, where)
    return from_official(tensors, config.depth)


def _check_positions(found: Tensor, config: DiTConfig, where: object) -> None:
    table = patch_positions(config.grid(), config.patch_size, config.patch_size, config.width)
    difference = float((found[0].float() - table).abs().max())
    if not difference < (1e-5 if found.dtype in (torch.float32, torch.float64) else 1e-2):
        raise FormatError(
            f"{where}: its positions are not DiT's sine-cosine table of a {config.grid()} grid (they differ by up to "
            f"{difference:.2g}); give the right input_size=(h, w), or the network is another one"
        )


def find(state: StateFile, options: dict[str, Any]) -> Source:
    """Read as DiT: epsilon on the linear 1000-step table, unless `path` and `prediction` say otherwise."""
    check_options(options, OPTIONS, "official-dit")
    config = read_config(state, options)
    path = option_path(options.get("path") or stated_path(state) or VPDiscrete())
    steps = path.num_timesteps if isinstance(path, VPDiscrete) else 1000
    return plain_source(
        format="official-dit",
        location=state.file,
        config=config,
        path=path,
        prediction=prediction_type(options.get("prediction") or state.facts.get("prediction") or "epsilon"),
        network_time=NetworkTime.timesteps(steps),
        tensors=lambda: read_tensors(state, config),
        metadata={"name": architecture(config)},
        notes=state.notes,
    )


def stated_path(state: StateFile) -> dict[str, Any] | None:
    """The path that `write` put into a safetensors file's metadata."""
    try:
        stated = json.loads(state.facts.get("path", "null"))
    except (TypeError, ValueError):
        return None
    return stated if isinstance(stated, dict) else None


def save(
    denoiser: Denoiser, file: str | FilePath, dtype: torch.dtype | None = None, allow_inexact: bool = False
) -> None:
    """Write the flat official state dict (`.safetensors` by its name, else torch.save). Atomic.

    Raises FormatError if the file would not mean the same to the official code, unless `allow_inexact`.
    """
    wrong = []
    if not isinstance(denoiser.path, VPDiscrete) or denoiser.path.betas != "linear":
        wrong.append(f"its path is {denoiser.path.name!r}, DiT's is 'vp-discrete' with linear betas")
    elif denoiser.network_time != NetworkTime.timesteps(denoiser.path.num_timesteps):
        wrong.append("its network does not count time in the table's steps")
    if denoiser.prediction != "epsilon":
        wrong.append(f"it predicts {denoiser.prediction}, DiT predicts epsilon")
    write(denoiser, file, "official-dit", wrong, dtype, allow_inexact)


def write(
    denoiser: Denoiser,
    file: str | FilePath,
    layout: str,
    wrong: list[str],
    dtype: torch.dtype | None,
    allow_inexact: bool,
) -> None:
    """Shared by DiT and SiT. `wrong`: what the layout's own meaning would misrepresent."""
    plain_network_only(denoiser)
    config = denoiser.dit_config
    if config.input_size[0] != config.input_size[1] or config.patch_size[0] != config.patch_size[1]:
        raise FormatError(f"official DiTs are square, this one takes {config.input_size}; save it as format 'pliant'")
    if config.frequency_divisor != 128:
        wrong = [*wrong, f"its time sinusoid divides by {config.frequency_divisor}, the official one by 128"]
    if config.norm2_eps != 1e-6:
        wrong = [*wrong, f"its second norms add {config.norm2_eps:g}, the official ones 1e-06"]
    refuse_inexact(wrong, layout, allow_inexact)
    tensors = to_official(denoiser.network.state_dict(), denoiser.network.positions)  # type: ignore[arg-type]
    target = FilePath(file)
    facts = {
        "format": "pt",
        "layout": layout,
        "heads": str(config.heads),
        "path": json.dumps(denoiser.path.to_config()),
        "prediction": denoiser.prediction,
    }
    with replaced_file(target) as temporary:
        if target.suffix == ".safetensors":
            save_file(export(tensors, dtype), temporary, metadata=facts)
        else:
            with temporary.open("wb") as handle:  # an open file: the archive then does not carry a temporary name
                torch.save(export(tensors, dtype), handle)


def plain_network_only(denoiser: Denoiser) -> None:
    """Raises FormatError for what no foreign format can hold: flexible or preconditioned networks, other paths."""
    if denoiser.preconditioning is not None:
        raise FormatError("this model is preconditioned and only format 'pliant' can hold that")
    if denoiser.trained is not None:
        raise FormatError(
            f"this model was trained on path {denoiser.trained.path.name!r} and is used along {denoiser.path.name!r}; "
            f"only format 'pliant' can hold that. Save the model before on_path"
        )
    if denoiser.core.family != "dit":
        raise FormatError(f"this model is a {denoiser.core.family} network and only format 'pliant' can hold that")
    config = denoiser.dit_config
    if isinstance(denoiser.network, DynamicDiT) or config.block_heads or config.block_hidden:
        raise FormatError("the blocks of this model differ in width and only format 'pliant' can hold that")
    if isinstance(denoiser.network, TokenRoutedDiT):
        raise FormatError("this model has token routers and only format 'pliant' can hold them")
    if isinstance(denoiser.network, ExitDiT):
        raise FormatError(
            "this model has early exits and only format 'pliant' can hold them; to export it without them, save "
            "dataclasses.replace(model, network=model.core)"
        )
    if isinstance(denoiser.network, FlexiDiT):
        raise FormatError(
            "this model is flexible and only format 'pliant' can hold that; to export one of its sizes, save "
            "dataclasses.replace(model, network=model.network.base)"
        )


def refuse_inexact(wrong: list[str], format: str, allow: bool) -> None:
    """Raises FormatError listing what a format cannot express; only warns if that is allowed."""
    if wrong and not allow:
        raise FormatError(
            f"format {format!r} cannot say what this model is: {'; '.join(wrong)}. Save it as format 'pliant', "
            f"or pass allow_inexact=True to write its weights all the same"
        )
    if wrong:
        warnings.warn(f"written as {format!r} although {'; '.join(wrong)}", stacklevel=4)


def export(tensors: dict[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """CPU copies that share no memory with each other, in `dtype` if given."""
    return {name: tensor.detach().to("cpu", dtype, copy=True).contiguous() for name, tensor in tensors.items()}
