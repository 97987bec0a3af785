"""The small convolutional classifiers whose penultimate features are Pliant's offline metric space.

They are deliberately ordinary: a residual network whose last hidden layer is a global average. Their features
order models of the same data set; they are not Inception, and no number computed with them is an FID.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from pliant.errors import ConfigError


@dataclass(frozen=True)
class ConvClassifierConfig:
    """Everything needed to rebuild the network of a shipped feature extractor.

    input_size: (H, W) in pixels; stem: channels at full resolution; widths: channels of each stage, the
    resolution halves before every stage; the feature has `widths[-1]` numbers.
    """

    input_size: tuple[int, int]
    in_channels: int
    stem: int
    widths: tuple[int, ...]
    num_classes: int

    def __post_init__(self) -> None:
        numbers = (*self.input_size, self.in_channels, self.stem, *self.widths, self.num_classes)
        if len(self.input_size) != 2 or not self.widths or not all(type(n) is int and n > 0 for n in numbers):
            raise ConfigError(f"a classifier needs positive integers for every size, got {asdict(self)}")

    def to_dict(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ConvClassifierConfig:
        """Raises ConfigError for missing or unknown keys."""
        try:
            arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
            return cls(**arguments)
        except TypeError as e:
            known = ", ".join(cls.__dataclass_fields__)
            raise ConfigError(f"classifier config does not fit ({e}); expected exactly the keys {known}") from e


class ConvNorm(nn.Sequential):
    """3x3 convolution, batch norm, ReLU."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__(nn.Conv2d(cin, cout, 3, padding=1, bias=False), nn.BatchNorm2d(cout), nn.ReLU(inplace=True))


class ResidualStage(nn.Module):
    """Widen, then add two convolutions to the result."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.widen = ConvNorm(cin, cout)
        self.residual = nn.Sequential(ConvNorm(cout, cout), ConvNorm(cout, cout))

    def forward(self, x: Tensor) -> Tensor:
        x = self.widen(x)
        return x + self.residual(x)


class ConvClassifier(nn.Module):
    """Images (B, C, H, W) in [-1, 1] -> class logits (B, num_classes); `features` gives the layer before."""

    def __init__(self, config: ConvClassifierConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = ConvNorm(config.in_channels, config.stem)
        sizes = (config.stem, *config.widths)
        self.stages = nn.ModuleList(ResidualStage(a, b) for a, b in pairwise(sizes))
        self.head = nn.Linear(config.widths[-1], config.num_classes)

    def features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) in [-1, 1] -> (B, widths[-1])."""
        return self.activations(x)[-1].mean(dim=(2, 3))

    def activations(self, x: Tensor) -> list[Tensor]:
        """What every stage gives: (B, widths[k], h, w), each half the size of the one before."""
        x, found = self.stem(x), []
        for stage in self.stages:
            x = stage(F.max_pool2d(x, 2))
            found.append(x)
        return found

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))
