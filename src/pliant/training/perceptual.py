"""Perceptual distances to train with: LPIPS where a package for it is installed, features of our classifiers else.

Neither is free of the metric it is judged by: a model trained on features of a network does better on distances in that
network's features than it looks. Tables here say which network was trained on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pliant.errors import ConfigError, suggest
from pliant.training.losses import PerceptualDistance


@dataclass(eq=False)
class ClassifierFeatures:
    """LPIPS's formula without its learnt weights, on the stages of a shipped classifier.

    Activations of every stage are normalised over channels, and their squared difference is averaged over places and
    summed over stages. Not LPIPS: the name says which classifier.
    """

    extractor: str
    _network: Any = field(default=None, repr=False)

    @property
    def name(self) -> str:
        return f"features of {self.extractor}"

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        network = self._loaded(a.device)
        total = torch.zeros(a.shape[0], device=a.device)
        for one, other in zip(network.stages(a), network.stages(b), strict=True):
            total = total + (_unit(one) - _unit(other)).square().sum(1).mean(dim=(1, 2))
        return total

    def _loaded(self, device: torch.device) -> Any:
        if self._network is None:
            from pliant.evaluation.features import ClassifierExtractor, get_extractor

            network = get_extractor(self.extractor)
            if not isinstance(network, ClassifierExtractor):
                raise ConfigError(f"{self.extractor!r} has no stages to compare; use our classifiers, or 'lpips'")
            self._network = network
        return self._network.to(device)


def _unit(activations: Tensor) -> Tensor:
    return activations / (activations.square().sum(1, keepdim=True).sqrt() + 1e-10)


@dataclass(eq=False)
class LPIPS:
    """Learned perceptual distance (arXiv 1801.03924) of the package `lpips`, images resized to `size` first."""

    size: int = 224
    network: str = "vgg"
    _model: Any = field(default=None, repr=False)

    name = "LPIPS"

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        if self._model is None:
            try:
                import lpips
            except ImportError:
                raise ConfigError(
                    "the perceptual distance 'lpips' needs the package lpips: pip install lpips; or use the built-in "
                    "'classifier:digits-classifier' / 'classifier:cifar10-classifier'"
                ) from None
            self._model = lpips.LPIPS(net=self.network, verbose=False).eval().requires_grad_(False)
        self._model.to(a.device)
        found: Tensor = self._model(self._fitted(a), self._fitted(b))
        return found.flatten()

    def _fitted(self, images: Tensor) -> Tensor:
        images = images if images.shape[1] == 3 else images.expand(-1, 3, -1, -1)
        return F.interpolate(images, (self.size, self.size), mode="bilinear", align_corners=False)


def get_perceptual(name: str) -> PerceptualDistance:
    """ "lpips", or "classifier:NAME" for one of our extractors. Raises ConfigError."""
    if name == "lpips":
        return LPIPS()
    kind, _, extractor = name.partition(":")
    if kind != "classifier" or not extractor:
        raise ConfigError(f"unknown perceptual distance {name!r}: write 'lpips' or 'classifier:digits-classifier'")
    from pliant.evaluation.features import available_extractors

    if extractor not in available_extractors():
        raise ConfigError(f"unknown feature extractor {extractor!r}: {suggest(extractor, available_extractors())}")
    return ClassifierFeatures(extractor)
