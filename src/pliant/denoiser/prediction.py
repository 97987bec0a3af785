"""What a network answers, and what it was trained to answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pliant.paths import Path, PredictionType, path_from_config, prediction_type


@dataclass
class Prediction:
    """One network call's answer, convertible to any prediction kind."""

    value: Tensor
    kind: PredictionType
    x: Tensor
    """The state it speaks about, (B, C, H, W)."""
    t: Tensor
    """House time, float64, (B,) or a scalar."""
    path: Path
    variance: Tensor | None = None
    """Variance code in about [-1, 1] of networks with learned sigma, (B, C, H, W)."""

    def to(self, kind: PredictionType) -> Tensor:
        """The prediction as another kind, (B, C, H, W)."""
        return self.path.convert(self.value, self.x, self.t, self.kind, kind)


@dataclass(frozen=True)
class Trained:
    """What a network was trained as, where that differs from what its denoiser is used as."""

    path: Path
    prediction: PredictionType

    def to_config(self) -> dict[str, Any]:
        return {"path": self.path.to_config(), "prediction": self.prediction}

    @staticmethod
    def from_config(config: dict[str, Any]) -> Trained:
        return Trained(path_from_config(config["path"]), prediction_type(config["prediction"]))
