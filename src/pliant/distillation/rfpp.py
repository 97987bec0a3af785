"""2-rectified flow++ (arXiv 2405.20320): one reflow done right. U-shaped times, a Huber loss (with a perceptual term
where the paper has LPIPS), and optionally real images inverted by the teacher.

The same stages as `reflow`; what differs are its settings. A diffusion teacher is taken as it is: `on_path: linear`
reads it as a velocity network of the linear path (the paper's EDM initialisation).
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from pliant.distillation.reflow import Reflow
from pliant.training.flow_config import MetricConfig


class RFPP(Reflow):
    """Reflow with the paper's choices as defaults."""

    time: str | dict[str, Any] = Field(default_factory=lambda: {"name": "u-shaped", "a": 4.0, "eps": 1e-5})
    metric: MetricConfig = MetricConfig(name="perceptual-huber", weight="1/t")
