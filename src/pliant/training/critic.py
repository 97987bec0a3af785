"""A small discriminator of images, for the adversarial term of distillation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call


class Critic(nn.Module):
    """Convolutions that halve the image down to 4 pixels or less, then one number, with the class projected on it.

    (CTM uses the projected discriminators of StyleGAN-XL, on features of ImageNet networks; this one starts from
    nothing, needs no download and suits small images.)
    """

    def __init__(self, channels: int, classes: int, size: int, width: int = 32, seed: int = 0) -> None:
        """channels, size: of images (C, size, size); classes: of labels, one more for the null label."""
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.LeakyReLU(0.2)]
            while size > 4:
                layers += [nn.Conv2d(width, 2 * width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
                width, size = 2 * width, size // 2
            self.body = nn.Sequential(*layers, nn.Conv2d(width, width, 3, padding=1), nn.LeakyReLU(0.2))
            self.score = nn.Linear(width, 1)
            self.classes = nn.Embedding(classes + 1, width)
            nn.init.normal_(self.classes.weight, std=0.02)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """(B, C, H, W) and (B,) -> (B,): above 0 for images that look real."""
        features = self.body(images.float()).mean((2, 3))
        found: Tensor = self.score(features)[:, 0] + (features * self.classes(labels)).sum(1)
        return found

    def frozen(self, images: Tensor, labels: Tensor) -> Tensor:
        """The same with gradients for the images only: how the generator sees its critic."""
        own = {name: parameter.detach() for name, parameter in self.named_parameters()}
        found: Tensor = functional_call(self, own, (images, labels))
        return found

    def hinge(self, real: Tensor, fake: Tensor, labels: Tensor) -> Tensor:
        """The critic's own loss: real above 1, fake (detached here) below -1."""
        return F.relu(1.0 - self(real, labels)).mean() + F.relu(1.0 + self(fake.detach(), labels)).mean()
