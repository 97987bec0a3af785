"""Training: objectives, data, and one trainer on accelerate.

from pliant.training import load_config, train
result = train(load_config("configs/digits.yaml", ["steps=500"]))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pliant.training.config import TrainConfig, load_config, parse_config
    from pliant.training.trainer import TrainResult, train

__all__ = ["TrainConfig", "TrainResult", "load_config", "parse_config", "train"]


def __getattr__(name: str) -> Any:
    # accelerate and pydantic are heavy: they are imported when training is, not with the package.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pliant.training import config, trainer

    return getattr(trainer if name in ("train", "TrainResult") else config, name)
