"""Configuration of a run's data, optimizer, average, checkpoints and pictures."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pliant.training.section import Section


class DataConfig(Section):
    """Images and labels."""

    source: str
    """"digits", a folder (sub-folders are classes, or metadata.jsonl), a Parquet file or glob, a Hub set, or pairs."""
    split: str = "train"
    image_column: str = "image"
    label_column: str | None = "label"
    """null: no labels, everything is class 0."""
    flip: bool = False
    """Mirror half of the samples left-right."""
    limit: int | None = Field(default=None, ge=1)
    """Use only the first so many images."""
    side: int | None = Field(default=None, ge=1)
    """Of images of any size: those of more than side*side pixels are shrunk to that area."""
    crop: float = Field(default=0.0, ge=0, le=1)
    """Of images of any size: share of those larger than side x side that are cropped to it (FiTv2: 0.5)."""
    autoencoder: str | None = None
    """Folder or Hub id of a diffusers autoencoder: train on its latents instead of pixels."""
    latents: str | None = None
    """Folder that keeps the encoded latents; default: `latents/` in the output folder."""
    more_pairs: list[str] = Field(default_factory=list)
    """Further folders of pairs, if `source` is one: inverted real images."""
    opposite: str | None = None
    """A second data set (as `source`): its images, not noise, are the other end of the path (domain transfer)."""


class OptimizerConfig(Section):
    """AdamW and the learning rate's course."""

    lr: float = Field(default=1e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup: int = Field(default=0, ge=0)
    """Optimizer steps of linear warm-up."""
    decay: Literal["constant", "cosine", "linear", "refined"] = "constant"
    """refined: from the gradient norms that an earlier run recorded, `refine_from` (arXiv 2310.07831)."""
    record_norms: bool = False
    """Write every step's gradient norm (L1, for Adam) to `gradient-norms.jsonl` in the output folder."""
    refine_from: str | None = None
    """Folder of a run with recorded norms."""
    clip: float | None = Field(default=1.0, gt=0)
    """Largest gradient norm; null: no clipping."""

    @model_validator(mode="after")
    def _refined(self) -> OptimizerConfig:
        if (self.decay == "refined") != (self.refine_from is not None):
            raise ValueError("decay 'refined' and refine_from, the folder of an earlier run, belong together")
        if self.decay == "refined" and self.warmup:
            raise ValueError("a refined schedule has its own warm-up: leave out warmup")
        return self


class EMAConfig(Section):
    """Average of the weights that is exported and sampled from."""

    decay: float = Field(default=0.9999, ge=0, lt=1)
    warmup: bool = True
    """Use min(decay, (1+k)/(10+k)) at step k; false: the plain decay of the papers."""


class CheckpointConfig(Section):
    """Resumable states `checkpoint-000500/` in the output folder."""

    every: int = Field(default=1000, ge=1)
    """Optimizer steps between checkpoints; one is always written at the end."""
    keep: int = Field(default=2, ge=1)


class SamplingConfig(Section):
    """Sample grids during training."""

    every: int = Field(default=0, ge=0)
    """Optimizer steps between grids; 0: none."""
    steps: int = Field(default=25, ge=1)
    solver: str = "heun"
    guidance: float = Field(default=1.0, ge=0)
    columns: int = Field(default=10, ge=1)
    """Classes shown, one per column."""
    rows: int = Field(default=4, ge=1)
