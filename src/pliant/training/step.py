"""The forward half of a training step, and what one costs and holds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pliant.denoiser import Denoiser
from pliant.errors import ConfigError
from pliant.training.config import TrainConfig
from pliant.training.data import SizedSet
from pliant.training.draws import Draws
from pliant.training.objectives import Batch, Objective, SizedBatch


class StepModule(nn.Module):
    """The forward half of a step as one module, so that DDP sees every parameter that any objective uses."""

    objective: Objective

    def __init__(self, denoiser: Denoiser, companions: Sequence[nn.Module], bf16: bool) -> None:
        """`objective` is to be set before the first step."""
        super().__init__()
        self.network = denoiser.network
        self.companions = nn.ModuleList(companions)
        self._denoiser, self._bf16 = denoiser, bf16

    def forward(self, batch: Batch | SizedBatch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast(batch.labels.device.type, dtype=torch.bfloat16, enabled=self._bf16):
            result = self.objective(self._denoiser, batch, draws)
        return result.loss, dict(result.logs)


def mean_flops(objective: Objective, denoiser: Denoiser, data: SizedSet) -> float:
    """Expected FLOPs per training image, over the sizes of the data."""
    sizes, counts = data.sizes.unique(dim=0, return_counts=True)
    pairs = zip(sizes.tolist(), counts.tolist(), strict=True)
    total = sum(n * objective.flops(denoiser.at_size(size)) for size, n in pairs)
    return total / len(data.labels)


def micro_batch(config: TrainConfig, processes: int) -> int:
    """Samples per forward pass. Raises ConfigError if the global batch does not divide."""
    parts = processes * config.accumulate
    assert config.batch_size is not None  # the configuration was checked
    if config.batch_size % parts:
        raise ConfigError(
            f"batch_size {config.batch_size} does not divide over {processes} processes x {config.accumulate} "
            f"micro-batches; use a multiple of {parts}"
        )
    return config.batch_size // parts
