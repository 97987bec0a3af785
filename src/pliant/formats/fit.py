"""Official FiT and FiTv2 files (whlzy/FiT, weights in InfImagine/FiTv2): state dicts as sheet B, section 1 lays out.

The layout holds every width and depth, but not the number of heads, whether queries and keys are normalised, or how
positions were stretched in training. FiTv2 is a velocity in SiT's time (0 is noise), FiT an epsilon with a variance
code on DDPM's table of 1000 steps.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pliant.denoiser import Denoiser
from pliant.errors import ConfigError, FormatError
from pliant.files import replaced_file
from pliant.formats.official_dit import (
    KINDS,
    export,
    refuse_inexact,
    stated_path,
    stored_classes,
    stored_shape,
)
from pliant.formats.source import Source, check_options, check_tensors, option_path, owned
from pliant.formats.state_files import StateFile, other_architecture
from pliant.models.fit import SIZES, FiT, FiTConfig
from pliant.models.patches import patch_pair
from pliant.paths import Linear, NetworkTime, VPDiscrete, prediction_type

FORMAT = "fit"
OPTIONS = (
    "heads",
    "input_size",
    "num_classes",
    "patch_size",
    "qk_norm",
    "extrapolation",
    "train_length",
    "train_tokens",
    "path",
    "prediction",
)

OUTSIDE = {
    "time_embed.fc1": "t_embedder.mlp.0",
    "time_embed.fc2": "t_embedder.mlp.2",
    "label_embed": "y_embedder.embedding_table",
}
INSIDE = {"qkv": "attn.qkv", "proj": "attn.proj", "fc1_gate": "mlp.fc1_g", "fc1": "mlp.fc1_x", "fc2": "mlp.fc2"}


def to_official(state: dict[str, Tensor], config: FiTConfig) -> dict[str, Tensor]:
    """A FiT's state dict -> the official one. Views where possible."""
    depth, width = config.depth, config.width
    out = {"x_embedder.proj.weight": state["patch_embed.weight"].flatten(1)}
    out["x_embedder.proj.bias"] = state["patch_embed.bias"]
    for ours, theirs in OUTSIDE.items():
        out |= {f"{theirs}.{kind}": state[f"{ours}.{kind}"] for kind in KINDS if f"{ours}.{kind}" in state}
    for i in range(depth):
        for ours, theirs in INSIDE.items():
            out |= {f"blocks.{i}.{theirs}.{kind}": state[f"blocks.{i}.{ours}.{kind}"] for kind in KINDS}
    for kind in KINDS:
        out[f"final_layer.linear.{kind}"] = _channel_first(state[f"head.{kind}"], config)
        if config.modulation_rank is None:
            rows = state[f"modulation.linear.{kind}"].split([*[6 * width] * depth, 2 * width])
            out |= {f"blocks.{i}.adaLN_modulation.1.{kind}": rows[i] for i in range(depth)}
            out[f"final_layer.adaLN_modulation.1.{kind}"] = rows[depth]
            continue
        out[f"global_adaLN_modulation.1.{kind}"] = state[f"modulation.shared.{kind}"]
        out[f"final_layer.adaLN_modulation.1.{kind}"] = state[f"modulation.head.{kind}"]
        down = state[f"modulation.down.{kind}"].split(config.modulation_rank)
        up = state[f"modulation.up_{kind}"]  # (L, r, 6D) or (L, 6D)
        for i in range(depth):
            out[f"blocks.{i}.adaLN_modulation.1.{kind}"] = down[i]
            out[f"blocks.{i}.adaLN_modulation.2.{kind}"] = up[i].T if kind == "weight" else up[i]
    return out


def from_official(tensors: dict[str, Tensor], config: FiTConfig) -> dict[str, Tensor]:
    """Inverse of `to_official`. fp32 copies."""
    own, depth = {name: owned(tensor) for name, tensor in tensors.items()}, config.depth
    kernel = (config.width, config.in_channels, *config.patch_size)
    state = {"patch_embed.weight": own["x_embedder.proj.weight"].view(kernel)}
    state["patch_embed.bias"] = own["x_embedder.proj.bias"]
    for ours, theirs in OUTSIDE.items():
        state |= {f"{ours}.{kind}": own[f"{theirs}.{kind}"] for kind in KINDS if f"{theirs}.{kind}" in own}
    for i in range(depth):
        for ours, theirs in INSIDE.items():
            state |= {f"blocks.{i}.{ours}.{kind}": own[f"blocks.{i}.{theirs}.{kind}"] for kind in KINDS}
    for kind in KINDS:
        state[f"head.{kind}"] = _channel_last(own[f"final_layer.linear.{kind}"], config)
        first = [own[f"blocks.{i}.adaLN_modulation.1.{kind}"] for i in range(depth)]
        head = own[f"final_layer.adaLN_modulation.1.{kind}"]
        if config.modulation_rank is None:
            state[f"modulation.linear.{kind}"] = torch.cat([*first, head])
            continue
        second = [own[f"blocks.{i}.adaLN_modulation.2.{kind}"] for i in range(depth)]
        state[f"modulation.shared.{kind}"] = own[f"global_adaLN_modulation.1.{kind}"]
        state[f"modulation.head.{kind}"] = head
        state[f"modulation.down.{kind}"] = torch.cat(first)
        state[f"modulation.up_{kind}"] = torch.stack([w.T if kind == "weight" else w for w in second])
    return state


def _channel_last(rows: Tensor, config: FiTConfig) -> Tensor:
    """Rows of the last linear from (C, ph, pw), FiT's order inside a token, to (ph, pw, C), ours."""
    cut = rows.view(config.out_channels, math.prod(config.patch_size), *rows.shape[1:])
    return cut.transpose(0, 1).reshape(rows.shape)


def _channel_first(rows: Tensor, config: FiTConfig) -> Tensor:
    cut = rows.view(math.prod(config.patch_size), config.out_channels, *rows.shape[1:])
    return cut.transpose(0, 1).reshape(rows.shape)


def is_fit(state: StateFile) -> bool:
    """Whether the tensors are of this layout."""
    return {"x_embedder.proj.weight", "t_embedder.mlp.0.weight", "blocks.0.mlp.fc1_g.weight"} <= state.tensors.keys()


def read_config(state: StateFile, options: dict[str, Any]) -> tuple[FiTConfig, list[str]]:
    """The architecture, and what had to be assumed. `OPTIONS` win over what the file says.

    Raises FormatError for another architecture, ConfigError for options that contradict the file.
    """
    if not is_fit(state):
        raise FormatError(f"{state.file} is no FiT: {other_architecture(state.tensors)}")
    width, features = stored_shape(state, "x_embedder.proj.weight", 2)
    rows = stored_shape(state, "y_embedder.embedding_table.weight", 2)[0]
    hidden = stored_shape(state, "blocks.0.mlp.fc1_g.weight", 2)[0]
    out = stored_shape(state, "final_layer.linear.weight", 2)[0] / features
    if out not in (1, 2):
        raise FormatError(f"{state.file}: the final layer has {out:g} times the input's features, expected 1 or 2")
    second = "global_adaLN_modulation.1.weight" in state.tensors
    rank = stored_shape(state, "blocks.0.adaLN_modulation.1.weight", 2)[0] if second else None
    given = {**_stated(state), **{k: v for k, v in options.items() if k in OPTIONS}}
    patch = patch_pair(given.get("patch_size", (2, 2)))
    if features % math.prod(patch):
        raise ConfigError(f"{state.file} has tokens of {features} features, no multiple of a patch of {patch}")
    notes: list[str] = []
    extrapolation, train_tokens = given.get("extrapolation"), given.get("train_tokens")
    if extrapolation is None and re.search(r"(?<![a-z])hr(ft)?(?![a-z])", state.file.name, re.IGNORECASE):
        extrapolation, train_tokens = "vision-ntk", train_tokens or 1024
        notes.append("taken for a high-resolution model, with positions of vision-ntk, because of the file's name")
    train_tokens = int(train_tokens or 256)
    side = math.isqrt(train_tokens)
    classes, dropout = stored_classes(state, rows, given.get("num_classes"))
    config = FiTConfig(
        input_size=patch_pair(given.get("input_size") or (side * patch[0], side * patch[1])),
        patch_size=patch,
        in_channels=features // math.prod(patch),
        width=width,
        depth=1 + max(int(m[1]) for m in map(re.compile(r"blocks\.(\d+)\.").match, state.tensors) if m),
        heads=_heads(state, width, given.get("heads")),
        mlp_hidden=hidden,
        modulation_rank=rank,
        qk_norm=bool(given.get("qk_norm", second)),
        learn_sigma=out == 2,
        num_classes=classes,
        class_dropout=dropout,
        train_length=int(given.get("train_length", 16)),
        train_tokens=train_tokens,
        extrapolation=extrapolation or "none",
    )
    return config, notes


def _stated(state: StateFile) -> dict[str, Any]:
    """What `save` put into a safetensors file's metadata."""
    try:
        stated = json.loads(state.facts.get("fit", "null"))
    except (TypeError, ValueError):
        return {}
    return stated if isinstance(stated, dict) else {}


def _heads(state: StateFile, width: int, given: Any) -> int:
    """Not in the file: released widths have known heads."""
    if given is not None:
        return int(given)
    known = {size["width"]: size["heads"] for size in SIZES.values()}
    if width in known:
        return known[width]
    raise ConfigError(f"{state.file} does not say how many heads its attention has; say it with heads=")


def read_tensors(state: StateFile, config: FiTConfig) -> dict[str, Tensor]:
    """The checked weights under Pliant's names. Raises FormatError for tensors that do not belong."""
    check_tensors(state.tensors, to_official(_meta(config).state_dict(), config), state.file)
    return from_official(state.tensors, config)


def _meta(config: FiTConfig) -> FiT:
    with torch.device("meta"):
        return FiT(config)


def find(state: StateFile, options: dict[str, Any]) -> Source:
    """Read as FiTv2 (linear velocity) or FiT (epsilon on the linear table), unless `path` and `prediction` differ."""
    check_options(options, OPTIONS, FORMAT)
    config, notes = read_config(state, options)
    first = config.modulation_rank is None
    path = option_path(options.get("path") or stated_path(state) or (VPDiscrete() if first else Linear()))
    predicted = options.get("prediction") or state.facts.get("prediction") or ("epsilon" if first else "velocity")
    network = _meta(config)
    shell = Denoiser(
        network,
        path,
        prediction_type(predicted),
        NetworkTime.timesteps(path.num_timesteps) if isinstance(path, VPDiscrete) else NetworkTime.sit(),
        {"name": config.name, "format": FORMAT},
    )

    def load() -> Denoiser:
        filled = _meta(config)
        filled.load_state_dict(read_tensors(state, config), assign=True)
        return replace(shell, network=filled.eval())

    count = sum(p.numel() for p in network.parameters())
    return Source(FORMAT, state.file, shell.identity(), count, (*state.notes, *notes), load)


def save(
    denoiser: Denoiser, file: str | FilePath, dtype: torch.dtype | None = None, allow_inexact: bool = False
) -> None:
    """Write the flat official state dict (`.safetensors` by its name, else torch.save). Atomic.

    Raises FormatError if the file would not mean the same to the official code, unless `allow_inexact`.
    """
    network = denoiser.network
    if not isinstance(network, FiT):
        kind = denoiser.core.family
        raise FormatError(f"format {FORMAT!r} holds FiT networks, this one is a {kind} network; save it as 'pliant'")
    if denoiser.preconditioning is not None or denoiser.trained is not None:
        raise FormatError("this model is used otherwise than it was trained and only format 'pliant' can hold that")
    config = network.config
    first = config.modulation_rank is None
    wrong = []
    if first and (not isinstance(denoiser.path, VPDiscrete) or denoiser.path.betas != "linear"):
        wrong.append(f"its path is {denoiser.path.name!r}, FiT's is 'vp-discrete' with linear betas")
    elif first and denoiser.network_time != NetworkTime.timesteps(getattr(denoiser.path, "num_timesteps", 0)):
        wrong.append("its network does not count time in the table's steps")
    if not first and denoiser.path.name != "linear":
        wrong.append(f"its path is {denoiser.path.name!r}, FiTv2's is 'linear'")
    if not first and denoiser.network_time != NetworkTime.sit():
        wrong.append("its network does not count time from 0 = noise to 1 = data")
    expected = "epsilon" if first else "velocity"
    if denoiser.prediction != expected:
        wrong.append(f"it predicts {denoiser.prediction}, {'FiT' if first else 'FiTv2'} predicts {expected}")
    refuse_inexact(wrong, FORMAT, allow_inexact)
    tensors = export(to_official(network.state_dict(), config), dtype)
    said = {k: v for k, v in config.to_dict().items() if k in OPTIONS}
    facts = {
        "format": "pt",
        "fit": json.dumps(said),
        "path": json.dumps(denoiser.path.to_config()),
        "prediction": denoiser.prediction,
    }
    target = FilePath(file)
    with replaced_file(target) as temporary:
        if target.suffix == ".safetensors":
            save_file(tensors, temporary, metadata=facts)
        else:
            with temporary.open("wb") as handle:
                torch.save(tensors, handle)
