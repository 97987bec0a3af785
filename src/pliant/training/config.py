"""The typed configuration tree of a training run, loaded from YAML; unknown keys are refused.

config = load_config("configs/digits.yaml", ["steps=200", "optimizer.lr=3e-4"])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from pliant.training.flow_config import FlowMatchingConfig as FlowMatchingConfig
from pliant.training.model_config import ModelConfig as ModelConfig
from pliant.training.objective_config import AnySizeConfig as AnySizeConfig
from pliant.training.objective_config import ObjectiveConfig as ObjectiveConfig
from pliant.training.parsing import parse_section as parse_section
from pliant.training.parsing import read_tree as read_tree
from pliant.training.run_config import CheckpointConfig as CheckpointConfig
from pliant.training.run_config import DataConfig as DataConfig
from pliant.training.run_config import EMAConfig as EMAConfig
from pliant.training.run_config import OptimizerConfig as OptimizerConfig
from pliant.training.run_config import SamplingConfig as SamplingConfig
from pliant.training.section import Section


class TrainConfig(Section):
    """A training run. Two runs with equal configs give equal results."""

    model: ModelConfig
    path: str | dict[str, Any] | None = None
    """Of a new network: linear (default), vp-discrete (default for ddpm), vp, cosine, gvp."""
    prediction: str | None = None
    """Of a new network: velocity (default), epsilon (default for ddpm), sample, v_prediction, score."""
    network_time: dict[str, Any] | None = None
    """Of a new network: {scale, offset, reversed}; default 1000*t, or table entries on vp-discrete."""
    preconditioning: dict[str, Any] | None = None
    """Make a new network EDM's bare F: {kind: edm, sigma_data: 0.5}. It then predicts samples."""
    objective: ObjectiveConfig = FlowMatchingConfig()
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    steps: int = Field(ge=1)
    """Optimizer steps."""
    batch_size: int | None = Field(default=None, ge=1)
    """Samples per optimizer step, over all processes and accumulation."""
    tokens: int | None = Field(default=None, ge=1)
    """Instead of batch_size, for samples of any size: most tokens per forward pass and process, at the finest patch."""
    accumulate: int = Field(default=1, ge=1)
    """Micro-batches per optimizer step and process."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast; weights, optimizer and EMA stay float32."""
    checkpointing: bool = False
    """Compute every block again in the backward pass instead of keeping its activations: less memory, more time."""
    compile: bool = False
    """Compile blocks at their first calls (`torch.compile`), which takes a minute or more."""
    seed: int = Field(default=0, ge=0)
    ema: EMAConfig = EMAConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    sampling: SamplingConfig = SamplingConfig()
    log_every: int = Field(default=50, ge=1)
    output: str
    """Folder of the run: checkpoints, metrics.jsonl, TensorBoard events, samples, and `model/` at the end."""
    resume: Literal["latest"] | None = None
    """latest: go on from the newest valid checkpoint in `output` (from the start if there is none)."""

    @model_validator(mode="after")
    def _batches(self) -> TrainConfig:
        any_size = isinstance(self.objective, AnySizeConfig)
        wanted, other = ("tokens", "batch_size") if any_size else ("batch_size", "tokens")
        if getattr(self, wanted) is None or getattr(self, other) is not None:
            raise ValueError(f"objective {self.objective.name!r} needs `{wanted}`, and not `{other}`")
        return self

    @model_validator(mode="after")
    def _model_fields(self) -> TrainConfig:
        if self.model.from_ is not None:
            for name in ("path", "prediction", "network_time", "preconditioning"):
                if getattr(self, name) is not None:
                    raise ValueError(f"`{name}` belongs to new networks; a model loaded with `from` brings its own")
        return self

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `parse_config` reads it back."""
        return self.model_dump(mode="json", by_alias=True)


def load_config(file: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a YAML file and apply `key.sub=value` overrides (values are YAML). Raises ConfigError."""
    return parse_config(read_tree(file, overrides))


def parse_config(tree: Mapping[str, Any]) -> TrainConfig:
    """A config from nested mappings. Raises ConfigError in one line."""
    return parse_section(TrainConfig, tree)
