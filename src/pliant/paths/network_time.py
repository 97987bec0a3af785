"""What a network calls time. Foreign conventions are translated here and nowhere else."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from pliant.errors import ConfigError


@dataclass(frozen=True)
class NetworkTime:
    """The affine map from house time (0 data, 1 noise) to a network's own: `scale*t + offset`, or of 1-t if reversed.

    A network whose time runs backwards also predicts velocities backwards: `sign` is what its velocity must be
    multiplied with to become dx/dt in house time.
    """

    scale: float = 1.0
    offset: float = 0.0
    reversed: bool = False

    def encode(self, t: Tensor) -> Tensor:
        """House time (any shape) as the network wants it."""
        s = 1.0 - t if self.reversed else t
        return self.scale * s + self.offset

    def decode(self, time: Tensor) -> Tensor:
        """Inverse of `encode`."""
        s = (time - self.offset) / self.scale
        return 1.0 - s if self.reversed else s

    @property
    def sign(self) -> float:
        return -1.0 if self.reversed else 1.0

    def to_config(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_config(config: dict[str, Any]) -> NetworkTime:
        try:
            return NetworkTime(**config)
        except TypeError as error:
            raise ConfigError(f"network_time takes scale, offset, reversed: {error}") from None

    @staticmethod
    def timesteps(count: int = 1000) -> NetworkTime:
        """DDPM's integers: table entry k = 0..count-1 lies at t = (k+1)/count."""
        return NetworkTime(scale=float(count), offset=-1.0)

    @staticmethod
    def sit() -> NetworkTime:
        """Official SiT: unit time with 0 = noise, 1 = data (sheet A, 4.1)."""
        return NetworkTime(reversed=True)
