"""A weak mode for any checkpoint, without training: the same network on a smaller grid (sheet H, section 0)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pliant.adapters.flexible_dit import FlexiDiT
from pliant.adapters.low_band import ScaleAlignment, coarse_network, low_alignment, read_back
from pliant.compute import MATMUL, Compute, Convention
from pliant.compute.bands import Band, down, up
from pliant.compute.scale import LowBand, Missing, Positions
from pliant.compute.spectra import Spectrum
from pliant.denoiser import Denoiser, Prediction
from pliant.errors import ConfigError
from pliant.models.dit import DiT
from pliant.paths import carried


@dataclass(frozen=True)
class LowBandDenoiser:
    """Answers like `base`, about the same full-size states, from network calls on the smaller grid."""

    base: Denoiser
    low: LowBand
    coarse: Denoiser = field(init=False)
    """The network on the smaller grid, sharing `base`'s weights, on its own path."""

    def __post_init__(self) -> None:
        base = self.base
        network = coarse_network(plain_network(base), self.low)
        object.__setattr__(self, "coarse", replace(base, network=network, forward=None))

    def __call__(self, x: Tensor, t: float | Tensor, cond: Tensor, compute: Compute | None = None) -> Prediction:
        """As `Denoiser.__call__`: x (B, C, H, W), house time, labels (B,). At ratio 1 it is `base`, bit for bit.

        Raises ConfigError for a compute that names another patch size.
        """
        if self.low.trivial:
            return self.base(x, t, cond, compute)
        compute = compute or Compute()
        if compute.patch not in (None, self.base.config.patch_size):
            raise ConfigError("a low-band call runs at the model's own patch size; choose a patch or a scale, not both")
        size, coarse = self.base.dit_config.input_size, self.coarse.dit_config.input_size
        self.base.dit_config.check_input(x)
        time = torch.as_tensor(t, dtype=torch.float64, device=x.device)
        a = self.alignment(time)
        px = down(x, coarse, self.low.band)
        scale = a.input_scale.to(x).reshape(-1, 1, 1, 1)
        raw = self.coarse.run(scale * px, self.coarse.encode(a.time), cond, replace(compute, patch=None))
        output, variance = self.coarse.split(raw)
        value = read_back(x, px, output, a, self.low.band)
        # The variance code is about single pixels: the block's own, whatever the band.
        variance = None if variance is None else up(variance, size, self.low.band)
        return Prediction(value, self.base.prediction, x, time, self.base.path, variance)

    def alignment(self, t: Tensor) -> ScaleAlignment:
        """How calls at house times t (any shape) on `base.path` are fed and read."""
        base, native, size = self.base, self.base.native, self.base.dit_config.input_size
        found = base.match(t)
        inner = low_alignment(
            self.low,
            native.path, native.prediction, t if found is None else found.time, size, base.preconditioning
        )
        if found is None:
            return inner
        p, q = carried(native.path, found.time, native.prediction, base.path, t, base.prediction)
        return inner.seen_from(found, p, q)

    def flops(self, convention: Convention = MATMUL) -> int:
        """FLOPs of one call for one image; a multiply-add counts 2. The change of grid itself is not counted."""
        return self.coarse.flops(None, convention)


def low_band(
    denoiser: Denoiser,
    ratio: float | Sequence[float] = 2,
    band: Band = "haar",
    missing: Missing = "hold",
    spectrum: Spectrum | None = None,
    positions: Positions = "own",
) -> LowBandDenoiser:
    """A training-free weak mode of a denoiser: `low_band(model)(x, t, labels)`. Options: the fields of `LowBand`.

    Raises ConfigError or ShapeError where the smaller grid does not exist or the model's patches do not fit on it.
    """
    return LowBandDenoiser(
        denoiser, LowBand.of(ratio, band=band, missing=missing, spectrum=spectrum, positions=positions)
    )


def plain_network(denoiser: Denoiser) -> DiT:
    """The denoiser's network at its own patch size as a plain DiT, without exits."""
    core = denoiser.dit
    return core.materialize() if isinstance(core, FlexiDiT) else core
