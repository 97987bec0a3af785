"""Folders of diffusers' DiTTransformer2DModel, alone or inside a DiTPipeline (sheet A, section 3.5).

diffusers is numerically not the official DiT: its time sinusoid divides by 127 and its second norms add 1e-5. Both
constants travel in `DiTConfig`, so either kind of weights runs as it was trained. Read without importing diffusers.
"""

from __future__ import annotations

import json
from pathlib import Path as FilePath
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pliant.denoiser import Denoiser
from pliant.errors import ConfigError, FormatError
from pliant.files import replaced_folder, write_json
from pliant.formats.native import CONFIG_FILE, read_config
from pliant.formats.official_dit import export, plain_network_only, refuse_inexact
from pliant.formats.source import (
    Source,
    architecture,
    check_options,
    check_tensors,
    meta_dit,
    option_path,
    owned,
    plain_source,
)
from pliant.formats.state_files import read_state
from pliant.models.dit import DiTConfig
from pliant.paths import NetworkTime, Path, VPDiscrete, prediction_type

OPTIONS = ("path", "prediction")
PIPELINE_FILE, WEIGHTS = "model_index.json", "diffusion_pytorch_model"
SCHEDULER_FILE = "scheduler_config.json"
CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")  # the second: facebook/DiT-XL-2-256 and its time

# Pliant's name -> diffusers'. The embedders exist in every block; `qkv` and `modulation` are cut.
OUTSIDE = {"patch_embed": "pos_embed.proj", "head": "proj_out_2"}
EMBEDDERS = {
    "time_embed.fc1": "timestep_embedder.linear_1",
    "time_embed.fc2": "timestep_embedder.linear_2",
    "label_embed": "class_embedder.embedding_table",
}
INSIDE = {"proj": "attn1.to_out.0", "fc1": "ff.net.0.proj", "fc2": "ff.net.2"}
KINDS = ("weight", "bias")

# Options of diffusers' class that Pliant's DiT has only one way of.
FIXED = {
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
    "attention_bias": True,
}


def to_diffusers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A DiT's state dict -> DiTTransformer2DModel's, embedders repeated in every block. Views where possible."""
    width = state["time_embed.fc2.bias"].shape[0]
    depth = (state["modulation.bias"].shape[0] // width - 2) // 6
    out = {f"{theirs}.{kind}": state[f"{ours}.{kind}"] for ours, theirs in OUTSIDE.items() for kind in KINDS}
    for i in range(depth):
        block = f"transformer_blocks.{i}"
        for ours, theirs in EMBEDDERS.items():
            names = [kind for kind in KINDS if f"{ours}.{kind}" in state]
            out |= {f"{block}.norm1.emb.{theirs}.{kind}": state[f"{ours}.{kind}"] for kind in names}
        for kind in KINDS:
            parts = state[f"blocks.{i}.qkv.{kind}"].chunk(3)
            out |= {f"{block}.attn1.to_{n}.{kind}": part for n, part in zip("qkv", parts, strict=True)}
            out |= {f"{block}.{theirs}.{kind}": state[f"blocks.{i}.{ours}.{kind}"] for ours, theirs in INSIDE.items()}
    for kind in KINDS:
        rows = state[f"modulation.{kind}"].split([*[6 * width] * depth, 2 * width])
        out |= {f"transformer_blocks.{i}.norm1.linear.{kind}": rows[i] for i in range(depth)}
        out[f"proj_out_1.{kind}"] = rows[depth]
    return out


def from_diffusers(tensors: dict[str, Tensor], depth: int, where: object) -> dict[str, Tensor]:
    """Inverse of `to_diffusers`, fp32 copies. Raises FormatError if blocks have different embedders."""
    state = {f"{ours}.{k}": owned(tensors[f"{theirs}.{k}"]) for ours, theirs in OUTSIDE.items() for k in KINDS}
    blocks = [f"transformer_blocks.{i}" for i in range(depth)]
    for ours, theirs in EMBEDDERS.items():
        for kind in KINDS:
            name = f"norm1.emb.{theirs}.{kind}"
            if f"{blocks[0]}.{name}" not in tensors:
                continue
            first = tensors[f"{blocks[0]}.{name}"]
            other = next((i for i, b in enumerate(blocks) if not torch.equal(tensors[f"{b}.{name}"], first)), None)
            if other is not None:
                raise FormatError(
                    f"{where}: block {other} has another {name!r} than block 0 (fine-tuned apart in diffusers); "
                    f"DiT has one for all blocks, so this model cannot be read"
                )
            state[f"{ours}.{kind}"] = owned(first)
    for i, block in enumerate(blocks):
        for kind in KINDS:
            state[f"blocks.{i}.qkv.{kind}"] = torch.cat([owned(tensors[f"{block}.attn1.to_{n}.{kind}"]) for n in "qkv"])
            state |= {f"blocks.{i}.{o}.{kind}": owned(tensors[f"{block}.{t}.{kind}"]) for o, t in INSIDE.items()}
    for kind in KINDS:
        rows = [*(tensors[f"{block}.norm1.linear.{kind}"] for block in blocks), tensors[f"proj_out_1.{kind}"]]
        state[f"modulation.{kind}"] = torch.cat([owned(r) for r in rows])
    return state


def model_config(config: dict[str, Any], where: object) -> DiTConfig:
    """diffusers' config.json -> ours. Raises FormatError for another class or an option DiT does not have."""
    if config.get("_class_name") not in CLASSES:
        raise FormatError(f"{where} describes a {config.get('_class_name')}; Pliant reads {CLASSES[0]}")
    for name, only in FIXED.items():
        if config.get(name, only) != only:
            raise FormatError(f"{where}: {name} is {config[name]!r}, a DiT has {only!r}")
    channels = _number(config, "in_channels", where, 4)
    out = config.get("out_channels") or channels
    if out not in (channels, 2 * channels):
        raise FormatError(f"{where}: out_channels is {out!r}, expected {channels} or {2 * channels}")
    heads = _number(config, "num_attention_heads", where, 16)
    try:
        return DiTConfig(
            input_size=(_number(config, "sample_size", where, 32),) * 2,
            patch_size=(_number(config, "patch_size", where, 2),) * 2,
            in_channels=channels,
            width=heads * _number(config, "attention_head_dim", where, 72),
            depth=_number(config, "num_layers", where, 28),
            heads=heads,
            num_classes=_number(config, "num_embeds_ada_norm", where, 1000),
            learn_sigma=out == 2 * channels,
            frequency_divisor=127,
            norm2_eps=float(config.get("norm_eps", 1e-5)),
        )
    except ValueError as error:
        raise FormatError(f"{where}: {error}") from None


def _number(config: dict[str, Any], name: str, where: object, default: int) -> int:
    value = config.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise FormatError(f"{where}: {name} is {value!r}, expected a positive integer")
    return value


def scheduler_path(config: dict[str, Any], where: object) -> tuple[VPDiscrete, str]:
    """(path, prediction) of a scheduler_config.json. Raises FormatError for a table Pliant has no path for."""
    steps = _number(config, "num_train_timesteps", where, 1000)
    scale = 1000.0 / steps
    tables = {"linear": (1e-4 * scale, 2e-2 * scale), "scaled_linear": (0.00085, 0.012)}
    name = config.get("beta_schedule", "linear")
    ends = config.get("beta_start", 1e-4), config.get("beta_end", 2e-2)
    odd = [k for k in ("trained_betas", "rescale_betas_zero_snr") if config.get(k)]
    if name not in tables or ends != tables[name] or odd:
        raise FormatError(
            f"{where}: betas {name!r} {ends}{' with ' + odd[0] if odd else ''} are not a table Pliant has "
            f"(linear {tables['linear']}, scaled_linear {tables['scaled_linear']}); pass path= to choose one"
        )
    path = VPDiscrete(betas=name.replace("_", "-"), num_timesteps=steps)
    return path, config.get("prediction_type", "epsilon")


def recognises(folder: FilePath) -> bool:
    """Whether a folder claims to be diffusers'."""
    if (folder / PIPELINE_FILE).is_file():
        return True
    return (folder / CONFIG_FILE).is_file() and "_class_name" in read_config(folder)


def find(folder: FilePath, options: dict[str, Any]) -> Source:
    """Read a transformer's folder or a pipeline's. `path` and `prediction` replace what the scheduler's config says."""
    check_options(options, OPTIONS, "diffusers")
    index = _json(folder / PIPELINE_FILE) if (folder / PIPELINE_FILE).is_file() else {}
    if index and not (folder / "transformer" / CONFIG_FILE).is_file():
        raise FormatError(f"{folder} is a {index.get('_class_name')} without a transformer; expected a DiTPipeline")
    model = folder / "transformer" if index else folder
    config = model_config(read_config(model), model / CONFIG_FILE)
    eps = f"{config.norm2_eps:g}"
    notes = [f"diffusers' arithmetic: sinusoid divisor 127, second norms' eps {eps} (official DiT: 128, 1e-06)"]
    scheduler = _scheduler_file(folder)
    path: Path = VPDiscrete()
    prediction = "epsilon"
    if "path" in options:
        path = option_path(options["path"])
    elif scheduler:
        path, prediction = scheduler_path(_json(scheduler), scheduler)
    else:
        notes.append(f"no {SCHEDULER_FILE} found: assumed DiT's linear betas, 1000 steps, epsilon")
    steps = path.num_timesteps if isinstance(path, VPDiscrete) else 1000
    metadata: dict[str, Any] = {"name": architecture(config)}
    names = _class_names(index.get("id2label"), config.num_classes)
    if names:
        metadata["class_names"] = names
    return plain_source(
        format="diffusers",
        location=folder,
        config=config,
        path=path,
        prediction=prediction_type(options.get("prediction", prediction)),
        network_time=NetworkTime.timesteps(steps),
        tensors=lambda: read_tensors(model, config),
        metadata=metadata,
        notes=notes,
    )


def _scheduler_file(folder: FilePath) -> FilePath | None:
    """The scheduler's config inside a folder, or beside it if the folder is part of a pipeline."""
    inside, beside = (place / "scheduler" / SCHEDULER_FILE for place in (folder, folder.parent))
    if inside.is_file():
        return inside
    return beside if beside.is_file() and (folder.parent / PIPELINE_FILE).is_file() else None


def _json(file: FilePath) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(f"{file} is not readable JSON ({error})") from None
    if not isinstance(content, dict):
        raise FormatError(f"{file} holds {type(content).__name__}, expected a JSON object")
    return content


def _class_names(labels: Any, classes: int) -> list[str] | None:
    """A pipeline's id2label as a list, if it names every class."""
    if not isinstance(labels, dict) or {str(k) for k in labels} != {str(i) for i in range(classes)}:
        return None
    return [str(labels[str(i)]) for i in range(classes)]


def read_tensors(folder: FilePath, config: DiTConfig) -> dict[str, Tensor]:
    """The checked weights under Pliant's names, from one file or from shards."""
    tensors: dict[str, Tensor] = {}
    for file in weight_files(folder):
        tensors |= read_state(file).tensors
    tensors.pop("pos_embed.pos_embed", None)  # recomputed; old versions stored it
    check_tensors(tensors, to_diffusers(meta_dit(config).state_dict()), folder)
    return from_diffusers(tensors, config.depth, folder)


def weight_files(folder: FilePath) -> list[FilePath]:
    """The files that hold the weights: safetensors before .bin, one file before shards, a variant (fp16) last."""
    for ending in ("safetensors", "bin"):
        single, index = folder / f"{WEIGHTS}.{ending}", folder / f"{WEIGHTS}.{ending}.index.json"
        if single.is_file():
            return [single]
        if index.is_file():
            return _shards(index)
    variants = sorted(f for f in folder.glob(f"{WEIGHTS}.*") if f.suffix in (".safetensors", ".bin"))
    if len(variants) == 1:
        return variants
    found = ", ".join(sorted(f.name for f in folder.iterdir())[:5])
    raise FormatError(f"{folder} holds no {WEIGHTS}.safetensors (found: {found}); the download is incomplete")


def _shards(index: FilePath) -> list[FilePath]:
    places = _json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise FormatError(f"{index} has no 'weight_map'")
    names = sorted({str(name) for name in places.values()})
    for name in names:
        if FilePath(name).name != name:
            raise FormatError(f"{index} names the file {name!r} outside its folder")
        if not (index.parent / name).is_file():
            raise FormatError(f"{index} names the file {name!r}, which is missing; the download is incomplete")
    return [index.parent / name for name in names]


def save(
    denoiser: Denoiser, folder: str | FilePath, dtype: torch.dtype | None = None, allow_inexact: bool = False
) -> None:
    """Write a folder for `DiTTransformer2DModel.from_pretrained`, and scheduler/ beside the weights. Atomic.

    Raises FormatError if diffusers' network would compute something else, unless `allow_inexact`.
    """
    plain_network_only(denoiser)
    config = denoiser.dit_config
    if config.input_size[0] != config.input_size[1] or config.patch_size[0] != config.patch_size[1]:
        raise FormatError(f"diffusers' DiT is square, this model takes {config.input_size}; save it as format 'pliant'")
    if config.mlp_ratio != 4 or config.class_dropout == 0:
        raise FormatError("diffusers' DiT has an MLP ratio of 4 and a null label; save this model as format 'pliant'")
    wrong = []
    if config.frequency_divisor != 127:
        wrong.append(f"its time sinusoid divides by {config.frequency_divisor}, diffusers' by 127 (outputs differ)")
    if not isinstance(denoiser.path, VPDiscrete):
        wrong.append(f"its path is {denoiser.path.name!r}, diffusers' DiT pipeline uses 'vp-discrete'")
    elif denoiser.network_time != NetworkTime.timesteps(denoiser.path.num_timesteps):
        wrong.append("its network does not count time in the table's steps")
    if denoiser.prediction not in ("epsilon", "sample", "v_prediction"):
        wrong.append(f"it predicts {denoiser.prediction}, diffusers' schedulers know epsilon, sample, v_prediction")
    refuse_inexact(wrong, "diffusers", allow_inexact)
    tensors = export(to_diffusers(denoiser.network.state_dict()), dtype)
    with replaced_folder(folder) as temporary:
        save_file(tensors, temporary / f"{WEIGHTS}.safetensors", metadata={"format": "pt"})
        write_json(temporary / CONFIG_FILE, _config(config))
        if not wrong:
            (temporary / "scheduler").mkdir()
            write_json(temporary / "scheduler" / SCHEDULER_FILE, _scheduler(denoiser))


def _config(config: DiTConfig) -> dict[str, Any]:
    return {
        "_class_name": CLASSES[0],
        **FIXED,
        "num_attention_heads": config.heads,
        "attention_head_dim": config.width // config.heads,
        "num_layers": config.depth,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "sample_size": config.input_size[0],
        "patch_size": config.patch_size[0],
        "num_embeds_ada_norm": config.num_classes,
        "norm_eps": config.norm2_eps,
    }


def _scheduler(denoiser: Denoiser) -> dict[str, Any]:
    path = denoiser.path
    if not isinstance(path, VPDiscrete):  # pragma: no cover - `save` has checked
        raise ConfigError("only a table of betas has a scheduler config")
    scale = 1000.0 / path.num_timesteps
    start, end = (1e-4 * scale, 2e-2 * scale) if path.betas == "linear" else (0.00085, 0.012)
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": path.num_timesteps,
        "beta_schedule": path.betas.replace("-", "_"),
        "beta_start": start,
        "beta_end": end,
        "prediction_type": denoiser.prediction,
        "clip_sample": False,
        "set_alpha_to_one": True,
    }
