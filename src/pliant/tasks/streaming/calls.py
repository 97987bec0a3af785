"""Network calls whose rows have different times: what a stream batch runs. Conditioning is computed ahead."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pliant.adapters.alignment import coarse
from pliant.compute import Compute
from pliant.denoiser import Denoiser
from pliant.models.patches import patch_pair
from pliant.plans.engine import Lowered
from pliant.tasks.streaming.levels import column


class RowCalls:
    """A batch whose row r is always called at `times[r]`, with `labels[r]` and `computes[r]`."""

    def __init__(
        self,
        model: Denoiser,
        lowered: Mapping[Compute, Lowered],
        times: Sequence[float],
        labels: Sequence[int],
        computes: Sequence[Compute],
    ) -> None:
        """lowered: the computes that occur, made ready once. Rows of one compute run as one call."""
        self.rows = len(times)
        self.groups: list[tuple[Tensor | None, _Group]] = []
        for compute in dict.fromkeys(computes):
            places = [r for r, c in enumerate(computes) if c == compute]
            group = _Group(model, lowered[compute], [times[r] for r in places], [labels[r] for r in places])
            whole = len(places) == self.rows
            self.groups.append((None if whole else torch.tensor(places, device=model.device), group))

    def __call__(self, x: Tensor) -> Tensor:
        """The denoiser's predictions for states x (rows, C, H, W), in x's dtype."""
        if len(self.groups) == 1:
            return self.groups[0][1](x)
        out = torch.empty_like(x)
        for places, group in self.groups:
            assert places is not None
            out[places] = group(x[places])
        return out


class _Group:
    """Rows of one compute."""

    def __init__(self, model: Denoiser, lowered: Lowered, times: Sequence[float], labels: Sequence[int]) -> None:
        self.model, self.compute = model, lowered.compute
        # A wrapped network (`through`) is run as it is; a plain one below its conditioning, which is known here.
        self.plain = lowered.plain if model.forward is None else None
        house = torch.tensor(times, dtype=torch.float64)
        aligned = model.align(self.compute, house)
        self.scale: Tensor | None = None
        if aligned is not None:
            house = aligned.time
            like = torch.zeros((), device=model.device)
            self.scale = column(aligned.input_scale, like)
            self.on_state, self.on_output = column(aligned.on_state, like), column(aligned.on_output, like)
            self.on_coarse = column(aligned.on_coarse, like)
        self.times = model.encode(house).float().to(model.device)
        self.labels = torch.tensor(labels, device=model.device)
        self.table = None if self.plain is None else self.plain.modulations(self.times, self.labels)

    def __call__(self, x: Tensor) -> Tensor:
        scaled = x if self.scale is None else x * self.scale
        if self.plain is not None and self.table is not None:
            raw = self.plain.forward_modulated(scaled, self.table)
        else:
            raw = self.model.run(scaled, self.times, self.labels, self.compute)
        value, _ = self.model.split(raw)
        value = value.to(x.dtype)
        if self.scale is None:
            return value
        value = self.on_state * x + self.on_output * value
        ratio = self.model.coarse_ratio(self.compute)
        return value if math.prod(ratio) == 1 else value + self.on_coarse * coarse(x, patch_pair(ratio))
