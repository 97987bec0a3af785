"""Training sets of latents: images run through an autoencoder once, stored in safetensors shards with statistics.

Every shard holds latents of one size, so images of any sizes make one cache, bucketed by size.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pliant.errors import DataError
from pliant.files import replaced_folder, write_json
from pliant.models.autoencoders import posterior
from pliant.training.data.images import TrainingSet
from pliant.training.data.sizes import SizedSet, check_one_size, size_groups
from pliant.training.draws import Draws

FORMAT = 2
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
    """`Encode` from any autoencoder of `load_autoencoder`."""

    def encode(images: Tensor) -> Encoded:
        return Encoded(*posterior(autoencoder, images))

    return encode


Advance: TypeAlias = Callable[[int, int], None]
"""(images done, of how many)."""


class LatentSet:
    """Cached latents, read from disk sample by sample. Stochastic autoencoders are sampled anew at every visit.

    A `TrainingSet` where all are of one size, and always a `SizedSet`.
    """

    def __init__(self, folder: str | Path) -> None:
        """Raises DataError if the folder is not a complete cache."""
        self.folder = Path(folder)
        try:
            index = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))
            if index["format"] != FORMAT:
                raise DataError(f"{self.folder} is of format {index['format']}, not {FORMAT}; delete it to rebuild")
            self.key: str = index["key"]
            self.channels: int = index["channels"]
            self.class_names: tuple[str, ...] = tuple(index["class_names"])
            self.statistics: dict[str, list[float]] = index["statistics"]
            self.normalisation: dict[str, list[float]] = index["normalisation"]
            self._flipped: bool = index["flipped"]
            self._stochastic: bool = index["stochastic"]
            self._shards = [safe_open(self.folder / shard["file"], framework="pt") for shard in index["shards"]]
            labels = [shard.get_tensor("labels") for shard in self._shards]
            self.labels: Tensor = torch.cat(labels)
            counts = torch.tensor([len(part) for part in labels])
            self.sizes: Tensor = torch.tensor([s["size"] for s in index["shards"]]).repeat_interleave(counts, dim=0)
            self._starts = (counts.cumsum(0) - counts).tolist()
            if [len(part) for part in labels] != [shard["count"] for shard in index["shards"]]:
                raise ValueError("the shards are not those of the index")
        except DataError:
            raise
        except Exception as error:  # OSError, JSON, KeyError, SafetensorError: all mean the same to the reader
            reason = (str(error).splitlines() or ["?"])[0]
            raise DataError(f"{self.folder} is not a complete latent cache: {reason}; delete it to rebuild") from None
        self._shift = torch.tensor(self.normalisation["shift"])[:, None, None]
        self._scale = torch.tensor(self.normalisation["scale"])[:, None, None]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, h, w) of every sample. Raises DataError if they differ in size."""
        if len(self.sizes.unique(dim=0)) > 1:
            raise DataError(f"{self.folder} holds latents of several sizes; this needs one size (encode with a crop)")
        height, width = self.sizes[0].tolist()
        return self.channels, height, width

    def samples(self, indices: Tensor, flips: Tensor, draws: Draws) -> Tensor:
        if bool(flips.any()) and not self._flipped:
            raise DataError(
                "this latent cache has no mirrored images; rebuild it with flip=True or set data.flip=false"
            )
        check_one_size(self.sizes, indices)
        rows = list(zip(indices.tolist(), flips.tolist(), strict=True))
        latents = torch.stack([self._read("mean", i, flip) for i, flip in rows])
        if self._stochastic:
            std = torch.stack([self._read("std", i, flip) for i, flip in rows])
            latents = latents + std * draws.normal(tuple(latents.shape[1:]))
        return (latents - self._shift) * self._scale

    def _read(self, name: str, index: int, flip: bool) -> Tensor:
        shard = bisect_right(self._starts, index) - 1
        row = index - self._starts[shard]
        piece = self._shards[shard].get_slice(f"{name}_flipped" if flip else name)
        tensor: Tensor = piece[row : row + 1][0]
        return tensor.float()


def cached_latents(
    folder: str | Path,
    images: TrainingSet | SizedSet,
    encode: Encode,
    key: str,
    *,
    scaling: Scaling = "standardise",
    flip: bool = False,
    batch_size: int = 32,
    shard_size: int = 2048,
    dtype: torch.dtype = torch.float32,
    advance: Advance | None = None,
) -> LatentSet:
    """The latents of `images`, from `folder` if it was made for the same `key` and options, else computed and stored.

    key: names the data and the autoencoder, e.g. "cifar10-train, taef2". scaling: the autoencoder's own
    (`config_scaling`), or "standardise" to zero mean and unit variance per channel. flip: store mirrored
    images too. dtype: of the stored tensors. Interrupting leaves no partial cache.

    Images of one size keep their order; a `SizedSet` is stored size by size, in its order within each.
    """
    options = {"key": key, "scaling": scaling, "flip": flip, "count": len(images.labels), "shard_size": shard_size}
    if dtype != torch.float32:
        options["dtype"] = str(dtype)
    digest = hashlib.sha256(json.dumps(options).encode()).hexdigest()[:16]
    folder = Path(folder)
    if (folder / INDEX).is_file():
        existing = LatentSet(folder)
        if existing.key == digest:
            return existing
    with replaced_folder(folder) as temporary:
        _write_cache(temporary, images, encode, digest, scaling, flip, batch_size, shard_size, dtype, advance)
    return LatentSet(folder)


def _write_cache(
    folder: Path,
    images: TrainingSet | SizedSet,
    encode: Encode,
    key: str,
    scaling: Scaling,
    flip: bool,
    batch_size: int,
    shard_size: int,
    dtype: torch.dtype,
    advance: Advance | None,
) -> None:
    moments = _Moments()
    shards: list[dict[str, Any]] = []
    channels, stochastic, done = 0, False, 0
    sides = ((False, ""), (True, "_flipped")) if flip else ((False, ""),)
    for members in _one_size_groups(images):
        for indices in members.split(shard_size):
            tensors: dict[str, Tensor] = {"labels": images.labels[indices]}
            for mirrored, suffix in sides:
                means, stds = [], []
                for part in _encoded(images, encode, indices, mirrored, batch_size):
                    means.append(part.mean)
                    if part.std is not None:
                        stds.append(part.std)
                    done += len(part.mean)
                    if advance is not None:
                        advance(done, len(sides) * len(images.labels))
                mean, std = torch.cat(means), torch.cat(stds) if stds else None
                moments.add(mean, std)
                tensors[f"mean{suffix}"] = mean.to(dtype).contiguous()
                if std is not None:
                    stochastic = True
                    tensors[f"std{suffix}"] = std.to(dtype).contiguous()
            channels = mean.shape[1]
            name = f"latents-{len(shards):05d}.safetensors"
            save_file(tensors, folder / name)
            shards.append({"file": name, "count": len(indices), "size": list(mean.shape[2:])})
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
        "channels": channels,
        "class_names": list(images.class_names),
        "statistics": {"mean": mean.tolist(), "std": std.tolist()},
        "normalisation": {"shift": shift.tolist(), "scale": scale.tolist()},
        "flipped": flip,
        "stochastic": stochastic,
        "shards": shards,
    }
    write_json(folder / INDEX, index)


def _one_size_groups(images: TrainingSet | SizedSet) -> Iterator[Tensor]:
    """(n,) indices, every group of one size."""
    sizes = getattr(images, "sizes", None)
    if sizes is None:
        yield torch.arange(len(images.labels))
    else:
        yield from (members for _, members in size_groups(sizes))


def _encoded(
    images: TrainingSet | SizedSet, encode: Encode, indices: Tensor, mirrored: bool, batch_size: int
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
