"""Training sets of pairs: (noise, sample, label) of a teacher in safetensors shards, or samples of two data sets.

A store is a folder with `pairs.json` and shards `pairs-00000.safetensors`, ... Every shard is a function of its number
alone and appears under its name only when complete, so that an interrupted generation goes on where it stopped.
Noise that was drawn from a seed is not stored but drawn again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Generator, Tensor

from pliant.errors import DataError
from pliant.files import replaced_file, write_json
from pliant.paths import Path as ModelPath
from pliant.paths import path_from_config
from pliant.plans.noise import seeded_noise
from pliant.training.data.images import MEMORY_LIMIT, TrainingSet, _mirror
from pliant.training.draws import Draws

FORMAT = 1
INDEX = "pairs.json"


@dataclass(frozen=True)
class StoreIndex:
    """What a store holds and how it was made. Two stores with equal indices hold the same pairs."""

    count: int
    shape: tuple[int, ...]
    """Of a sample: (C, H, W) for images."""
    shard_size: int
    path: dict[str, Any]
    """Of the teacher: whose law the noise has."""
    seeded: bool
    """The noise of pair k is that of the seed in `seeds`; else it is stored."""
    made_by: dict[str, Any] = field(default_factory=dict)
    """Teacher, plan, seeds or data: equal for equal pairs."""
    class_names: tuple[str, ...] = ()

    @property
    def shards(self) -> int:
        return -(-self.count // self.shard_size)

    def rows(self, shard: int) -> range:
        """The pairs in a shard."""
        return range(shard * self.shard_size, min(self.count, (shard + 1) * self.shard_size))

    def write(self, folder: Path) -> None:
        write_json(folder / INDEX, {"format": FORMAT, **asdict(self)})

    @staticmethod
    def read(folder: Path) -> StoreIndex:
        """Raises DataError if there is none that can be read."""
        try:
            data = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            if data.pop("format") != FORMAT:
                raise DataError(f"{folder} has another pair format than this version reads ({FORMAT})")
            data["shape"], data["class_names"] = tuple(data["shape"]), tuple(data["class_names"])
            return StoreIndex(**data)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{folder / INDEX} is not the index of a pair store ({error})") from None


def is_pair_store(source: str | Path) -> bool:
    """Whether a data source is a folder of pairs."""
    return (Path(source) / INDEX).is_file()


def shard_file(folder: Path, shard: int) -> Path:
    return folder / f"pairs-{shard:05d}.safetensors"


def write_shard(folder: Path, shard: int, tensors: dict[str, Tensor]) -> None:
    """images (n, C, H, W) float32, labels (n,), and seeds (n,) or noise (n, C, H, W). Atomic. Raises OSError."""
    with replaced_file(shard_file(folder, shard)) as temporary:
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, temporary)


def missing_shards(folder: Path, index: StoreIndex) -> list[int]:
    """Numbers of the shards that are not there or cannot be read in full."""
    return [k for k in range(index.shards) if not _complete(shard_file(folder, k), len(index.rows(k)))]


def _complete(file: Path, rows: int) -> bool:
    try:
        with safe_open(file, framework="pt") as handle:
            return handle.get_slice("labels").get_shape() == [rows]
    except (OSError, SafetensorError):
        return False


class PairSet:
    """A complete store as a training set: images at t = 0, their noise at t = 1."""

    def __init__(self, folder: str | Path) -> None:
        """Raises DataError for a store that is missing, damaged or not complete."""
        self.folder = Path(folder)
        self.index = StoreIndex.read(self.folder)
        if missing := missing_shards(self.folder, self.index):
            raise DataError(
                f"{self.folder} lacks {len(missing)} of {self.index.shards} shards of pairs (first: {missing[0]}); "
                f"resume the generation that was to fill it"
            )
        self.class_names = self.index.class_names
        self._path: ModelPath = path_from_config(self.index.path)
        files = [shard_file(self.folder, k) for k in range(self.index.shards)]
        self._shards = [safe_open(file, framework="pt") for file in files]
        self.labels = torch.cat([shard.get_tensor("labels") for shard in self._shards])
        elements = self.index.count * math.prod(self.index.shape)
        self._images = self._whole("images") if 8 * elements <= MEMORY_LIMIT else None
        self._noise = None if self._images is None else self._all_noise()

    def __len__(self) -> int:
        return self.index.count

    @property
    def shape(self) -> tuple[int, int, int]:
        channels, height, width = self.index.shape
        return channels, height, width

    def samples(self, indices: Tensor, flips: Tensor, draws: Draws) -> Tensor:
        images = self._images[indices] if self._images is not None else self._rows("images", indices)
        return _mirror(images, flips)

    def sources(self, indices: Tensor, flips: Tensor, draws: Draws) -> Tensor:
        """The noise of each pair, mirrored with its image."""
        if self._noise is not None:
            return _mirror(self._noise[indices], flips)
        noise = self._seeded(self._rows("seeds", indices)) if self.index.seeded else self._rows("noise", indices)
        return _mirror(noise, flips)

    def _all_noise(self) -> Tensor:
        return self._seeded(self._whole("seeds")) if self.index.seeded else self._whole("noise")

    def _seeded(self, seeds: Tensor) -> Tensor:
        return torch.stack([seeded_noise(seed, -1, self.shape, self._path) for seed in seeds.tolist()])

    def _whole(self, name: str) -> Tensor:
        return torch.cat([shard.get_tensor(name) for shard in self._shards])

    def _rows(self, name: str, indices: Tensor) -> Tensor:
        size = self.index.shard_size
        return torch.stack([self._shards[i // size].get_slice(name)[i % size] for i in indices.tolist()])


class JoinedPairs:
    """Several pair sets one after the other: a teacher's pairs and inverted real images."""

    def __init__(self, parts: Sequence[PairSet]) -> None:
        """Raises DataError if they do not hold samples of one shape."""
        if len({part.shape for part in parts}) != 1:
            raise DataError(f"pairs of different shapes cannot be mixed: {sorted({part.shape for part in parts})}")
        self.parts = list(parts)
        self.labels = torch.cat([part.labels for part in parts])
        self.class_names = parts[0].class_names
        self._starts = torch.tensor([0, *(len(part) for part in parts)]).cumsum(0)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.parts[0].shape

    def samples(self, indices: Tensor, flips: Tensor, draws: Draws) -> Tensor:
        return self._gather("samples", indices, flips, draws)

    def sources(self, indices: Tensor, flips: Tensor, draws: Draws) -> Tensor:
        return self._gather("sources", indices, flips, draws)

    def _gather(self, name: str, indices: Tensor, flips: Tensor, draws: Draws) -> Tensor:
        out = torch.empty(len(indices), *self.shape)
        which = torch.searchsorted(self._starts[1:], indices, right=True)
        for k, part in enumerate(self.parts):
            rows = (which == k).nonzero()[:, 0]
            if len(rows):
                out[rows] = getattr(part, name)(indices[rows] - self._starts[k], flips[rows], draws)
        return out


class TwoSets:
    """Two data sets as the ends of a path (domain transfer): each sample with a random one of the other set.

    No Gaussian anywhere; labels are those of `data`. Which source a sample gets is drawn anew at every visit.
    """

    def __init__(self, data: TrainingSet, opposite: TrainingSet) -> None:
        """Raises DataError if samples have different shapes."""
        if tuple(data.shape) != tuple(opposite.shape):
            raise DataError(f"samples have shape {tuple(data.shape)}, the opposite set's {tuple(opposite.shape)}")
        self.data, self.opposite = data, opposite
        self.labels, self.class_names = data.labels, data.class_names

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.data.shape

    def samples(self, indices: Tensor, flips: Tensor, draws: Draws) -> Tensor:
        return self.data.samples(indices, flips, draws)

    def sources(self, indices: Tensor, flips: Tensor, draws: Draws) -> Tensor:
        def choice(n: int, generator: Generator) -> Tensor:
            return torch.randint(len(self.opposite.labels), (n,), generator=generator)

        return self.opposite.samples(draws.each(choice), flips, draws)
