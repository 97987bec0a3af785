"""Training sets of latents: images run through an autoencoder once, stored in safetensors shards with statistics."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pliant.errors import DataError
from pliant.files import replaced_folder, write_json
from pliant.training.data.images import TrainingSet
from pliant.training.draws import Draws

FORMAT = 1
INDEX = "latents.json"


class Encoded(NamedTuple):
    """Latents of a batch of images. std: None for deterministic autoencoders. Both (B, C, h, w), not normalised."""

    mean: Tensor
    std: Tensor | None = None


Scaling: TypeAlias = tuple[Any, Any] | Literal["standardise"]
"""(shift, scale), numbers or one per channel: models see `(latent - shift) * scale`. Or computed from the data."""

Encode: TypeAlias = Callable[[Tensor], Encoded]
"""(B, channels, H, W) float32 images in [-1, 1] -> latents."""


def autoencoder_encode(autoencoder: Any) -> Encode:
    """`Encode` from any autoencoder with diffusers' interface (AutoencoderKL, AutoencoderTiny, ...)."""

    @torch.no_grad()
    def encode(images: Tensor) -> Encoded:
        parameter = next(autoencoder.parameters())
        out = autoencoder.encode(images.to(parameter.device, parameter.dtype))
        if hasattr(out, "latent_dist"):
            return Encoded(out.latent_dist.mean, out.latent_dist.std)
        return Encoded(out.latents)

    return encode


class LatentSet:
    """Cached latents, read from disk sample by sample. Stochastic autoencoders are sampled anew at every visit."""

    def __init__(self, folder: str | Path) -> None:
        """Raises DataError if the folder is not a complete cache."""
        self.folder = Path(folder)
        try:
            index = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))
            self.key: str = index["key"]
            self.shape: tuple[int, int, int] = tuple(index["shape"])
            self.class_names: tuple[str, ...] = tuple(index["class_names"])
            self.statistics: dict[str, list[float]] = index["statistics"]
            self.normalisation: dict[str, list[float]] = index["normalisation"]
            self._shard_size: int = index["shard_size"]
            self._flipped: bool = index["flipped"]
            self._stochastic: bool = index["stochastic"]
            if index["format"] != FORMAT:
                raise DataError(f"{self.folder} has latent format {index['format']}, this version reads {FORMAT}")
            self._shards = [safe_open(self.folder / name, framework="pt") for name in index["shards"]]
            self.labels: Tensor = torch.cat([shard.get_tensor("labels") for shard in self._shards])
        except DataError:
            raise
        except Exception as error:  # OSError, JSON, KeyError, SafetensorError: all mean the same to the reader
            reason = (str(error).splitlines() or ["?"])[0]
            raise DataError(f"{self.folder} is not a complete latent cache: {reason}; delete it to rebuild") from None
        self._shift = torch.tensor(self.normalisation["shift"])[:, None, None]
        self._scale = torch.tensor(self.normalisation["scale"])[:, None, None]

    def __len__(self) -> int:
        return len(self.labels)

    def samples(self, indices: Tensor, flips: Tensor, draws: Draws) -> Tensor:
        if bool(flips.any()) and not self._flipped:
            raise DataError(
                "this latent cache has no mirrored images; rebuild it with flip=True or set data.flip=false"
            )
        rows = list(zip(indices.tolist(), flips.tolist(), strict=True))
        latents = torch.stack([self._read("mean", i, flip) for i, flip in rows])
        if self._stochastic:
            std = torch.stack([self._read("std", i, flip) for i, flip in rows])
            latents = latents + std * draws.normal(self.shape)
        return (latents - self._shift) * self._scale

    def _read(self, name: str, index: int, flip: bool) -> Tensor:
        shard, row = divmod(index, self._shard_size)
        piece = self._shards[shard].get_slice(f"{name}_flipped" if flip else name)
        tensor: Tensor = piece[row : row + 1][0]
        return tensor.float()


def cached_latents(
    folder: str | Path,
    images: TrainingSet,
    encode: Encode,
    key: str,
    *,
    scaling: Scaling = "standardise",
    flip: bool = False,
    batch_size: int = 32,
    shard_size: int = 2048,
) -> LatentSet:
    """The latents of `images`, from `folder` if it was made for the same `key` and options, else computed and stored.

    key: names the data and the autoencoder, e.g. "cifar10-train, taef2". scaling: the autoencoder's own
    (`config_scaling`), or "standardise" to zero mean and unit variance per channel. flip: store mirrored
    images too. Interrupting leaves no partial cache.
    """
    options = {"key": key, "scaling": scaling, "flip": flip, "count": len(images.labels), "shard_size": shard_size}
    digest = hashlib.sha256(json.dumps(options).encode()).hexdigest()[:16]
    folder = Path(folder)
    if (folder / INDEX).is_file():
        existing = LatentSet(folder)
        if existing.key == digest:
            return existing
    with replaced_folder(folder) as temporary:
        _write_cache(temporary, images, encode, digest, scaling, flip, batch_size, shard_size)
    return LatentSet(folder)


def _write_cache(
    folder: Path,
    images: TrainingSet,
    encode: Encode,
    key: str,
    scaling: Scaling,
    flip: bool,
    batch_size: int,
    shard_size: int,
) -> None:
    moments = _Moments()
    names: list[str] = []
    shape: tuple[int, ...] = ()
    stochastic = False
    for shard in torch.arange(len(images.labels)).split(shard_size):
        tensors: dict[str, Tensor] = {"labels": images.labels[shard]}
        for suffix, mirrored in (("", False), ("_flipped", True)) if flip else (("", False),):
            parts = list(_encoded(images, encode, shard, mirrored, batch_size))
            tensors[f"mean{suffix}"] = torch.cat([part.mean for part in parts])
            if parts[0].std is not None:
                stochastic = True
                tensors[f"std{suffix}"] = torch.cat([part.std for part in parts if part.std is not None])
            moments.add(tensors[f"mean{suffix}"], tensors.get(f"std{suffix}"))
        shape = tuple(tensors["mean"].shape[1:])
        names.append(f"latents-{len(names):05d}.safetensors")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / names[-1])
    mean, std = moments.mean_std()
    if not bool(torch.isfinite(std).all()):
        raise DataError("the autoencoder returned latents that are not finite; check its precision and input range")
    if scaling == "standardise":
        shift, scale = mean, 1.0 / std.clamp(min=1e-6)
    else:
        shift, scale = (torch.as_tensor(v, dtype=mean.dtype).expand_as(mean) for v in scaling)
    index = {
        "format": FORMAT,
        "key": key,
        "shape": list(shape),
        "class_names": list(images.class_names),
        "statistics": {"mean": mean.tolist(), "std": std.tolist()},
        "normalisation": {"shift": shift.tolist(), "scale": scale.tolist()},
        "flipped": flip,
        "stochastic": stochastic,
        "shard_size": shard_size,
        "shards": names,
    }
    write_json(folder / INDEX, index)


def _encoded(
    images: TrainingSet, encode: Encode, indices: Tensor, mirrored: bool, batch_size: int
) -> Iterator[Encoded]:
    for part in indices.split(batch_size):
        flips = torch.full((len(part),), mirrored)
        encoded = encode(images.samples(part, flips, Draws.single(len(part))))
        std = None if encoded.std is None else encoded.std.float().cpu()
        yield Encoded(encoded.mean.float().cpu(), std)


class _Moments:
    """Per-channel mean and standard deviation of the latents, posterior noise included. Float64 sums."""

    def __init__(self) -> None:
        self._count = 0
        self._sum: Tensor = torch.zeros((), dtype=torch.float64)
        self._squares: Tensor = torch.zeros((), dtype=torch.float64)

    def add(self, mean: Tensor, std: Tensor | None) -> None:
        """mean, std: (N, C, h, w)."""
        values = mean.double()
        second = values.square() + (0.0 if std is None else std.double().square())
        self._count += values[:, 0].numel()
        self._sum = self._sum + values.sum((0, 2, 3))
        self._squares = self._squares + second.sum((0, 2, 3))

    def mean_std(self) -> tuple[Tensor, Tensor]:
        mean = self._sum / self._count
        return mean, (self._squares / self._count - mean.square()).clamp(min=0.0).sqrt()
