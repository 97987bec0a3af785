"""`--size`: from what people mean, pixels of pictures, to the size of states."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from pliant.errors import ConfigError, ShapeError

if TYPE_CHECKING:
    from pliant.denoiser import Denoiser


def parse_size(text: str) -> tuple[int, ...]:
    """ "160x320" -> (160, 320), height first; one number per axis of the states. Raises ConfigError."""
    if not re.fullmatch(r"\d+(x\d+)*", text):
        raise ConfigError(f"cannot read the size {text!r}; write height and width, as in 160x320")
    return tuple(int(n) for n in text.split("x"))


def at_size(model: Denoiser, size: str | None, extrapolation: str | None, decoder: str | None) -> Denoiser:
    """The model of pictures of this size. With a decoder, size is in its pixels, which are so many per latent pixel.

    Raises ShapeError, with the nearest size that works.
    """
    if size is None and extrapolation is None:
        return model
    if size is None:
        return model.at_size(model.sample_size, extrapolation)
    wanted = parse_size(size)
    if decoder is None:
        return model.at_size(wanted, extrapolation)
    from pliant.models.autoencoders import downscale_factor, load_autoencoder

    factor = downscale_factor(load_autoencoder(decoder))
    own = model.patch_sizes
    unit = [factor * math.lcm(*(patch[axis] for patch in own)) for axis in range(len(own[0]))]
    if len(wanted) == len(unit) and any(n < u or n % u for n, u in zip(wanted, unit, strict=True)):
        nearest = "x".join(str(max(1, round(n / u)) * u) for n, u in zip(wanted, unit, strict=True))
        raise ShapeError(
            f"a picture of {size} does not divide into this model's patches: sides are multiples of "
            f"{'x'.join(map(str, unit))} (patch x autoencoder factor {factor}); the nearest is {nearest}"
        )
    return model.at_size(tuple(n // factor for n in wanted), extrapolation)
