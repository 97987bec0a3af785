"""What turns images into features, and the small extractors that ship with Pliant.

A distance is named after its extractor: "Fréchet distance (digits-classifier)". Only Inception's pool3 makes
an FID.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from pliant.errors import ConfigError, FormatError, ShapeError, suggest
from pliant.evaluation.images import from_uint8
from pliant.evaluation.networks import ConvClassifier, ConvClassifierConfig

ASSETS = Path(__file__).resolve().parents[1] / "assets" / "extractors"
INCEPTION = "inception-v3-pool3"
ENCODERS = {"dinov2": "facebook/dinov2-large", "clip": "openai/clip-vit-large-patch14-336"}
"""The networks that DINOv2 distances (Stein et al. 2023) and CMMD (Jayasumana et al. 2024) are quoted for."""
SPATIAL_CHANNELS = 7
"""Of sFID (Nash et al. 2021, arXiv 2103.03841), so that its features are about as many as the pooled ones."""


@runtime_checkable
class FeatureExtractor(Protocol):
    """Images to features. Everything a recipe needs to say about them is text on the object."""

    @property
    def name(self) -> str: ...

    @property
    def dim(self) -> int: ...

    @property
    def preprocessing(self) -> str:
        """What happens to an image first, e.g. "8-bit, bicubic antialiased to 32x32 unless that size"."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the weight file."""
        ...

    def __call__(self, images: Tensor) -> Tensor:
        """images: (B, C, H, W) float in [-1, 1] -> (B, dim) float32."""
        ...


@runtime_checkable
class Classifier(FeatureExtractor, Protocol):
    """An extractor that can also say which class a feature belongs to."""

    @property
    def num_classes(self) -> int: ...

    def logits(self, features: Tensor) -> Tensor:
        """features: (B, dim) -> class logits (B, num_classes)."""
        ...


@runtime_checkable
class SpatialExtractor(FeatureExtractor, Protocol):
    """An extractor that also gives features that still know where things are in the image."""

    @property
    def spatial_name(self) -> str:
        """Which ones, e.g. "mixed_6/conv, first 7 channels"."""
        ...

    def both(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images: (B, C, H, W) float in [-1, 1] -> (B, dim) features and (B, E) spatial features, from one pass."""
        ...


def fitted(images: Tensor, channels: int, size: tuple[int, int]) -> Tensor:
    """(B, C, H, W) -> (B, channels, *size): grey is repeated to RGB, RGB of three equal channels is taken as
    grey, and other sizes are resized (bicubic, antialiased).

    Raises ShapeError for anything else; colour is never thrown away.
    """
    x = images.float()
    if x.ndim == 4 and channels == 1 and x.shape[1] == 3 and bool((x == x[:, :1]).all()):
        x = x[:, :1].contiguous()  # the same memory as true grey, hence the same bits out
    if x.ndim != 4 or x.shape[1] not in (1, channels):
        raise ShapeError(f"expected images (B, {channels}, H, W), got {tuple(images.shape)}")
    if x.shape[2:] != size:
        x = F.interpolate(x, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)
    return x.expand(-1, channels, -1, -1)


class ClassifierExtractor:
    """A shipped `ConvClassifier`: float32, evaluation mode, never trained further."""

    def __init__(self, name: str, network: ConvClassifier, fingerprint: str, test_accuracy: float) -> None:
        self.name, self.fingerprint, self.test_accuracy = name, fingerprint, test_accuracy
        self.config = network.config
        self.dim, self.num_classes = network.config.widths[-1], network.config.num_classes
        h, w = network.config.input_size
        self.preprocessing = f"8-bit, bicubic antialiased to {h}x{w} unless that size"
        self.spatial_name = f"first stage at {h // 2}x{w // 2}, first {SPATIAL_CHANNELS} channels"
        self._network = network.eval().requires_grad_(False)

    def __call__(self, images: Tensor) -> Tensor:
        return self.both(images)[0]

    def both(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = fitted(images, self.config.in_channels, self.config.input_size)
        x = x.to(self._network.head.weight.device)
        with torch.inference_mode():
            maps = self._network.activations(x.contiguous(memory_format=torch.channels_last))
            return maps[-1].mean(dim=(2, 3)).clone(), maps[0][:, :SPATIAL_CHANNELS].flatten(1).clone()

    def logits(self, features: Tensor) -> Tensor:
        with torch.inference_mode():
            return self._network.head(features.to(self._network.head.weight.device)).clone()

    def classify(self, features: Tensor) -> Tensor:
        """features: (B, dim) -> most likely class (B,) int64."""
        return self.logits(features).argmax(1)

    def stages(self, images: Tensor) -> list[Tensor]:
        """Activations after every stage, each (B, C, h, w); differentiable with respect to the images."""
        return self._network.activations(fitted(images, self.config.in_channels, self.config.input_size))

    def to(self, device: str | torch.device) -> ClassifierExtractor:
        """Moves the network in place and returns self."""
        self._network.to(device)
        return self

    @classmethod
    def load(cls, folder: str | Path) -> ClassifierExtractor:
        """A folder with config.json and model.safetensors.  Raises FormatError for anything missing or
        damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        folder = Path(folder)
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            data = (folder / "model.safetensors").read_bytes()
            network = ConvClassifier(ConvClassifierConfig.from_dict(config["network"]))
            # The file is float16; load_state_dict copies into float32 parameters.
            network.load_state_dict(load(data))
            name, accuracy = str(config["name"]), float(config["test_accuracy"])
        except (
            OSError,
            json.JSONDecodeError,
            KeyError,
            TypeError,
            SafetensorError,
            RuntimeError,
            ConfigError,
        ) as e:
            raise FormatError(f"{folder} is not a readable feature extractor ({e}); reinstall or retrain it") from e
        return cls(name, network, hashlib.sha256(data).hexdigest(), accuracy)


def available_extractors() -> tuple[str, ...]:
    """Names that `get_extractor` knows."""
    shipped = [p.parent.name for p in ASSETS.glob("*/config.json")]
    return (*sorted(shipped), INCEPTION, *ENCODERS)


BUNDLED: dict[tuple[int, ...], str] = {(1, 8, 8): "digits-classifier", (3, 32, 32): "cifar10-classifier"}


def bundled_extractor(shape: Sequence[int]) -> str | None:
    """Name of the trained extractor in the package for images (C, H, W) of this shape; None where there is none."""
    return BUNDLED.get(tuple(shape))


@lru_cache(maxsize=4)
def get_extractor(name: str, device: str = "cpu") -> FeatureExtractor:
    """A shipped extractor, "inception-v3-pool3" (needs torch-fidelity), or a vision encoder of transformers: "dinov2",
    "clip", "hf:<Hub id>", or a folder with its config.json.

    Raises ConfigError for other names, PliantError for a missing package, FormatError for unusable files.
    """
    if name == INCEPTION:
        from pliant.evaluation.inception import InceptionPool3

        return InceptionPool3.load().to(device)
    if name in ENCODERS or name.startswith("hf:") or (Path(name) / "config.json").is_file():
        from pliant.evaluation.encoders import VisionEncoder

        return VisionEncoder.load(ENCODERS.get(name, name.removeprefix("hf:"))).to(device)
    if name not in available_extractors():
        known = suggest(name, available_extractors())
        raise ConfigError(f"unknown feature extractor {name!r}; {known} Others: hf:<Hub id>, or a folder")
    return ClassifierExtractor.load(ASSETS / name).to(device)


def distance_name(extractor: FeatureExtractor) -> str:
    """What the Fréchet distance in this space may be called."""
    kind = "FID" if extractor.name == INCEPTION else "Fréchet distance"
    return f"{kind} ({extractor.name})"


def extract(extractor: FeatureExtractor, batches: Iterable[Tensor]) -> Tensor:
    """uint8 batches (B, C, H, W) -> all features (N, dim) float32, on the CPU.  Raises ShapeError when there
    are none.
    """
    features = [extractor(from_uint8(b)).cpu() for b in batches]
    if not features:
        raise ShapeError("no images were given to the feature extractor")
    return torch.cat(features)
